"""An evaluated example: the content of a line of predictions.jsonl, from which tasks compute metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vau_jax.tasks.columns import Values


@dataclass(frozen=True)
class Record:
    """One example with the model's completions, each of them parsed once. Lists have one entry for each completion.

    Where the video could not be read, completions are empty texts and every score is 0.
    """

    example: str  # id of the example
    task: str  # name of the task
    video: str  # name of the (first) video file; empty without
    source: str  # part of the dataset
    rotation: int  # positions that the choices were rotated by
    question: str  # the question, without instructions
    prompt_hash: str  # of the whole prompt: 16 hexadecimal digits of its SHA-256
    choices: tuple[str, ...]  # options or labels, in the order shown
    truth: Mapping[str, Any]  # ground truth in the task's format
    target: str  # the right answer as one line
    anomaly_class: str | None  # class of the video; null if unknown
    duration: float | None  # of the videos, in seconds; null if unknown
    key_object: str  # of the annotation
    reference: str  # for descriptions: the annotation's text
    failure: str | None  # why the video could not be read; null if it was
    completions: list[str]  # texts of the completions
    format_ok: list[bool]  # whether the completion keeps the strict grammar
    answers: list[Values]  # final answers by the lenient rule: values by column, missing ones included
    predictions: list[str | None]  # the same as one line each
    scores: list[float]  # task scores of the answers, in [0, 1]; empty for tasks without right answers
    drafts: list[Values]  # draft answers likewise; empty without reflection
    draft_predictions: list[str | None]  # the same as one line each
    draft_scores: list[float]  # task scores of the drafts
    reflect_words: list[int]  # words of the reflection; empty without reflection
    rewards: Mapping[str, list[float]]  # each built-in reward, by the strict rule


def seen(records: Sequence[Record]) -> np.ndarray:
    """bool [N]: whether the video of each record could be read."""
    return np.asarray([record.failure is None for record in records], bool)
