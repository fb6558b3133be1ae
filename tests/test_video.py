"""Video files: which frames are taken, at which size, and what happens to broken ones. All files are real."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vau_jax.data import synthetic, video
from vau_jax.data.video import FrameCache, VideoError, VideoOptions
from vau_jax.files import InputError

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
    clip = video.read(numbered(tmp_path / "a.mp4"), SMALL, factor=28, multiple=2)
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
    clip = video.read(numbered(tmp_path / "a.mp4"), VideoOptions.from_item(options, SMALL), factor=28, multiple=2)
    assert numbers(clip.frames) == expected


def test_variable_frame_rate_is_read_by_time_stamp(tmp_path: Path) -> None:
    """20 frames in the first second, then 10 in five seconds: evenly spaced times are no evenly spaced indices."""
    path = tmp_path / "v.mp4"
    times = [Fraction(i, 20) for i in range(20)] + [1 + Fraction(i, 2) for i in range(10)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((84, 112, 3), 5 * i + 20, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(t * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = video.read(path, VideoOptions.from_item({"nframes": 6}, SMALL), factor=28, multiple=2)
    wanted = [i * clip.duration / 6 for i in range(6)]
    assert numbers(clip.frames) == [max(i for i, t in enumerate(times) if t <= w + 1e-3) for w in wanted]


def test_both_decoders_give_the_same_frames(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    path = numbered(tmp_path / "a.mp4")
    (a, *span), (b, *other) = (f(path, SMALL, 2) for f in (video._decode_decord, video._decode_pyav))
    np.testing.assert_allclose(a.astype(int), b.astype(int), atol=2)
    assert span == pytest.approx(other, abs=1e-3)


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
    assert video.smart_resize(*size, 28, *bounds) == expected


@pytest.mark.parametrize("content", [b"", b"not a video" * 100], ids=["empty", "text"])
def test_an_unreadable_file_is_a_video_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        video.read(path, SMALL, 28, 2)


def test_a_missing_file_is_a_video_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        FrameCache(tmp_path).read(tmp_path / "none.mp4", SMALL, 28, 2)


def test_the_cache_gives_the_same_clip(tmp_path: Path) -> None:
    path, cache = numbered(tmp_path / "a.mp4"), FrameCache(tmp_path / "cache")
    first, again = cache.read(path, SMALL, 28, 2), cache.read(path, SMALL, 28, 2)
    np.testing.assert_array_equal(first.frames, again.frames)
    assert again.seconds_per_frame == first.seconds_per_frame
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_sees_a_changed_video_and_other_options(tmp_path: Path) -> None:
    path, cache = numbered(tmp_path / "a.mp4"), FrameCache(tmp_path / "cache")
    cache.read(path, SMALL, 28, 2)
    assert len(cache.read(path, VideoOptions.from_item({"nframes": 4}, SMALL), 28, 2).frames) == 4
    numbered(path, count=20)
    assert len(cache.read(path, SMALL, 28, 2).frames) == 4


def test_a_damaged_cache_record_is_made_again(tmp_path: Path) -> None:
    path, cache = numbered(tmp_path / "a.mp4"), FrameCache(tmp_path / "cache")
    first = cache.read(path, SMALL, 28, 2)
    record = next((tmp_path / "cache").iterdir())
    record.write_bytes(record.read_bytes()[:1000])
    np.testing.assert_array_equal(cache.read(path, SMALL, 28, 2).frames, first.frames)


@pytest.mark.parametrize("item", [{"fps": 0.0}, {"min_frames": 8, "max_frames": 4}], ids=str)
def test_impossible_options_are_named(item: dict) -> None:
    with pytest.raises(InputError, match="fps must be positive"):
        VideoOptions.from_item(item)
