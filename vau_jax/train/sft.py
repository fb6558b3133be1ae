"""Supervised fine-tuning: the loss, with the same signature as `grpo.loss`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def loss(
    logps: jax.Array, batch: Mapping[str, jax.Array], config: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean negative log-probability of the target tokens, and no metrics.

    logps [N, C]; batch: `weights` [N, C], 0 on padding and on what the model should not imitate; for a part of an
    update, `num_tokens` of the whole (see `totals`). A batch without any weight has loss 0.
    """
    count = batch["num_tokens"] if "num_tokens" in batch else totals(batch)["num_tokens"]
    return -jnp.sum(batch["weights"] * logps) / count, {}


def totals(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The sum of an update's weights, that its loss is divided by."""
    return {"num_tokens": jnp.maximum(jnp.sum(batch["weights"], dtype=jnp.float32), 1e-6)}
