"""Sets of time intervals: the one temporal IoU of this project, and intervals as text."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_INTERVALS = 1  # K: intervals that an answer can hold


def temporal_iou(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Intersection over union of two sets of intervals [..., K, 2] in seconds, in [0, 1]; 0 where both are empty.

    The intervals of one set do not overlap; [0, 0] fills up a set with fewer than K. Numpy in, numpy out, in the dtype
    of the inputs; JAX arrays likewise. VAU-R1's code divides by the hull, from the first start to the last end: of two
    intervals that overlap it is the union, and else the result is 0 either way.
    """
    xp = np if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else jnp
    first = xp.maximum(a[..., :, None, 0], b[..., None, :, 0])
    last = xp.minimum(a[..., :, None, 1], b[..., None, :, 1])
    inner = xp.maximum(last - first, 0.0).sum((-2, -1))
    union = (a[..., 1] - a[..., 0]).sum(-1) + (b[..., 1] - b[..., 0]).sum(-1) - inner
    return xp.where(union > 0, inner / xp.where(union > 0, union, 1.0), 0.0)


def format_interval(interval: Sequence[float] | None) -> str:
    """`[12.0, 30.5]`, or `[-1.0, -1.0]` for no anomaly; with more digits where a tenth of a second is coarse."""
    if interval is None:
        return "[-1.0, -1.0]"
    start, end = interval
    digits = 1 if end - start > 0.2 else 6
    return f"[{start:.{digits}f}, {end:.{digits}f}]"
