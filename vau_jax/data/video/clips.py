"""Video files to frames: selection by time and resizing.

Frames are selected by time stamp, so that variable frame rates are handled correctly; the true times of the selected
frames go into the prompt's positions.
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vau_jax.common.files import InputError, short
from vau_jax.data.video import decoders
from vau_jax.data.video.decoders import Picture, VideoError

MAX_CLIP_BYTES = 2**31  # of the resized frames
IMAGES = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow runs other programs for some others


@dataclass(frozen=True)
class VideoOptions:
    """How a video is sampled and resized. Names are qwen-vl-utils' keys, sizes are in pixels."""

    fps: float = 2.0
    nframes: int | None = None  # a fixed count instead of fps
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 28 * 28  # a frame
    max_pixels: int = 768 * 28 * 28  # a frame
    total_pixels: int = 115200 * 28 * 28  # all temporal patches together
    per_clip: bool = False  # min_pixels and max_pixels are of all frames together, instead of each (Qwen3-VL)
    resized_height: int | None = None
    resized_width: int | None = None
    video_start: float | None = None  # seconds
    video_end: float | None = None
    lead: int = 0  # extra frames before the others, for frame differences

    @classmethod
    def from_item(cls, item: Mapping[str, Any], default: "VideoOptions | None" = None) -> "VideoOptions":
        """The options in a chat message's content item, over `default`."""
        default = default or cls()
        given = {key: item[key] for key in asdict(default) if item.get(key) is not None}
        options = replace(default, **given)
        if options.fps <= 0 or options.min_frames < 1 or options.max_frames < options.min_frames:
            raise InputError(f"fps must be positive and 1 <= min_frames <= max_frames, found {options}")
        return options


BUDGETS = {  # pixel budgets by name, as items
    "model": {},  # the model folder's own
    # VAU-R1 (arXiv 2505.23504; its code at 845c33b): in training, in evaluation of questions and of other tasks
    "vau_r1": {"min_pixels": 16 * 28 * 28, "total_pixels": 3584 * 28 * 28},
    "vau_r1_qa": {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28, "total_pixels": 115200 * 28 * 28},
    "vau_r1_eval": {"min_pixels": 256 * 28 * 28, "max_pixels": 768 * 28 * 28, "total_pixels": 115200 * 28 * 28},
}


@dataclass(frozen=True)
class Sampling:
    """The arguments of `read` as one value."""

    options: VideoOptions
    factor: int  # what sides must be multiples of
    multiple: int  # the same for the number of frames


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video."""

    frames: np.ndarray  # uint8 [F, height, width, 3]
    seconds_per_frame: float  # spacing of the sampling instants
    times: np.ndarray | None = (
        None  # float64 [F]: the frames' own time stamps, in seconds of the video; None: evenly spaced
    )
    damage: str = ""  # what could not be decoded; empty: nothing

    @property
    def duration(self) -> float:
        return len(self.frames) * self.seconds_per_frame


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, frames: int = 1, multiple: int = 1
) -> tuple[int, int]:
    """The size nearest to (height, width) with both sides multiples of `factor` and a pixel count inside the bounds.

    The rule of Qwen2-VL's processors, which keeps the aspect ratio as closely as the factor allows; with `frames`, that
    of Qwen3-VL's, whose bounds are on the whole clip (rounded to `multiple` frames). Raises VideoError.
    """
    if frames > 1 and min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise VideoError(f"aspect ratio of {width}x{height} is above 200", "too large")
    h, w = (round(side / factor) * factor for side in (height, width))
    count = round(frames / multiple) * multiple
    if count * h * w > max_pixels:
        scale = math.sqrt(frames * height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif count * h * w < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return max(h, factor), max(w, factor)


def frame_count(duration: float, available: int, options: VideoOptions, multiple: int) -> int:
    """How many frames to take of a clip of `duration` seconds: a multiple of `multiple`, at least one multiple."""
    wanted = options.nframes or min(max(duration * options.fps, options.min_frames), options.max_frames)
    wanted = min(wanted, max(available, multiple))
    return max(multiple, math.floor(wanted / multiple + 1e-6) * multiple)


def frame_size(
    height: int, width: int, count: int, options: VideoOptions, factor: int, multiple: int
) -> tuple[int, int]:
    """Height and width of the resized frames of a clip of `count` frames; `multiple` is a temporal patch's."""
    if options.resized_height and options.resized_width:
        return smart_resize(options.resized_height, options.resized_width, factor, factor**2, 2**62)
    if options.per_clip:
        most = min(options.max_pixels, options.total_pixels * multiple)
        return smart_resize(height, width, factor, options.min_pixels, most, max(count, multiple), multiple)
    share = options.total_pixels * multiple // count  # a temporal patch costs one frame's tokens
    most = max(min(options.max_pixels, share), int(options.min_pixels * 1.05))
    return smart_resize(height, width, factor, options.min_pixels, most)


def read(path: str | os.PathLike, options: VideoOptions, factor: int, multiple: int) -> Clip:
    """Decodes and resizes the frames that `options` choose.

    `factor` is what sides must be multiples of, `multiple` the same for the number of frames. Of a damaged file the
    nearest frame before stands in for one that cannot be decoded, as long as options.min_frames can. Raises VideoError.
    """
    path = Path(path)
    if not os.path.isfile(path):  # also for invalid file names
        raise VideoError(f"no such file: {path}", "missing")
    index = decoders.scan(path)
    numbers, seconds = choose(index.starts, index.end, options, multiple)
    best, errors = None, []
    for pictures in decoders.pictures(path, index, frozenset(numbers.tolist())):
        try:
            result = _Frames(numbers, options, factor, multiple)
            result.collect(pictures)
        except (VideoError, MemoryError):
            raise
        except Exception as error:  # decoders raise types of their own, by version
            errors.append(short(error))
        if best is None or result.count > best.count:
            best = result
        if best.count == len(numbers):
            break
    least = min(options.min_frames, len(numbers))
    if best.count < least:
        what = f"{best.count} of {len(numbers)} frames can be decoded, and at least {least} are needed"
        raise VideoError(f"cannot decode {path}: {'; '.join([what, *errors, index.damage])}", "damaged")
    damage = "; ".join(note for note in (index.damage, best.damage) if note)
    return Clip(best.filled(), seconds / len(numbers), index.starts[numbers] - index.starts[0], damage)


@dataclass(frozen=True)
class Probe:
    """What a video file is."""

    duration: float  # seconds
    fps: float  # mean
    width: int  # upright, in pixels
    height: int


def probe(path: str | os.PathLike) -> Probe:
    """Reads a file's list of frames and decodes the first. Raises VideoError."""
    path = Path(path)
    if not os.path.isfile(path):  # also for invalid file names
        raise VideoError(f"no such file: {path}", "missing")
    index = decoders.scan(path)
    for pictures in decoders.pictures(path, index, frozenset({0})):
        for picture in pictures:
            duration = index.end - float(index.starts[0])
            return Probe(duration, len(index.starts) / duration, *picture.image.shape[1::-1])
    raise VideoError(f"{path}: its first frame cannot be decoded", "damaged")


def clip_bytes(probed: Probe, sampling: Sampling) -> int:
    """The size of the frames that `read` returns; where frames are not evenly spaced, nearly."""
    options, multiple = sampling.options, sampling.multiple
    end = probed.duration if options.video_end is None else min(options.video_end, probed.duration)
    seconds = max(0.0, end - (options.video_start or 0.0))
    count = frame_count(seconds, round(seconds * probed.fps), options, multiple)
    height, width = frame_size(probed.height, probed.width, count, options, sampling.factor, multiple)
    return (count + options.lead) * height * width * 3


class _Frames:
    """The frames of a clip as they come out of a decoder: resized at once, so that never all are held in full size."""

    def __init__(self, numbers: np.ndarray, options: VideoOptions, factor: int, multiple: int) -> None:
        self.numbers, self.options, self.factor, self.multiple = numbers, options, factor, multiple
        self.frames: np.ndarray | None = None
        self.there = np.zeros(len(numbers), bool)
        self.corrupt = 0

    @property
    def count(self) -> int:
        return int(self.there.sum())

    @property
    def damage(self) -> str:
        notes = {"could not be decoded": len(self.numbers) - self.count, "were decoded in part": self.corrupt}
        return "; ".join(f"{n} of {len(self.numbers)} frames {what}" for what, n in notes.items() if n)

    def collect(self, pictures: Iterable[Picture]) -> None:
        for number, image, corrupt in pictures:
            if self.frames is None:
                self.frames = self._allocate(*image.shape[:2])
            first, last = np.searchsorted(self.numbers, (number, number + 1))
            self.frames[first:last] = resize(image[None], *self.frames.shape[1:3])
            self.there[first:last] = True
            self.corrupt += corrupt * int(last - first)

    def _allocate(self, height: int, width: int) -> np.ndarray:
        count = len(self.numbers)
        size = frame_size(height, width, count - self.options.lead, self.options, self.factor, self.multiple)
        if count * size[0] * size[1] * 3 > MAX_CLIP_BYTES:
            raise VideoError(f"{count} frames of {size[1]}x{size[0]} are more than {MAX_CLIP_BYTES} bytes", "too large")
        return np.empty((count, *size, 3), np.uint8)

    def filled(self) -> np.ndarray:
        """The frames; missing ones are replaced by the nearest before (or the first after)."""
        before = np.maximum.accumulate(np.where(self.there, np.arange(len(self.there)), -1))
        return self.frames[np.where(before < 0, np.argmax(self.there), before)] if not self.there.all() else self.frames


def read_image(path: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W, 3] of a picture file, its size checked before it is decoded. Raises VideoError."""
    if not os.path.isfile(path):
        raise VideoError(f"no such file: {path}", "missing")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=IMAGES) as image:
            if image.width * image.height > decoders.MAX_FRAME_PIXELS:
                raise VideoError(f"{path} has {image.width}x{image.height} pixels", "too large")
            return np.asarray(image.convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # a damaged file can raise anything in Pillow
        raise VideoError(f"cannot read image {path}: {short(error)}") from error


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, as Qwen's processors do: uint8 [F, H, W, 3] -> uint8 [F, height, width, 3]."""
    if frames.shape[1:3] == (height, width):
        return frames
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def choose(starts: np.ndarray, end: float, options: VideoOptions, multiple: int) -> tuple[np.ndarray, float]:
    """Indices of the frames to take, in order, and the seconds they cover.

    `starts` float64 [N] are the frames' time stamps in order, `end` is when the last one ends. Frame i of n is the one
    shown at i / n of the part between video_start and video_end.
    """
    first = float(starts[0])
    begin = first + (options.video_start or 0.0)
    stop = min(end, first + options.video_end) if options.video_end is not None else end
    if not begin < stop:
        raise VideoError(f"video_start {options.video_start} is not before the end, {stop - first:.2f} s", "empty")
    inside = int(np.sum((starts >= begin) & (starts < stop)))
    count = frame_count(stop - begin, inside, options, multiple) + options.lead
    times = begin + np.arange(count) * (stop - begin) / count
    numbers = np.clip(np.searchsorted(starts, times + 1e-4, side="right") - 1, 0, len(starts) - 1)
    return numbers, stop - begin
