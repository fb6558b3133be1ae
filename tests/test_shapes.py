"""The padded shapes of a run: few, planned for all its prompts, with little padding; patches packed into groups."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vau_jax.data import shapes
from vau_jax.data.groups import group_numbers
from vau_jax.data.processor import Encoded, Visual, collate
from vau_jax.data.shapes import NO_FLOOR, Plan, Shape, Size
from vau_jax.models.config import SIZES, VisionConfig, from_hf


@pytest.fixture(scope="module")
def vision() -> VisionConfig:
    """Qwen2.5-VL's: windows of 4 x 4 merged units."""
    return from_hf(SIZES["qwen2.5-vl-3b"]).vision


def drawn(count: int, seed: int = 0) -> list[Size]:
    """Prompts of clips of a few or many frames, small or large, so that most have about as many tokens."""
    rng, sizes = np.random.default_rng(seed), []
    for _ in range(count):
        frames = int(rng.integers(2, 40))
        side = max(2, int(np.sqrt(600 / frames)))
        grid = (frames, side + int(rng.integers(0, 3)), side + int(rng.integers(0, 3)))
        sizes.append(Size(int(np.prod(grid)) + int(rng.integers(60, 120)), (grid,)))
    return sizes


def encoded(size: Size, vision: VisionConfig) -> Encoded:
    """A prompt of that size, of blank pixels."""
    visuals = []
    for grid in size.grids:
        patches = int(np.prod(grid)) * vision.spatial_merge_size**2
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        visuals.append(Visual(np.zeros((patches, width), np.uint8), grid))
    tokens = np.zeros(size.tokens, np.int32)
    return Encoded(tokens, np.zeros((3, size.tokens), np.int32), np.full(size.tokens, -1, np.int32), visuals)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_groups_hold_every_segment_whole_and_none_more_than_fits(sizes: list[int]) -> None:
    numbers = group_numbers(sizes, 64)
    held = Counter()
    for number, size in zip(numbers, sizes, strict=True):
        held[int(number)] += size
    assert max(held.values()) <= 64 and set(held) == set(range(len(held)))


def test_groups_of_three_windows_are_nearly_full() -> None:
    """Of a frame of 9 x 13 merged units, which windows of 4 x 4 cut in four kinds."""
    rows, columns = (4, 4, 1), (4, 4, 4, 1)
    sizes = [4 * h * w for h in rows for w in columns] * 20
    assert sum(sizes) / ((group_numbers(sizes, 192).max() + 1) * 192) > 0.97


def test_a_segment_larger_than_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="65 patches exceeds a group of 64"):
        group_numbers([3, 65], 64)


def test_padded_batches_have_every_patch_once_and_its_frame_and_window_together(vision: VisionConfig) -> None:
    rows = [encoded(size, vision) for size in drawn(3)]
    batch = collate(rows, vision)
    for groups, kind in ((batch.vision.frames, "frame"), (batch.vision.windows, "window")):
        for b, row in enumerate(rows):
            count = len(row.visuals[0].patches)
            held = groups.members[b] < groups.slots.shape[1]
            np.testing.assert_array_equal(np.sort(groups.members[b][held]), np.arange(count))
            assert (held == (groups.segments[b] >= 0)).all()
            group = groups.slots[b, :count] // groups.members.shape[2]
            segment = groups.segments[b].reshape(-1)[groups.slots[b, :count]]
            t, h, w = row.visuals[0].grid
            units = np.stack(np.unravel_index(np.arange(count) // 4, (t, h, w)))
            place = units[0] if kind == "frame" else units[0] * 10000 + units[1] // 4 * 100 + units[2] // 4
            together = {(int(g), int(s)): set() for g, s in zip(group, segment, strict=True)}
            for g, s, where in zip(group, segment, place, strict=True):
                together[int(g), int(s)].add(int(where))
            assert all(len(places) == 1 for places in together.values())
            assert len(together) == len(np.unique(place))


def test_the_planned_shapes_hold_all_prompts_and_are_few(vision: VisionConfig) -> None:
    sizes = drawn(300)
    plan = Plan.of(sizes, vision, 4)
    assert len(plan.shapes) <= 4
    for size in sizes:
        shape = plan.shapes[plan.number(size)]
        collate([encoded(size, vision)], vision, shape)


def test_the_planned_edges_are_those_of_least_padding() -> None:
    """Against all choices."""
    rng = np.random.default_rng(1)
    tokens = np.sort(rng.integers(100, 900, 40))
    ends = np.unique(-(-tokens // shapes.STEP) * shapes.STEP)
    found = shapes._edges(tokens, 3)

    def padded(edges: tuple[int, ...]) -> int:
        return sum(min(edge for edge in edges if edge >= n) for n in tokens)

    last = int(ends[-1])
    best = min(padded((int(a), int(b), last)) for a in ends for b in ends)
    assert padded(tuple(found)) == best and len(found) == 3


def test_a_plan_pads_less_than_rounding(vision: VisionConfig) -> None:
    sizes = drawn(300)
    plan = Plan.of(sizes, vision, 4)
    planned = sum(plan.shape([size]).tokens for size in sizes)
    rounded = sum(shapes.batch_shape([size], vision).tokens for size in sizes)
    assert planned < 0.95 * rounded
    assert len({shapes.batch_shape([size], vision) for size in sizes}) > 10


def test_a_prompt_that_was_not_expected_gets_a_shape_of_its_own(vision: VisionConfig) -> None:
    plan = Plan.of(drawn(20), vision, 2)
    large = Size(9000, ((40, 15, 15),))
    assert plan.number(large) == len(plan.shapes)
    collate([encoded(large, vision)], vision, plan.shape([large]))


def test_a_batch_is_padded_at_least_to_the_shape_that_all_processes_expect(vision: VisionConfig) -> None:
    sizes = drawn(100)
    plan = Plan.of(sizes, vision, 3)
    small = min(sizes, key=lambda size: size.tokens)
    assert plan.shape([small]) == plan.shapes[0]
    assert plan.shape([small], 2) == plan.shapes[2]


def test_without_prompts_of_known_size_shapes_are_rounded(vision: VisionConfig) -> None:
    plan = Plan.of([], vision, 4, Shape(128))
    assert plan.shapes == () and plan.shape([Size(100)]) == Shape(128)
    assert plan.shape([Size(200)]) == shapes.batch_shape([Size(200)], vision, NO_FLOOR) == Shape(256)
