"""Video files: which frames are taken, at which size, and what happens to broken ones. All files are real."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import video_files
from vau_jax.common.files import InputError
from vau_jax.data.video import clips
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decoders import VideoError
from vau_jax.datasets import synthetic

SMALL = VideoOptions(min_pixels=28 * 28, max_pixels=112 * 112)


def numbered(
    path: Path, count: int = 40, fps: int = 10, size: tuple[int, int] = (112, 84), codec: str = "libx264"
) -> Path:
    """A clip whose frame i is grey of brightness 5 * i + 20."""
    images = (np.full((size[1], size[0], 3), 5 * i + 20, np.uint8) for i in range(count))
    synthetic.encode(path, images, fps, codec)
    return path


def numbers(frames: np.ndarray) -> list[int]:
    return [round((frame.mean() - 20) / 5) for frame in frames]


def test_frames_are_chosen_by_time(tmp_path: Path) -> None:
    clip = clips.read(numbered(tmp_path / "a.mp4"), SMALL, factor=28, multiple=2)
    assert numbers(clip.frames) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert clip.seconds_per_frame == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nframes": 4}, [0, 10, 20, 30]),
        ({"fps": 1.0}, [0, 10, 20, 30]),
        ({"fps": 1.0, "min_frames": 8}, [0, 5, 10, 15, 20, 25, 30, 35]),
        ({"fps": 10.0, "max_frames": 4}, [0, 10, 20, 30]),
        ({"video_start": 1.0, "video_end": 3.0, "fps": 2.0}, [10, 15, 20, 25]),
    ],
    ids=str,
)
def test_sampling_options(tmp_path: Path, options: dict, expected: list[int]) -> None:
    clip = clips.read(numbered(tmp_path / "a.mp4"), VideoOptions.from_item(options, SMALL), factor=28, multiple=2)
    assert numbers(clip.frames) == expected


def test_variable_frame_rate_is_read_by_time_stamp(tmp_path: Path) -> None:
    """20 frames in the first second, then 10 in five seconds: evenly spaced times are no evenly spaced indices."""
    times = [Fraction(i, 20) for i in range(20)] + [1 + Fraction(i, 2) for i in range(10)]
    path = video_files.write(tmp_path / "v.mp4", count=30, times=times)
    clip = clips.read(path, VideoOptions.from_item({"nframes": 6}, SMALL), factor=28, multiple=2)
    wanted = [i * clip.duration / 6 for i in range(6)]
    assert [video_files.number(f) for f in clip.frames] == [
        max(i for i, t in enumerate(times) if t <= w + 1e-3) for w in wanted
    ]
    np.testing.assert_allclose(clip.times, [float(times[video_files.number(f)]) for f in clip.frames], atol=2e-3)


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((480, 640), (3136, 12845056), (476, 644)),
        ((1080, 1920), (3136, 602112), (560, 1008)),
        ((20, 30), (3136, 602112), (56, 84)),
        ((64, 96), (784, 3136), (28, 56)),
    ],
)
def test_smart_resize(size: tuple[int, int], bounds: tuple[int, int], expected: tuple[int, int]) -> None:
    """What transformers 5.23's `smart_resize` gave for factor 28 (its module needs torchvision to import)."""
    assert clips.smart_resize(*size, 28, *bounds) == expected


@pytest.mark.parametrize("content", [b"", b"not a video" * 100], ids=["empty", "text"])
def test_an_unreadable_file_is_a_video_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        clips.read(path, SMALL, 28, 2)


def test_a_missing_file_is_a_video_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        clips.read(tmp_path / "none.mp4", SMALL, 28, 2)


def truncated(path: Path, share: float) -> Path:
    """The same file, broken off; its table of frames stands at the front."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_of_a_file_that_breaks_off_what_is_there_is_used_and_flagged(tmp_path: Path) -> None:
    path = truncated(video_files.fast_start(tmp_path / "a.mp4", count=200), 0.6)
    clip = clips.read(path, SMALL, 28, 2)
    assert "of 200 frames are there" in clip.damage
    seen = [video_files.number(f) for f in clip.frames]
    assert seen[0] == 0 and set(np.diff(seen)) <= {10, 11, 12} and 90 < seen[-1] < 120


def test_a_damaged_packet_costs_its_frames_alone_and_is_flagged(tmp_path: Path) -> None:
    path = video_files.fast_start(tmp_path / "a.mp4", count=200)
    whole = clips.read(path, SMALL, 28, 2)
    clip = clips.read(video_files.damage(path, 0.5, 600), SMALL, 28, 2)
    same = [np.array_equal(a, b) for a, b in zip(whole.frames, clip.frames, strict=True)]
    assert clip.damage and 1 <= same.count(False) <= 3


def test_fewer_frames_than_the_minimum_are_a_failure(tmp_path: Path) -> None:
    path = video_files.fast_start(tmp_path / "a.mp4", count=200)
    data = bytearray(path.read_bytes())
    first = data.index(b"mdat") + 4
    data[first:] = bytes(len(data) - first)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="0 of 20 frames can be decoded") as caught:
        clips.read(path, SMALL, 28, 2)
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize(("frames", "size"), [(60, (320, 240)), (400, (1280, 720)), (7, (96, 64)), (3000, (320, 240))])
@pytest.mark.parametrize("budget", [{}, clips.BUDGETS["vau_r1"]], ids=["default", "vau_r1"])
def test_counts_and_sizes_are_qwen_vl_utils(frames: int, size: tuple[int, int], budget: dict[str, int]) -> None:
    """Its own functions, for H.264 clips of 30 frames a second."""
    from qwen_vl_utils import vision_process

    item = {"fps": 2.0, **budget}
    count = vision_process.smart_nframes(item, frames, 30.0)
    options = VideoOptions.from_item(item)
    assert clips.frame_count(frames / 30, frames, options, 2) == count
    least = item.get("min_pixels", 128 * 28 * 28)
    most = max(min(768 * 28 * 28, item.get("total_pixels", 128000 * 28 * 28 * 0.9) / count * 2), int(least * 1.05))
    theirs = vision_process.smart_resize(size[1], size[0], 28, min_pixels=least, max_pixels=most)
    assert clips.frame_size(size[1], size[0], count, options, 28, 2) == theirs


def png(width: int, height: int) -> bytes:
    """A grey picture file that is cut short after its first bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize("kind", clips.IMAGES)
def test_pictures_are_read_in_colour(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).save(tmp_path / "a", format=kind)
    found = clips.read_image(tmp_path / "a")
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - (200, 30, 60)).max() <= 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(20_000, 20_000), "400000000 pixels"),
        (png(10_000, 10_000), "10000x10000 pixels"),
        (png(100, 100), "image file is truncated|broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (b"", "cannot identify"),
    ],
    ids=["20,000", "10,000", "cut short", "PostScript", "empty"],
)
def test_a_picture_that_is_too_large_or_none_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=words):
        clips.read_image(path)


@pytest.mark.parametrize("item", [{"fps": 0.0}, {"min_frames": 8, "max_frames": 4}], ids=str)
def test_impossible_options_are_named(item: dict) -> None:
    with pytest.raises(InputError, match="fps must be positive"):
        VideoOptions.from_item(item)
