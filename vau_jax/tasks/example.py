"""The interface between datasets and tasks: annotations of videos, and the examples built from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Interval = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True)
class Annotation:
    """What a dataset knows about one video, independent of the dataset's format; unknown values are None or empty."""

    question: str = ""
    options: tuple[str, ...] = ()
    answer: int | None = None  # index into options
    label: str | None = None
    labels: tuple[str, ...] = ()  # all classes of the dataset
    intervals: tuple[Interval, ...] | None = None  # of anomalies; (): there is none; None: not known
    description: str = ""
    reasoning: Mapping[str, str] = field(default_factory=dict)  # section title -> text
    key_object: str = ""


@dataclass(frozen=True)
class Reflection:
    """A reflection record: the text between the tags, and the draft answer as a mapping that its task reads.

    `{check}` in a text is replaced by the choices in the order shown, up to the right one (`A flood, B fire`), because
    their order can change.
    """

    think: str
    draft: Mapping[str, Any]
    draft_is_right: bool
    reflect: str
    revise: str


@dataclass(frozen=True)
class Example:
    """One question about one video, several videos, or none."""

    id: str  # unique in a dataset; the example's name in every file
    task: str  # a name in TASKS
    media: tuple[Path, ...]  # video files, in the order in which the prompt shows them
    question: str  # from the dataset; empty where the task has its own
    choices: tuple[str, ...]  # options of a question, or the label set; in the order in which they are shown
    truth: Mapping[str, Any]  # ground truth in the task's format (`Task.truth`)
    meta: Mapping[str, Any] = field(default_factory=dict)  # further facts: source, anomaly_class, duration, ...
    reflection: Reflection | None = None
    rotation: int = 0  # rotation of the choices, after they are shuffled

    @property
    def video(self) -> str:
        """The name of the (first) video in the dataset; empty for an example without videos."""
        return self.meta.get("video", "")

    @property
    def kind(self) -> str:
        """The group whose running accuracy this example shares: task and class."""
        return f"{self.task}/{self.meta.get('anomaly_class')}"


def with_choices(example: Example, choices: tuple[str, ...], truth: Mapping[str, Any], draft: Any) -> Example:
    """The example with other choices, and matching truth and draft."""
    reflection = example.reflection and replace(example.reflection, draft=draft)
    return replace(example, choices=choices, truth=truth, reflection=reflection)
