"""A picture of what a Video Motion Prompt does: frames, differences, attention and prompted frames over time.

python -m vau_jax.motion_strip VIDEO --out=strip.png [--m=0.8916] [--n=-0.2543]
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from vau_jax.common.files import InputError, exit_on_input_error
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
