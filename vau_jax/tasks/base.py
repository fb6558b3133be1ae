"""What a task is: one class, in one file of this folder, that owns everything that is particular to it.

A task says what is asked, what a right completion is, how a completion is read, what is true, how answers are rewarded
and measured, and how they are shown. The rest of the project goes through the methods below and compares no task's
name. `vau_jax.tasks.TASKS` lists the tasks.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

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
    """A row of the report's table: its title, where its number stands in metrics.json, and a baseline beside it."""

    title: str
    path: tuple[str, ...]
    baseline: tuple[str, ...] | None = None


class Task(ABC):
    """See the module's docstring. Methods that have a body here are right for tasks with one value to read."""

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, Column]] = {}  # of answers and of truths; a name that tasks share is one column
    verifiable: ClassVar[bool] = True  # an answer is right or wrong; else it has no score, draft or correctness
    extra_tags: ClassVar[tuple[str, ...]] = ()  # tags after <answer>
    default_choices: ClassVar[tuple[str, ...]] = ()  # of an example that brings none
    shuffles: ClassVar[bool] = False  # the order of choices means nothing and may change
    timed: ClassVar[bool] = False  # answers have times, which are drawn on the video's time line
    judged: ClassVar[bool] = False  # a judge model can mark what is written
    right_from: ClassVar[float] = 1.0  # score from which an answer counts as right
    exact_from: ClassVar[float] = 1.0  # score of the right answer written out, which rounding may lower

    question: ClassVar[str]  # what is asked; {question}, {options}, {labels}, {sections} are filled in
    short_question: ClassVar[str]  # all that is said with data.wording=short
    answer_instruction: ClassVar[str]  # what stands inside <answer>

    command: ClassVar[str]  # name for `vau_jax.ask --task`
    title: ClassVar[str]  # name for people
    report_rows: ClassVar[tuple[ReportRow, ...]] = ()
    reflection_rows: ClassVar[tuple[ReportRow, ...]] = ()  # below the rows of all tasks

    # --- Truth ---

    @abstractmethod
    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        """What is right, as JSON values; None where the annotation does not say, so that the task cannot be asked."""

    @abstractmethod
    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        """The truth as values of this task's columns."""

    def choices(self, annotation: Annotation) -> tuple[str, ...]:
        """What the answer is chosen from."""
        return ()

    @abstractmethod
    def identity(self, annotation: Annotation) -> Any:
        """What tells a question from others about the same video, as JSON values: what is asked, and the truth."""

    # --- Text of prompts and completions ---

    def fields(self, example: Example) -> dict[str, str]:
        """What is filled into the question's places."""
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False))
        return {"question": example.question, "options": options, "labels": ", ".join(example.choices), "sections": ""}

    @abstractmethod
    def answer(self, example: Example) -> str:
        """What stands inside <answer> when the answer is right."""

    def closing(self, example: Example) -> str:
        """What follows </answer>."""
        return ""

    def target(self, example: Example) -> str:
        """The right answer in a line."""
        return self.answer(example)

    def hint(self, example: Example) -> str:
        """A line of the annotation that helps without naming the answer: the evidence, or what happens."""
        meta = example.meta
        evidence = meta.get("reasoning", {}).get("Key Evidence")
        return evidence or meta.get("description") or meta.get("key_object") or "watch the whole video"

    def plain_reasoning(self, example: Example) -> str:
        """Reasoning in prose from the annotation: what is visible, why it matters, what follows."""
        reasoning = example.meta.get("reasoning", {})
        parts = [reasoning.get(title, "") for title in ("Key Evidence", "Detailed Explanation", "Conclusion")]
        return (
            " ".join(part for part in parts if part) or example.meta.get("description") or "The video has been watched."
        )

    def check(self, example: Example) -> str:
        """What replaces `{check}` in a reflection record: the choices as they are shown, up to the right one."""
        return ""

    # --- Choices in another order ---

    def shuffled(self, example: Example, order: Sequence[int]) -> Example:
        """The example with choice order[i] at position i."""
        return example

    # --- Drafts of reflection records ---

    draft_format: ClassVar[str] = "it has no drafts"  # how a draft is written, for errors

    def check_draft(self, draft: Mapping[str, Any]) -> bool:
        """Whether this is a draft of this task."""
        return False

    def draft_text(self, draft: Mapping[str, Any], example: Example) -> str:
        """What stands inside <draft>."""
        raise NotImplementedError(f"{self.name} has no drafts")

    def draft_prose(self, draft: Mapping[str, Any], example: Example) -> str:
        """A draft in running text, as the reflection quotes it."""
        return self.draft_text(draft, example)

    def draft_of(self, answers: Columns, index: int, example: Example) -> dict[str, Any] | None:
        """The answer as a draft; None where there is no answer."""
        return None

    def true_draft(self, example: Example) -> dict[str, Any]:
        """The right answer as a draft."""
        raise NotImplementedError(f"{self.name} has no drafts")

    def wrong_draft(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """Some wrong answer as a draft."""
        raise NotImplementedError(f"{self.name} has no drafts")

    # --- Reading of completions ---

    def tags(self, reflection: bool) -> tuple[str, ...]:
        """The tags of a completion, in order."""
        return (REFLECTION_ORDER if reflection and self.verifiable else PLAIN_ORDER) + self.extra_tags

    @abstractmethod
    def value(self, text: str, choices: Sequence[str]) -> Values:
        """The value inside <answer> or <draft>, exactly as the grammar has it; empty where it is another text."""

    def loose_value(self, text: str, choices: Sequence[str]) -> Values:
        """The one value that a text names in some way; empty where it names none or several."""
        return self.value(text, choices)

    def strict(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values] | None:
        """Final answer and draft of a completion in the strict grammar; None where one of them cannot be read."""
        final, draft = self.value(sections["answer"], choices), self.value(sections.get("draft", ""), choices)
        return (final, draft) if final and (draft or "draft" not in sections) else None

    def lenient(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values]:
        """Final answer and draft in the sections of any text; "rest" is what follows the reasoning."""
        final, draft = sections.get("answer", sections.get("rest", "")), sections.get("draft", "")
        return self.loose_value(final, choices), self.loose_value(draft, choices)

    def conclusion(self, choices: Sequence[str]) -> re.Pattern[str] | None:
        """Finds in reasoning the value (its group 1) that a sentence states as the answer; None: nothing is stated."""
        return None

    # --- Rewards: pure JAX, under jit and vmap ---

    @abstractmethod
    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        """bool [N]: whether the answer is there and right."""

    def score(self, answers: Columns, target: Columns) -> jax.Array:
        """float32 [N] in [0, 1]: what the task measures; 1 or 0 where an answer is right or wrong."""
        return jnp.asarray(self.correct(answers, target), jnp.float32)

    @property
    def rewards(self) -> Mapping[str, Callable[[Columns, Columns], jax.Array]]:
        """Rewards of this task alone, besides format, accuracy and reflection: name -> f(answers, target) -> [N]."""
        return {}

    # --- Metrics: numpy ---

    @abstractmethod
    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """The numbers of metrics.json for records of this task and their first answers, read leniently."""

    def baselines(self, target: Columns) -> dict[str, Any]:
        """Scores of constant answers, which tables show beside a model."""
        return {}

    def agreement(self, answers: Columns) -> np.ndarray:
        """float [N, n, n]: how far the n answers [N, n, ...] to a question agree, pair by pair."""
        raise NotImplementedError(f"{self.name} has no answers to compare")

    def overall(self, records: Sequence[Record]) -> dict[str, Any]:
        """Further entries of metrics.json, beside "tasks"."""
        return {}

    # --- How answers are shown ---

    @abstractmethod
    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        """An answer (JSON values by column) in a line, as records and reports have it; None where there is none."""

    def display(self, values: Mapping[str, Any], completion: str, choices: Sequence[str]) -> Shown | None:
        """An answer for who has asked about a video; None where nothing can be read."""
        text = self.show(values, choices)
        return None if text is None else Shown(text)

    def check_question(self, text: str, options: Sequence[str]) -> str:
        """What is wrong with a question that a user asks; empty where it can be asked."""
        return ""

    def user_prompt(self, text: str, prompt: str, trained: bool) -> str:
        """The prompt for a user's own question `text` and the task's `prompt`; `trained`: the model was trained on this
        task."""
        return f"{text}\n{prompt}" if text else prompt

    def charts(self, result: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
        """Charts of an evaluation for the report: title, data and layout of each, as Plotly has them."""
        return []

    def is_right(self, record: Record) -> bool:
        """Whether the first answer of a record counts as right."""
        return record.scores[0] >= self.right_from

    def bars(self, record: Record) -> list[tuple[str, str]]:
        """(name, answer in a line) of the intervals that a card draws on its time line."""
        return []


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def same_value(column: np.ndarray) -> np.ndarray:
    """`Task.agreement` of answers [N, n] that are one number, negative where there is none."""
    return ((column[:, :, None] == column[:, None]) & (column >= 0)[:, :, None]).astype(np.float64)


def stripped(text: str) -> str:
    """A value without spaces around it and a full stop behind it; empty where it is not ASCII, since other scripts
    have letters that fold to ours."""
    text = text.strip().removesuffix(".").strip()
    return text if text.isascii() else ""
