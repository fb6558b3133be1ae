"""An evaluated example: the content of a line of predictions.jsonl, from which tasks compute metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vau_jax.tasks.columns import Values


@dataclass(frozen=True)
class Record:
    """One example with the model's completions, each of them parsed once. Lists have one entry for each completion.

    Where the video could not be read, completions are empty texts and every score is 0.
    """

    example: str  # id of the example
    task: str
    video: str  # name of the video file; empty without
    source: str  # which part of the dataset it is from
    rotation: int  # positions that the choices were moved by
    question: str  # what is asked, without instructions
    prompt_hash: str  # of the whole prompt: 16 hexadecimal digits of its SHA-256
    choices: tuple[str, ...]  # options or labels, in the order that was shown
    truth: Mapping[str, Any]  # as the task writes it
    target: str  # the right answer in a line
    anomaly_class: str | None  # class of the video, where it is known
    duration: float | None  # of the video, in seconds
    key_object: str  # of the annotation
    reference: str  # for descriptions: what the annotation says
    failure: str | None  # why the video could not be read
    completions: list[str]
    format_ok: list[bool]  # whether the completion keeps the strict grammar
    answers: list[Values]  # final answers read leniently: values by column; empty where there is none
    predictions: list[str | None]  # the same in a line
    scores: list[float]  # task scores of the answers, in [0, 1]; empty for tasks without right answers
    drafts: list[Values]  # draft answers likewise; empty without reflection
    draft_predictions: list[str | None]
    draft_scores: list[float]
    reflect_words: list[int]  # words of the reflection; empty without reflection
    rewards: Mapping[str, list[float]]  # each built-in reward, computed from the strict reading
