"""The interface that the rest of the project uses of a model: methods that are functions of parameters and batches.

`QwenVL` is the one implementation; a new architecture is another class with these methods. Axes: see `vau_jax.types`.
"""

from typing import Any, Protocol

import jax

from vau_jax.models.packing import Packing
from vau_jax.types import Batch, Completions, Features, KVCache, Variables


class Model(Protocol):
    """Methods marked `apply` run as `model.apply(variables, ..., method="name")`. The vision tower is optional: a model
    without one takes batches whose `vision` is None, and its `encode_vision` is never called.
    """

    config: Any
    dtype: Any

    def encode_vision(self, batch: Batch) -> Features:
        """apply: visual features of the batch's patches, tokens [B, M, D]; features are returned unchanged."""

    def hidden(self, batch: Batch, completions: Completions | None = None, packing: Packing | None = None) -> jax.Array:
        """apply: last hidden states [B, T + N, D] of prompts and of their completions, packed into N tokens, which
        attend to the prompt and themselves. Sows totals of auxiliary losses among the "losses".
        """

    def prefill(self, batch: Batch) -> tuple[jax.Array, KVCache]:
        """apply: hidden states [B, T, D] of the prompts, and their cache [L, B, K, T, H]."""

    def decode(
        self, tokens: jax.Array, batch: Batch, step: jax.Array, caches: tuple[KVCache, KVCache]
    ) -> tuple[jax.Array, KVCache]:
        """apply: one step of all completions: tokens int32 [B, G] at completion position `step` to hidden states
        [B, G, D] and new keys and values [L, B, G, K, H]."""

    def head(self, variables: Variables) -> jax.Array:
        """The matrix [V, D] that turns hidden states into logits."""

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """Divisors of the totals of auxiliary losses, float32 [] by name."""
