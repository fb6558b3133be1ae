"""Segments of patches (frames, or windows of them) packed into groups of equal size, in which attention is computed."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np


def group_numbers(sizes: Iterable[int], capacity: int) -> np.ndarray:
    """int32: the group of each segment, so that no group holds more than `capacity` patches; one larger than that
    raises ValueError.

    The largest segments come first, each into the fullest group that has room (best fit decreasing): with the few sizes
    that a clip has, nearly no room is left.
    """
    sizes = np.asarray(list(sizes), np.int64)
    if sizes.size and sizes.max() > capacity:
        raise ValueError(f"a segment of {sizes.max()} patches exceeds a group of {capacity}")
    numbers, count = np.zeros(sizes.size, np.int32), 0
    free: dict[int, list[int]] = {}  # groups by their room
    for segment in np.argsort(-sizes, kind="stable"):
        size = int(sizes[segment])
        room = min((room for room in free if room >= size), default=0)
        if room:
            group = free[room].pop()
            if not free[room]:
                del free[room]
        else:
            room, group, count = capacity, count, count + 1
        numbers[segment] = group
        if room > size:
            free.setdefault(room - size, []).append(group)
    return numbers


@lru_cache(maxsize=1 << 14)
def group_count(sizes: tuple[tuple[int, int], ...], capacity: int) -> int:
    """The number of groups for `sizes`, which are (patches of a segment, how many such)."""
    if not sizes:
        return 0
    return int(group_numbers(np.repeat(*np.asarray(sizes).T), capacity).max()) + 1
