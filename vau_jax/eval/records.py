"""Records of an evaluation: each completion is parsed here, once, and written as a line of predictions.jsonl."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vau_jax.common.files import InputError, dump_json, read_lines
from vau_jax.data.loading import Loaded
from vau_jax.tasks import TASKS, parsing, prompts, rewards
from vau_jax.tasks.columns import Columns
from vau_jax.tasks.example import Example
from vau_jax.tasks.parsing import Parsed
from vau_jax.tasks.record import Record

FORMAT = 2  # of lines; 1 had no number


def of_loaded(item: Loaded, completions: Sequence[str], style: str) -> Record:
    """The record of an example that was shown to a model, and its completions."""
    length = None if item.failure else item.seconds
    return make(item.example, completions, style, item.prompt, item.failure, length)


def make(
    example: Example,
    completions: Sequence[str],
    style: str,
    prompt: str = "",
    failure: str | None = None,
    seconds: float | None = None,
) -> Record:
    """The record of an example, with its choices in the order shown, and of its completions.

    `seconds` is the length of the decoded video, for annotations without one. With a `failure`, the text about the grey
    frames is no answer: completions are empty, and every score is 0.
    """
    task, meta = TASKS[example.task], example.meta
    texts = [""] * len(completions) if failure else list(completions)
    reflection = task.verifiable and style in prompts.WITH_DRAFT
    lenient, strict = (
        parsing.parse(texts, example.task, rule, style in prompts.WITH_DRAFT, [example.choices] * len(texts))
        for rule in ("lenient", "strict")
    )
    target = parsing.targets_of([example] * len(texts))
    scores, draft_scores, earned = jax.device_get(_score(lenient, strict, target))
    answers = [parsing.values_at(lenient.final, i, task) for i in range(len(texts))]
    drafts = [parsing.values_at(lenient.draft, i, task) for i in range(len(texts))] if reflection else []
    duration = meta.get("duration") or seconds
    return Record(
        example=example.id,
        task=example.task,
        video=example.video,
        source=meta.get("source", ""),
        rotation=example.rotation,
        question=prompts.question(example, "direct", "short"),
        prompt_hash=hashlib.sha256(prompt.encode()).hexdigest()[:16],
        choices=example.choices,
        truth=example.truth,
        target=task.target(example),
        anomaly_class=meta.get("anomaly_class"),
        duration=None if duration is None else round(duration, 3),
        key_object=meta.get("key_object", ""),
        reference=prompts.facts(example) if task.judged else "",
        failure=failure,
        completions=texts,
        format_ok=strict.format_ok.tolist(),
        answers=answers,
        predictions=[task.show(values, example.choices) for values in answers],
        scores=scores.tolist() if task.verifiable else [],
        drafts=drafts,
        draft_predictions=[task.show(values, example.choices) for values in drafts],
        draft_scores=draft_scores.tolist() if reflection else [],
        reflect_words=lenient.reflect_words.tolist() if reflection else [],
        rewards={name: values.tolist() for name, values in earned.items()},
    )


@jax.jit
def _score(lenient: Parsed, strict: Parsed, target: Columns) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Task scores of final answers and drafts, and all built-in rewards, each float32 [N]."""
    scores, draft_scores = (jnp.asarray(rewards.task_score(x, target)) for x in (lenient.final, lenient.draft))
    return scores, draft_scores, {name: reward(strict, target) for name, reward in rewards.REWARDS.items()}


def to_line(record: Record, fingerprint: str) -> str:
    """A line of predictions.jsonl."""
    return dump_json({"fingerprint": fingerprint, "format": FORMAT, **asdict(record)}) + "\n"


def of_line(line: str, fingerprint: str | None = None) -> Record | None:
    """The record of a line; None where the line is cut short, or not of this format or fingerprint."""
    try:
        raw = json.loads(line) if line.endswith("\n") else {}
    except (ValueError, RecursionError):
        raw = {}
    if not isinstance(raw, dict) or raw.pop("format", 1) != FORMAT:
        return None
    if raw.pop("fingerprint", None) != fingerprint and fingerprint is not None:
        return None
    if set(raw) != {field.name for field in fields(Record)} or not isinstance(raw["choices"], list):
        return None
    return Record(**{**raw, "choices": tuple(raw["choices"])})


def load(folder: Path) -> list[Record]:
    """The records of the evaluation in a folder, without those of rotated choices; none without a file."""
    path = folder / "predictions.jsonl"
    lines = read_lines(path) if path.is_file() else []
    records = [of_line(line) for line in lines]
    if None in records:
        raise InputError(f"{path} has a line that is not a record of format {FORMAT}: evaluate again")
    first = [record for record in records if not record.rotation]
    if repeated := [name for name, n in Counter(record.example for record in first).items() if n > 1]:
        raise InputError(f"{path} has {len(repeated)} ids more than once, {repeated[0]} first: evaluate again")
    return first


def answers_of(records: Sequence[Record], number: int = 0) -> Columns:
    """Answer `number` of each record as arrays [N, ...]."""
    return parsing.stack_answers([record.answers[number] for record in records])


def as_array(values: Sequence[float]) -> np.ndarray:
    """Stored numbers in float32, in which they were computed."""
    return np.asarray(values, np.float32)
