"""Reflection records for SFT: a first answer, a reflection on it, a revised reasoning, the answer.

    python -m data_prep.reflection --config=configs/reflection.py --workdir=DIR --config.data.csv=... \
        --config.data.videos=... [--config.student.checkpoint=RUN] [--config.teacher.url=... --config.teacher.model=...]

1. The student answers every question some times; without one, drafts are made by rule.
2. The teacher, told draft and truth, writes reflection and revision; without one, the annotation's words are used.
3. Every record is checked as training would read it; what is turned down is counted by reason.
4. A mix of wrong and right drafts, spread over tasks, sources and classes, goes to DIR/reflection.jsonl.

DIR also gets drafts.jsonl, answers.jsonl (of the teacher, each paid for once), rejected.jsonl, card.json. A killed call
goes on where it was. How SRVAU-R1 (arXiv 2602.01004) made its records is not published: this design is ours.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax import chat, cli, files, parsing, rewards, sampling
from vau_jax.chat import Chat, Message
from vau_jax.data import annotations, pipeline, prompts, video
from vau_jax.data.annotations import LABELS, Row
from vau_jax.data.decoders import VideoError
from vau_jax.data.pipeline import Example
from vau_jax.data.prompts import Reflection
from vau_jax.files import InputError
from vau_jax.metric_writer import Progress
from vau_jax.vlm import VideoLM, decode_text

DOUBT = re.compile(
    r"\b(wrong|incorrect|mistaken|mistake|error|inaccurate|overlook\w*|miss(?:ed|es)?|not|however|instead|contradict\w*|"
    r"fails?|should|rather|but|too (?:early|late|short|long))\b",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(wrong|incorrect|mistaken|mistake|inaccurate)\b", re.IGNORECASE)
LEAK = re.compile(
    r"ground[- ]truth|annotat\w+|(?:reference|provided|given) answer|(?:correct|true|right) answer (?:is|was) (?:given|"
    r"provided)|according to the (?:label|answer key)|answer key|i was told|as an ai\b",
    re.IGNORECASE,
)
COMMON = frozenset(  # longer words that say nothing about a video
    re.findall(
        r"\w+",
        """about above after again also another anomaly answer because been before being both could does during each
        event from have however into like more most normal only other over shows some such than that their them then
        there these they this those through under very video were what when where which while with within without
        would""",
    )
)


@dataclass(frozen=True)
class Draft:
    """A first answer: why, what (in the form of `Reflection.draft`), and its score."""

    think: str
    value: dict[str, Any]
    score: float  # in [0, 1], as training scores it


# --- 1. Drafts ----------------------------------------------------------------------------------------------------


def drafts_by_rule(example: Example, wrong_share: float, seed: int) -> list[Draft]:
    """One draft, wrong in `wrong_share` of cases, reasoned from what the annotation says of the place and the event."""
    row, task = example.row, example.task
    rng = np.random.default_rng([seed, *hashlib.sha256(example.name.encode()).digest()])
    wrong = rng.random() < wrong_share
    think = first_sentence(row.reasoning.get("Location") or row.description or "The video has been watched.")
    if task == "qa":
        value = {"choice": str(rng.choice([c for c in "ABCD" if c != row.answer])) if wrong else row.answer}
    elif task == "classification":
        value = {
            "label": str(rng.choice([k for k in LABELS if k != row.anomaly_class])) if wrong else row.anomaly_class
        }
    elif not wrong:
        value = {"interval": None if row.interval == "normal" else row.interval}
    else:
        value = {"interval": _other_interval(row, rng)}
    return [Draft(think, value, score(row, task, value))]


def _other_interval(row: Row, rng: np.random.Generator) -> tuple[float, float] | None:
    """An interval that overlaps the true one too little, or "no anomaly" for an abnormal video."""
    if row.interval == "normal":
        start = round(float(rng.uniform(0, 10)), 1)
        return start, round(start + float(rng.uniform(2, 8)), 1)
    start, end = row.interval
    length = end - start
    if rng.random() < 0.3:
        return None
    moved = start - 0.8 * length if start > 0.8 * length and rng.random() < 0.5 else start + 0.8 * length
    return round(moved, 1), round(moved + length, 1)


def drafts_by_student(config: ConfigDict, examples: list[Example]) -> Iterator[tuple[Example, list[Draft]]]:
    """The student's answers, config.student.samples to a question, its options in the row's own order."""
    s = config.student
    vlm = VideoLM.load(s.checkpoint, s.dtype)
    batches = pipeline.eval_batches(examples, vlm.processor, config.data, s.batch_size, config.seed, blind=False)
    key = jax.random.key(config.seed)
    for number, host in enumerate(batches):
        out = sampling.sample(
            vlm.variables,
            host.batch,
            jax.random.fold_in(key, number),
            s.temperature,
            model=vlm.model,
            num_generations=s.samples,
            max_new_tokens=config.data.max_completion_tokens,
            end_tokens=vlm.processor.end_tokens,
        )
        texts = decode_text(vlm.processor, np.asarray(out.tokens), np.asarray(out.mask))
        left = examples[number * s.batch_size : (number + 1) * s.batch_size]
        for item, example, found in zip(host.examples, left, texts, strict=False):
            answered = [] if item.failure else [read_draft(text, example) for text in found]
            yield example, [draft for draft in answered if draft]


def read_draft(text: str, example: Example) -> Draft | None:
    """A completion as a draft; None where no answer can be read."""
    row, task = example.row, example.task
    final = parsing.parse([text], task, "lenient").final
    if task == "qa" and final.choice[0] >= 0:
        value = {"choice": "ABCD"[final.choice[0]]}
    elif task == "classification" and final.label[0] >= 0:
        value = {"label": LABELS[final.label[0]]}
    elif task == "grounding" and final.kind[0] != parsing.UNKNOWN:
        found = final.kind[0] == parsing.INTERVAL
        value = {"interval": tuple(round(float(t), 1) for t in final.interval[0]) if found else None}
    else:
        return None
    think = parsing.loose_sections(text).get("think", "").strip()
    return Draft(parsing.TAG.sub("", think), value, score(row, task, value))


def score(row: Row, task: str, value: dict[str, Any]) -> float:
    """A draft's task score, by the parser and the reward of training."""
    answer = prompts.draft_answer(value, range(4))
    text = f"<think></think><draft>{answer}</draft><reflect></reflect><revise></revise><answer></answer><glue></glue>"
    parsed = parsing.parse([text], task, "lenient", reflection=True)
    target = parsing.targets([(task, row.answer, row.anomaly_class, row.interval)])
    return float(rewards.task_score(parsed.draft, target)[0])


def pick(drafts: Sequence[Draft], right_from: float, prefer_wrong: bool) -> Draft:
    """One of a question's drafts: a wrong one where one is preferred and there is one, else a right one."""
    fitting = [draft for draft in drafts if (draft.score < right_from) == prefer_wrong]
    return (fitting or list(drafts))[0]


# --- 2. Reflection ------------------------------------------------------------------------------------------------


def teacher_messages(example: Example, draft: Draft, right: bool, frames: np.ndarray | None) -> list[Message]:
    """The teacher's prompt: what is known of the video, the question, the draft, and whether it is right."""
    row, task = example.row, example.task
    asked = prompts.question(row, task, "direct", "short")
    drafted, truth = prompts.draft_answer(draft.value, range(4)), prompts.final_answer(row, task)
    if task == "grounding":
        truth = f"{truth} {prompts.format_interval(row.interval)}"
    system = (
        "You train a model of surveillance videos to check its own first answers. Write as that model, in the first "
        "person, as someone who has seen the video and nothing else. Never mention an annotation, a label, a hint or "
        "a known solution. Answer with a JSON object of two texts: reflect, which says in one to four sentences what "
        "in the video shows that the first answer is wrong, or confirms it with what can be seen; and revise, which "
        "reasons once more in one to five sentences towards the final answer without naming its letter or tags."
    )
    verdict = "The first answer is right." if right else f"The first answer is wrong; the right one is: {truth}"
    text = (
        f"What can be seen:\n{prompts.facts(row)}\n\nQuestion:\n{asked}\n\n"
        f"First reasoning:\n{draft.think or '(none)'}\n\nFirst answer: {drafted}\n{verdict}"
    )
    content = text if frames is None else [*chat.frames_content(frames), {"type": "text", "text": text}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def read_reply(text: str) -> tuple[str, str] | None:
    """(reflect, revise) of a teacher's JSON; None where it is something else."""
    found = chat.json_object(text) or {}
    reflect, revise = found.get("reflect"), found.get("revise")
    return (reflect.strip(), revise.strip()) if isinstance(reflect, str) and isinstance(revise, str) else None


def reflection_by_rule(example: Example, draft: Draft, right: bool) -> tuple[str, str]:
    """(reflect, revise) composed from the annotation's sections."""
    row = example.row
    evidence = first_sentence(row.reasoning.get("Key Evidence") or row.description or row.key_object)
    why = first_sentence(row.reasoning.get("Detailed Explanation") or row.description)
    end = first_sentence(row.reasoning.get("Conclusion") or row.description)
    said = _in_words(row, draft.value)
    if right:
        return f"I answered {said}. What can be seen agrees with it: {evidence}", f"{why} {end}"
    return f"I answered {said}, but that does not fit what can be seen: {evidence}", f"{why} {end}"


def _in_words(row: Row, value: dict[str, Any]) -> str:
    if "choice" in value:
        return f'"{row.options["ABCD".index(value["choice"])]}"'
    if "label" in value:
        return value["label"]
    return "that nothing is abnormal" if value["interval"] is None else "{:.1f} to {:.1f} s".format(*value["interval"])


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, tags taken out."""
    text = " ".join(parsing.TAG.sub("", text).split())
    match = re.match(r".+?[.!?](?=\s|$)", text)
    found = match[0] if match else text
    return found if found.endswith((".", "!", "?")) or not found else f"{found}."


# --- 3. Checks ----------------------------------------------------------------------------------------------------


def fault(example: Example, record: Reflection, keep: ConfigDict) -> str:
    """Why a record is not kept; empty where it is."""
    row, task = example.row, example.task
    low, high = keep.words
    for name in ("reflect", "revise"):
        text = getattr(record, name)
        if not low <= len(text.split()) <= high:
            return f"{name} has too few or too many words"
        if LEAK.search(text):
            return f"{name} gives away that the answer was known"
    if any(parsing.TAG.search(text) for text in (record.think, record.reflect, record.revise)):
        return "a text holds a tag"
    whole = "".join(span.text for span in prompts.completion(row, task, "reflection", record))
    parsed = parsing.parse([whole], task, "strict", reflection=True)
    target = parsing.targets([(task, row.answer, row.anomaly_class, row.interval)])
    if not parsed.form[0]:
        return "the completion breaks the grammar"
    if float(rewards.task_score(parsed.final, target)[0]) < 1.0 - 0.05 * (task == "grounding"):
        return "the final answer is not the truth"
    if record.draft_is_right and DENIAL.search(record.reflect):
        return "the reflection rejects a right draft"
    if not record.draft_is_right and not DOUBT.search(record.reflect):
        return "the reflection finds nothing wrong in a wrong draft"
    if not _words(record.reflect) & _words(f"{prompts.facts(row)} {row.key_object}"):
        return "the reflection names no evidence"
    return ""


def _words(text: str) -> set[str]:
    """Words that mean something, in lower case."""
    return {word for word in re.findall(r"[a-z]{4,}", text.lower())} - COMMON


class Likeness:
    """Tells texts that share most of their five-word runs with an earlier one."""

    def __init__(self, most: float) -> None:
        self.most, self.count = most, 0
        self.texts_with: defaultdict[int, list[int]] = defaultdict(list)

    def seen(self, text: str) -> bool:
        """Whether the text is like one before; one that is not is remembered."""
        words = re.findall(r"\w+", text.lower())
        runs = {hash(tuple(words[i : i + 5])) for i in range(max(1, len(words) - 4))}
        shared = Counter(number for run in runs for number in self.texts_with.get(run, ()))
        if shared and max(shared.values()) >= self.most * len(runs):
            return True
        for run in runs:
            self.texts_with[run].append(self.count)
        self.count += 1
        return False


# --- 4. Mix -------------------------------------------------------------------------------------------------------


def mix(records: list[tuple[Example, Reflection]], wrong_share: float, most: int, seed: int) -> list[int]:
    """Numbers of the records to keep: `wrong_share` of wrong drafts as nearly as there are enough of both kinds, taken
    from tasks, sources and classes in turn."""
    orders = {wrong: _in_turn(records, wrong, seed) for wrong in (True, False)}
    size = min(len(orders[True]) / wrong_share if wrong_share else np.inf, len(records))
    size = min(size, len(orders[False]) / (1 - wrong_share) if wrong_share < 1 else np.inf)
    size = int(min(size, most or np.inf))
    wrong = min(round(size * wrong_share), len(orders[True]))
    return sorted(orders[True][:wrong] + orders[False][: size - wrong])


def _in_turn(records: list[tuple[Example, Reflection]], wrong: bool, seed: int) -> list[int]:
    """Numbers of the records with wrong (or right) drafts, one of each group after the other."""
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for number in np.random.default_rng(seed).permutation(len(records)):
        example, record = records[number]
        if record.draft_is_right != wrong:
            row = example.row
            groups[example.task, row.source, row.anomaly_class or ""].append(int(number))
    ranked = [(rank, name, number) for name, members in groups.items() for rank, number in enumerate(members)]
    return [number for _, _, number in sorted(ranked)]


# --- The whole ----------------------------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Builds the records in `workdir` and returns the card."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config = config.copy_and_resolve_references()
    config.data.shuffle_options, config.data.reflection = False, ""
    if unfit := [task for task in config.data.tasks if task not in parsing.VERIFIABLE]:
        raise InputError(
            f"data.tasks has {unfit[0]}: reflection needs tasks with an answer to check, expected some of "
            f"{', '.join(parsing.VERIFIABLE)}"
        )
    examples = _examples(config)
    drafted = _drafts(config, workdir, examples)
    chosen = [(e, _choose(config, e, drafts)) for e, drafts in drafted if drafts]
    if config.dry_run:
        for example, draft in chosen[: config.dry_run]:
            messages = teacher_messages(example, draft, _right(config, example, draft), None)
            print("\n".join(f"--- {m['role']}\n{m['content']}" for m in messages), flush=True)
        return {}
    written, teacher = _reflections(config, workdir, chosen)
    accepted, rejected = [], Counter()
    likeness, reasons = {task: Likeness(config.keep.likeness) for task in parsing.VERIFIABLE}, []
    for (example, draft), (texts, error) in zip(chosen, written, strict=True):
        reason, record = error, None
        if texts:
            record = Reflection(draft.think, draft.value, _right(config, example, draft), *texts)
            reason = fault(example, record, config.keep)
        if not reason and likeness[example.task].seen(f"{record.reflect} {record.revise}"):
            reason = "nearly the same as an earlier one"
        if reason:
            rejected[reason.split(":")[0]] += 1
            reasons.append({"example": example.name, "reason": reason})
        else:
            accepted.append((example, record))
    kept = [accepted[i] for i in mix(accepted, config.keep.wrong_share, config.keep.most, config.seed)]
    files.write_text(workdir / "reflection.jsonl", "".join(json.dumps(_record(e, r)) + "\n" for e, r in kept))
    files.write_text(workdir / "rejected.jsonl", "".join(json.dumps(r) + "\n" for r in reasons))
    card = _card(config, len(examples), len(chosen), len(accepted), rejected, kept, teacher)
    files.write_text(workdir / "card.json", json.dumps(card, indent=1))
    print(json.dumps(card, indent=1), flush=True)
    return card


def _examples(config: ConfigDict) -> list[Example]:
    """All usable questions; without a folder of videos, of the annotations alone, for those that need no video."""
    if config.data.videos:
        examples, audit = pipeline.load_examples(config.data)
    elif config.student.checkpoint or config.teacher.frames:
        raise InputError("a student, and a teacher with frames, must see the videos: set config.data.videos")
    else:
        rows, audit = annotations.load(config.data.csv, config.data.source, config.data.protocol)
        examples = [
            Example(row, task, Path(row.video)) for row in rows for task in config.data.tasks if task in row.tasks
        ]
        examples = examples[: config.data.max_examples or None]
    print(audit.table(), flush=True)
    return examples


def _right(config: ConfigDict, example: Example, draft: Draft) -> bool:
    return draft.score >= _right_from(config, example)


def _right_from(config: ConfigDict, example: Example) -> float:
    """The score from which a draft counts as right."""
    return config.keep.tiou if example.task == "grounding" else 1.0


def _choose(config: ConfigDict, example: Example, drafts: list[Draft]) -> Draft:
    """A wrong draft in about keep.wrong_share of the questions that have both kinds."""
    rng = np.random.default_rng([config.seed, 1, *hashlib.sha256(example.name.encode()).digest()])
    return pick(drafts, _right_from(config, example), bool(rng.random() < config.keep.wrong_share))


def _drafts(config: ConfigDict, workdir: Path, examples: list[Example]) -> list[tuple[Example, list[Draft]]]:
    """Drafts of every example, from drafts.jsonl as far as they are there from the same settings."""
    if not config.student.checkpoint:
        return [(e, drafts_by_rule(e, config.keep.wrong_share, config.seed)) for e in examples]
    path = workdir / "drafts.jsonl"
    settings = hashlib.sha256(f"{config.student}{config.data}{config.seed}".encode()).hexdigest()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    known = {r["example"]: [Draft(**d) for d in r["drafts"]] for r in whole if r["settings"] == settings}
    todo = [example for example in examples if example.name not in known]
    progress = Progress("drafts", len(examples), start=len(known))
    files.write_text(path, "".join(json.dumps(r) + "\n" for r in whole if r["settings"] == settings))
    with path.open("a", encoding="utf-8") as file:
        for example, drafts in drafts_by_student(config, todo) if todo else ():
            known[example.name] = drafts
            record = {"settings": settings, "example": example.name, "drafts": [asdict(d) for d in drafts]}
            file.write(json.dumps(record) + "\n")
            file.flush()
            progress.show(len(known))
    return [(example, known[example.name]) for example in examples]


Written = tuple[tuple[str, str] | None, str]  # texts, or why there are none


def _reflections(
    config: ConfigDict, workdir: Path, chosen: list[tuple[Example, Draft]]
) -> tuple[list[Written], dict[str, Any]]:
    """(reflect, revise) for every chosen draft, and what the card says of the teacher."""
    if not config.teacher.url:
        texts = [reflection_by_rule(e, d, _right(config, e, d)) for e, d in chosen]
        return [(text, "") for text in texts], {"kind": "rules: composed from the annotation, no model"}
    teacher = Chat(config.teacher, workdir / "answers.jsonl")
    written: list[Written] = [(None, "")] * len(chosen)
    questions, numbers = [], []
    for number, (example, draft) in enumerate(chosen):
        try:
            frames = _frames(example, config.teacher.frames)
        except VideoError as error:
            written[number] = (None, f"the video cannot be read: {error}")
            continue
        questions.append(teacher_messages(example, draft, _right(config, example, draft), frames))
        numbers.append(number)
    progress = Progress("teacher", len(questions))

    def check(text: str) -> str:
        return "" if read_reply(text) else "the teacher's answer is no JSON with reflect and revise"

    for done, (index, reply) in enumerate(teacher.ask_all(questions, check), start=1):
        error = f"the teacher did not answer: {reply.error}" if reply.error else ""
        written[numbers[index]] = (None if error else read_reply(reply.text), error)
        progress.show(done, f"{sum(teacher.tokens.values())} tokens, cost {teacher.cost:.2f}")
    template = json.dumps(teacher_messages(*_blank(), None))
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
    """An example without words, so that the prompt around it can be told from others."""
    row = Row("", "msad", "", ("",) * 4, "A", None, None, "", "", {})
    return Example(row, "qa", Path()), Draft("", {"choice": "B"}, 0.0), False


def _frames(example: Example, count: int) -> np.ndarray | None:
    """Pictures for the teacher, none for `count` 0."""
    if not count:
        return None
    options = video.VideoOptions(nframes=count, min_pixels=64 * 64, max_pixels=512 * 512)
    return video.read(example.path, options, factor=2, multiple=1).frames


def _record(example: Example, record: Reflection) -> dict[str, Any]:
    return {"video": example.row.video, "task": example.task, **asdict(record)}


def _card(
    config: ConfigDict,
    asked: int,
    drafted: int,
    accepted: int,
    rejected: Counter[str],
    kept: list[tuple[Example, Reflection]],
    teacher: dict[str, Any],
) -> dict[str, Any]:
    """What the records are and where they come from."""

    def lengths(name: str) -> dict[str, float]:
        words = [len(getattr(record, name).split()) for _, record in kept] or [0]
        return {"least": min(words), "mean": round(float(np.mean(words)), 1), "most": max(words)}

    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(Counter(values).most_common())

    return {
        "questions": asked,
        "with_a_draft": drafted,
        "accepted": accepted,
        "acceptance": round(accepted / drafted, 4) if drafted else 0.0,
        "rejected": dict(rejected.most_common()),
        "records": len(kept),
        "wrong_drafts": sum(not record.draft_is_right for _, record in kept),
        "tasks": count(example.task for example, _ in kept),
        "sources": count(example.row.source for example, _ in kept),
        "classes": count(example.row.anomaly_class or "none" for example, _ in kept),
        "words": {name: lengths(name) for name in ("think", "reflect", "revise")},
        "student": config.student.checkpoint or "rules: drafts made from the annotation, no model",
        "teacher": teacher,
        "annotations": str(config.data.csv),
        "seed": config.seed,
    }


if __name__ == "__main__":
    cli.main(run)
