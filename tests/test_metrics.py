"""Scores against independent code and hand-worked cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vau_jax import metrics, parsing
from vau_jax.data.annotations import LABELS
from vau_jax.evaluate import score


def record(
    task: str,
    completion: str,
    answer: str = "A",
    label: str = "Fire",
    interval: object = None,
    failure: str | None = None,
) -> dict:
    return {
        "task": task,
        "completion": completion,
        "answer": answer,
        "anomaly_class": label,
        "interval": interval,
        "failure": failure,
    }


def grounded(glue: str, interval: object = (2.0, 6.0), label: str = "Fire", answer: str = "Anomaly") -> dict:
    return record(
        "grounding", f"<think>t</think><answer>{answer}</answer><glue>{glue}</glue>", label=label, interval=interval
    )


def test_hand_worked_grounding() -> None:
    records = [
        grounded("[2.0, 6.0]"),
        grounded("[4.0, 8.0]"),
        grounded("[-1.0, -1.0]", answer="Normal"),
        {**grounded("[2.0, 6.0]"), "failure": "no such file"},
        grounded("[2.0, 6.0]", None),
        grounded("[-1.0, -1.0]", "normal", "Normal", "Normal"),
        grounded("[1.0, 2.0]", "normal", "Normal"),
    ]
    result = score(records, reflection=False)["tasks"]["grounding"]
    assert result["mIoU"]["value"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert (result["R@0.3"]["value"], result["R@0.5"]["value"]) == (0.5, 0.25)
    assert result["mIoU"]["n"] == 4
    assert (result["false_alarms"]["value"], result["false_alarms"]["n"]) == (0.5, 2)
    assert result["unparsed"] == 1


def test_an_unreadable_answer_on_a_normal_video_is_a_false_alarm() -> None:
    records = [grounded("?", "normal", "Normal", "")]
    assert score(records, reflection=False)["tasks"]["grounding"]["false_alarms"]["value"] == 1.0


def test_hand_worked_classification() -> None:
    texts = [("Fire", "Fire"), ("Normal", "Normal"), ("Explosion", "Fire"), ("???", "Fire"), ("Fire", "Normal")]
    records = [record("classification", f"<answer>{said}</answer>", label=label) for said, label in texts]
    result = score(records, reflection=False)["tasks"]["classification"]
    assert result["multiclass"]["value"] == 0.4
    assert result["binary"]["value"] == 0.6
    assert result["unparsed"] == 1
    fire, normal = 2 * 1 / (2 + 3), 2 * 1 / (1 + 2)
    assert result["macro_f1"] == pytest.approx((fire + normal) / 2)


def test_failed_videos_count_as_wrong() -> None:
    records = [record("qa", "<answer>A</answer>"), record("qa", "<answer>A</answer>", failure="no such file")]
    result = score(records, reflection=False)["tasks"]["qa"]
    assert (result["accuracy"]["value"], result["accuracy"]["n"], result["unparsed"]) == (0.5, 2, 1)


def test_macro_f1_equals_scikit_learn(rng: np.random.Generator) -> None:
    from sklearn.metrics import f1_score

    truth, said = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    assert metrics.macro_f1(said, truth) == pytest.approx(f1_score(truth, said, average="macro"))


def test_interval_covers_the_mean_about_as_often_as_it_says(rng: np.random.Generator) -> None:
    """95% intervals of 80 draws hold the true mean in 90 to 99% of 300 repetitions."""
    found = [metrics.estimate(rng.random(80) < 0.3, resamples=400) for _ in range(300)]
    assert 0.90 <= np.mean([e["low"] <= 0.3 <= e["high"] for e in found]) <= 0.99


def test_interval_width_is_the_textbooks(rng: np.random.Generator) -> None:
    values = rng.normal(size=400)
    found = metrics.estimate(values)
    half = stats.norm.ppf(0.975) * values.std() / 20
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_no_examples_have_no_value() -> None:
    assert metrics.estimate(np.zeros(0)) == {"value": None, "n": 0, "low": None, "high": None}


intervals = st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted)


@settings(max_examples=200, deadline=None)
@given(intervals, intervals)
def test_temporal_iou_is_symmetric_and_bounded(a: list[float], b: list[float]) -> None:
    forth, back = (float(metrics.temporal_iou(np.asarray(x), np.asarray(y))) for x, y in ((a, b), (b, a)))
    assert forth == pytest.approx(back)
    assert 0 <= forth <= 1 + 1e-9
    assert float(metrics.temporal_iou(np.asarray(a), np.asarray(a))) == pytest.approx(float(a[1] > a[0]))


def test_best_constant_interval_beats_every_other(rng: np.random.Generator) -> None:
    truth = np.sort(rng.uniform(0, 12, (60, 2)), axis=1)
    best = metrics.best_constant_interval(truth)
    for guess in np.sort(rng.integers(0, 24, (200, 2)) / 2, axis=1):
        assert metrics.temporal_iou(guess[None].astype(float), truth).mean() <= best["value"] + 1e-9
    assert metrics.temporal_iou(np.asarray([best["answer"]]), truth).mean() == pytest.approx(best["value"])


def test_majority_is_the_commonest_answer() -> None:
    target = parsing.targets([("classification", None, label, None) for label in ("Fire", "Fire", "Normal")])
    assert metrics.majority(target.label)["value"] == pytest.approx(2 / 3)
    assert metrics.majority(target.label)["answer"] == LABELS.index("Fire")


def test_reflection_counts_corrections_and_damage() -> None:
    found = metrics.reflection(np.asarray([0.0, 1.0, 1.0, 0.5]), np.asarray([1.0, 1.0, 0.0, 0.7]))
    assert (found["corrected"]["value"], found["broken"]["value"]) == (0.5, 0.25)
