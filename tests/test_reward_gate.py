"""rewards.gate: nothing without the grammar, or each reward by itself and answers read leniently."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.data.processor import Processor
from vau_jax.rl import scorer
from vau_jax.tasks import parsing

QA, TAG, CLS = (
    ("qa", "B", None, None),
    ("grounding", None, "Fire", (2.0, 6.0)),
    ("classification", None, "Fire", None),
)
NORMAL = ("grounding", None, "Normal", "normal")

# (completion, truth) -> (format, accuracy, tIoU) with the gate, and without
EARNED = {
    ("<think>x</think><answer>B</answer>", QA): ((1, 1, 0), (1, 1, 0)),
    ("The answer is seen. <answer>B</answer>", QA): ((0, 0, 0), (0, 1, 0)),
    ("<answer>C</answer>", QA): ((0, 0, 0), (0, 0, 0)),
    ("A video shows many things", QA): ((0, 0, 0), (0, 0, 0)),
    ("<answer>A, B, C, D</answer>", QA): ((0, 0, 0), (0, 0, 0)),
    ("", QA): ((0, 0, 0), (0, 0, 0)),
    ("<think>x</think><answer>Anomaly</answer><glue>[2, 6]</glue>", TAG): ((1, 1, 1), (1, 1, 1)),
    ("<answer>Anomaly</answer><glue>[2, 6]</glue>", TAG): ((0, 0, 0), (0, 1, 1)),
    ("<glue>[2.0, 4.0]</glue>", TAG): ((0, 0, 0), (0, 1, 0.5)),
    ("<answer>Anomaly</answer>", TAG): ((0, 0, 0), (0, 1, 0)),
    ("<answer>Anomaly</answer><glue>[-1, -1]</glue>", TAG): ((0, 0, 0), (0, 0, 0)),
    ("<answer>Normal</answer><glue>[2, 6]</glue>", TAG): ((0, 0, 0), (0, 0, 0)),
    ("<answer>Anomaly</answer><glue>[-1, -1]</glue>", NORMAL): ((0, 0, 0), (0, 0, 0)),
    ("<answer>Normal</answer>", NORMAL): ((0, 0, 0), (0, 1, 1)),
    ("It is a Fire.", CLS): ((0, 0, 0), (0, 1, 0)),
    ("Fire or Robbery", CLS): ((0, 0, 0), (0, 0, 0)),
}


@pytest.fixture(scope="module", params=["form", "none"])
def gated(request: pytest.FixtureRequest, model_folder: Path) -> scorer.Scorer:
    c = base.get_config()
    c.rewards.gate, c.rewards.tiou = request.param, 1.0
    return scorer.Scorer(c, Processor(model_folder))


@pytest.mark.parametrize(("said", "earned"), EARNED.items(), ids=lambda x: str(x[0])[:40])
def test_what_a_completion_earns(gated: scorer.Scorer, said: tuple, earned: tuple) -> None:
    (text, truth), gate = said, gated.config.rewards.gate
    parsed = parsing.parse([text], truth[0], scorer.GATES[gate])
    columns, *_ = jax.device_get(gated.compute_rewards(parsed, parsing.targets([truth])))
    found = dict(zip(gated.built_in, columns[0], strict=True))
    names = ("format", "accuracy", "tiou")
    np.testing.assert_allclose([found[name] for name in names], earned[gate == "none"], atol=1e-6)


def test_the_gate_is_no_weight() -> None:
    c = base.get_config()
    assert "gate" not in scorer.weights_of(c.rewards) and scorer.weights_of(c.rewards)["format"] == 1.0


def test_an_unknown_gate_lists_the_known() -> None:
    c = base.get_config()
    c.stage, c.rewards.gate = "rft", "loose"
    with pytest.raises(InputError, match=r"rewards\.gate='?loose'?.*form, none"):
        scorer.check(c)


def test_direct_answers_can_earn_accuracy_without_the_gate() -> None:
    c = base.get_config()
    c.stage, c.data.style, c.rewards.format, c.rewards.gate = "rft", "direct", 0.0, "none"
    scorer.check(c)
    c.rewards.gate = "form"
    with pytest.raises(InputError, match="direct can earn none"):
        scorer.check(c)
