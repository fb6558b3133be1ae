"""First answers for reflection records: by a model of ours, by a model behind an endpoint, or by rule."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import compiled, files, processes, sharding
from vau_jax.common.chat import Chat, Message, Reply, frames_content
from vau_jax.common.files import Lines, dump_json
from vau_jax.common.heartbeat import monitored
from vau_jax.common.progress import Progress
from vau_jax.data import loading, pipeline
from vau_jax.data.video import clips
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.datasets import tables
from vau_jax.rl import sampling
from vau_jax.tasks import TASKS, grammar, parsing, prompts, rewards
from vau_jax.tasks.example import Example
from vau_jax.vlm import VideoLM


@dataclass(frozen=True)
class Draft:
    """A first answer: its reasoning, the answer (in the format of `Reflection.draft`), and its score."""

    think: str
    value: dict[str, Any]
    score: float  # in [0, 1], as training scores it


DRAFTS = "drafts.jsonl"
Drafted = tuple[Example, list[Draft], str]  # and, where there are no drafts, why


def make(config: ConfigDict, workdir: Path, examples: list[Example]) -> list[Drafted]:
    """Drafts of every example; a student's are kept in drafts.jsonl and sampled once for the same settings.

    Of several processes each samples from a student of ours for its share of the videos; the first gets all drafts, the
    others none. A student behind an endpoint is asked by the first.
    """
    student = config.student
    if not (student.checkpoint or student.url):
        return [(e, by_rule(e, config.keep.wrong_share, config.seed), "") for e in examples]
    settings = hashlib.sha256(f"{student}{config.data}{config.seed}".encode()).hexdigest()
    known: dict[str, dict[str, Any]] = {}
    with monitored(workdir, "the same command goes on with the drafts that are there") as beat:
        processes.together(lambda: known.update(_asked(config, workdir, examples, settings, beat)))
    if not processes.is_first():
        return []
    path = workdir / DRAFTS
    parts = processes.other_lines(path)
    for part in parts:
        known |= _read_drafts(part, settings)
    if parts:
        order = {example.id: i for i, example in enumerate(examples)}
        kept = sorted(known.values(), key=lambda record: order.get(record["example"], -1))
        files.write_text(path, "".join(dump_json(record) + "\n" for record in kept))
    for part in parts:
        part.unlink()
    results = [known[example.id] for example in examples]
    return [(e, [Draft(**d) for d in r["drafts"]], r["reason"]) for e, r in zip(examples, results, strict=True)]


def _read_drafts(path: Path, settings: str) -> dict[str, dict[str, Any]]:
    """The complete records of a file that were made with the same settings, by example."""
    whole = [line for line in files.read_lines(path) if line.endswith("\n")] if path.exists() else []
    records = [record for _, record in tables.json_lines(path, "".join(whole))]
    return {record["example"]: record for record in records if record.get("settings") == settings}


def _asked(
    config: ConfigDict, workdir: Path, examples: list[Example], settings: str, beat: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """This process's share of the records, and those of an earlier call; `beat` is told how many there are."""
    path = processes.own_lines(workdir / DRAFTS)
    known = _read_drafts(path, settings)
    own = examples if processes.is_first() else []
    if config.student.checkpoint:
        own = pipeline.share(examples, jax.process_index(), jax.process_count())
    todo = [example for example in own if example.id not in known]
    progress = Progress("drafts", len(own), "example", start=len(own) - len(todo))
    files.write_text(path, "".join(dump_json(record) + "\n" for record in known.values()))
    done = failed = 0
    asked = (by_model if config.student.checkpoint else by_endpoint)(config, workdir, todo) if todo else ()
    with closing(Lines(path)) as file:
        for example, drafts, reason in asked:
            record = {"settings": settings, "example": example.id, "drafts": [asdict(d) for d in drafts]}
            known[example.id] = record | {"reason": reason}
            if not reason.startswith(UNANSWERED):  # such a question is asked again by the next call
                file.write([dump_json(known[example.id]) + "\n"])
                file.save(every=60)
            done, failed = done + 1, failed + (not drafts)
            beat(done)
            if processes.is_first():
                progress.show(len(own) - len(todo) + done, f"without a draft {failed}")
    return known


# --- A student ----------------------------------------------------------------------------------------------------

UNANSWERED = "the student did not answer"


def by_model(config: ConfigDict, workdir: Path, examples: list[Example]) -> Iterator[Drafted]:
    """The answers of config.student.checkpoint, student.samples to a question, its options in the row's own order."""
    s = config.student
    compiled.use(config.compilation_cache, workdir)
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    sharding.check_divisible(s.batch_size, mesh)
    vlm = VideoLM.load(s.checkpoint, s.dtype, mesh)
    loader = loading.make_loader(vlm.processor, config.data, augment=False)
    batches = pipeline.eval_batches(pipeline.Prompts(examples, loader), s.batch_size, config.seed)
    for number, host in enumerate(batches):
        out = sampling.sample(
            vlm.variables,
            jax.device_put(host.batch, sharding.examples(mesh)),
            pipeline.sampling_keys(host.examples, config.seed),
            s.temperature,
            model=vlm.model,
            num_generations=s.samples,
            max_new_tokens=config.data.max_completion_tokens,
            end_tokens=vlm.processor.end_tokens,
        )
        texts = vlm.processor.decode_completions(np.asarray(out.tokens), np.asarray(out.mask))
        left = examples[number * s.batch_size : (number + 1) * s.batch_size]
        for item, example, result in zip(host.examples, left, texts, strict=False):
            yield _read(example, [] if item.failure else result, f"the video cannot be read: {item.failure}")


def by_endpoint(config: ConfigDict, workdir: Path, examples: list[Example]) -> Iterator[Drafted]:
    """The answers of the model behind config.student.url, student.samples to a question; texts are kept in
    student.jsonl, so that none is paid for twice."""
    s, templates = config.student, prompts.load_templates(config.data.templates)
    student = Chat(s, workdir / "student.jsonl")
    pool = DecoderPool(1, config.data.video_seconds)
    asked: list[Example] = []
    unread: list[Drafted] = []

    def questions() -> Iterator[list[Message]]:
        for example in examples:
            try:
                shown = pictures(example, s.frames, pool)
            except VideoError as error:
                unread.append((example, [], f"the video cannot be read: {error}"))
                continue
            asked.append(example)
            text = prompts.question(example, config.data.style, config.data.wording, templates)
            yield [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]

    replies: defaultdict[int, list[Reply]] = defaultdict(list)
    for number, reply in student.ask_all(questions(), samples=s.samples):
        replies[number].append(reply)
        if len(replies[number]) == s.samples:
            result = replies.pop(number)
            texts = [reply.text for reply in result if not reply.error]
            yield _read(asked[number], texts, f"{UNANSWERED}: {result[-1].error}")
    pool.close()
    yield from unread


def _read(example: Example, texts: Sequence[str], reason: str) -> Drafted:
    """The drafts in a student's texts; `reason` explains missing texts."""
    drafts = [draft for text in texts if (draft := read(text, example))]
    return example, drafts, "" if drafts else "no answer in the student's texts" if texts else reason


def pictures(example: Example, count: int, pool: DecoderPool) -> list[Message]:
    """`count` frames of a video, decoded by `pool`, as content of a message, and their times; nothing for 0. Raises
    VideoError.
    """
    if not count or not example.media:
        return []
    options = clips.VideoOptions(nframes=count, min_pixels=64 * 64, max_pixels=512 * 512)
    clip = pool.read(example.media[0], options, factor=2, multiple=1)
    times = ", ".join(f"{time:.1f}" for time in clip.times)
    return [
        *frames_content(clip.frames),
        {"type": "text", "text": f"The pictures are frames of one video, taken at {times} s."},
    ]


def read(text: str, example: Example) -> Draft | None:
    """A completion as a draft; None where no answer can be read."""
    final = parsing.parse([text], example.task, "lenient", choices=[example.choices]).final
    value = TASKS[example.task].draft_of(final, 0, example)
    if value is None:
        return None
    think = grammar.loose_sections(text).get("think", "").strip()
    return Draft(grammar.prose(think), value, score(example, value))


# --- By rule ------------------------------------------------------------------------------------------------------


def by_rule(example: Example, wrong_share: float, seed: int) -> list[Draft]:
    """One draft, wrong in `wrong_share` of cases, with reasoning from the annotation's place and event."""
    task, meta = TASKS[example.task], example.meta
    rng = np.random.default_rng([seed, *hashlib.sha256(example.id.encode()).digest()])
    wrong = rng.random() < wrong_share
    location = meta.get("reasoning", {}).get("Location")
    think = first_sentence(location or meta.get("description") or "The video has been watched.")
    value = task.wrong_draft(example, rng) if wrong else task.true_draft(example)
    return [Draft(think, value, score(example, value))]


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, tags taken out."""
    text = " ".join(grammar.prose(text).split())
    match = re.match(r".+?[.!?](?=\s|$)", text)
    result = match[0] if match else text
    return result if result.endswith((".", "!", "?")) or not result else f"{result}."


# --- Scores -------------------------------------------------------------------------------------------------------


def score(example: Example, value: Mapping[str, Any]) -> float:
    """A draft's task score, by the parser and the reward of training."""
    answer = TASKS[example.task].draft_text(value, example)
    text = f"<think></think><draft>{answer}</draft><reflect></reflect><revise></revise><answer></answer><glue></glue>"
    parsed = parsing.parse([text], example.task, "lenient", reflection=True, choices=[example.choices])
    target = parsing.targets_of([example])
    return float(rewards.task_score(parsed.draft, target)[0])


def pick(drafts: Sequence[Draft], right_from: float, prefer_wrong: bool) -> Draft:
    """One of a question's drafts: a wrong one if preferred and available, else a right one."""
    fitting = [draft for draft in drafts if (draft.score < right_from) == prefer_wrong]
    return (fitting or list(drafts))[0]
