"""Video files to frames: which frames, at which size, and a cache of the result.

Frames are chosen by time stamp, so that variable frame rates come out right; the true spacing of the chosen frames
goes into the prompt's positions.
"""

import hashlib
import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from vau_jax.files import InputError, write_bytes

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # what it cannot open is reported by `read`
except ImportError:  # no wheel for this processor (arm64): PyAV carries the load
    decord = None


class VideoError(Exception):
    """This video cannot be used; the message says why. It costs the one video, never the run."""


@dataclass(frozen=True)
class VideoOptions:
    """How a video is sampled and resized; the names are qwen-vl-utils' keys, sizes are in pixels."""

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

    @classmethod
    def from_item(cls, item: Mapping[str, Any], default: "VideoOptions | None" = None) -> "VideoOptions":
        """Options of a chat message's content item: the keys it has, over `default`."""
        default = default or cls()
        given = {key: item[key] for key in asdict(default) if item.get(key) is not None}
        options = replace(default, **given)
        if options.fps <= 0 or options.min_frames < 1 or options.max_frames < options.min_frames:
            raise InputError(f"fps must be positive and 1 <= min_frames <= max_frames, found {options}")
        return options


@dataclass(frozen=True)
class Clip:
    """Frames chosen from a video."""

    frames: np.ndarray  # uint8 [F, height, width, 3]
    seconds_per_frame: float  # spacing of the frames, as sampled
    start: float = 0.0  # seconds from the start of the video to the first frame

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
        raise VideoError(f"aspect ratio of {width}x{height} is above 200")
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

    `factor` is what sides must be multiples of, `multiple` the same for the number of frames. Raises VideoError.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"no such file: {path}")
    errors = []
    for decode in (_decode_decord, _decode_pyav) if decord else (_decode_pyav,):
        try:
            frames, start, duration = decode(path, options, multiple)
            break
        except VideoError:
            raise
        except Exception as error:  # decoders raise types of their own, by version
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    else:
        raise VideoError(f"cannot decode {path}: {'; '.join(errors)}")
    height, width = frame_size(*frames.shape[1:3], len(frames), options, factor, multiple)
    return Clip(resize(frames, height, width), duration / len(frames), start)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, as Qwen's processors do: uint8 [F, H, W, 3] -> uint8 [F, height, width, 3]."""
    if frames.shape[1:3] == (height, width):
        return frames
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def choose(starts: np.ndarray, end: float, options: VideoOptions, multiple: int) -> tuple[np.ndarray, float, float]:
    """Numbers of the frames to take, the second of the video where they begin, and the seconds they cover.

    `starts` float64 [N] are the frames' time stamps in order, `end` is when the last one ends. Frame i of n is the one
    shown at i / n of the part between video_start and video_end.
    """
    first = float(starts[0])
    begin = first + (options.video_start or 0.0)
    stop = min(end, first + options.video_end) if options.video_end is not None else end
    if not begin < stop:
        raise VideoError(f"video_start {options.video_start} is not before the end, {stop - first:.2f} s")
    inside = int(np.sum((starts >= begin) & (starts < stop)))
    count = frame_count(stop - begin, inside, options, multiple)
    times = begin + np.arange(count) * (stop - begin) / count
    numbers = np.clip(np.searchsorted(starts, times + 1e-4, side="right") - 1, 0, len(starts) - 1)
    return numbers, begin - first, stop - begin


def _decode_decord(path: Path, options: VideoOptions, multiple: int) -> tuple[np.ndarray, float, float]:
    reader = decord.VideoReader(str(path), num_threads=1)
    stamps = reader.get_frame_timestamp(np.arange(len(reader)))  # [N, 2]: start and end
    indices, *span = choose(stamps[:, 0].astype(np.float64), float(stamps[-1, 1]), options, multiple)
    return reader.get_batch(indices).asnumpy(), *span


def _decode_pyav(path: Path, options: VideoOptions, multiple: int) -> tuple[np.ndarray, float, float]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        images, starts = [], []
        for frame in container.decode(stream):
            images.append(frame.to_ndarray(format="rgb24"))
            starts.append(float(frame.time if frame.time is not None else len(starts) / (stream.average_rate or 25)))
        if not images:
            raise VideoError(f"{path} has no frame that can be decoded")
        step = (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else 1 / float(stream.average_rate or 25)
    indices, *span = choose(np.asarray(starts), starts[-1] + step, options, multiple)
    return np.stack([images[i] for i in indices]), *span


class FrameCache:
    """Decoded and resized frames as .npy files in a folder, one a video, made when first asked for.

    The name of a file says the video's path, size and time of change, and the options, so that a changed video or
    another setting never finds an old record; a damaged record is made anew.
    """

    def __init__(self, folder: str | os.PathLike | None) -> None:
        self.folder = Path(folder) if folder else None
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, path: str | os.PathLike, options: VideoOptions, factor: int, multiple: int) -> Clip:
        """As `video.read`."""
        if self.folder is None:
            return read(path, options, factor, multiple)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise VideoError(f"no such file: {path}") from error
        key = f"{Path(path).resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{options}|{factor}|{multiple}"
        record = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        clip = _load_record(record)
        if clip is None:
            clip = read(path, options, factor, multiple)
            write_bytes(record, _record_bytes(clip))
        return clip


def _record_bytes(clip: Clip) -> bytes:
    """The frames as .npy, followed by their spacing and start as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, clip.frames, allow_pickle=False)
    np.save(buffer, np.asarray([clip.seconds_per_frame, clip.start]), allow_pickle=False)
    return buffer.getvalue()


def _load_record(record: Path) -> Clip | None:
    try:
        with record.open("rb") as file:
            frames, times = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
        return Clip(frames, *times.tolist())
    except (OSError, ValueError, TypeError, EOFError):
        return None
