"""Video Motion Prompts (arXiv 2407.03179): attention from frame differences, by two learned numbers, on the frames.

    D_t = grey_{t+1} - grey_t         A_t = sigmoid(a (D_t - b))         prompted_t = A_t * frame_{t+1}

with slope a = 5 / (0.45 |tanh m| + 0.1) in [9.09, 50] and shift b = 0.6 tanh n in (-0.6, 0.6). What does not move gets
the weight sigmoid(-a b): b below 0 keeps a still scene, b above 0 takes it away. m = 0 is a point without gradient.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vau_jax.common.checks import NOT_NEGATIVE, check_choices, check_ranges
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, dump_json, read_json, write_text
from vau_jax.models.config import FILE_BYTES, MOTION_FILE, ORDERS, Motion, VisionConfig
from vau_jax.types import Vision

GREY = (0.299, 0.587, 0.114)  # weights of R, G, B
PUBLISHED = {  # (m, n) that the paper's authors learned
    "mpii": (0.257, 0.053),
    "hmdb51": (0.2646, -0.6615),
    "ucf_crime": (0.8916, -0.2543),
}


STARTS = PUBLISHED | {"identity": (0.9, -2.0)}  # a still pixel has the weight 0.999


def slope(m: jax.Array | float) -> jax.Array:
    """a(m), in [9.09, 50]."""
    return 5 / (0.45 * jnp.abs(jnp.tanh(m)) + 0.1)


def shift(n: jax.Array | float) -> jax.Array:
    """b(n), in (-0.6, 0.6); in units of grey levels from 0 to 1."""
    return 0.6 * jnp.tanh(n)


def attention_of(difference: jax.Array, m: jax.Array | float, n: jax.Array | float) -> jax.Array:
    """Weights in (0, 1) of differences in [-1, 1], the paper's power normalisation."""
    return jax.nn.sigmoid(slope(m) * (difference - shift(n)))


def motion_prompt(
    frames: jax.Array,
    m: jax.Array | float,
    n: jax.Array | float,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    signed: bool = True,
    order: Literal["rgb", "bgr"] = "rgb",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(prompted [B, T-1, H, W, 3], attention [B, T-1, H, W], variation []) of normalised frames [B, T, H, W, 3].

    `prompted[:, t]` is `frames[:, t + 1]`, in the frames' dtype, weighed by `attention[:, t]`; the rest is computed in
    float32 or better. `mean` and `std` undo the frames' normalisation, so that differences are of grey levels in
    [0, 1]; `signed=False` takes their size alone. `order="bgr"` gives red the weight of blue and the other way round,
    as the published code does. `variation` is the mean of (A_{t+1} - A_t)^2, which times lambda is the paper's
    regulariser; 0 where there is one attention map. Raises InputError for fewer than 2 frames or an unknown order.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[1] < 2:
        raise InputError(f"frames are {list(frames.shape)}: expected [B, T, H, W, 3] with T at least 2")
    if order not in ORDERS:
        raise InputError(f"order={order!r} is unknown: expected one of {', '.join(ORDERS)}")
    exact = frames.astype(jnp.promote_types(frames.dtype, jnp.float32))
    weights = jnp.asarray(GREY if order == "rgb" else GREY[::-1], exact.dtype)
    plain = exact * jnp.asarray(std, exact.dtype) + jnp.asarray(mean, exact.dtype)
    grey = jnp.sum(plain * weights, axis=-1)  # [B, T, H, W]
    difference = grey[:, 1:] - grey[:, :-1]
    attention = attention_of(difference if signed else jnp.abs(difference), m, n)
    changes = attention[:, 1:] - attention[:, :-1]
    variation = jnp.mean(changes**2) if changes.shape[1] else jnp.zeros((), exact.dtype)
    prompted = (attention[..., None] * exact[:, 1:]).astype(frames.dtype)
    return prompted, attention, variation


PREFIX = "visual/motion_prompt/"  # prefix of its parameters' names
NAMES = (PREFIX + "m", PREFIX + "n")
VARIATION = "motion/variation"  # name of the auxiliary loss


# --- In front of a vision tower -----------------------------------------------------------------------------------


class MotionPrompt(nn.Module):
    """The layer on patches, a submodule of the vision tower with two parameters, m and n. A model whose parameters lack
    them has no motion prompt yet.
    """

    config: VisionConfig

    def __call__(self, vision: Vision) -> jax.Array | None:
        """float32 [B, P, depth, size^2]: weights of the patches' pixels; 1 for still images."""
        c = self.config
        if not self.has_variable("params", "m"):
            return None
        m, n = (self.get_variable("params", name).astype(jnp.float32) for name in ("m", "n"))
        grey = jnp.asarray(GREY if c.motion.order == "rgb" else GREY[::-1], jnp.float32)
        now, before = (
            jnp.einsum("bpcx,c->bpx", x.reshape(*x.shape[:2], c.in_channels, -1).astype(jnp.float32) / 255, grey)
            for x in (vision.patches, vision.motion.before)
        )
        difference = (now - before).reshape(*now.shape[:2], c.temporal_patch_size, -1)
        attention = attention_of(difference if c.motion.signed else jnp.abs(difference), m, n)
        return jnp.where(vision.motion.moves[..., None, None], attention, 1.0)


def variation_total(weights: jax.Array, vision: Vision) -> jax.Array:
    """float32 []: the sum of (A_{t+1} - A_t)^2 over all neighbouring frames of the clips. Over `pairs_of` it is the
    paper's variation; the totals of parts of a batch add up to that of the whole."""
    inside = jnp.diff(weights, axis=2)
    linked = vision.motion.following < weights.shape[1]
    index = jnp.minimum(vision.motion.following, weights.shape[1] - 1)[..., None]
    across = jnp.take_along_axis(weights[:, :, 0], index, axis=1) - weights[:, :, -1]
    moves = vision.motion.moves[..., None, None]
    return jnp.sum(jnp.where(moves, inside**2, 0)) + jnp.sum(jnp.where(linked[..., None], across**2, 0))


def pairs_of(vision: Vision, config: VisionConfig) -> jax.Array:
    """float32 []: pairs of a pixel's weights in neighbouring frames, over all clips."""
    inside = jnp.sum(vision.motion.moves, dtype=jnp.float32) * (config.temporal_patch_size - 1)
    across = jnp.sum(vision.motion.following < vision.patches.shape[1], dtype=jnp.float32)
    return (inside + across) * config.patch_size**2


def check(config: ConfigDict) -> None:
    """Raises InputError for the first invalid setting of config.motion."""
    check_choices(config, "motion.", {"start": tuple(STARTS), "order": ORDERS})
    check_ranges(config, "motion.", dict.fromkeys(("weight", "lr_scale", "weight_decay"), NOT_NEGATIVE))


def read_file(folder: str | Path) -> dict[str, float]:
    """The numbers m and n of a model folder's MOTION_FILE. Raises InputError for a damaged one."""
    path = Path(folder) / MOTION_FILE
    fields = Fields(read_json(path, FILE_BYTES), str(path))
    return {name: float(fields.number(name, -1e6, 1e6)) for name in ("m", "n")}


def write_file(folder: str | Path, motion: Motion, numbers: Mapping[str, Any]) -> None:
    """MOTION_FILE of a model folder."""
    values = {name: float(numbers[name]) for name in ("m", "n")}
    write_text(Path(folder) / MOTION_FILE, dump_json({**values, "signed": motion.signed, "order": motion.order}))
