"""The frame cache: what it gives back, and how stale, damaged and half-written parts are found and mended."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import video_files
from vau_jax.common import files
from vau_jax.common.files import InputError
from vau_jax.data.video import clips, frame_cache
from vau_jax.data.video.clips import Clip, Sampling, VideoOptions
from vau_jax.data.video.decoders import VideoError
from vau_jax.data.video.frame_cache import FrameCache

SAMPLING = Sampling(VideoOptions(min_pixels=28 * 28, max_pixels=112 * 112), 28, 2)


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Three clips and a broken file."""
    paths = [video_files.write(tmp_path / f"{n}.mp4", count=20 + n) for n in range(3)]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"broken")
    return [*paths, broken]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "frames"


def build(folder: Path, videos: list[Path], sampling: Sampling = SAMPLING) -> Counter[str]:
    return frame_cache.build(folder, videos, sampling, clips.read, workers=2, show=lambda done, note: None)


def forbidden(*args: Any) -> Clip:
    raise AssertionError("a video was decoded")


def test_what_is_read_is_what_was_decoded(folder: Path, videos: list[Path]) -> None:
    assert build(folder, videos) == Counter(written=3, failed=1)
    for path in videos[:3]:
        clip, cached = FrameCache(folder, forbidden).read(path, SAMPLING)
        direct = clips.read(path, SAMPLING.options, 28, 2)
        np.testing.assert_array_equal(clip.frames, direct.frames)
        np.testing.assert_array_equal(clip.times, direct.times)
        assert cached and clip.seconds_per_frame == direct.seconds_per_frame


def test_a_broken_video_is_remembered_with_its_reason(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    with pytest.raises(VideoError, match="cannot open") as caught:
        FrameCache(folder, forbidden).read(videos[3], SAMPLING)
    assert caught.value.reason == "unreadable"


def test_a_second_call_decodes_nothing(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    again = frame_cache.build(folder, videos, SAMPLING, forbidden, workers=2, show=lambda done, note: None)
    assert again == Counter(kept=4, failed=1)


def test_other_settings_are_not_served(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    other = Sampling(VideoOptions(nframes=4, max_pixels=112 * 112), 28, 2)
    clip, cached = FrameCache(folder).read(videos[0], other)
    assert not cached and len(clip.frames) == 4


def test_a_changed_video_is_not_served_and_its_record_is_rebuilt(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    video_files.write(videos[1], count=50)
    clip, cached = FrameCache(folder).read(videos[1], SAMPLING)
    assert not cached and len(clip.frames) == 4
    assert build(folder, videos) == Counter(stale=1, written=1, kept=3, failed=1)
    assert FrameCache(folder, forbidden).read(videos[1], SAMPLING)[1]


def test_a_change_inside_a_file_is_noticed_whatever_its_size_and_time(folder: Path, videos: list[Path]) -> None:
    data = bytearray(videos[1].read_bytes() + (2**20).to_bytes(4) + b"free" + bytes(2**20 - 8))
    videos[1].write_bytes(data)
    build(folder, videos)
    stat = videos[1].stat()
    data[len(data) // 2] ^= 1
    with videos[1].open("r+b") as file:
        file.write(data)
    os.utime(videos[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert videos[1].stat().st_size == stat.st_size and videos[1].stat().st_mtime_ns == stat.st_mtime_ns
    assert not FrameCache(folder).read(videos[1], SAMPLING)[1]


def test_files_that_did_not_change_are_not_read_again(
    folder: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_cache, "SETTLED", 0)
    build(folder, videos)
    shutil.copy(videos[0], videos[0].with_name("copy.mp4"))
    read, hashed = [], files.content_hash
    monkeypatch.setattr(files, "content_hash", lambda path: read.append(path) or hashed(path))
    cache = FrameCache(folder, forbidden)
    for name in ("0.mp4", "1.mp4", "copy.mp4", "copy.mp4"):
        assert cache.read(videos[0].with_name(name), SAMPLING)[1]
    assert read == [videos[0].with_name("copy.mp4")]


def test_the_key_says_every_setting_by_name() -> None:
    """A pinned text: another one would leave every cache behind."""
    assert set(frame_cache.FIELDS) == set(VideoOptions.__dataclass_fields__)
    assert frame_cache.sampling_text(SAMPLING) == (
        '{"fps": 2.0, "nframes": null, "min_frames": 4.0, "max_frames": 768.0, "min_pixels": 784.0, '
        '"max_pixels": 12544.0, "total_pixels": 90316800.0, "per_clip": 0.0, "resized_height": null, '
        '"resized_width": null, "video_start": null, "video_end": null, "lead": 0.0, "factor": 28.0, "multiple": 2.0}'
    )


def test_equal_settings_have_equal_keys(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    same = replace(SAMPLING, options=replace(SAMPLING.options, fps=2))
    assert FrameCache(folder, forbidden).read(videos[0], same)[1]


def test_a_cache_of_another_version_is_said_and_filled_anew(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    listing = next(folder.glob("*.json"))
    old = [
        {name: e[name] for name in ("video", "sampling", "failure", "reason")} for e in json.loads(listing.read_text())
    ]
    listing.write_text(json.dumps([{"key": f"{n:032x}", **entry} for n, entry in enumerate(old)]))
    with pytest.raises(InputError, match="filled by another version"):
        FrameCache(folder)
    assert build(folder, videos) == Counter(stale=4, written=3, failed=1)
    assert FrameCache(folder, forbidden).read(videos[0], SAMPLING)[1]


def test_a_damaged_record_is_decoded_and_then_rebuilt(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    shard = next(folder.glob("*.arrayrecord"))
    first = clips.read(videos[0], SAMPLING.options, 28, 2)
    data = bytearray(shard.read_bytes())
    at = data.index(first.frames[0].tobytes()[:64])
    data[at + 100] ^= 1
    shard.write_bytes(data)
    clip, cached = FrameCache(folder).read(videos[0], SAMPLING)
    assert not cached
    np.testing.assert_array_equal(clip.frames, first.frames)
    assert build(folder, videos) == Counter(damaged=1, written=1, kept=3, failed=1)
    assert all(FrameCache(folder, forbidden).read(path, SAMPLING)[1] for path in videos[:3])


def test_a_truncated_shard_is_rebuilt(folder: Path, videos: list[Path]) -> None:
    build(folder, videos)
    shard = next(folder.glob("*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert not FrameCache(folder).read(videos[0], SAMPLING)[1]
    assert build(folder, videos)["written"] == 3
    assert all(FrameCache(folder, forbidden).read(path, SAMPLING)[1] for path in videos[:3])


def test_a_killed_call_resumes_after_its_last_complete_shard(
    folder: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_cache, "SHARD_BYTES", 1)  # a shard a clip

    def killed(path: Path, *args: Any) -> Clip:
        if path == videos[2]:
            raise KeyboardInterrupt
        return clips.read(path, *args)

    with pytest.raises(KeyboardInterrupt):
        frame_cache.build(folder, videos, SAMPLING, killed, workers=1, show=lambda done, note: None)
    (folder / "frames-00009.part").write_bytes(b"half")
    assert build(folder, videos) == Counter(kept=2, written=1, failed=1)
    assert not list(folder.glob("*.part"))


def test_a_copied_cache_serves_copied_videos(folder: Path, videos: list[Path], tmp_path: Path) -> None:
    build(folder, videos)
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.copy(videos[0], tmp_path / "renamed.mp4")
    assert FrameCache(tmp_path / "elsewhere", forbidden).read(tmp_path / "renamed.mp4", SAMPLING)[1]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frame cache .* does not exist"):
        FrameCache(tmp_path / "none")


def test_a_missing_video_is_a_video_error(folder: Path, videos: list[Path], tmp_path: Path) -> None:
    build(folder, videos)
    with pytest.raises(VideoError) as caught:
        FrameCache(folder).read(tmp_path / "none.mp4", SAMPLING)
    assert caught.value.reason == "missing"
