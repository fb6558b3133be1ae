"""The one temporal IoU: of sets of intervals, for rewards in JAX and metrics in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vau_jax.tasks.intervals import temporal_iou


def sets_of(cuts: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Sets [N, K, 2] of `count` [N] disjoint intervals between sorted cuts [N, 2 * K], the others [0, 0]."""
    pairs = np.sort(cuts, axis=1).reshape(len(cuts), -1, 2)
    return np.where((np.arange(pairs.shape[1]) < count[:, None])[..., None], pairs, 0)


def by_counting(a: np.ndarray, b: np.ndarray, most: int) -> np.ndarray:
    """IoU of sets of intervals with whole numbers as bounds, by counting units."""
    units = np.arange(most) + 0.5
    inside = [((units >= x[..., :1]) & (units < x[..., 1:])).any(1) for x in (a, b)]
    either = (inside[0] | inside[1]).sum(1)
    return (inside[0] & inside[1]).sum(1) / np.maximum(either, 1)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_it_equals_counting_units_for_any_number_of_intervals(k: int, rng: np.random.Generator) -> None:
    a, b = (sets_of(rng.integers(0, 60, (500, 2 * k)), rng.integers(0, k + 1, 500)) for _ in range(2))
    expected = by_counting(a, b, 60)
    np.testing.assert_allclose(temporal_iou(a.astype(np.float64), b.astype(np.float64)), expected, atol=1e-12)
    in_jax = jax.jit(jax.vmap(temporal_iou))(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert in_jax.dtype == jnp.float32
    np.testing.assert_allclose(in_jax, expected, atol=1e-6)  # float32


def test_numpy_stays_numpy_in_its_own_precision() -> None:
    one = np.asarray([[[1.0, 1.0 + 1e-12]]])
    assert isinstance(temporal_iou(one, one), np.ndarray)
    assert temporal_iou(one, one).tolist() == [1.0]


def test_two_empty_sets_have_nothing_in_common() -> None:
    assert temporal_iou(np.zeros((1, 2, 2)), np.zeros((1, 2, 2))).tolist() == [0.0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_it_is_symmetric_and_does_not_depend_on_the_unit_of_time(cuts: list[int]) -> None:
    a, b = (np.sort(np.asarray(pair, np.float64)).reshape(1, 1, 2) for pair in (cuts[:2], cuts[2:]))
    np.testing.assert_allclose(temporal_iou(a, b), temporal_iou(b, a))
    np.testing.assert_allclose(temporal_iou(a, b), temporal_iou(a * 1e-9, b * 1e-9), atol=1e-9)
