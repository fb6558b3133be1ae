"""A run that is killed with SIGKILL, at any step, ends with the same bits as one that is not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vau_jax import checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 6


def command(stage: str, model: Path, data: Path, workdir: Path) -> list[str]:
    values = {
        "config": "configs/srvau_r1_rft.py",
        "workdir": workdir,
        "config.stage": stage,
        "config.model": model,
        "config.data.csv": data / "train.csv",
        "config.data.videos": data / "videos",
        "config.data.reflection": data / "train_reflection.jsonl",
        "config.data.augment": True,
        "config.data.wording": "short",
        "config.data.max_frames": 8,
        "config.data.max_completion_tokens": 128 if stage == "sft" else 16,
        "config.data.bucket": "(128, 576, 48, 64, 12, 64)",
        "config.dtype": "float32",
        "config.batch_size": 4,
        "config.steps": STEPS,
        "config.optim.lr": 1e-3,
        "config.checkpoint.every": 2,
    }
    return [sys.executable, "-m", "vau_jax.train", *(f"--{key}={value}" for key, value in values.items())]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(args: list[str]) -> None:
    done = subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_after(args: list[str], workdir: Path, step: int) -> None:
    """Starts a run and kills it as soon as its metrics show `step`, whatever it is doing then."""
    process = subprocess.Popen(
        args, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        file = workdir / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was to be killed"


def final(workdir: Path) -> dict:
    return checkpoint.restore_params(workdir / "checkpoints" / str(STEPS))


def learning_curve(workdir: Path) -> list[tuple[int, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def straight_sft(model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nobody killed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(command("sft", model_folder, dataset, workdir))
    return workdir


def test_a_killed_sft_run_ends_like_a_straight_one(
    straight_sft: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    ends_alike("sft", (1, 4), straight_sft, model_folder, dataset, tmp_path)


def test_a_killed_rft_run_ends_like_a_straight_one(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    run(command("rft", model_folder, dataset, tmp_path / "straight"))
    ends_alike("rft", (3,), tmp_path / "straight", model_folder, dataset, tmp_path)


def ends_alike(
    stage: str, kills: tuple[int, ...], straight: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Bit for bit: a run that is killed at these steps, and one that is not."""
    for step in kills:
        kill_after(command(stage, model_folder, dataset, tmp_path / "killed"), tmp_path / "killed", step)
    run(command(stage, model_folder, dataset, tmp_path / "killed"))
    expected, found = final(straight), final(tmp_path / "killed")
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
    assert learning_curve(tmp_path / "killed") == learning_curve(straight)


def test_a_workdir_with_another_run_is_refused(straight_sft: Path, model_folder: Path, dataset: Path) -> None:
    other = [*command("sft", model_folder, dataset, straight_sft), "--config.optim.lr=5e-4"]
    done = subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "optim.lr (was 0.001, is 0.0005)" in done.stderr
