"""Runs of RFT that are small, and rollouts of given texts: a worker whose model is never run, its rewards, and what the
loss reads of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tests.runs import small
from vau_jax.rl.outcome import RolloutBatch, SelectedGroups
from vau_jax.rl.rollout import RolloutWorker
from vau_jax.rl.scorer import Scorer
from vau_jax.types import Sampled

REWARD = "tests.reward_functions:{}"


def written(r: RolloutWorker, texts: list[str], limit: int = 16) -> Sampled:
    """Completions of the given texts, each with an end token where there is room."""
    g = r.config.rollout.num_generations
    tokens, mask = np.zeros((len(texts), limit), np.int32), np.zeros((len(texts), limit), bool)
    for i, text in enumerate(texts):
        ids = [*r.scorer.processor.tokenizer(text)["input_ids"], r.scorer.processor.end_tokens[0]][:limit]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    shape = (-1, g, limit)
    return Sampled(tokens.reshape(shape), np.full((len(texts) // g, g, limit), -1.0, np.float32), mask.reshape(shape))


def judged(scorer: tuple, texts: list[str], **changed: Any) -> tuple[RolloutWorker, RolloutBatch]:
    r, host, c = scorer
    c = c.copy_and_resolve_references()
    with c.unlocked():
        c.update_from_flattened_dict(changed)
    r = replace(r, config=c, scorer=Scorer(c, r.scorer.processor))
    return r, r.scorer.read(host, written(r, texts))


def loss_inputs(r: RolloutWorker, draw: RolloutBatch, kl: np.ndarray | None = None) -> dict[str, np.ndarray]:
    return r.loss_inputs(SelectedGroups(draw, None, draw.sampled, []), kl)[0]


def config(model: Path, data: Path, reward: str = "vowels", **changed: Any) -> ConfigDict:
    """Small RFT whose rewards differ between the completions of a random model."""
    c = small("vau_r1_multi_rft", model, data)
    c.user_rewards = ((REWARD.format(reward), 1.0),)
    c.optim.lr, c.optim.schedule, c.remat = 1e-3, "constant", False
    with c.unlocked():
        c.update_from_flattened_dict(changed)
    return c


def assert_close(a: Any, b: Any, atol: float) -> None:
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, err_msg=str(path))
