"""A picture of what a Video Motion Prompt does: frames, differences, attention and prompted frames over time.

vau motion-strip VIDEO --out=strip.png [--m=0.8916] [--n=-0.2543]
"""

import argparse

import jax.numpy as jnp
import numpy as np
from PIL import Image

from vau_jax import cli
from vau_jax.common.files import InputError
from vau_jax.data.video import clips
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.models.motion_prompt import GREY, PUBLISHED, motion_prompt


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


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    known = PUBLISHED["ucf_crime"]
    m, n = (known[i] if given is None else given for i, given in enumerate((args.m, args.n)))
    options = clips.VideoOptions.from_item({"fps": args.fps, "min_pixels": 64 * 64, "max_pixels": 160 * 160})
    try:
        clip = DecoderPool(1).read(args.video, options, factor=4, multiple=2)
    except VideoError as error:
        raise InputError(str(error)) from error
    Image.fromarray(strip(clip.frames, m, n)).save(args.out)
    print(f"{args.out}: frames, differences, attention, prompted frames; m={m:g}, n={n:g}")


if __name__ == "__main__":
    cli.main("motion-strip")
