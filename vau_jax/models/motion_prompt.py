"""Video Motion Prompts (arXiv 2407.03179): attention from frame differences, by two learned numbers, on the frames.

    D_t = grey_{t+1} - grey_t         A_t = sigmoid(a (D_t - b))         prompted_t = A_t * frame_{t+1}

with slope a = 5 / (0.45 |tanh m| + 0.1) in [9.09, 50] and shift b = 0.6 tanh n in (-0.6, 0.6). What does not move gets
the weight sigmoid(-a b): b below 0 keeps a still scene, b above 0 takes it away. m = 0 is a point without gradient.

    python -m vau_jax.models.motion_prompt VIDEO --out=strip.png [--m=0.8916] [--n=-0.2543]

draws frames, differences, attention and prompted frames over time.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, dump_json, exit_on_input_error, read_json, write_text
from vau_jax.data.video import clips
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.models.config import FILE_BYTES, MOTION_FILE, ORDERS, Motion, VisionConfig
from vau_jax.types import Vision

GREY = (0.299, 0.587, 0.114)  # weights of R, G, B
PUBLISHED = {  # (m, n) that the paper's authors learned
    "mpii": (0.257, 0.053),
    "hmdb51": (0.2646, -0.6615),
    "ucf_crime": (0.8916, -0.2543),
}


STARTS = PUBLISHED | {"identity": (0.9, -2.0)}  # what stands still has the weight 0.999


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


NAMES = ("motion_prompt/m", "motion_prompt/n")  # of its parameters


# --- In front of a vision tower -----------------------------------------------------------------------------------


class MotionPrompt(nn.Module):
    """The layer on patches. Its numbers m and n are adapters where there are such, else parameters; a model that has
    neither is the one before it got a motion prompt."""

    config: VisionConfig

    def _numbers(self) -> tuple[jax.Array, jax.Array] | None:
        for collection in ("lora", "params"):
            if self.has_variable(collection, "m"):
                m, n = (self.get_variable(collection, name) for name in ("m", "n"))
                return m.astype(jnp.float32), n.astype(jnp.float32)
        return None

    def __call__(self, vision: Vision) -> jax.Array | None:
        """float32 [B, P, depth, size^2]: weights of the patches' pixels; 1 where nothing can move."""
        c, numbers = self.config, self._numbers()
        if numbers is None:
            return None
        grey = jnp.asarray(GREY if c.motion.order == "rgb" else GREY[::-1], jnp.float32)
        now, before = (
            jnp.einsum("bpcx,c->bpx", x.reshape(*x.shape[:2], c.in_channels, -1).astype(jnp.float32) / 255, grey)
            for x in (vision.patches, vision.motion.before)
        )
        difference = (now - before).reshape(*now.shape[:2], c.temporal_patch_size, -1)
        attention = attention_of(difference if c.motion.signed else jnp.abs(difference), *numbers)
        return jnp.where(vision.motion.moves[..., None, None], attention, 1.0)

    def variation(self, vision: Vision, pairs: jax.Array | None = None) -> jax.Array:
        """The mean of (A_{t+1} - A_t)^2 over all neighbouring frames of the clips; 0 without any. For a part of a
        batch, `pairs` of the whole are given (see `pairs_of`), and what the parts give adds up to the mean."""
        weights = self(vision)
        if weights is None:
            return jnp.float32(0)
        inside = jnp.diff(weights, axis=2)
        linked = vision.motion.following < weights.shape[1]
        index = jnp.minimum(vision.motion.following, weights.shape[1] - 1)[..., None]
        across = jnp.take_along_axis(weights[:, :, 0], index, axis=1) - weights[:, :, -1]
        moves = vision.motion.moves[..., None]
        total = jnp.sum(jnp.where(moves[..., None], inside**2, 0)) + jnp.sum(jnp.where(linked[..., None], across**2, 0))
        return total / jnp.maximum(pairs_of(vision, self.config) if pairs is None else pairs, 1)


def pairs_of(vision: Vision, config: VisionConfig) -> jax.Array:
    """float32 []: pairs of a pixel's weights in neighbouring frames, over all clips."""
    inside = jnp.sum(vision.motion.moves, dtype=jnp.float32) * (config.temporal_patch_size - 1)
    across = jnp.sum(vision.motion.following < vision.patches.shape[1], dtype=jnp.float32)
    return (inside + across) * config.patch_size**2


def start(name: str) -> tuple[float, float]:
    """(m, n) to begin from: one of STARTS. Raises InputError for another name."""
    if name not in STARTS:
        raise InputError(f"motion.start={name!r} is unknown: expected one of {', '.join(STARTS)}")
    return STARTS[name]


def read_file(folder: str | Path) -> dict[str, float]:
    """The numbers m and n of a model folder's MOTION_FILE. Raises InputError for a damaged one."""
    path = Path(folder) / MOTION_FILE
    fields = Fields(read_json(path, FILE_BYTES), str(path))
    return {name: float(fields.number(name, -1e6, 1e6)) for name in ("m", "n")}


def write_file(folder: str | Path, motion: Motion, numbers: Mapping[str, Any]) -> None:
    """MOTION_FILE of a model folder."""
    values = {name: float(numbers[name]) for name in ("m", "n")}
    write_text(Path(folder) / MOTION_FILE, dump_json({**values, "signed": motion.signed, "order": motion.order}))


# --- A picture of it ----------------------------------------------------------------------------------------------


def strip(frames: np.ndarray, m: float, n: float, most: int = 12) -> np.ndarray:
    """Rows of frames, differences, attention and prompted frames over time: uint8 [H', W', 3] of frames uint8
    [T, H, W, 3], at most `most` columns."""
    prompted, attention, _ = motion_prompt(jnp.asarray(frames[None] / 255.0), m, n, mean=(0, 0, 0), std=(1, 1, 1))
    grey = frames @ np.asarray(GREY) / 255
    difference = (grey[1:] - grey[:-1]) / 2 + 0.5
    columns = np.unique(np.linspace(0, len(frames) - 2, min(most, len(frames) - 1)).round().astype(int))

    def row(values: np.ndarray) -> np.ndarray:
        coloured = values if values.ndim == 4 else values[..., None].repeat(3, -1)
        return np.concatenate(list(coloured[columns]), axis=1)

    rows = [frames[1:] / 255, difference, np.asarray(attention[0]), np.asarray(prompted[0])]
    return (np.concatenate([row(values) for values in rows]) * 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--m", type=float, default=PUBLISHED["ucf_crime"][0], help="slope before its bounds")
    parser.add_argument("--n", type=float, default=PUBLISHED["ucf_crime"][1], help="shift before its bounds")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second")
    args = parser.parse_args()
    options = clips.VideoOptions.from_item({"fps": args.fps, "min_pixels": 64 * 64, "max_pixels": 160 * 160})
    try:
        clip = DecoderPool(1).read(args.video, options, factor=4, multiple=2)
    except VideoError as error:
        raise InputError(str(error)) from error
    Image.fromarray(strip(clip.frames, args.m, args.n)).save(args.out)
    print(f"{args.out}: frames, differences, attention, prompted frames; m={args.m:g}, n={args.n:g}")


if __name__ == "__main__":
    exit_on_input_error(main)
