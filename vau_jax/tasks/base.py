"""The base class of tasks. A task is one class in one file of this folder and owns everything specific to it: question,
target completion, parsing, ground truth, rewards, metrics and display.

The rest of the project calls the methods below and never compares a task's name. `vau_jax.tasks.TASKS` lists the tasks.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vau_jax.tasks.charts import Chart, Matrix
from vau_jax.tasks.columns import Column, Columns, Values
from vau_jax.tasks.example import Annotation, Example, Interval
from vau_jax.tasks.grammar import PLAIN_ORDER, REFLECTION_ORDER
from vau_jax.tasks.record import Record


@dataclass(frozen=True)
class Shown:
    """An answer for people: text, and an interval in seconds to mark in the video."""

    text: str
    interval: Interval | None = None


@dataclass(frozen=True)
class ReportRow:
    """A row of the report's table: its title, the path of its number in metrics.json, and of a baseline."""

    title: str
    path: tuple[str, ...]
    baseline: tuple[str, ...] | None = None


class Task(ABC):
    """See the module's docstring. Methods with a body here suit tasks whose answer is a single value."""

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, Column]] = {}  # of answers and of truths; a name that tasks share is one column
    verifiable: ClassVar[bool] = True  # an answer is right or wrong; else it has no score, draft or correctness
    extra_tags: ClassVar[tuple[str, ...]] = ()  # tags after <answer>
    default_choices: ClassVar[tuple[str, ...]] = ()  # where an example has none of its own
    shuffles: ClassVar[bool] = False  # the order of choices means nothing and may change
    timed: ClassVar[bool] = False  # answers have times, which are shown on the video's time line
    judged: ClassVar[bool] = False  # a judge model can score the text
    right_from: ClassVar[float] = 1.0  # score from which an answer counts as right
    exact_from: ClassVar[float] = 1.0  # score of the right answer written out, which rounding may lower

    question: ClassVar[str]  # placeholders: {question}, {options}, {labels}, {sections}
    short_question: ClassVar[str]  # the whole prompt with data.wording=short
    answer_instruction: ClassVar[str]  # describes the text inside <answer>

    command: ClassVar[str]  # name for `vau_jax.ask --task`
    title: ClassVar[str]  # name for people
    report_rows: ClassVar[tuple[ReportRow, ...]] = ()
    reflection_rows: ClassVar[tuple[ReportRow, ...]] = ()  # after the rows of all tasks

    # --- Truth ---

    @abstractmethod
    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        """The ground truth as JSON values; None where the annotation lacks it: the task is then not asked."""

    @abstractmethod
    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        """The ground truth as values of this task's columns."""

    def choices(self, annotation: Annotation) -> tuple[str, ...]:
        """The options or labels to choose from."""
        return ()

    @abstractmethod
    def identity(self, annotation: Annotation) -> Any:
        """The identity of a question among those about one video, as JSON values: the question and its truth."""

    # --- Text of prompts and completions ---

    def fields(self, example: Example) -> dict[str, str]:
        """Values for the placeholders of the question."""
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False))
        return {"question": example.question, "options": options, "labels": ", ".join(example.choices), "sections": ""}

    @abstractmethod
    def answer(self, example: Example) -> str:
        """The text inside <answer> of the right completion."""

    def closing(self, example: Example) -> str:
        """The text after </answer> of the right completion."""
        return ""

    def target(self, example: Example) -> str:
        """The right answer as one line."""
        return self.answer(example)

    def hint(self, example: Example) -> str:
        """One line of the annotation that helps without naming the answer: the evidence, or the event."""
        meta = example.meta
        evidence = meta.get("reasoning", {}).get("Key Evidence")
        return evidence or meta.get("description") or meta.get("key_object") or "watch the whole video"

    def plain_reasoning(self, example: Example) -> str:
        """Reasoning in prose from the annotation: visible events, their meaning, their consequences."""
        reasoning = example.meta.get("reasoning", {})
        parts = [reasoning.get(title, "") for title in ("Key Evidence", "Detailed Explanation", "Conclusion")]
        return (
            " ".join(part for part in parts if part) or example.meta.get("description") or "The video has been watched."
        )

    def check(self, example: Example) -> str:
        """The text that replaces `{check}` in a reflection record: the choices as shown, up to the right one."""
        return ""

    # --- Choices in another order ---

    def shuffled(self, example: Example, order: Sequence[int]) -> Example:
        """The example with choice order[i] at position i."""
        return example

    # --- Drafts of reflection records ---

    draft_format: ClassVar[str] = "it has no drafts"  # how a draft is written, for errors

    @property
    def has_drafts(self) -> bool:
        """Whether reflection records can be built for this task."""
        return type(self).draft_text is not Task.draft_text

    def check_draft(self, draft: Mapping[str, Any]) -> bool:
        """Whether this is a valid draft of this task."""
        return False

    def draft_text(self, draft: Mapping[str, Any], example: Example) -> str:
        """The text inside <draft>."""
        raise NotImplementedError(f"{self.name} has no drafts")

    def draft_prose(self, draft: Mapping[str, Any], example: Example) -> str:
        """A draft in prose, as quoted by the reflection."""
        return self.draft_text(draft, example)

    def draft_of(self, answers: Columns, index: int, example: Example) -> dict[str, Any] | None:
        """The answer as a draft; None where there is no answer."""
        return None

    def true_draft(self, example: Example) -> dict[str, Any]:
        """The right answer as a draft."""
        raise NotImplementedError(f"{self.name} has no drafts")

    def wrong_draft(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """A wrong answer as a draft."""
        raise NotImplementedError(f"{self.name} has no drafts")

    # --- Reading of completions ---

    def tags(self, reflection: bool) -> tuple[str, ...]:
        """The tags of a completion, in order."""
        return (REFLECTION_ORDER if reflection and self.verifiable else PLAIN_ORDER) + self.extra_tags

    @abstractmethod
    def value(self, text: str, choices: Sequence[str]) -> Values:
        """The value inside <answer> or <draft> in the strict grammar; empty for any other text."""

    def loose_value(self, text: str, choices: Sequence[str]) -> Values:
        """The one value that a text names in any form; empty where it names none or several."""
        return self.value(text, choices)

    def strict(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values] | None:
        """Final answer and draft of a completion in the strict grammar; None where one of them cannot be parsed."""
        final, draft = self.value(sections["answer"], choices), self.value(sections.get("draft", ""), choices)
        return (final, draft) if final and (draft or "draft" not in sections) else None

    def lenient(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values]:
        """Final answer and draft from the sections of any text; "rest" is the text after the reasoning."""
        final, draft = sections.get("answer", sections.get("rest", "")), sections.get("draft", "")
        return self.loose_value(final, choices), self.loose_value(draft, choices)

    def conclusion(self, choices: Sequence[str]) -> re.Pattern[str] | None:
        """A pattern that finds the value (its group 1) stated as the answer in reasoning; None: no such statement is
        looked for.
        """
        return None

    # --- Rewards: pure JAX, under jit and vmap ---

    @abstractmethod
    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        """bool [N]: whether the answer exists and is right."""

    def score(self, answers: Columns, target: Columns) -> jax.Array:
        """float32 [N] in [0, 1]: the task's measure; 1 or 0 where an answer is either right or wrong."""
        return jnp.asarray(self.correct(answers, target), jnp.float32)

    @property
    def rewards(self) -> Mapping[str, Callable[[Columns, Columns], jax.Array]]:
        """Rewards specific to this task, besides format, accuracy and reflection: name -> f(answers, target) -> [N]."""
        return {}

    # --- Metrics: numpy ---

    @abstractmethod
    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """The task's entry of metrics.json from its records and their first answers, parsed leniently."""

    def baselines(self, target: Columns, records: Sequence[Record]) -> dict[str, Any]:
        """Scores of constant answers, for comparison with a model."""
        return {}

    def agreement(self, answers: Columns) -> np.ndarray:
        """float [N, n, n]: pairwise agreement of the n answers [N, n, ...] to each question; here equality of the one
        column, whose missing value is negative."""
        if len(self.columns) != 1:
            raise NotImplementedError(f"{self.name} has {len(self.columns)} columns: define agreement")
        (column,) = (np.asarray(answers[name]) for name in self.columns)
        return ((column[:, :, None] == column[:, None]) & (column >= 0)[:, :, None]).astype(np.float64)

    def overall(self, records: Sequence[Record]) -> dict[str, Any]:
        """Further top-level entries of metrics.json, beside "tasks"."""
        return {}

    # --- How answers are shown ---

    @abstractmethod
    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        """An answer (JSON values by column) as one line, for records and reports; None without an answer."""

    def display(self, values: Mapping[str, Any], completion: str, choices: Sequence[str]) -> Shown | None:
        """An answer for display to a user; None where none can be parsed."""
        text = self.show(values, choices)
        return None if text is None else Shown(text)

    def check_question(self, text: str, options: Sequence[str]) -> str:
        """What is wrong with a user's question; empty where it can be asked."""
        return ""

    def user_prompt(self, text: str, prompt: str, trained: bool) -> str:
        """The prompt for a user's own question `text` and the task's `prompt`; `trained`: the model was trained on this
        task."""
        return f"{text}\n{prompt}" if text else prompt

    def charts(self, result: Mapping[str, Any], records: Sequence[Record]) -> list[Chart]:
        """Charts of an evaluation for the report: title, data and layout of each in Plotly's format."""
        return []

    def matrices(self, result: Mapping[str, Any]) -> list[Matrix]:
        """Confusion matrices of an evaluation for the report."""
        return []

    def is_right(self, record: Record) -> bool:
        """Whether the first answer of a record counts as right."""
        return record.scores[0] >= self.right_from

    def bars(self, record: Record) -> list[tuple[str, str]]:
        """(name, answer as one line) of the intervals on a card's time line."""
        return []


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def stripped(text: str) -> str:
    """A value without surrounding spaces and trailing full stop; empty where it is not ASCII, since other scripts have
    letters that case-fold to ASCII.
    """
    text = text.strip().removesuffix(".").strip()
    return text if text.isascii() else ""
