"""Rollouts of given texts: a worker whose model is never run, its rewards, and what the loss reads of them."""

from dataclasses import replace
from typing import Any

import numpy as np

from vau_jax.rl.outcome import RolloutBatch, SelectedGroups
from vau_jax.rl.rollout import RolloutWorker
from vau_jax.rl.scorer import Scorer
from vau_jax.types import Completions, Sampled


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


def completions(r: RolloutWorker, draw: RolloutBatch) -> Completions:
    return r.completions(draw.sampled, draw.lengths)


def loss_inputs(r: RolloutWorker, draw: RolloutBatch, kl: np.ndarray | None = None) -> dict[str, np.ndarray]:
    chosen = SelectedGroups(draw, None, draw.sampled, [])
    return r.loss_inputs(chosen, completions(r, draw).mask, kl)[0]
