"""A run that is killed, asked to end, or cannot write, goes on to the same bits as one that was left in peace.

    KILLS=50 STAGE=rft SEED=1 python -m pytest tests/test_resume.py -k random -s

kills a longer run as often as that.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs import arguments
from vau_jax.common.files import read_json
from vau_jax.models import checkpoint
from vau_jax.types import State

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "2"))
STAGE = os.environ.get("STAGE", "sft")
SEED = int(os.environ.get("SEED", "0"))
EVERY = 2  # steps between checkpoints
STEPS = max(8, 3 * KILLS) // EVERY * EVERY


def command(stage: str, model: Path, data: Path, workdir: Path, program: str = "vau_jax.train") -> list[str]:
    args = arguments(stage, model, data, workdir, STEPS, **{"data.augment": True})
    return [sys.executable, "-m", program, *args]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(args: list[str]) -> None:
    done = subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def start(args: list[str]) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(args, cwd=ROOT, env=environment(), start_new_session=True, **quiet)


def steps_done(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns when the run's metrics show `step`."""
    deadline = time.monotonic() + 240
    while steps_done(workdir) < step and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)


def kill_after(args: list[str], workdir: Path, step: int, delay: float) -> int:
    """Starts a run, kills it `delay` seconds after its metrics show `step`, whatever it is doing then, and returns the
    steps that it has done."""
    process = start(args)
    wait_for(workdir, step, process)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was to be killed"
    return steps_done(workdir)


def final(workdir: Path) -> dict:
    return checkpoint.restore_params(workdir / "checkpoints" / str(STEPS))


def learning_curve(workdir: Path) -> list[tuple[float, ...]]:
    """What does not depend on the machine's speed, of each step; the loss last."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = ("grad_norm", "tokens_seen", "data/failed_videos")
    return [(*(line[name] for name in names), line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def straight(model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nobody killed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(command(STAGE, model_folder, dataset, workdir))
    return workdir


@pytest.mark.long
def test_a_run_that_is_killed_at_random_moments_ends_like_a_straight_one(
    straight: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Bit for bit: parameters, and every step's metrics with the tokens and videos seen."""
    rng, workdir = np.random.default_rng(SEED), tmp_path / "killed"
    args, seen = command(STAGE, model_folder, dataset, workdir), []
    for number in range(KILLS):
        # One in five while the run is starting, the others during a step or while it is being saved.
        step = min(steps_done(workdir) + rng.integers(1, 5), STEPS - KILLS + number) if rng.random() > 0.2 else 0
        seen.append(kill_after(args, workdir, step, rng.uniform(0.0, 1.0 if step else 8.0)))
    print(f"killed after steps {seen}")
    run(args)
    expected, found = final(straight), final(workdir)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
    assert learning_curve(workdir) == learning_curve(straight)


def test_a_run_that_is_asked_to_end_saves_its_step_first(
    straight: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "asked"
    args = command(STAGE, model_folder, dataset, workdir)
    process = start(args)
    wait_for(workdir, 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    step = read_json(workdir / "preempted.json")["step"]
    assert checkpoint.steps(workdir)[-1] == step == steps_done(workdir) < STEPS
    run(args)
    assert not (workdir / "preempted.json").exists()
    assert learning_curve(workdir) == learning_curve(straight)
    assert read_json(workdir / "best.json") == read_json(straight / "best.json")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    straight: Path, model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it is done meanwhile, and is done again."""
    workdir = tmp_path / "killed"
    monkeypatch.setenv("HELD_AFTER", str(workdir / "checkpoints" / str(EVERY)))
    slow = command(STAGE, model_folder, dataset, workdir, "tests.slow_writes")
    assert kill_after(slow, workdir, 2 * EVERY + 1, 0.0) == 2 * EVERY + 1
    assert checkpoint.steps(workdir) == [EVERY]
    run(command(STAGE, model_folder, dataset, workdir))
    for a, b in zip(jax.tree.leaves(final(straight)), jax.tree.leaves(final(workdir)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert learning_curve(workdir) == learning_curve(straight)


def test_a_run_that_is_asked_to_end_waits_for_its_checkpoint(
    straight: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """While that of a step before is written."""
    workdir = tmp_path / "asked"
    process = start(command(STAGE, model_folder, dataset, workdir, "tests.slow_writes"))
    wait_for(workdir, EVERY, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    step = read_json(workdir / "preempted.json")["step"]
    assert checkpoint.steps(workdir)[-1] == step == steps_done(workdir) < STEPS
    run(command(STAGE, model_folder, dataset, workdir))
    assert learning_curve(workdir) == learning_curve(straight)


def test_a_disk_that_is_full_is_one_line_and_loses_nothing(
    straight: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Files may not grow to what a checkpoint needs: the system refuses to write them, as it does to a full disk."""
    workdir = tmp_path / "full"
    args = command(STAGE, model_folder, dataset, workdir)
    shutil.copytree(straight, workdir)
    for step in checkpoint.steps(workdir)[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    kept = checkpoint.steps(workdir)
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "-", *args]
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if line.startswith(f"error: cannot write to {workdir}")]
    assert len(told) == 1 and f"the checkpoint of step {kept[-1]} is complete" in told[0]
    assert checkpoint.steps(workdir) == kept
    run(args)
    assert learning_curve(workdir) == learning_curve(straight)


def test_a_folder_that_cannot_be_written_to_is_one_line(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    args = command(STAGE, model_folder, dataset, tmp_path / "file" / "run")
    done = subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: cannot write to {tmp_path / 'file' / 'run'}")


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        if path.exists():
            raise SystemExit

    state = State(np.int32(0), {"w": np.zeros(3, np.float32)}, ())
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state, {}, 1.0)
    checkpoints.save(4, state, {}, 3.0)
    checkpoints.save(6, state, {}, 2.0)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        checkpoints.save(8, state, {}, 1.0)  # 6 goes: it is neither the newest nor the best
        checkpoints.wait()
    monkeypatch.undo()
    again = checkpoint.Checkpoints(tmp_path, keep=1)
    assert checkpoint.steps(tmp_path) == [4, 8] and again.best() == 4
    assert not again.removed.exists()


def test_the_best_checkpoint_stays_besides_the_newest(straight: Path) -> None:
    """The best by the mean loss since the checkpoint before."""
    losses = np.asarray([line[-1] for line in learning_curve(straight)]).reshape(-1, EVERY).mean(1)
    best = EVERY * (int(losses.argmin()) + 1)
    assert read_json(straight / "best.json") == {"step": best, "metric": "-loss"}
    assert checkpoint.steps(straight) == sorted({best, STEPS - EVERY, STEPS})


def test_a_workdir_with_another_run_is_refused(straight: Path, model_folder: Path, dataset: Path) -> None:
    other = [*command(STAGE, model_folder, dataset, straight), "--config.optim.lr=5e-4"]
    done = subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "optim.lr (was 0.001, is 0.0005)" in done.stderr
