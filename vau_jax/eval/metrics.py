"""Numbers for question answering, grounding and classification, each with n and a 95% interval; numpy only."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vau_jax.datasets.vau_bench import LABELS
from vau_jax.tasks.parsing import INTERVAL, NORMAL, UNKNOWN, Answers, Parsed
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


def paired(a: np.ndarray, b: np.ndarray, resamples: int = 10000, seed: int = 0) -> dict[str, Any]:
    """{"difference", "low", "high", "p", "n"}: mean of b - a over the same examples, its 95% bootstrap interval, and
    the two-sided p-value that signs of differences are random (by permutation, never below 1 / (resamples + 1))."""
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if not len(difference):
        return {"difference": None, "low": None, "high": None, "p": None, "n": 0}
    found = estimate(difference, seed=seed)
    rng, size, hits, done = np.random.default_rng(seed), abs(difference.sum()), 0, 0
    while done < resamples:  # in pieces: a thousand rows of signs at a time
        count = min(1000, resamples - done)
        sums = rng.choice([-1.0, 1.0], (count, len(difference))) @ difference
        hits, done = hits + int((np.abs(sums) >= size - 1e-9).sum()), done + count
    p = (1 + hits) / (1 + resamples)
    return {"difference": found["value"], "low": found["low"], "high": found["high"], "p": p, "n": len(difference)}


def temporal_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of intervals [..., 2] and [..., 2] in seconds; 0 where both are empty.

    VAU-R1's code divides by the hull, from the first start to the last end: of intervals that overlap it is the union,
    and else the result is 0 either way.
    """
    inner = np.maximum(0.0, np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]))
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def question_answering(parsed: Parsed, target: Target) -> dict[str, Any]:
    """Accuracy over all rows; an answer that could not be read is wrong, and counted."""
    choice, truth = np.asarray(parsed.final.choice), np.asarray(target.choice)
    return {"accuracy": estimate(choice == truth), "unparsed": int((choice < 0).sum())}


def grounding(parsed: Parsed, target: Target, protocol: str = "clean") -> dict[str, Any]:
    """Mean IoU and recall over abnormal rows with a known interval; false alarms over normal videos; and by how many
    seconds start and end are missed where both intervals are there.

    A normal video is a false alarm unless the answer says that there is no anomaly: an unreadable answer is one too.
    With protocol "paper" unreadable answers are left out of IoU and recall.
    """
    kind, said = np.asarray(target.kind), np.asarray(parsed.final.kind)
    interval, truth = np.asarray(parsed.final.interval, np.float64), np.asarray(target.interval, np.float64)
    iou = np.where(said == INTERVAL, temporal_iou(interval, truth), 0.0)
    iou = iou[(kind == INTERVAL) & ((said != UNKNOWN) | (protocol == "clean"))]
    missed = np.abs(interval - truth)[(kind == INTERVAL) & (said == INTERVAL)]
    return {
        "mIoU": estimate(iou),
        **{f"R@{t}": estimate(iou >= t) for t in THRESHOLDS},
        "false_alarms": estimate((said != NORMAL)[kind == NORMAL]),
        "start_error": estimate(missed[:, 0]),
        "end_error": estimate(missed[:, 1]),
        "unparsed": int((said == UNKNOWN).sum()),
    }


def classification(parsed: Parsed, target: Target) -> dict[str, Any]:
    """Binary (normal or not) and multi-class accuracy, macro-F1 over the classes that occur in truth."""
    label, truth = np.asarray(parsed.final.label), np.asarray(target.label)
    binary = ((label == NORMAL_LABEL) == (truth == NORMAL_LABEL)) & (label >= 0)
    return {
        "multiclass": estimate(label == truth),
        "binary": estimate(binary),
        "macro_f1": macro_f1(label, truth),
        "confusion": confusion(label, truth),
        "unparsed": int((label < 0).sum()),
    }


def macro_f1(label: np.ndarray, truth: np.ndarray) -> float | None:
    """Unweighted mean of the F1 of every class that occurs in `truth`."""
    scores = []
    for c in np.unique(truth):
        hits = np.sum((label == c) & (truth == c))
        scores.append(2 * hits / (np.sum(label == c) + np.sum(truth == c)))
    return float(np.mean(scores)) if scores else None


def confusion(label: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """{"labels": names, "counts": [[...]]}: a row for each true class, a column for each class that was said, the last
    one for answers that could not be read; only classes that occur."""
    classes = sorted({*truth.tolist(), *label[label >= 0].tolist()})
    counts = [[int(((truth == t) & (label == c)).sum()) for c in (*classes, -1)] for t in classes]
    return {"labels": [LABELS[c] for c in classes], "counts": counts}


# --- Several answers to a question --------------------------------------------------------------------------------


def pass_at(right: np.ndarray, k: int) -> dict[str, Any]:
    """Chance that one of k answers is right, estimated from n >= k of each question: bool [N, n] (arXiv 2107.03374)."""
    n, wrong = right.shape[1], (~right).sum(1)
    miss = [np.prod([(w - i) / (n - i) for i in range(k)]) if w >= k else 0.0 for w in wrong]
    return estimate(1.0 - np.asarray(miss))


def vote(answers: Answers, task: str, n: int) -> np.ndarray:
    """int [N]: which of a question's n answers the others agree with most, the first of equals; answers are [N * n],
    a question's one after the other. Letters and classes agree or not; intervals by their IoU."""
    groups = jax.tree.map(lambda x: np.asarray(x).reshape(-1, n, *np.shape(x)[1:]), answers)
    if task == "grounding":
        kind = groups.kind
        agree = temporal_iou(groups.interval[:, :, None], groups.interval[:, None])
        agree = np.where((kind == INTERVAL)[:, :, None] & (kind == INTERVAL)[:, None], agree, 0.0)
        agree += (kind == NORMAL)[:, :, None] & (kind == NORMAL)[:, None]
    else:
        value = groups.choice if task == "qa" else groups.label
        agree = ((value[:, :, None] == value[:, None]) & (value >= 0)[:, :, None]).astype(np.float64)
    return np.argmax(agree.sum(2), axis=1)


def option_order(right: np.ndarray) -> dict[str, Any]:
    """Of bool [N, R], each question with its options in R orders: accuracy over all, by order, and the share of
    questions that are right in every order (or in none)."""
    return {
        "accuracy": estimate(right.mean(1)),
        "by_order": [float(x) for x in right.mean(0)],
        "always": estimate(right.all(1)),
        "never": estimate(~right.any(1)),
    }


# --- Frames, as classic anomaly detection scores them -------------------------------------------------------------


def frame_scores(intervals: Sequence[tuple[float, float] | None], duration: float, rate: float = 10.0) -> np.ndarray:
    """Share of the intervals (None: no anomaly) that hold each instant, [duration * rate]: one answer gives 0 or 1,
    several a score between."""
    times = (np.arange(max(1, round(duration * rate))) + 0.5) / rate
    inside = [(times >= i[0]) & (times < i[1]) if i else np.zeros(len(times), bool) for i in intervals]
    return np.mean(inside, axis=0)


def frame_level(scores: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, Any]:
    """Area under the ROC curve and average precision over the instants of all videos together; None where all are
    normal, or none is."""
    score, label = np.concatenate([*scores, []]), np.concatenate([*labels, []]) > 0
    found: dict[str, Any] = {"auc": None, "ap": None, "instants": len(label), "videos": len(scores)}
    if label.any() and not label.all():
        from sklearn.metrics import average_precision_score, roc_auc_score  # noqa: PLC0415 - slow to import

        found |= {"auc": float(roc_auc_score(label, score)), "ap": float(average_precision_score(label, score))}
    return found


# --- Reflection ---------------------------------------------------------------------------------------------------


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
