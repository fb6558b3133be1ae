"""GRPO's losses, gradients and advantages equal TRL's.

data/grpo_trl.json holds numbers computed by TRL's own GRPOTrainer (huggingface/trl at f2cd577, Apache-2.0) in float64.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vau_jax import grpo
from vau_jax.files import InputError

GOLDEN = json.loads((Path(__file__).parent / "data" / "grpo_trl.json").read_text())
INPUTS = GOLDEN["inputs"]
OURS = {
    "grpo": "grpo",
    "grpo_kl0.1": "grpo",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "dapo_clip_higher": "dapo",
    "dapo_delta1.1": "dapo",
    "gspo": "gspo",
    "cispo": "cispo",
}


@pytest.fixture(autouse=True)
def float64() -> None:
    with jax.enable_x64(True):
        yield


def settings(name: str) -> SimpleNamespace:
    options = GOLDEN["cases"][name]["opts"]
    low = options.get("eps", INPUTS["default_epsilon"])
    return SimpleNamespace(
        loss_type=OURS[name],
        beta=options.get("beta", 0.0),
        kl="k3",
        epsilon_low=low,
        epsilon_high=options.get("eps_high", INPUTS["default_epsilon_high"] if "eps" not in options else low),
        delta=options.get("delta"),
        max_completion_length=INPUTS["max_completion_length"],
    )


def batch() -> dict[str, np.ndarray]:
    return {
        "mask": np.asarray(INPUTS["mask"]),
        "old_logps": np.asarray(INPUTS["old_per_token_logps"]),
        "ref_logps": np.asarray(INPUTS["ref_per_token_logps"]),
        "advantages": np.asarray(INPUTS["advantages"]),
    }


@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradient_equal_trl(name: str) -> None:
    logps = jnp.asarray(INPUTS["per_token_logps"], jnp.float64)
    value, grad = jax.value_and_grad(lambda x: grpo.loss(x, batch(), settings(name))[0])(logps)
    expected = GOLDEN["cases"][name]
    np.testing.assert_allclose(value, expected["loss"], atol=1e-6)
    np.testing.assert_allclose(grad, np.asarray(expected["grad"]), atol=1e-6)


def test_kl_and_clip_fractions_equal_trl() -> None:
    _, metrics = grpo.loss(jnp.asarray(INPUTS["per_token_logps"], jnp.float64), batch(), settings("grpo_kl0.1"))
    expected = GOLDEN["cases"]["grpo_kl0.1"]["metrics"]
    np.testing.assert_allclose(metrics["kl"], expected["kl"], atol=1e-6)
    np.testing.assert_allclose(metrics["clip/low"], expected["clip_ratio/low_mean"], atol=1e-6)
    np.testing.assert_allclose(metrics["clip/high"], expected["clip_ratio/high_mean"], atol=1e-6)


REWARDS = np.asarray(GOLDEN["advantages"]["rewards_per_func"], np.float64)  # None becomes NaN


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale: str) -> None:
    ours = grpo.group_advantages(REWARDS, GOLDEN["advantages"]["num_generations"], scale)
    np.testing.assert_allclose(ours, GOLDEN["advantages"]["results"][f"sum_then_normalize/{scale}"], atol=1e-6)


def test_weighted_advantages_equal_trl() -> None:
    ours = grpo.group_advantages(REWARDS, GOLDEN["advantages"]["num_generations"], weights=(0.7, 0.3))
    expected = GOLDEN["advantages"]["results"]["sum_then_normalize/group/weights=.7,.3"]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_equal_rewards_give_exactly_zero() -> None:
    assert not np.asarray(grpo.group_advantages(np.full(8, 0.7), 4)).any()


def test_old_log_probs_default_to_the_policys_own() -> None:
    logps = jnp.asarray(INPUTS["per_token_logps"], jnp.float64)
    without = {k: v for k, v in batch().items() if k != "old_logps"}
    own = {**without, "old_logps": np.asarray(logps)}
    a, b = (jax.grad(lambda x, data=data: grpo.loss(x, data, settings("grpo"))[0])(logps) for data in (without, own))
    np.testing.assert_allclose(a, b, atol=1e-12)
    assert np.abs(a).max() > 0


@pytest.mark.parametrize("form", ["k1", "k2", "k3"])
def test_kl_estimates_the_divergence(form: str) -> None:
    """The mean over samples of the policy comes to the exact KL (k2 to second order, for close policies)."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=8)
    p = np.exp(scores) / np.exp(scores).sum()
    near = scores + 0.05 * rng.normal(size=8)
    q = np.exp(near) / np.exp(near).sum()
    expected = np.sum(p * np.log(p / q))
    estimate = np.sum(p * np.asarray(grpo.kl_divergence(np.log(p), np.log(q), form)))
    np.testing.assert_allclose(estimate, expected, rtol=0.05 if form == "k2" else 1e-9)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_masked_tokens_have_no_gradient(loss_type: str) -> None:
    config = settings("grpo_kl0.1")
    config.loss_type = loss_type
    grad = jax.grad(lambda x: grpo.loss(x, batch(), config)[0])(jnp.asarray(INPUTS["per_token_logps"], jnp.float64))
    mask = np.asarray(INPUTS["mask"], bool)
    assert not np.asarray(grad)[~mask].any()
    assert np.asarray(grad)[mask].all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: grpo.group_advantages(np.ones(4), 1), "num_generations=1"),
        (lambda: grpo.group_advantages(np.ones(5), 2), "5 rewards"),
        (lambda: grpo.group_advantages(np.ones(4), 2, scale="sum"), "scale='sum'"),
        (lambda: grpo.loss(jnp.zeros((1, 1)), {}, SimpleNamespace(loss_type="ppo")), "loss_type='ppo'"),
        (lambda: grpo.kl_divergence(jnp.zeros(1), jnp.zeros(1), "k4"), "kl='k4'"),
    ],
)
def test_a_wrong_setting_is_named(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
