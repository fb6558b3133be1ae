"""Statistics that tasks and evaluations report, each with n and a 95% interval; numpy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vau_jax.tasks.example import Interval


def estimate(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """{"value", "n", "low", "high"}: the mean and its 95% interval by a percentile bootstrap over examples.

    Without any example all but n is None.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return {"value": None, "n": 0, "low": None, "high": None}
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return {"value": float(values.mean()), "n": len(values), "low": float(low), "high": float(high)}


def majority(truth: np.ndarray) -> dict[str, Any]:
    """Accuracy of always giving the most frequent answer of these rows (its value under "answer")."""
    values, counts = np.unique(truth, return_counts=True)
    best = values[np.argmax(counts)]
    return {**estimate(truth == best), "answer": int(best)}


def macro_f1(label: np.ndarray, truth: np.ndarray) -> float | None:
    """Unweighted mean of the F1 of every class that occurs in `truth`."""
    scores = []
    for c in np.unique(truth):
        hits = np.sum((label == c) & (truth == c))
        scores.append(2 * hits / (np.sum(label == c) + np.sum(truth == c)))
    return float(np.mean(scores)) if scores else None


def confusion(label: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """{"labels": names, "counts": [[...]]}: a row for each true class, a column for each predicted class, the last for
    unreadable answers; only classes that occur. Indices are into `names`.
    """
    classes = sorted({*truth.tolist(), *label[label >= 0].tolist()})
    counts = [[int(((truth == t) & (label == c)).sum()) for c in (*classes, -1)] for t in classes]
    return {"labels": [names[c] for c in classes], "counts": counts}


def frame_scores(answers: Sequence[Sequence[Interval]], duration: float, rate: float = 10.0) -> np.ndarray:
    """Share of the answers, each a set of intervals, that contain each instant, [duration * rate]: one answer gives 0
    or 1, several give a score in between.
    """
    times = (np.arange(max(1, round(duration * rate))) + 0.5) / rate
    inside = [np.any([(times >= s) & (times < e) for s, e in answer] or [times < 0], axis=0) for answer in answers]
    return np.mean(inside, axis=0)


def frame_level(scores: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, Any]:
    """Area under the ROC curve and average precision over the instants of all videos together; None where all are
    normal, or none is."""
    score, label = np.concatenate([*scores, []]), np.concatenate([*labels, []]) > 0
    result: dict[str, Any] = {"auc": None, "ap": None, "instants": len(label), "videos": len(scores)}
    if label.any() and not label.all():
        from sklearn.metrics import average_precision_score, roc_auc_score  # noqa: PLC0415 - slow to import

        result |= {"auc": float(roc_auc_score(label, score)), "ap": float(average_precision_score(label, score))}
    return result
