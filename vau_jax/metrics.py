"""Numbers for question answering, grounding and classification, each with n and a 95% interval; numpy only."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vau_jax.data.annotations import LABELS
from vau_jax.parsing import INTERVAL, NORMAL, Parsed
from vau_jax.types import Target

THRESHOLDS = (0.3, 0.5, 0.7)
NORMAL_LABEL = LABELS.index("Normal")


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


def temporal_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of intervals [..., 2] and [..., 2] in seconds; 0 where both are empty."""
    inner = np.maximum(0.0, np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]))
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def question_answering(parsed: Parsed, target: Target) -> dict[str, Any]:
    """Accuracy over all rows; an answer that could not be read is wrong, and counted."""
    choice, truth = np.asarray(parsed.final.choice), np.asarray(target.choice)
    return {"accuracy": estimate(choice == truth), "unparsed": int((choice < 0).sum())}


def grounding(parsed: Parsed, target: Target) -> dict[str, Any]:
    """Mean IoU and recall over abnormal rows with a known interval; false alarms over normal videos.

    A normal video is a false alarm unless the answer says that there is no anomaly: an unreadable answer is one too.
    """
    kind, known = np.asarray(target.kind), np.asarray(parsed.final.kind) == INTERVAL
    iou = np.where(known, temporal_iou(np.asarray(parsed.final.interval), np.asarray(target.interval)), 0.0)[
        kind == INTERVAL
    ]
    quiet = (np.asarray(parsed.final.kind) == NORMAL) & (np.asarray(parsed.final.anomaly) != 1)
    return {
        "mIoU": estimate(iou),
        **{f"R@{t}": estimate(iou >= t) for t in THRESHOLDS},
        "false_alarms": estimate(~quiet[kind == NORMAL]),
        "unparsed": int((np.asarray(parsed.final.kind) == 0).sum()),
    }


def classification(parsed: Parsed, target: Target) -> dict[str, Any]:
    """Binary (normal or not) and multi-class accuracy, macro-F1 over the classes that occur in truth."""
    label, truth = np.asarray(parsed.final.label), np.asarray(target.label)
    binary = ((label == NORMAL_LABEL) == (truth == NORMAL_LABEL)) & (label >= 0)
    return {
        "multiclass": estimate(label == truth),
        "binary": estimate(binary),
        "macro_f1": macro_f1(label, truth),
        "unparsed": int((label < 0).sum()),
    }


def description(parsed: Parsed, target: Target) -> dict[str, Any]:
    """Share that keeps the grammar: what a description is worth, a judge says."""
    return {"form": estimate(np.asarray(parsed.form))}


def macro_f1(label: np.ndarray, truth: np.ndarray) -> float | None:
    """Unweighted mean of the F1 of every class that occurs in `truth`."""
    scores = []
    for c in np.unique(truth):
        hits = np.sum((label == c) & (truth == c))
        scores.append(2 * hits / (np.sum(label == c) + np.sum(truth == c)))
    return float(np.mean(scores)) if scores else None


def reflection(draft: np.ndarray, final: np.ndarray) -> dict[str, Any]:
    """Of scores in [0, 1] before and after reflection: how often it helped, changed nothing, or broke an answer, and
    what it gained (for grounding, in temporal IoU)."""
    return {
        "draft": estimate(draft),
        "final": estimate(final),
        "corrected": estimate(final > draft),
        "kept": estimate(final == draft),
        "broken": estimate(final < draft),
        "gain": estimate(final - draft),
    }


# --- What can be had without looking ------------------------------------------------------------------------------


def majority(truth: np.ndarray) -> dict[str, Any]:
    """Accuracy of always giving the commonest answer of these very rows (its value under "answer")."""
    values, counts = np.unique(truth, return_counts=True)
    best = values[np.argmax(counts)]
    return {**estimate(truth == best), "answer": int(best)}


def best_constant_interval(intervals: np.ndarray, step: float = 0.5) -> dict[str, Any]:
    """Mean IoU of the one interval that, said of every video, scores best on these very rows ("answer", seconds)."""
    if not len(intervals):
        return {**estimate(np.zeros(0)), "answer": None}
    grid = np.arange(0.0, float(intervals.max()) + step, step)
    best, best_iou = (0.0, 0.0), np.zeros(len(intervals))
    for start in grid:
        ends = grid[grid > start]
        candidates = np.stack([np.full_like(ends, start), ends], -1)  # [E, 2]
        iou = temporal_iou(candidates[:, None], np.asarray(intervals, np.float64)[None])  # [E, N]
        if len(ends) and iou.mean(1).max() > best_iou.mean():
            winner = int(np.argmax(iou.mean(1)))
            best, best_iou = (float(start), float(ends[winner])), iou[winner]
    return {**estimate(best_iou), "answer": list(best)}


TASK_METRICS: dict[str, Callable[[Parsed, Target], dict[str, Any]]] = {
    "qa": question_answering,
    "grounding": grounding,
    "classification": classification,
    "description": description,
}


def baselines(target: Target, task: str) -> dict[str, Any]:
    """The constant guesses that every table shows beside a model."""
    if task == "qa":
        return {"majority_letter": majority(np.asarray(target.choice))}
    if task == "classification":
        return {"majority_class": majority(np.asarray(target.label))}
    if task == "description":
        return {}
    known = np.asarray(target.kind) == INTERVAL
    return {"best_constant_interval": best_constant_interval(np.asarray(target.interval)[known])}


def select(tree: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """The given rows of a Parsed or Target."""

    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)
