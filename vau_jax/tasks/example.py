"""What datasets give and tasks take: annotations of videos, and the examples that are made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Interval = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True)
class Annotation:
    """What a dataset says about one video, in the terms of no particular dataset; unknown is None or empty."""

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

    `{check}` in a text stands for the choices as they are shown, up to the right one (`A flood, B fire`), because their
    order can change.
    """

    think: str
    draft: Mapping[str, Any]
    draft_is_right: bool
    reflect: str
    revise: str


@dataclass(frozen=True)
class Example:
    """One question about one video, several, or none."""

    id: str  # unique in a dataset: what every file calls this example
    task: str  # a name in TASKS
    media: tuple[Path, ...]  # video files, in the order in which the prompt shows them
    question: str  # in the dataset's words; empty where the task has its own
    choices: tuple[str, ...]  # options of a question, or the label set; in the order in which they are shown
    truth: Mapping[str, Any]  # what is right, as the task writes it (`Task.truth`)
    meta: Mapping[str, Any] = field(default_factory=dict)  # what else is known: source, anomaly_class, duration, ...
    reflection: Reflection | None = None
    rotation: int = 0  # positions that the choices are moved by, after they are shuffled

    @property
    def video(self) -> str:
        """The name of the video in the dataset; empty for an example without."""
        return self.meta.get("video", "")

    @property
    def kind(self) -> str:
        """The group whose running accuracy this example shares: task and class."""
        return f"{self.task}/{self.meta.get('anomaly_class')}"


def with_choices(example: Example, choices: tuple[str, ...], truth: Mapping[str, Any], draft: Any) -> Example:
    """The example with other choices, and truth and draft that go with them."""
    reflection = example.reflection and replace(example.reflection, draft=draft)
    return replace(example, choices=choices, truth=truth, reflection=reflection)
