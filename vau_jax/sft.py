"""Supervised fine-tuning: the loss, with the same signature as `grpo.loss`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def loss(
    logps: jax.Array, batch: Mapping[str, jax.Array], config: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean negative log-probability of the target tokens.

    logps [N, C]; batch: `weights` [N, C], 0 on padding and on what the model should not imitate. Returns the loss and
    its metrics; a batch without any weight has loss 0.
    """
    weights = batch["weights"]
    total = jnp.maximum(weights.sum(), 1e-6)
    value = -jnp.sum(weights * logps) / total
    return value, {"perplexity": jnp.exp(value), "tokens": (weights > 0).sum().astype(jnp.float32)}
