"""Description: what happens in a video and why, in prose. Answers are not right or wrong; they are measured by word
overlap and by a judge model.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vau_jax.tasks import grammar, statistics
from vau_jax.tasks.base import ReportRow, Shown, Task
from vau_jax.tasks.columns import Columns, Values
from vau_jax.tasks.example import Annotation, Example
from vau_jax.tasks.record import Record

SECTIONS = (  # of VAU-Bench's reasoning
    "Specific Anomaly Type",
    "Location",
    "Key Evidence",
    "Detailed Explanation",
    "Cause and Effect",
    "Conclusion",
)


class Description(Task):
    """The reasoning is the description, the answer has a line for each section of the annotation."""

    name = "description"
    verifiable = False
    judged = True

    question = "Describe this surveillance video, and explain what in it is abnormal, if anything."
    short_question = "What happens, and why?"
    answer_instruction = "The reasoning describes what is seen. The answer has a line for each of these: {sections}."

    command = "describe"
    title = "Free"
    report_rows = (
        ReportRow("Description: words of key objects", ("tasks", "description", "word_overlap", "key_objects")),
    )

    # --- Truth ---

    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        """{"description": text, "reasoning": {section: text}}."""
        usable = annotation.description and annotation.reasoning
        known = {"description": annotation.description, "reasoning": dict(annotation.reasoning)}
        return known if usable else None

    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        return {}

    def identity(self, annotation: Annotation) -> Any:
        return annotation.description, annotation.reasoning

    # --- Text ---

    def fields(self, example: Example) -> dict[str, str]:
        return super().fields(example) | {"sections": ", ".join(SECTIONS)}

    def answer(self, example: Example) -> str:
        return grammar.prose("\n".join(f"{title}: {text}" for title, text in example.truth["reasoning"].items()))

    def plain_reasoning(self, example: Example) -> str:
        return example.truth["description"]

    # --- Reading: prose has no value ---

    def value(self, text: str, choices: Sequence[str]) -> Values:
        return {}

    def strict(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values] | None:
        return ({}, {}) if grammar.words(sections["answer"]) else None

    # --- Rewards and metrics ---

    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        """Never: nothing is right or wrong."""
        return jnp.zeros(target.task.shape, bool)

    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """Word overlap of descriptions with the annotation: ROUGE-L F1 with its text, and the share of the words of its
        key objects and its class that occur.
        """
        texts = [grammar.TAG.sub(" ", r.completions[0]) for r in records]
        rouge = [_rouge().score(r.reference, text)["rougeL"].fmeasure for r, text in zip(records, texts, strict=True)]
        objects = [_share(r.key_object, text) for r, text in zip(records, texts, strict=True)]
        classes = [_share(r.anomaly_class or "", text) for r, text in zip(records, texts, strict=True)]
        return {
            "format_ok": statistics.estimate(np.asarray([r.format_ok[0] for r in records])),
            "word_overlap": {
                "rouge_l": statistics.estimate(np.asarray(rouge)),
                "key_objects": statistics.estimate(np.asarray([x for x in objects if x is not None])),
                "class": statistics.estimate(np.asarray([x for x in classes if x is not None])),
            },
        }

    # --- Display ---

    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        return None

    def display(self, values: Mapping[str, Any], completion: str, choices: Sequence[str]) -> Shown | None:
        return Shown(grammar.TAG.sub("\n", completion).strip())

    def user_prompt(self, text: str, prompt: str, trained: bool) -> str:
        """A model that was not trained on the task is asked without the grammar."""
        return super().user_prompt(text, prompt, trained) if trained else text or "Describe what happens in the video."


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - slow to import, with NLTK

    return RougeScorer(["rougeL"], use_stemmer=True)


def _share(wanted: str, text: str) -> float | None:
    """The share of the words of `wanted` (of three letters or more) that occur in the text; None without any."""
    words, there = (set(_words(t)) for t in (wanted, text))
    return len(words & there) / len(words) if words else None


def _words(text: str) -> list[str]:
    return [w for w in "".join(c if c.isalnum() else " " for c in text.lower()).split() if len(w) > 2]


TASK = Description()
