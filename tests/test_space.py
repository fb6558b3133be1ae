"""What a run or a frame cache needs is said before it begins, and refused where it is certain not to fit."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import video_files
from tests.runs import small
from vau_jax.common import files
from vau_jax.common.files import InputError
from vau_jax.data.video import clips, frame_cache
from vau_jax.data.video.clips import Sampling, VideoOptions
from vau_jax.models import checkpoint
from vau_jax.train import loop, space
from vau_jax.types import State

DISK = 4 * 2**20  # bytes of `disk`


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "disk", folder]).returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def config(steps: int = 100, keep: int = 2) -> ConfigDict:
    given = {"steps": steps, "batch_size": 4, "log_every": 10, "checkpoint": {"every": 10, "keep": keep}}
    given["eval"] = {"csv": ""}
    return ConfigDict(given)


def state(megabytes: float) -> State:
    return State(np.int32(0), {"w": jax.ShapeDtypeStruct((int(megabytes * 2**18),), np.float32)}, ())


def with_checkpoints(workdir: Path, *steps: int) -> Path:
    for step in steps:
        (workdir / checkpoint.CHECKPOINTS / str(step)).mkdir(parents=True)
    return workdir


def test_a_run_that_cannot_fit_is_one_line_before_its_first_step(disk: Path, model_folder: Path, dataset: Path) -> None:
    c = small("vau_r1_sft", model_folder, dataset)
    c.steps, c.checkpoint.every, c.checkpoint.keep = 8, 1, 4
    with pytest.raises(InputError, match=r"4\.0 MiB free, and 6 more checkpoints of .* config\.checkpoint\.keep"):
        loop.run(c, disk / "run")
    assert not (disk / "run" / "metrics.jsonl").exists()


def test_a_run_that_fits_says_what_it_takes(disk: Path, capsys: pytest.CaptureFixture) -> None:
    space.check(config(), state(0.5), disk / "run")
    assert (
        "needs about 2.1 MiB for 4 more checkpoints of 0.5 MiB before compression; 4.0 MiB free"
        in capsys.readouterr().out
    )


def test_a_run_that_may_not_fit_is_warned_of(disk: Path, capsys: pytest.CaptureFixture) -> None:
    space.check(config(), state(1.5), disk / "run")
    assert capsys.readouterr().out.startswith("warning: this may not fit: ")


def test_checkpoints_that_are_there_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    space.check(config(), state(1), with_checkpoints(tmp_path, 10, 20))
    assert "for 2 more checkpoints of" in capsys.readouterr().out


def test_a_run_that_is_short_needs_no_more_than_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    space.check(config(steps=25), state(1), tmp_path)
    assert "for 3 more checkpoints of" in capsys.readouterr().out


def test_checkpoints_that_evaluations_cause_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    c = config(steps=10)
    c.eval.csv = "val.csv"
    space.check(c, state(1), tmp_path)
    assert "for 4 more checkpoints of" in capsys.readouterr().out


@pytest.mark.parametrize("free", [0, 2**50, 2**62])
def test_a_bucket_that_does_not_report_free_space_is_not_refused(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=free, used=0, free=free))
    space.check(config(), state(2**20), tmp_path)
    assert "free space is not known" in capsys.readouterr().out


SAMPLING = Sampling(VideoOptions(min_pixels=28 * 28, max_pixels=112 * 112), 28, 2)


@pytest.mark.parametrize("lead", [0, 1])
def test_the_size_of_frames_is_calculated_without_decoding_them(lead: int, tmp_path: Path) -> None:
    path = video_files.write(tmp_path / "a.mp4", count=53)
    sampling = Sampling(VideoOptions(min_pixels=28 * 28, max_pixels=112 * 112, lead=lead), 28, 2)
    clip = clips.read(path, sampling.options, sampling.factor, sampling.multiple)
    assert clips.clip_bytes(clips.probe(path), sampling) == clip.frames.nbytes


def build(folder: Path, videos: list[Path]) -> None:
    frame_cache.build(folder, videos, SAMPLING, clips.read, workers=2, show=lambda done, note: None)


def test_a_frame_cache_that_cannot_fit_is_one_line_before_it_is_filled(disk: Path, tmp_path: Path) -> None:
    video = video_files.write(tmp_path / "a.mp4", count=600)
    videos = [Path(shutil.copy(video, tmp_path / f"{n}.mp4")) for n in range(frame_cache.PROBED + 1)]
    with pytest.raises(InputError, match=r"4\.0 MiB free, and the frames of 33 videos need .*config\.data\.max_pixels"):
        build(disk / "frames", videos)
    assert not list((disk / "frames").iterdir())


def test_a_frame_cache_says_what_is_to_come(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    videos = [video_files.write(tmp_path / f"{n}.mp4", count=20 + n) for n in range(3)]
    build(tmp_path / "frames", videos[:2])
    said = capsys.readouterr().out
    build(tmp_path / "frames", videos)
    assert "for the frames of 2 videos;" in said and "for the frames of 1 video;" in capsys.readouterr().out
    assert files.free_space(tmp_path / "not" / "there") > 0
