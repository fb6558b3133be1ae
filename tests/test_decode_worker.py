"""Decoding in processes of their own: what a hanging, crashing or greedy decoder costs, and that it costs no more."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests import video_files
from vau_jax.data.video import clips
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError

SMALL = VideoOptions(min_pixels=28 * 28, max_pixels=112 * 112)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video_files.write(tmp_path_factory.mktemp("clips") / "a.mp4")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds of decoding: every frame of it is wanted at full size."""
    return video_files.write(tmp_path_factory.mktemp("clips") / "slow.mp4", count=300, size=(1280, 720))


EVERY_FRAME = VideoOptions(fps=20.0, max_pixels=1280 * 720, total_pixels=10**9)


def test_a_worker_gives_what_read_gives(clip: Path) -> None:
    ours, direct = DecoderPool(1).read(clip, SMALL, 28, 2), clips.read(clip, SMALL, 28, 2)
    np.testing.assert_array_equal(ours.frames, direct.frames)
    np.testing.assert_array_equal(ours.times, direct.times)
    assert (ours.seconds_per_frame, ours.damage) == (direct.seconds_per_frame, direct.damage)


def test_errors_come_through_with_their_reason(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    with pytest.raises(VideoError, match=r"cannot open .*bad\.mp4") as caught:
        DecoderPool(1).read(bad, SMALL, 28, 2)
    assert caught.value.reason == "unreadable"


def test_a_video_that_takes_too_long_costs_itself_alone(clip: Path, slow: Path) -> None:
    pool = DecoderPool(1, seconds=0.5)
    with pytest.raises(VideoError, match=r"longer than 0\.5 s") as caught:
        pool.read(slow, EVERY_FRAME, 28, 2)
    assert caught.value.reason == "timeout"
    assert len(pool.read(clip, SMALL, 28, 2).frames) == 6


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=lambda s: s.name)
def test_a_crash_costs_one_video(clip: Path, slow: Path, number: signal.Signals) -> None:
    pool = DecoderPool(1)
    pool.read(clip, SMALL, 28, 2)  # the process is there
    worker = pool.idle.get()
    pool.idle.put(worker)
    threading.Timer(0.3, os.kill, (worker.process.pid, number)).start()
    with pytest.raises(VideoError, match="crashed") as caught:
        pool.read(slow, EVERY_FRAME, 28, 2)
    assert caught.value.reason == "crashed"
    assert len(pool.read(clip, SMALL, 28, 2).frames) == 6


def test_a_worker_that_died_between_videos_costs_none(clip: Path) -> None:
    pool = DecoderPool(1)
    pool.read(clip, SMALL, 28, 2)
    worker = pool.idle.get()
    worker.process.kill()
    worker.process.wait()
    pool.idle.put(worker)
    assert len(pool.read(clip, SMALL, 28, 2).frames) == 6


def test_no_video_takes_more_memory_than_allowed(clip: Path, slow: Path) -> None:
    """300 frames of 1280 x 720 are 0.8 GB, and a worker may have 0.5."""
    pool = DecoderPool(1, memory=2**29)
    with pytest.raises(VideoError, match="more memory") as caught:
        pool.read(slow, EVERY_FRAME, 28, 2)
    assert caught.value.reason == "too large"
    assert len(pool.read(clip, SMALL, 28, 2).frames) == 6


def test_a_clip_of_too_many_bytes_is_refused(slow: Path) -> None:
    big = VideoOptions(nframes=600, resized_height=2800, resized_width=2800)
    with pytest.raises(VideoError, match="more than 2147483648 bytes"):
        clips.read(slow, big, 28, 2)


def test_many_threads_share_a_pool(clip: Path) -> None:
    pool, found = DecoderPool(2), []

    def some() -> None:
        found.extend(len(pool.read(clip, SMALL, 28, 2).frames) for _ in range(3))

    threads = [threading.Thread(target=some) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [6] * 15


def test_a_worker_ends_when_its_input_does(clip: Path) -> None:
    """As when the run that it serves ends, however that ends."""
    pool = DecoderPool(1)
    pool.read(clip, SMALL, 28, 2)
    worker = pool.idle.get()
    worker.process.stdin.close()
    for _ in range(50):
        if worker.process.poll() is not None:
            break
        time.sleep(0.1)
    assert worker.process.poll() == 0
