"""Scores against independent code and hand-worked cases."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.records import record
from vau_jax.datasets.vau_bench import LABELS, load
from vau_jax.eval import metrics
from vau_jax.eval.scores import score
from vau_jax.tasks import TASKS, grounding, parsing, qa, statistics
from vau_jax.tasks.intervals import temporal_iou
from vau_jax.tasks.record import Record


def grounded(
    glue: str,
    interval: object = (2.0, 6.0),
    label: str = "Fire",
    answer: str = "Anomaly",
    style: str = "think",
    failure: str | None = None,
) -> Record:
    text = f"<think>t</think><answer>{answer}</answer><glue>{glue}</glue>"
    return record("grounding", text, style, failure, anomaly_class=label, interval=interval)


def test_hand_worked_grounding() -> None:
    records = [
        grounded("[2.0, 6.0]"),
        grounded("[4.0, 8.0]"),
        grounded("[-1.0, -1.0]", answer="Normal"),
        grounded("[2.0, 6.0]", failure="no such file"),
        grounded("[-1.0, -1.0]", "normal", "Normal", "Normal"),
        grounded("[1.0, 2.0]", "normal", "Normal"),
    ]
    result = score(records)["tasks"]["grounding"]
    assert result["mIoU"]["value"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert (result["R@0.3"]["value"], result["R@0.5"]["value"]) == (0.5, 0.25)
    assert result["mIoU"]["n"] == 4
    assert (result["false_alarms"]["value"], result["false_alarms"]["n"]) == (0.5, 2)
    assert result["unparsed"] == 1


def test_an_unreadable_answer_on_a_normal_video_is_a_false_alarm() -> None:
    records = [grounded("?", "normal", "Normal", "")]
    assert score(records)["tasks"]["grounding"]["false_alarms"]["value"] == 1.0


@pytest.mark.parametrize(("answer", "glue"), [("Anomaly", "[-1, -1]"), ("Normal", "[2, 6]")])
def test_an_answer_that_contradicts_its_time_is_wrong_on_every_video_and_counted(answer: str, glue: str) -> None:
    records = [grounded(glue, answer=answer), grounded(glue, "normal", "Normal", answer)]
    result = score(records)
    found = result["tasks"]["grounding"]
    assert (found["mIoU"]["value"], found["false_alarms"]["value"], found["unparsed"]) == (0.0, 1.0, 2)
    assert [estimate["value"] for estimate in result["by_class"]["grounding"].values()] == [0.0, 0.0]


def test_no_number_that_a_model_writes_makes_a_score_that_is_none() -> None:
    """Strict JSON has neither Infinity nor NaN."""
    numbers = ("9" * 38, "9" * 39, "9" * 400, "9" * 5000, "0." + "0" * 400 + "1")
    records = [grounded(f"[{a}, {b}]") for a, b in itertools.product(("0", *numbers), numbers)]
    texts = [[r.completions[0], f"from {'9' * 39}:00 to 5"] for r in records]
    json.dumps(score([record("grounding", pair, "reflection") for pair in texts]), allow_nan=False)


def test_the_best_constant_interval_scores_what_the_baseline_says(vau_bench: Path) -> None:
    rows, _ = load(vau_bench / "test_msad.csv")
    target = parsing.targets([("grounding", None, r.anomaly_class, r.interval) for r in rows if "grounding" in r.tasks])
    best = grounding.TASK.baselines(target, [])["best_constant_interval"]
    text = f"<think>t</think><answer>Anomaly</answer><glue>{best['answer']}</glue>"
    final = parsing.parse([text] * len(target.task), "grounding", "lenient").final
    expected = {name: value for name, value in best.items() if name != "answer"}
    assert grounding.TASK.metrics(final, target, [], "clean")["mIoU"] == pytest.approx(expected)


def test_hand_worked_classification() -> None:
    texts = [("Fire", "Fire"), ("Normal", "Normal"), ("Explosion", "Fire"), ("???", "Fire"), ("Fire", "Normal")]
    records = [record("classification", f"<answer>{said}</answer>", anomaly_class=label) for said, label in texts]
    result = score(records)["tasks"]["classification"]
    assert result["multiclass"]["value"] == 0.4
    assert result["binary"]["value"] == 0.6
    assert result["unparsed"] == 1
    fire, normal = 2 * 1 / (2 + 3), 2 * 1 / (1 + 2)
    assert result["macro_f1"] == pytest.approx((fire + normal) / 2)


def test_failed_videos_count_as_wrong() -> None:
    records = [record("qa", "<answer>B</answer>"), record("qa", "<answer>B</answer>", failure="no such file")]
    result = score(records)["tasks"]["qa"]
    assert (result["accuracy"]["value"], result["accuracy"]["n"], result["unparsed"]) == (0.5, 2, 1)


def test_macro_f1_equals_scikit_learn(rng: np.random.Generator) -> None:
    from sklearn.metrics import f1_score

    truth, said = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    assert statistics.macro_f1(said, truth) == pytest.approx(f1_score(truth, said, average="macro"))


def test_interval_covers_the_mean_about_as_often_as_it_says(rng: np.random.Generator) -> None:
    """95% intervals of 80 draws hold the true mean in 90 to 99% of 300 repetitions."""
    found = [statistics.estimate(rng.random(80) < 0.3, resamples=400) for _ in range(300)]
    assert 0.90 <= np.mean([e["low"] <= 0.3 <= e["high"] for e in found]) <= 0.99


def test_interval_width_is_the_textbooks(rng: np.random.Generator) -> None:
    values = rng.normal(size=400)
    found = statistics.estimate(values)
    half = stats.norm.ppf(0.975) * values.std() / 20
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_no_examples_have_no_value() -> None:
    assert statistics.estimate(np.zeros(0)) == {"value": None, "n": 0, "low": None, "high": None}


def iou(a: list[float], b: list[float]) -> float:
    return float(temporal_iou(np.asarray([a]), np.asarray([b])))


intervals = st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted)


@settings(max_examples=200, deadline=None)
@given(intervals, intervals)
def test_the_hull_that_vau_r1_divides_by_gives_the_same(a: list[float], b: list[float]) -> None:
    inner = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    hull = max(a[1], b[1]) - min(a[0], b[0])
    expected = inner / hull if hull > 0 else 0.0
    assert iou(a, b) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(intervals, intervals)
def test_temporal_iou_is_symmetric_and_bounded(a: list[float], b: list[float]) -> None:
    forth, back = (iou(x, y) for x, y in ((a, b), (b, a)))
    assert forth == pytest.approx(back)
    assert 0 <= forth <= 1 + 1e-9
    assert iou(a, a) == pytest.approx(float(a[1] > a[0]))


def test_best_constant_interval_beats_every_other(rng: np.random.Generator) -> None:
    truth = np.sort(rng.uniform(0, 12, (60, 2)), axis=1)
    best = grounding.best_constant_interval(truth[:, None])
    for guess in np.sort(rng.integers(0, 24, (200, 2)) / 2, axis=1):
        assert temporal_iou(guess[None, None].astype(float), truth[:, None]).mean() <= best["value"] + 1e-9
    assert temporal_iou(np.asarray([[best["answer"]]]), truth[:, None]).mean() == pytest.approx(best["value"])


# --- Several answers, orders, frames, runs ------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_with_a_right_one(rng: np.random.Generator) -> None:
    """Brute force over all choices of k of the n answers."""
    right = rng.random((7, 6)) < 0.4
    for k in (1, 2, 4, 6):
        chosen = [list(c) for c in itertools.combinations(range(6), k)]
        expected = np.mean([[right[i, c].any() for c in chosen] for i in range(7)])
        assert metrics.pass_at(right, k)["value"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "texts", "winner"),
    [
        ("qa", ["A", "B", "B"], 1),
        ("qa", ["A", "?", "B"], 0),
        ("qa", ["?", "?", "C"], 2),
        ("classification", ["Fire", "Normal", "fire"], 0),
        ("grounding", ["[0, 4]", "[1, 5]", "[2, 6]"], 1),
        ("grounding", ["[0, 4]", "[-1, -1]", "[-1, -1]"], 1),
    ],
)
def test_the_vote_goes_to_the_answer_that_others_agree_with(task: str, texts: list[str], winner: int) -> None:
    form = "<answer>Anomaly</answer><glue>{}</glue>" if task == "grounding" else "<answer>{}</answer>"
    parsed = parsing.parse([form.format(t).replace("Anomaly", "") for t in texts] * 2, task, "lenient")
    assert metrics.vote(parsed.final, TASKS[task], 3).tolist() == [winner, winner]


def test_sensitivity_to_the_order_of_options() -> None:
    found = metrics.option_order(np.asarray([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool))
    assert found["accuracy"]["value"] == pytest.approx(5 / 12) and found["accuracy"]["n"] == 3
    assert found["by_order"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert (found["always"]["value"], found["never"]["value"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_confusion_equals_scikit_learn(rng: np.random.Generator) -> None:
    from sklearn.metrics import confusion_matrix

    truth, said = rng.integers(0, 5, 300), rng.integers(-1, 5, 300)
    found = statistics.confusion(said, truth, LABELS)
    assert found["labels"] == list(LABELS[:5])
    expected = confusion_matrix(truth, np.where(said < 0, 5, said), labels=range(6))[:5]
    assert found["counts"] == expected.tolist()


def test_frame_scores_and_their_area(rng: np.random.Generator) -> None:
    """Of one answer, and of several, which give scores between; beside counting pairs of instants."""
    assert statistics.frame_scores([[(1.0, 2.0)]], 3.0, rate=2.0).tolist() == [0, 0, 1, 1, 0, 0]
    assert statistics.frame_scores([[(1.0, 2.0)], []], 2.0, rate=2.0).tolist() == [0, 0, 0.5, 0.5]
    scores = [rng.integers(0, 4, 30) / 3 for _ in range(4)]
    labels = [rng.random(30) < 0.3 for _ in range(4)]
    found = statistics.frame_level(scores, labels)
    s, y = np.concatenate(scores), np.concatenate(labels)
    pairs = s[y][:, None] - s[~y][None]
    assert found["auc"] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    assert (found["instants"], found["videos"]) == (120, 4) and 0 < found["ap"] < 1
    assert statistics.frame_level(scores, [np.zeros(30)] * 4)["auc"] is None


def test_paired_differences_find_what_is_there_and_nothing_else(rng: np.random.Generator) -> None:
    a = rng.random(200)
    better = metrics.paired(a, a + 0.1 + 0.2 * rng.normal(size=200))
    assert better["p"] < 1e-3 and better["low"] > 0 and better["n"] == 200
    chances = [metrics.paired(a, a + 0.2 * rng.normal(size=200), resamples=400, seed=i)["p"] for i in range(200)]
    assert 0.01 <= np.mean(np.asarray(chances) < 0.05) <= 0.10
    assert metrics.paired(a, a)["p"] == 1.0


def test_the_paired_p_value_is_that_of_scipys_permutation_test(rng: np.random.Generator) -> None:
    a = rng.random(30)
    b = a + 0.08 + 0.2 * rng.normal(size=30)
    exact = stats.permutation_test((b - a,), np.mean, permutation_type="samples", n_resamples=10000, rng=1)
    assert metrics.paired(a, b)["p"] == pytest.approx(exact.pvalue, abs=0.01)


def test_in_the_papers_grounding_only_absent_predictions_drop_out() -> None:
    """By hand: [4, 8] beside [2, 6] is 2 of 6; "?" counts 0, as their evaluator reads it as (0, 0); the video that
    failed is left out, and in the clean protocol 0."""
    texts = ["[2.0, 6.0]", "[4.0, 8.0]", "?", ""]
    records = [replace(grounded(text), failure=None if text else "damaged") for text in texts]
    final = parsing.parse([r.completions[0] * (not r.failure) for r in records], "grounding", "lenient").final
    target = parsing.targets([("grounding", None, "Fire", (2.0, 6.0))] * 4)
    paper, clean = (grounding.TASK.metrics(final, target, records, protocol) for protocol in ("paper", "clean"))
    assert paper["mIoU"]["n"] == 3 and paper["mIoU"]["value"] == pytest.approx((1 + 1 / 3) / 3)
    assert clean["mIoU"]["n"] == 4 and clean["mIoU"]["value"] == pytest.approx((1 + 1 / 3) / 4)
    assert (clean["start_error"]["value"], clean["end_error"]["value"], clean["start_error"]["n"]) == (1.0, 1.0, 2)


def test_in_the_papers_qa_unreadable_answers_and_failed_videos_leave_the_denominator() -> None:
    texts = ["<answer>A</answer>", "<answer>B</answer>", "no letter", ""]
    records = [replace(grounded(text), task="qa", failure=None if text else "damaged") for text in texts]
    final = parsing.parse(texts, "qa", "lenient").final
    target = parsing.targets([("qa", "A", None, None)] * 4)
    paper, clean = (qa.TASK.metrics(final, target, records, protocol)["accuracy"] for protocol in ("paper", "clean"))
    assert (paper["n"], paper["value"]) == (2, 0.5)
    assert (clean["n"], clean["value"]) == (4, 0.25)


def test_majority_is_the_commonest_answer() -> None:
    target = parsing.targets([("classification", None, label, None) for label in ("Fire", "Fire", "Normal")])
    assert statistics.majority(target.label)["value"] == pytest.approx(2 / 3)
    assert statistics.majority(target.label)["answer"] == LABELS.index("Fire")


def test_reflection_counts_corrections_and_damage() -> None:
    found = metrics.reflection(np.asarray([0.0, 1.0, 1.0, 0.5]), np.asarray([1.0, 1.0, 0.0, 0.7]))
    assert (found["corrected"]["value"], found["broken"]["value"]) == (0.5, 0.25)
