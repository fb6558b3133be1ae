"""The parts that a batch is scored and updated in: rows whose completions are of similar length, and what they are
packed into.

Completions of a prompt are packed one after the other, into as many tokens as the longest row of a part needs: the
smallest of a few lengths, so that there are few programs. Sorted by length, most parts need a short one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Part(NamedTuple):
    """Some rows of a batch."""

    rows: np.ndarray | None  # int32 [D, m]: of the rows of each of D devices' shares, those that are taken; None: all
    length: int  # that completions are packed into


def lengths(shares: Sequence[float], generations: int, longest: int) -> tuple[int, ...]:
    """The lengths that the completions of a prompt are packed into: `shares` of generations * longest tokens."""
    whole = generations * longest
    return tuple(sorted({min(whole, max(1, round(share * whole))) for share in shares} | {whole}))


def split(tokens: np.ndarray, count: int, devices: int, lengths: Sequence[int]) -> list[Part]:
    """The batch in `count` parts of equal size; `tokens` int [B] are those of each row's completions, `lengths` to
    choose from in order.

    Each device has an equal share of the rows, consecutive ones, and of each part.
    """
    shares = tokens.reshape(devices, -1)
    order = np.argsort(shares, axis=1, kind="stable").astype(np.int32)
    result = []
    for rows in np.split(order, count, axis=1):
        most = int(np.take_along_axis(shares, rows, axis=1).max())
        length = next(length for length in lengths if length >= most)
        result.append(Part(None if count == 1 else rows, length))
    return result


def take(tree: Any, rows: jax.Array) -> Any:
    """The rows of arrays [B, ...] that a part has, [D * m, ...], without communication between devices."""

    def of(x: jax.Array) -> jax.Array:
        shares = x.reshape(rows.shape[0], -1, *x.shape[1:])
        return jax.vmap(lambda share, rows: share[rows])(shares, rows).reshape(-1, *x.shape[1:])

    return jax.tree.map(of, tree)


def put(whole: jax.Array, part: jax.Array, rows: jax.Array) -> jax.Array:
    """The inverse: `whole` [B, ...] with the rows of `part` [D * m, ...]."""
    shares, own = (x.reshape(rows.shape[0], -1, *x.shape[1:]) for x in (whole, part))
    return jax.vmap(lambda share, own, rows: share.at[rows].set(own))(shares, own, rows).reshape(whole.shape)
