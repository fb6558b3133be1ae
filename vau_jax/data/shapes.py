"""The padded shapes of batches: rounded from what a batch needs, or a few planned for all prompts of a run.

A program is compiled for each shape, for minutes with a large model. So the shapes of a run are planned together: a
number of tokens, with all other sizes derived from the prompts that have at most as many.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vau_jax.data.groups import group_count
from vau_jax.models.config import VisionConfig

Grid = tuple[int, int, int]  # temporal patches, rows, columns of merged units
STEP = 32  # planned numbers of tokens are multiples of it
SPARE = 8  # tokens by which a prompt may exceed what is expected: its options are shuffled
WINDOWS = 3  # largest windows that a group has room for: those that a frame's border cuts fill it nearly always


class Shape(NamedTuple):
    """Sizes of a padded batch; windows are 0 for models without them."""

    tokens: int
    patches: int = 0
    windows: int = 0  # groups of windows
    window_size: int = 0  # patches of such a group
    frames: int = 0  # groups of frames
    frame_size: int = 0


NO_FLOOR = Shape(0)


class Size(NamedTuple):
    """What the padding of one prompt depends on."""

    tokens: int
    grids: tuple[Grid, ...] = ()  # of its clips and images


@lru_cache(maxsize=1 << 14)
def _segments(grid: Grid, side: int, unit: int) -> tuple[Counter[int], Counter[int]]:
    """How many frames and how many windows of `side` merged units there are of each number of patches."""
    t, h, w = grid
    windows: Counter[int] = Counter()
    if side:
        for y in range(0, h, side):
            for x in range(0, w, side):
                windows[min(side, h - y) * min(side, w - x) * unit] += t
    return Counter({h * w * unit: t}), windows


class Need:
    """What a prompt needs of a shape: tokens, patches, and how many frames and windows of each number of patches."""

    def __init__(self, size: Size, config: VisionConfig | None) -> None:
        self.tokens, self.frames, self.windows = size.tokens, Counter[int](), Counter[int]()
        if config is None:
            return
        side = config.window_size // (config.spatial_merge_size * config.patch_size)
        for grid in size.grids:
            frames, windows = _segments(grid, side, config.spatial_merge_size**2)
            self.frames.update(frames)
            self.windows.update(windows)

    @property
    def patches(self) -> int:
        return sum(patches * count for patches, count in self.frames.items())

    def shape(self, window_size: int, frame_size: int) -> Shape:
        """The least shape with groups of these sizes."""
        windows, frames = (
            group_count(tuple(sorted(segments.items())), size)
            for segments, size in ((self.windows, window_size), (self.frames, frame_size))
        )
        return Shape(self.tokens, self.patches, windows, window_size, frames, frame_size)


def _group_sizes(needs: Iterable[Need], floor: Shape) -> tuple[int, int]:
    """Patches of a group of windows, and of one of frames."""
    window = max((size for need in needs for size in need.windows), default=0)
    frame = max((size for need in needs for size in need.frames), default=0)
    return floor.window_size if window <= floor.window_size else WINDOWS * window, max(frame, floor.frame_size)


def _largest(shapes: Iterable[Shape]) -> Shape:
    return Shape(*map(max, zip(*shapes, strict=True)))


def round_up(n: int) -> int:
    """The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few sizes, at most half more than asked for."""
    if n <= 3:
        return n
    power = 1 << (n.bit_length() - 1)
    return next(size for size in (power, power * 3 // 2, power * 2) if size >= n)


def least_shape(sizes: Sequence[Size], config: VisionConfig | None) -> Shape:
    """The smallest shape that holds prompts of `sizes`; those of a text-only model (None) have no visuals."""
    needs = [Need(size, config) for size in sizes]
    groups = _group_sizes(needs, NO_FLOOR)
    return _largest(need.shape(*groups) for need in needs)


def batch_shape(sizes: Sequence[Size], config: VisionConfig | None, floor: Shape = NO_FLOOR) -> Shape:
    """The shape to pad prompts of `sizes` to: `floor` where that is enough, else the next rounded size."""
    needs = [Need(size, config) for size in sizes]
    if not any(need.frames for need in needs):
        return Shape(_rounded(max(need.tokens for need in needs), floor.tokens))
    window_size, frame_size = _group_sizes(needs, floor)
    frame_size = _rounded(frame_size, floor.frame_size)
    least = _largest(need.shape(window_size, frame_size) for need in needs)
    rounded = Shape(*map(_rounded, least, floor))
    return rounded._replace(window_size=window_size, frame_size=frame_size)


def _rounded(n: int, low: int) -> int:
    return low if n <= low else round_up(n)


class Plan:
    """The shapes of a run, each with room for all that fits into those before it."""

    def __init__(self, shapes: Sequence[Shape], config: VisionConfig | None, floor: Shape = NO_FLOOR) -> None:
        """`floor` is that of batches that exceed them all."""
        self.shapes, self.config = tuple(shapes), config
        self.floor = self.shapes[-1] if self.shapes else floor

    @classmethod
    def of(cls, sizes: Sequence[Size], config: VisionConfig | None, count: int, floor: Shape = NO_FLOOR) -> "Plan":
        """At most `count` shapes with the least padding of tokens for prompts of `sizes`, none smaller than `floor`;
        none at all for no prompts."""
        if not sizes or count == 0:
            return cls((), config, floor)
        needs = sorted((Need(size, config) for size in sizes), key=lambda need: need.tokens)
        floor = floor if any(need.frames for need in needs) else Shape(floor.tokens)
        groups = _group_sizes(needs, floor)
        tokens = np.maximum([need.tokens + SPARE for need in needs], floor.tokens)
        edges, shapes, held, begin = _edges(tokens, count), [], floor, 0
        for edge, end in zip(edges, np.searchsorted(tokens, edges, side="right"), strict=True):
            held = _largest([held, *(need.shape(*groups) for need in needs[begin:end])])
            shapes.append(held._replace(tokens=edge))
            begin = end
        return cls(shapes, config)

    def number(self, size: Size) -> int:
        """Which shape a prompt is padded to; their number for one that exceeds all."""
        need = Need(size, self.config)
        for number, shape in enumerate(self.shapes):
            if shape.tokens < need.tokens or shape.patches < need.patches:
                continue
            windows, frames = max(need.windows, default=0), max(need.frames, default=0)
            if windows > shape.window_size or frames > shape.frame_size:
                continue
            if _largest([need.shape(shape.window_size, shape.frame_size), shape]) == shape:
                return number
        return len(self.shapes)

    def shape(self, sizes: Sequence[Size], least: int = 0) -> Shape:
        """The shape of a batch: the first that holds all its prompts, from number `least` on, or else a rounded one."""
        number = max(least, *(self.number(size) for size in sizes))
        return self.shapes[number] if number < len(self.shapes) else batch_shape(sizes, self.config, self.floor)


def _edges(tokens: np.ndarray, count: int) -> list[int]:
    """Of numbers of `tokens` in order, the at most `count` multiples of STEP that they are padded to with the least
    padding in all."""
    ends = np.unique(-(-tokens // STEP) * STEP)
    below = np.searchsorted(tokens, ends, side="right")  # prompts up to each end
    cost, before = below * ends.astype(float), []  # of the best edges of which the last is this end
    best, choice = cost[-1], [len(ends) - 1]
    for _ in range(min(count, len(ends)) - 1):
        table = cost[:, None] + (below[None] - below[:, None]) * ends[None].astype(float)
        table[np.tril_indices(len(ends))] = math.inf
        before.append(table.argmin(axis=0))
        cost = table.min(axis=0)
        if cost[-1] < best:
            best, choice = cost[-1], [len(ends) - 1]
            for previous in reversed(before):
                choice.append(int(previous[choice[-1]]))
    return [int(ends[i]) for i in reversed(choice)]
