"""Answers and truths as arrays: a task declares the columns of its answers, a batch has the columns of all tasks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Values = dict[str, Any]  # one answer: JSON values by column; empty: no answer


class Column(NamedTuple):
    """One array of an answer: `shape` and `dtype` of an entry, and the value of a missing one."""

    shape: tuple[int, ...]
    dtype: type
    missing: Any


@jax.tree_util.register_pytree_with_keys_class
class Columns(dict[str, Array]):
    """Arrays [N, ...] by name, readable as attributes too; a pytree, so that jit, vmap and tree.map take it."""

    def __getattr__(self, name: str) -> Array:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"no column {name!r}: this has {', '.join(self)}") from error

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Array]], tuple[str, ...]]:
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], leaves: Iterable[Array]) -> "Columns":
        return cls(zip(names, leaves, strict=True))


def stack(columns: Mapping[str, Column], entries: Sequence[Values]) -> Columns:
    """N entries, each with values of some columns, as arrays [N, ...]; absent values are `missing`."""
    return Columns(
        {
            name: np.asarray([entry.get(name, kind.missing) for entry in entries], kind.dtype).reshape(-1, *kind.shape)
            for name, kind in columns.items()
        }
    )
