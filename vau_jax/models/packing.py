"""The completions of a prompt as one packed row behind it: [B, G, C] to [B, N] and back.

    completions [G, C]      aaa.....  bbbbb...  cc......          N = 12
    packed      [N]         aaabbbbbcc..                          starts 000333338 8..

Completions of unequal length follow each other without padding between them; what is left of N is padding. Where N is
G * C each keeps its C places, so that nothing moves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vau_jax.types import Array, Completions


class Packing(NamedTuple):
    """Where the tokens of packed completions come from, and go to."""

    starts: jax.Array  # int32 [B, N]: the place at which the completion of a token begins; padding begins at itself
    source: jax.Array  # int32 [B, N]: the token's number among the G * C
    places: jax.Array  # int32 [B, G, C]: the place of each token; any for padding

    def take(self, x: Array) -> jax.Array:
        """[B, G, C] to [B, N]."""
        return jnp.take_along_axis(jnp.asarray(x).reshape(x.shape[0], -1), self.source, axis=1)

    def back(self, x: jax.Array) -> jax.Array:
        """[B, N] to [B, G, C], zero at the padding of completions."""
        flat = self.places.reshape(x.shape[0], -1)
        found = jnp.take_along_axis(x, jnp.maximum(flat, 0), axis=1)
        return jnp.where(flat >= 0, found, 0).reshape(self.places.shape)


def pack(completions: Completions, length: int | None = None) -> Packing:
    """The packing of completions into `length` = N tokens a prompt, which are enough for the real ones of each (see
    `needed`); None: G * C."""
    b, g, c = completions.mask.shape
    mask = jnp.asarray(completions.mask)
    sizes = jnp.sum(mask, axis=2, dtype=jnp.int32)  # [B, G]
    if length in (None, g * c):
        first = jnp.broadcast_to(jnp.arange(g, dtype=jnp.int32) * c, (b, g))
        length, sizes = g * c, jnp.full((b, g), c, jnp.int32)
    else:
        first = jnp.cumsum(sizes, axis=1) - sizes
    place = jnp.arange(length, dtype=jnp.int32)
    ends = first + sizes
    number = jnp.sum(place >= ends[:, :, None], axis=1, dtype=jnp.int32)  # [B, N]: of the completion; G: padding
    own = jnp.minimum(number, g - 1)
    starts = jnp.where(number < g, jnp.take_along_axis(first, own, axis=1), place)
    source = own * c + jnp.minimum(place - jnp.take_along_axis(first, own, axis=1), c - 1)
    places = jnp.where(mask, first[:, :, None] + jnp.arange(c, dtype=jnp.int32), -1)
    return Packing(starts, source, places)
