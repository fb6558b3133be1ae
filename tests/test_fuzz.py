"""Clips changed at random: each is decoded, or is a VideoError of one line; none crashes or holds up its worker."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests import video_files
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError

OPTIONS = VideoOptions(nframes=4, min_frames=2, min_pixels=28 * 28, max_pixels=56 * 56)
SECONDS = 30.0  # for one clip; whole ones take a hundredth
CLIPS = {  # file name -> codec, options
    "h264.mp4": ("libx264", {"bf": "2"}),
    "h264.ts": ("libx264", {}),
    "h264.flv": ("libx264", {"bf": "0"}),
    "vp9.ivf": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "h265.mkv": ("libx265", {"x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {}),
    "mjpeg.mov": ("mjpeg", {}),
    "wmv2.asf": ("wmv2", {}),
    "vp8.mkv": ("libvpx", {"deadline": "realtime"}),
    "flv1.flv": ("flv", {}),
    "raw.gif": ("gif", {}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Clips of ten frames in many containers and codecs."""
    folder = tmp_path_factory.mktemp("whole")
    formats = {"mjpeg": "yuvj420p", "gif": "rgb8"}
    found = []
    for name, (codec, options) in CLIPS.items():
        path = video_files.write(
            folder / name, 10, (64, 48), codec=codec, options=options, pix_fmt=formats.get(codec, "yuv420p")
        )
        found.append(path.read_bytes())
    return found


def mutated(whole: list[bytes], seed: int) -> bytes:
    """One of the clips with one to eight changes; half of them in its first 512 bytes, where the tables are."""
    rng = np.random.default_rng(seed)
    data = bytearray(whole[seed % len(whole)])
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(0, min(len(data), 512) if rng.random() < 0.5 else len(data)))
        size = int(rng.integers(1, 65))
        change = rng.integers(0, 8)
        if change <= 1:  # other bytes
            data[at : at + size] = rng.bytes(len(data[at : at + size]))
        elif change == 2:  # one bit
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif change == 3:  # a number at the end of its range
            data[at : at + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"][size % 4]
        elif change == 4:  # a part again
            data[at:at] = data[at : at + 16 * size]
        elif change == 5:  # a part less
            del data[at : at + size]
        elif change == 6:  # a part of another file
            other = whole[int(rng.integers(0, len(whole)))]
            start = int(rng.integers(0, len(other)))
            data[at:at] = other[start : start + 16 * size]
        elif at > 64:  # broken off
            del data[at:]
    return bytes(data)


def outcome(pool: DecoderPool, path: Path) -> str:
    """What became of a clip, in a word."""
    try:
        pool.probe(path)
        clip = pool.read(path, OPTIONS, 28, 2)
    except VideoError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error
        return error.reason
    assert clip.frames.ndim == 4 and clip.frames.dtype == np.uint8 and len(clip.frames) == len(clip.times)
    assert np.isfinite(clip.times).all() and 0 < clip.seconds_per_frame < np.inf
    return "damaged but read" if clip.damage else "read"


def outcomes(whole: list[bytes], folder: Path, seeds: range) -> Counter[str]:
    pool = DecoderPool(2, SECONDS)

    def one(seed: int) -> str:
        path = folder / f"{seed}.mp4"
        path.write_bytes(mutated(whole, seed))
        found = outcome(pool, path)
        path.unlink()
        return found

    with ThreadPoolExecutor(2) as threads:
        found = Counter(threads.map(one, seeds))
    pool.close()
    return found


def check(found: Counter[str], printed: str) -> None:
    assert printed == ""
    assert not found.keys() & {"crashed", "timeout"}, found
    assert min(found["read"], found["damaged but read"], found["unreadable"]) > found.total() / 100, found


def test_all_whole_clips_are_read(whole: list[bytes], tmp_path: Path) -> None:
    pool = DecoderPool(1)
    for name, data in zip(CLIPS, whole, strict=True):
        (tmp_path / name).write_bytes(data)
        assert outcome(pool, tmp_path / name) == "read", name
    pool.close()


def test_240_changed_clips_are_read_or_named(
    whole: list[bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check(outcomes(whole, tmp_path, range(240)), capfd.readouterr().err)


@pytest.mark.long
def test_5000_changed_clips_are_read_or_named(
    whole: list[bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check(outcomes(whole, tmp_path, range(1000, 6000)), capfd.readouterr().err)
