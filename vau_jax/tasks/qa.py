"""Multiple-choice question answering: any number of options up to 26, answered by a letter."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import jax
import numpy as np

from vau_jax.common.files import InputError
from vau_jax.tasks import statistics
from vau_jax.tasks.base import LETTERS, ReportRow, Shown, Task, stripped
from vau_jax.tasks.columns import Column, Columns, Values
from vau_jax.tasks.example import Annotation, Example, with_choices
from vau_jax.tasks.grammar import SO, STATES
from vau_jax.tasks.record import Record, seen


class QuestionAnswering(Task):
    """The answer is the letter of an option."""

    name = "qa"
    columns: ClassVar = {"choice": Column((), np.int32, -1)}  # index of the option
    default_choices = ("", "", "", "")
    shuffles = True

    question = "{question}\n{options}"
    short_question = "{question}\n{options}"
    answer_instruction = "The answer is the letter of the right option."

    command = "qa"
    title = "Multiple choice"
    report_rows = (ReportRow("QA accuracy", ("tasks", "qa", "accuracy"), ("baselines", "qa", "majority_letter")),)
    reflection_rows = (
        ReportRow("Corrected by reflection, QA", ("reflection", "qa", "corrected")),
        ReportRow("Broken by reflection, QA", ("reflection", "qa", "broken")),
    )

    # --- Truth ---

    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        """{"choice": index of the right option}."""
        usable = annotation.answer is not None and annotation.options
        return {"choice": annotation.answer} if usable else None

    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        """Raises InputError for more options than letters."""
        if len(choices) > len(LETTERS):
            raise InputError(f"a question has {len(choices)} options: expected at most {len(LETTERS)}, one per letter")
        return {"choice": truth["choice"]}

    def choices(self, annotation: Annotation) -> tuple[str, ...]:
        return annotation.options

    def identity(self, annotation: Annotation) -> Any:
        """Independent of the order of the options."""
        return annotation.question, sorted(annotation.options), annotation.options[annotation.answer]

    # --- Text ---

    def answer(self, example: Example) -> str:
        return LETTERS[example.truth["choice"]]

    def check(self, example: Example) -> str:
        """`A flood, B fire`."""
        shown = example.choices[: example.truth["choice"] + 1]
        return ", ".join(f"{letter} {text}" for letter, text in zip(LETTERS, shown, strict=False))

    def shuffled(self, example: Example, order: Sequence[int]) -> Example:
        moved = list(order)
        truth = {"choice": moved.index(example.truth["choice"])}
        draft = example.reflection and {"choice": LETTERS[moved.index(_index(example.reflection.draft["choice"]))]}
        return with_choices(example, tuple(example.choices[i] for i in order), truth, draft)

    # --- Drafts: {"choice": letter} ---

    draft_format = 'expected {"choice": "A"}, a letter'

    def check_draft(self, draft: Mapping[str, Any]) -> bool:
        letter = draft.get("choice")
        return set(draft) == {"choice"} and isinstance(letter, str) and len(letter) == 1 and letter in LETTERS

    def draft_text(self, draft: Mapping[str, Any], example: Example) -> str:
        return draft["choice"]

    def draft_prose(self, draft: Mapping[str, Any], example: Example) -> str:
        return f'"{example.choices[_index(draft["choice"])]}"'

    def draft_of(self, answers: Columns, index: int, example: Example) -> dict[str, Any] | None:
        choice = int(answers.choice[index])
        return {"choice": LETTERS[choice]} if choice >= 0 else None

    def true_draft(self, example: Example) -> dict[str, Any]:
        return {"choice": self.answer(example)}

    def wrong_draft(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        right = self.answer(example)
        return {"choice": str(rng.choice([c for c in LETTERS[: len(example.choices)] if c != right]))}

    # --- Reading ---

    def value(self, text: str, choices: Sequence[str]) -> Values:
        text = stripped(text)
        return {"choice": _index(text)} if len(text) == 1 and text in LETTERS[: len(choices)] else {}

    def loose_value(self, text: str, choices: Sequence[str]) -> Values:
        """A letter on its own: at the end of a line or clause, or in an enumeration."""
        if exact := self.value(text, choices):
            return exact
        letters = {match.group(1) for match in _standing_alone(len(choices)).finditer(text)}
        return {"choice": _index(letters.pop())} if len(letters) == 1 else {}

    def conclusion(self, choices: Sequence[str]) -> re.Pattern[str] | None:
        return _stated(len(choices))

    # --- Rewards and metrics ---

    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        return (answers.choice == target.choice) & (answers.choice >= 0)

    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """Accuracy over all rows; an unreadable answer is wrong, and counted. With protocol "paper", videos that failed
        and unreadable answers are left out."""
        choice, truth = np.asarray(final.choice), np.asarray(target.choice)
        right = (choice == truth) if protocol == "clean" else (choice == truth)[(choice >= 0) & seen(records)]
        return {"accuracy": statistics.estimate(right), "unparsed": int((choice < 0).sum())}

    def baselines(self, target: Columns, records: Sequence[Record]) -> dict[str, Any]:
        return {"majority_letter": statistics.majority(np.asarray(target.choice))}

    # --- Display ---

    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        return LETTERS[values["choice"]] if values["choice"] >= 0 else None

    def display(self, values: Mapping[str, Any], completion: str, choices: Sequence[str]) -> Shown | None:
        choice = values["choice"]
        return Shown(f"{LETTERS[choice]}. {choices[choice]}") if choice >= 0 else None

    def check_question(self, text: str, options: Sequence[str]) -> str:
        if text and 2 <= len(options) <= len(LETTERS) and all(options):
            return ""
        return (
            f'the task qa needs a question and 2 to {len(LETTERS)} options, found "{text[:100]}" and '
            f"{[option[:100] for option in options[:9]]}"
        )

    def user_prompt(self, text: str, prompt: str, trained: bool) -> str:
        return prompt  # which holds the question


def _index(letter: str) -> int:
    return LETTERS.index(letter)


@cache
def _standing_alone(count: int) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w'])\(?([A-{LETTERS[count - 1]}])(?:[.):](?=\s|$)|(?=\s*$)|(?=\s*[,;\n]))")


@cache
def _stated(count: int) -> re.Pattern[str]:
    """A letter; no more of the sentence may follow A, which is also the article (and I, the pronoun)."""
    plain = "".join(letter for letter in LETTERS[:count] if letter not in "AI")
    whole = r"(?=[)*]{0,3}\s{0,3}(?:[.,;:!?]|$))"
    ambiguous = "[AI]" if count > LETTERS.index("I") else "A"
    letters = rf"[{plain}]\b|{ambiguous}{whole}" if plain else rf"{ambiguous}{whole}"
    return re.compile(rf"(?:{STATES}|{SO})[\s,:*(]{{0,4}}(?i:(?:option|answer)\s{{1,3}})?\(?({letters})")


TASK = QuestionAnswering()
