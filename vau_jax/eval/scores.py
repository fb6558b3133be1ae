"""Records to the numbers of metrics.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vau_jax.eval import metrics
from vau_jax.eval.records import answers_of, as_array
from vau_jax.tasks import TASKS, parsing, rewards
from vau_jax.tasks.base import Task
from vau_jax.tasks.record import Record
from vau_jax.tasks.statistics import estimate


def score(
    records: Sequence[Record], protocol: str = "clean", weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All numbers of a list of records: by task, class and source, constant baselines, rewards and, with `weights`,
    their weighted sum as in training; and the metrics of several samples, several orders of choices, and time instants,
    where there are any.
    """
    first = [record for record in records if not record.rotation]
    result: dict[str, Any] = {"tasks": {}, "baselines": {}, "reflection": {}, "by_class": {}, "by_source": {}}
    overall: dict[str, Any] = {}
    for name, task in TASKS.items():
        own = [record for record in first if record.task == name]
        if not own:
            continue
        target = parsing.targets_of(own)
        result["tasks"][name] = task.metrics(answers_of(own), target, own, protocol)
        result["baselines"][name] = task.baselines(target, own)
        overall |= task.overall(own)
        if not task.verifiable:
            continue
        final = as_array([record.scores[0] for record in own])
        result["by_class"][name] = _by(final, [record.anomaly_class or "unknown" for record in own])
        result["by_source"][name] = _by(final, [record.source for record in own])
        if own[0].drafts:
            draft = as_array([record.draft_scores[0] for record in own])
            words = estimate(np.asarray([record.reflect_words[0] for record in own]))
            result["reflection"][name] = {**metrics.reflection(draft, final), "words": words}
    values = {name: as_array([record.rewards[name][0] for record in first]) for name in rewards.REWARDS}
    result["rewards"] = {name: estimate(value) for name, value in values.items()}
    if weights is not None:
        total = sum(weights.get(name, 0.0) * value for name, value in values.items())
        result["rewards"]["total"] = estimate(total)
    return result | _samples(first) | _orders(records) | overall


def _by(values: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """The mean task score of each group (temporal IoU for grounding, else accuracy)."""
    names = np.asarray(groups)
    return {name: estimate(values[names == name]) for name in sorted(set(groups))}


def _samples(first: Sequence[Record]) -> dict[str, Any]:
    """By task: pass@k for powers of two, and the score of the answer that most samples agree with."""
    count = len(first[0].completions) if first else 1
    if count == 1:
        return {}
    by_task = {}
    for name, task in TASKS.items():
        own = [record for record in first if record.task == name]
        if own and task.verifiable:
            by_task[name] = _samples_of(own, task, count)
    return {"samples": by_task}


def _samples_of(own: Sequence[Record], task: Task, count: int) -> dict[str, Any]:
    scores = as_array([record.scores for record in own])  # [N, count]
    sizes = [2**i for i in range(count.bit_length()) if 2**i <= count]
    answers = parsing.stack_answers([values for record in own for values in record.answers])
    chosen = metrics.vote(answers, task, count)
    return {
        "count": count,
        "mean": estimate(scores.mean(1)),
        "pass": {str(k): metrics.pass_at(scores >= task.right_from, k) for k in sizes},
        "vote": estimate(scores[np.arange(len(own)), chosen]),
    }


def _orders(records: Sequence[Record]) -> dict[str, Any]:
    """Questions that were asked with their choices in several orders."""
    if not any(record.rotation for record in records):
        return {}
    questions: dict[str, dict[int, Record]] = {}  # by example, then by rotation
    for record in records:
        if TASKS[record.task].shuffles:
            questions.setdefault(record.example, {})[record.rotation] = record
    groups = list(questions.values())
    flat = [record for group in groups for record in group.values()]
    right = rewards.correctness(answers_of(flat), parsing.targets_of(flat))
    return {"option_order": metrics.option_order(np.asarray(right).reshape(len(groups), -1) > 0)}
