"""The teacher, which reflects on a first answer: a model behind an endpoint, given draft and truth, or rules."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vau_jax.common.chat import Chat, Message, json_object
from vau_jax.common.files import dump_json
from vau_jax.common.progress import Progress
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.data_prep.drafts import Draft, first_sentence, pictures
from vau_jax.tasks import TASKS, grammar, prompts
from vau_jax.tasks.example import Example

Written = tuple[tuple[str, str] | None, str]  # texts, or why there are none


def reflect(
    config: ConfigDict, workdir: Path, chosen: list[tuple[Example, Draft, bool]]
) -> tuple[list[Written], dict[str, Any]]:
    """(reflect, revise) for every draft (with its example, and whether it is right), and what the card says of the
    teacher. Its answers are kept in answers.jsonl, so that none is paid for twice."""
    if not config.teacher.url:
        return [(by_rule(*one), "") for one in chosen], {"kind": "rules: composed from the annotation, no model"}
    teacher = Chat(config.teacher, workdir / "answers.jsonl")
    pool = DecoderPool(1, config.data.video_seconds)
    written: list[Written] = [(None, "")] * len(chosen)
    numbers: list[int] = []

    def questions() -> Iterator[list[Message]]:
        for number, (example, draft, right) in enumerate(chosen):
            try:
                shown = pictures(example, config.teacher.frames, pool)
            except VideoError as error:
                written[number] = (None, f"the video cannot be read: {error}")
                continue
            numbers.append(number)
            yield messages(example, draft, right, shown)

    progress = Progress("teacher", len(chosen), "record")
    for done, (index, reply) in enumerate(teacher.ask_all(questions(), _complaint), start=1):
        error = f"the teacher did not answer: {reply.error}" if reply.error else ""
        written[numbers[index]] = (None if error else read_reply(reply.text), error)
        progress.show(done, f"{teacher.tokens.total()} tokens, cost {teacher.cost:.2f}")
    pool.close()
    template = dump_json(messages(*_blank(), []))
    card = {
        "kind": "model",
        "url": config.teacher.url,
        "model": config.teacher.model,
        "temperature": config.teacher.temperature,
        "prompt_hash": hashlib.sha256(template.encode()).hexdigest()[:16],
        "tokens_this_call": dict(teacher.tokens),
        "cost_this_call": teacher.cost,
    }
    return written, card


def _blank() -> tuple[Example, Draft, bool]:
    """An example without text, so that the prompt around it can be hashed."""
    return Example("", "qa", (), "", ("",) * 4, {"choice": 0}), Draft("", {"choice": "B"}, 0.0), False


def messages(example: Example, draft: Draft, right: bool, shown: list[Message]) -> list[Message]:
    """The teacher's prompt: what is known of the video, the question, the draft, and whether it is right;
    after the pictures `shown`."""
    task = TASKS[example.task]
    asked = prompts.question(example, "direct", "short")
    drafted = task.draft_text(draft.value, example)
    truth = " ".join(grammar.TAG.sub(" ", task.answer(example) + task.closing(example)).split())
    system = (
        "You train a model of surveillance videos to check its own first answers. Write as that model, in the first "
        "person, as someone who has seen the video and nothing else. Never mention an annotation, a label, a hint or "
        "a known solution. Answer with a JSON object of two texts: reflect, which says in one to four sentences what "
        "in the video shows that the first answer is wrong, or confirms it with what can be seen; and revise, which "
        "reasons once more in one to five sentences towards the final answer without naming its letter or tags."
    )
    verdict = "The first answer is right." if right else f"The first answer is wrong; the right one is: {truth}"
    text = (
        f"What can be seen:\n{prompts.facts(example)}\n\nQuestion:\n{asked}\n\n"
        f"First reasoning:\n{draft.think or '(none)'}\n\nFirst answer: {drafted}\n{verdict}"
    )
    content = [*shown, {"type": "text", "text": text}] if shown else text
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def read_reply(text: str) -> tuple[str, str] | None:
    """(reflect, revise) of a teacher's JSON; None where it is something else."""
    result = json_object(text) or {}
    reflect, revise = result.get("reflect"), result.get("revise")
    return (reflect.strip(), revise.strip()) if isinstance(reflect, str) and isinstance(revise, str) else None


def _complaint(answer: str) -> str:
    return "" if read_reply(answer) else "the teacher's answer is not JSON with reflect and revise"


def by_rule(example: Example, draft: Draft, right: bool) -> tuple[str, str]:
    """(reflect, revise) composed from the annotation's sections."""
    reasoning, description = example.meta.get("reasoning", {}), example.meta.get("description", "")
    evidence = first_sentence(reasoning.get("Key Evidence") or description or example.meta.get("key_object", ""))
    why = first_sentence(reasoning.get("Detailed Explanation") or description)
    end = first_sentence(reasoning.get("Conclusion") or description)
    answered = TASKS[example.task].draft_prose(draft.value, example)
    if right:
        return f"I answered {answered}. What can be seen agrees with it: {evidence}", f"{why} {end}"
    return f"I answered {answered}, but that does not fit what can be seen: {evidence}", f"{why} {end}"
