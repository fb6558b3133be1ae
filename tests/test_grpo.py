"""GRPO's losses, gradients and advantages equal TRL's: on kept numbers, and on inputs drawn afresh.

data/grpo_trl.json holds numbers computed by TRL's own GRPOTrainer (huggingface/trl at f2cd577, Apache-2.0) in float64.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_oracle
from hypothesis import given
from hypothesis import settings as drawing
from hypothesis import strategies as st

from vau_jax.common.files import InputError
from vau_jax.rl import grpo

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


def drawn(seed: int, n: int = 6, c: int = 7) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A random update: policies that differ enough to be clipped, completions of all lengths from none on."""
    rng = np.random.default_rng(seed)
    logps = -rng.exponential(1.0, (n, c))
    near = {name: logps + rng.normal(0, 0.4, (n, c)) for name in ("old_logps", "ref_logps", "sampler_logps")}
    lengths = rng.integers(0, c + 1, n)
    lengths[0] = c
    mask = (np.arange(c) < lengths[:, None]).astype(np.float64)
    return logps, {
        **near,
        "mask": mask,
        "advantages": rng.normal(0, 1, n),
        "entropies": rng.exponential(1.0, (n, c)),
    }


def options(**changed: object) -> SimpleNamespace:
    usual = {
        "loss_type": "grpo",
        "beta": 0.04,
        "kl": "k3",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "delta": 0.0,
        "importance_cap": 0.0,
        "entropy_bonus": 0.0,
        "max_completion_length": 9,
    }
    return SimpleNamespace(**{**usual, **changed})


VARIANTS = {
    "plain": {"beta": 0.0},
    "kl": {},
    "delta": {"delta": 1.5},
    "importance": {"importance_cap": 1.2},
    "entropy": {"entropy_bonus": 0.01},
    "all": {"delta": 1.4, "importance_cap": 1.1, "entropy_bonus": 0.02, "beta": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", [name for name in grpo.LOSS_TYPES if name != "reg_grpo"])
def test_loss_and_gradients_equal_trl_on_drawn_inputs(loss_type: str, variant: str) -> None:
    """Values and gradients to 1e-9: both sides are float64."""
    config = options(loss_type=loss_type, **VARIANTS[variant])
    for seed in range(3):
        logps, data = drawn(seed)
        expected, grads = trl_oracle.loss(logps, data, config)

        def value(logps: jax.Array, entropies: jax.Array, data: dict = data) -> jax.Array:
            return grpo.loss(logps, {**data, "entropies": entropies}, config)[0]

        ours, (by_logps, by_entropies) = jax.value_and_grad(value, argnums=(0, 1))(
            jnp.asarray(logps), jnp.asarray(data["entropies"])
        )
        np.testing.assert_allclose(ours, expected, atol=1e-9)
        np.testing.assert_allclose(by_logps, grads["logps"], atol=1e-9)
        np.testing.assert_allclose(by_entropies, grads["entropies"], atol=1e-9)
        assert np.abs(by_logps).max() > 0


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_parts_of_an_update_add_up_to_the_whole(loss_type: str) -> None:
    """Also where one part has many more tokens than the other."""
    config = options(loss_type=loss_type, entropy_bonus=0.01, num_generations=2)
    logps, data = drawn(4)
    data["mask"][2:] *= np.arange(7) < 2
    whole, grad = jax.value_and_grad(lambda x: grpo.loss(x, data, config)[0])(jnp.asarray(logps))
    share = grpo.totals(data)
    parts = [slice(0, 2), slice(2, 6)]
    pieces = [{k: v[part] for k, v in data.items()} | share for part in parts]
    results = [
        jax.value_and_grad(lambda x, piece=piece: grpo.loss(x, piece, config)[0])(jnp.asarray(logps[part]))
        for part, piece in zip(parts, pieces, strict=True)
    ]
    np.testing.assert_allclose(sum(value for value, _ in results), whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([g for _, g in results]), grad, rtol=1e-6, atol=1e-12)


def test_regression_equals_its_formula() -> None:
    """Mean over completions of (A - (r - mean) / sqrt(var + eps^2))^2, by numpy, group by group."""
    logps, data = drawn(5)
    data["mask"][:, 0] = 1
    config = options(loss_type="reg_grpo", beta=0.0, num_generations=3, regression_eps=0.5)
    ratio = ((logps - data["old_logps"]) * data["mask"]).sum(1).reshape(2, 3)
    predicted = (ratio - ratio.mean(1, keepdims=True)) / np.sqrt(ratio.var(1, ddof=1, keepdims=True) + 0.25)
    expected = np.mean((data["advantages"] - predicted.reshape(-1)) ** 2)
    np.testing.assert_allclose(grpo.loss(jnp.asarray(logps), data, config)[0], expected, rtol=1e-9)


def test_regression_begins_as_twice_the_policy_gradient() -> None:
    logps, data = drawn(6)
    data["mask"][:, 0] = 1
    data["advantages"] -= np.repeat(data["advantages"].reshape(2, 3).mean(1), 3)
    data["old_logps"] = logps
    config = options(loss_type="reg_grpo", beta=0.0, num_generations=3)
    grad = jax.grad(lambda x: grpo.loss(x, data, config)[0])(jnp.asarray(logps))
    np.testing.assert_allclose(grad, -2 / 6 * data["advantages"][:, None] * data["mask"], atol=1e-9)


def test_kl_in_the_reward_leaves_the_loss_alone() -> None:
    logps, data = drawn(7)
    inside, metrics = grpo.loss(jnp.asarray(logps), data, options(kl_in="reward"))
    without, _ = grpo.loss(jnp.asarray(logps), data, options(beta=0.0))
    np.testing.assert_allclose(inside, without, atol=1e-12)
    assert metrics["kl"] > 0


def test_the_overlong_penalty_equals_trl() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = np.arange(1, 121)
    theirs = get_soft_overlong_punishment(100, 20)([[0] * length for length in lengths])
    np.testing.assert_allclose(grpo.overlong_penalty(lengths, 100, 20), theirs, atol=1e-12)


REWARDS = np.asarray(GOLDEN["advantages"]["rewards_per_func"], np.float64)  # None becomes NaN


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale: str) -> None:
    ours = grpo.group_advantages(REWARDS, GOLDEN["advantages"]["num_generations"], scale)
    np.testing.assert_allclose(ours, GOLDEN["advantages"]["results"][f"sum_then_normalize/{scale}"], atol=1e-6)


def test_weighted_advantages_equal_trl() -> None:
    ours = grpo.group_advantages(REWARDS, GOLDEN["advantages"]["num_generations"], weights=(0.7, 0.3))
    expected = GOLDEN["advantages"]["results"]["sum_then_normalize/group/weights=.7,.3"]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_advantages_of_each_reward_by_itself_equal_trl() -> None:
    ours = grpo.group_advantages(REWARDS, GOLDEN["advantages"]["num_generations"], per_reward=True)
    np.testing.assert_allclose(ours, GOLDEN["advantages"]["results"]["normalize_then_sum"], atol=1e-6)


@drawing(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5), st.integers(1, 3))
def test_advantages_equal_numpy(seed: int, prompts: int, g: int, count: int) -> None:
    """Written out completion by completion; both ways of normalising."""
    rng = np.random.default_rng(seed)
    rewards, weights = rng.normal(size=(prompts * g, count)), rng.uniform(0.1, 2, count)
    by_group = (rewards @ weights).reshape(prompts, g)
    expected = [(r - row.mean()) / (row.std(ddof=1) + 1e-4) for row in by_group for r in row]
    np.testing.assert_allclose(grpo.group_advantages(rewards, g, weights=weights), expected, rtol=1e-7, atol=1e-9)
    each = np.zeros(prompts * g)
    for k in range(count):
        column = rewards[:, k].reshape(prompts, g)
        scaled = (column - column.mean(1, keepdims=True)) / (column.std(1, ddof=1, keepdims=True) + 1e-4)
        each += weights[k] * scaled.reshape(-1)
    expected = (each - each.mean()) / (each.std(ddof=1) + 1e-4)
    ours = grpo.group_advantages(rewards, g, weights=weights, per_reward=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("per_reward", [False, True])
def test_equal_rewards_give_exactly_zero(per_reward: bool) -> None:
    assert not np.asarray(grpo.group_advantages(np.full(8, 0.75), 4, per_reward=per_reward)).any()


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
    config.loss_type, config.num_generations = loss_type, 3
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
