"""Metrics over several answers to a question, of reflection, and of the difference of two evaluations."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vau_jax.tasks.base import Task
from vau_jax.tasks.columns import Columns
from vau_jax.tasks.statistics import estimate


def paired(a: np.ndarray, b: np.ndarray, resamples: int = 10000, seed: int = 0) -> dict[str, Any]:
    """{"difference", "low", "high", "p", "n"}: mean of b - a over the same examples, its 95% bootstrap interval, and
    the two-sided p-value that signs of differences are random (by permutation, never below 1 / (resamples + 1))."""
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if not len(difference):
        return {"difference": None, "low": None, "high": None, "p": None, "n": 0}
    mean = estimate(difference, seed=seed)
    rng, size, hits, done = np.random.default_rng(seed), abs(difference.sum()), 0, 0
    while done < resamples:  # in chunks of a thousand rows of signs
        count = min(1000, resamples - done)
        sums = rng.choice([-1.0, 1.0], (count, len(difference))) @ difference
        hits, done = hits + int((np.abs(sums) >= size - 1e-9).sum()), done + count
    p = (1 + hits) / (1 + resamples)
    return {"difference": mean["value"], "low": mean["low"], "high": mean["high"], "p": p, "n": len(difference)}


def pass_at(right: np.ndarray, k: int) -> dict[str, Any]:
    """Chance that one of k answers is right, estimated from n >= k of each question: bool [N, n] (arXiv 2107.03374)."""
    n, wrong = right.shape[1], (~right).sum(1)
    miss = [np.prod([(w - i) / (n - i) for i in range(k)]) if w >= k else 0.0 for w in wrong]
    return estimate(1.0 - np.asarray(miss))


def vote(answers: Columns, task: Task, n: int) -> np.ndarray:
    """int [N]: the index of a question's answer that agrees most with its n answers, the first of equals; answers are
    [N * n], grouped by question.
    """
    groups = jax.tree.map(lambda x: np.asarray(x).reshape(-1, n, *np.shape(x)[1:]), answers)
    return np.argmax(task.agreement(groups).sum(2), axis=1)


def option_order(right: np.ndarray) -> dict[str, Any]:
    """From bool [N, R], each question with its options in R orders: accuracy over all, by order, and the share of
    questions that are right in every order (or in none).
    """
    return {
        "accuracy": estimate(right.mean(1)),
        "by_order": [float(x) for x in right.mean(0)],
        "always": estimate(right.all(1)),
        "never": estimate(~right.any(1)),
    }


def reflection(draft: np.ndarray, final: np.ndarray) -> dict[str, Any]:
    """From scores in [0, 1] before and after reflection: how often it improved, kept or broke an answer, and its gain
    (for grounding, in temporal IoU).
    """
    return {
        "draft": estimate(draft),
        "final": estimate(final),
        "corrected": estimate(final > draft),
        "kept": estimate(final == draft),
        "broken": estimate(final < draft),
        "gain": estimate(final - draft),
    }


def select(tree: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """The given rows of a Parsed or Columns."""

    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)
