"""The embedding of tokens, with its table split over a mesh.

Left to the compiler, a lookup with examples over `data` and a table over `fsdp` and `tensor` moves examples, or the
table, between slices. Here each device looks up the rows and columns that it has, for the examples of its part of
`data`, and the parts are put together over `tensor` and `fsdp` alone.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vau_jax.common import sharding
from vau_jax.models.layers import UNIT_NORMAL, rows_of


class Embedding(nn.Module):
    """Rows of a table [V, D] by token."""

    vocab_size: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, gathered: bool = False) -> jax.Array:
        """int32 [B, T] to [B, T, D]; `gathered` where the table is not split over fsdp."""
        table = self.param("embedding", UNIT_NORMAL, (self.vocab_size, self.features))
        mesh = sharding.ambient()
        if mesh is None or mesh.size == 1 or tokens.shape[0] % sharding.example_parts(mesh):
            return rows_of(table, tokens, self.dtype)
        rows, columns = sharding.param_spec("embed_tokens/embedding", table.shape, mesh)
        return _lookup(table, tokens, self.dtype, _Split(rows, None if gathered else columns))


class _Split(NamedTuple):
    """The mesh axes of a table's rows and columns; None: whole."""

    rows: str | None
    columns: str | None

    def tokens(self, tokens: jax.Array) -> jax.Array:
        """Of a device's examples, those that its columns are for."""
        return jax.lax.all_gather(tokens, self.columns, tiled=True) if self.columns else tokens

    def index(self, tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """The device's row for each token, and whether it has it."""
        index = tokens - (jax.lax.axis_index(self.rows) * rows if self.rows else 0)
        return jnp.clip(index, 0, rows - 1), ((index >= 0) & (index < rows))[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table: jax.Array, tokens: jax.Array, dtype: Any, split: _Split) -> jax.Array:
    def own(table: jax.Array, tokens: jax.Array) -> jax.Array:
        index, here = split.index(split.tokens(tokens), table.shape[0])
        x = jnp.where(here, jnp.take(table.astype(dtype), index, axis=0), 0)
        x = jax.lax.psum(x, split.rows) if split.rows else x  # one device has the row, the others add zeros
        return jax.lax.all_to_all(x, split.columns, 0, 2, tiled=True) if split.columns else x

    examples = P(sharding.EXAMPLES)
    return jax.shard_map(own, in_specs=(P(*split), examples), out_specs=examples, check_vma=False)(table, tokens)


def _forward(table: jax.Array, tokens: jax.Array, dtype: Any, split: _Split) -> tuple[jax.Array, Any]:
    return _lookup(table, tokens, dtype, split), (table, tokens)


def _backward(dtype: Any, split: _Split, kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    """Gradients are added up in float32, as in `layers.rows_of`."""
    others = tuple(axis for axis in sharding.EXAMPLES if axis != split.columns)

    def own(table: jax.Array, tokens: jax.Array, grad: jax.Array) -> jax.Array:
        index, here = split.index(split.tokens(tokens), table.shape[0])
        grad = jax.lax.all_to_all(grad, split.columns, 2, 0, tiled=True) if split.columns else grad
        total = jnp.zeros(table.shape, jnp.float32).at[index].add(jnp.where(here, grad.astype(jnp.float32), 0))
        return jax.lax.psum(total, others)

    places = P(*split), P(sharding.EXAMPLES), P(sharding.EXAMPLES)
    total = jax.shard_map(own, in_specs=places, out_specs=P(*split), check_vma=False)(*kept, grad)
    return total.astype(kept[0].dtype), None


_lookup.defvjp(_forward, _backward)
