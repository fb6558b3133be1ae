"""Anomaly classification: which class of a label set a video shows, VAU-Bench's unless the example brings its own."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import jax
import numpy as np

from vau_jax.common.files import InputError
from vau_jax.tasks import statistics
from vau_jax.tasks.base import ReportRow, Task, stripped
from vau_jax.tasks.charts import Matrix
from vau_jax.tasks.columns import Column, Columns, Values
from vau_jax.tasks.example import Annotation, Example
from vau_jax.tasks.grammar import STATES
from vau_jax.tasks.record import Record

LABELS = (  # of VAU-Bench
    "Abuse",
    "Agriculture",
    "Arrest",
    "Arson",
    "Assault",
    "Explosion",
    "Fighting",
    "Fire",
    "Food Safety",
    "Medical Abnormality",
    "Natural Hazard",
    "Normal",
    "Object_falling",
    "People_falling",
    "Robbery",
    "Shooting",
    "Stealing",
    "Traffic_accident",
    "Vandalism",
    "Water_incident",
)
NORMAL = "Normal"  # the label of a video without anomaly, in any label set


class Classification(Task):
    """The answer is a label; case and underscores do not matter."""

    name = "classification"
    columns: ClassVar = {"label": Column((), np.int32, -1)}  # index into the example's choices
    default_choices = LABELS

    question = "Which kind of abnormal event does this surveillance video show, if any?"
    short_question = "Which kind is it?"
    answer_instruction = "The answer is one of these: {labels}."

    command = "classify"
    title = "Which kind?"
    report_rows = (
        ReportRow(
            "Classification, multi-class",
            ("tasks", "classification", "multiclass"),
            ("baselines", "classification", "majority_class"),
        ),
        ReportRow("Classification, normal or not", ("tasks", "classification", "binary")),
    )

    # --- Truth ---

    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        """{"label": the class}."""
        return None if annotation.label is None else {"label": annotation.label}

    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        """Raises InputError for labels that could not be told apart in a completion."""
        if (label := unreadable(tuple(choices))) is not None:
            raise InputError(
                f"the label {label[:60]!r} could never be read from a completion: labels are ASCII letters, spaces "
                "and underscores, and differ in more than case"
            )
        return {"label": list(choices).index(truth["label"])}

    def choices(self, annotation: Annotation) -> tuple[str, ...]:
        return annotation.labels or self.default_choices

    def identity(self, annotation: Annotation) -> Any:
        return annotation.label

    # --- Text ---

    def answer(self, example: Example) -> str:
        return example.truth["label"]

    # --- Drafts: {"label": class} ---

    draft_format = 'expected {"label": "Fire"}, a class'

    def check_draft(self, draft: Mapping[str, Any]) -> bool:
        return set(draft) == {"label"} and isinstance(draft["label"], str)

    def draft_text(self, draft: Mapping[str, Any], example: Example) -> str:
        return draft["label"]

    def draft_of(self, answers: Columns, index: int, example: Example) -> dict[str, Any] | None:
        label = int(answers.label[index])
        return {"label": example.choices[label]} if label >= 0 else None

    def true_draft(self, example: Example) -> dict[str, Any]:
        return {"label": example.truth["label"]}

    def wrong_draft(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        return {"label": str(rng.choice([k for k in example.choices if k != example.truth["label"]]))}

    # --- Reading ---

    def value(self, text: str, choices: Sequence[str]) -> Values:
        text = stripped(text)
        index = _index_of(tuple(choices)).get(_fold(text)) if text else None
        return {} if index is None else {"label": index}

    def loose_value(self, text: str, choices: Sequence[str]) -> Values:
        """The one label that is named in the text."""
        if exact := self.value(text, choices):
            return exact
        folded = f" {re.sub(r'[^a-z ]', ' ', _fold(text))} "
        named = {index for name, index in _index_of(tuple(choices)).items() if f" {name} " in folded}
        return {"label": named.pop()} if len(named) == 1 else {}

    def conclusion(self, choices: Sequence[str]) -> re.Pattern[str] | None:
        return _stated(tuple(choices))

    # --- Rewards and metrics ---

    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        return (answers.label == target.label) & (answers.label >= 0)

    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """Multi-class accuracy, binary accuracy (normal or not) where the labels include Normal, macro-F1 over the
        classes that occur in the truth, and the confusion counts, over all label sets of the records.
        """
        names = _names(records)
        label, truth = (_renumbered(np.asarray(x), records, names) for x in (final.label, target.label))
        result = {"multiclass": statistics.estimate(label == truth)}
        if NORMAL in names:
            normal = names.index(NORMAL)
            result["binary"] = statistics.estimate(((label == normal) == (truth == normal)) & (label >= 0))
        return {
            **result,
            "macro_f1": statistics.macro_f1(label, truth),
            "confusion": statistics.confusion(label, truth, names),
            "unparsed": int((label < 0).sum()),
        }

    def baselines(self, target: Columns, records: Sequence[Record]) -> dict[str, Any]:
        return {"majority_class": statistics.majority(_renumbered(np.asarray(target.label), records, _names(records)))}

    # --- Display ---

    def matrices(self, result: Mapping[str, Any]) -> list[Matrix]:
        confusion = result["tasks"].get(self.name, {}).get("confusion")
        if not confusion or not confusion["labels"]:
            return []
        return [Matrix(result["name"], confusion["labels"], confusion["counts"])]

    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        return choices[values["label"]] if values["label"] >= 0 else None


def _fold(text: str) -> str:
    return re.sub(r"[\s_]+", " ", text.strip()).casefold()


@cache
def _index_of(choices: tuple[str, ...]) -> dict[str, int]:
    return {_fold(label): index for index, label in enumerate(choices)}


@cache
def unreadable(choices: tuple[str, ...]) -> str | None:
    """The first label that is not parsed as itself, strictly and leniently; None without one."""
    for index, label in enumerate(choices):
        read = TASK.value(label, choices), TASK.loose_value(f"It is {label}", choices)
        named = [other for other in choices if f" {_fold(other)} " in f" {_fold(label)} "]
        if read[0] != {"label": index} or (len(named) == 1 and read[1] != {"label": index}):
            return label
    return None


@cache
def _stated(choices: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(choices, key=len, reverse=True)  # one label may begin another
    names = "|".join(re.escape(label).replace("_", "[ _]") for label in longest_first)
    return re.compile(rf"{STATES}[\s*]{{0,4}}((?i:{names}))(?!\w)")


def _names(records: Sequence[Record]) -> list[str]:
    """All labels of the records' label sets."""
    return sorted({name for record in records for name in record.choices})


def _renumbered(label: np.ndarray, records: Sequence[Record], names: Sequence[str]) -> np.ndarray:
    """Indices [N] into each record's own choices as indices into `names`; -1 stays."""
    index = {name: number for number, name in enumerate(names)}
    return np.asarray([index[r.choices[i]] if i >= 0 else -1 for i, r in zip(label, records, strict=True)], np.int32)


TASK = Classification()
