"""Rollouts larger than updates, and completions that nobody sampled."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollouts import assert_close, config
from tests.runs import IN_PROPORTION
from vau_jax.common import sharding
from vau_jax.common.files import InputError
from vau_jax.rl.rollout import Clock
from vau_jax.train import loop
from vau_jax.types import TrainBatch


def collected(t: loop.Run) -> tuple[TrainBatch, np.ndarray, dict[str, Any]]:
    train, tokens, metrics, _ = t.worker.collect(t.learner, t.feed.next(), jax.random.fold_in(t.key, 0), Clock())
    return jax.device_put(train, sharding.examples(t.mesh)), tokens, metrics


def test_a_rollout_serves_several_updates_one_after_the_other(model_folder: Path, dataset: Path) -> None:
    """Of its first prompts, then of the next, with the log-probabilities of the policy that sampled."""
    t = loop.Run(config(model_folder, dataset, **{"batch_size": 2, "rollout.batch_size": 4, **IN_PROPORTION}))
    train, tokens, _ = collected(t)
    assert train.completions.tokens.shape[:2] == (4, 4) and len(tokens) == 4
    begun = jax.tree.map(jnp.copy, t.learner.state)
    metrics = t.learner.update(train, tokens)
    assert int(t.learner.state.step) == 2
    together = jax.device_get(t.learner.state.params)
    t.learner.state, each = begun, []
    for half in (slice(0, 2), slice(2, 4)):
        each.append(t.learner.update(jax.tree.map(lambda x, half=half: x[half], train), tokens[half]))
    assert_close(jax.device_get(t.learner.state.params), together, 1e-5)
    assert metrics["loss"] == pytest.approx(np.mean([m["loss"] for m in each]), abs=1e-6)
    t.close()


def test_a_rollout_as_large_as_an_update_is_as_without_the_option(model_folder: Path, dataset: Path) -> None:
    losses = []
    for size in (0, 4):
        t = loop.Run(config(model_folder, dataset, **{"rollout.batch_size": size}))
        losses.append(t.step(0)[0])
        t.close()
    assert losses[0]["loss"] == losses[1]["loss"] and losses[0]["grad_norm"] == losses[1]["grad_norm"]


def test_an_annotated_completion_takes_the_last_place_of_its_group(model_folder: Path, dataset: Path) -> None:
    """It is rewarded and compared like the sampled ones; its log-probabilities are those of the policy."""
    c = config(model_folder, dataset, **{"rollout.annotated": True, "data.max_completion_tokens": 256})
    t = loop.Run(c)
    host = t.feed.next()
    train, tokens, metrics, _ = t.worker.collect(t.learner, host, jax.random.fold_in(t.key, 0), Clock())
    last = np.asarray(train.completions.mask[:, -1])
    np.testing.assert_array_equal(
        np.asarray(train.completions.tokens[:, -1])[last], host.completions.tokens[:, 0][last]
    )
    np.testing.assert_array_equal(last, host.completions.mask[:, 0])
    assert train.completions.tokens.shape[:2] == (4, 4) and tokens.sum() == np.asarray(train.completions.mask).sum()
    policy = np.asarray(t.learner.policy_logps(train.batch, train.completions))[:, -1]
    np.testing.assert_allclose(np.asarray(train.loss_inputs["sampler_logps"])[:, -1][last], policy[last], atol=1e-5)
    assert metrics["annotated/completions"] == 4 and metrics["annotated/reward"] > metrics["reward"]
    assert (np.asarray(train.loss_inputs["advantages"])[:, -1] > 0).all()
    t.close()


def test_a_rollout_that_is_no_multiple_of_updates_is_refused(model_folder: Path, dataset: Path) -> None:
    with pytest.raises(InputError, match=r"rollout\.batch_size=6: expected a multiple of batch_size=4"):
        loop.check(config(model_folder, dataset, **{"rollout.batch_size": 6}))
