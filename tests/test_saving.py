"""Checkpoints are written in the background: what is saved, who waits, and what is said of a write that fails."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests import slow_writes
from tests.runs import small
from vau_jax.common import checksums
from vau_jax.common.files import InputError
from vau_jax.common.metric_writer import RunLog, read_metrics
from vau_jax.models import checkpoint
from vau_jax.train import loop
from vau_jax.types import State


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    gate = threading.Event()
    slow_writes.patch(monkeypatch, lambda: gate.wait(60))
    yield gate
    gate.set()


def fill_disk(patches: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    slow_writes.patch(patches, refuse)


def state(value: float) -> State:
    return State(jnp.int32(0), {"w": jnp.full(3000, value, jnp.float32)}, ())


def test_what_is_saved_is_the_step_of_the_save_while_updates_go_on(tmp_path: Path, gate: threading.Event) -> None:
    """They donate the state: numbers of later steps take its place in memory. The position in the data changes too."""
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    now, position = update(state(0)), {"seen": [1]}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, now, position, 0.0)
    for step in range(2, 7):
        now = update(now)
        position["seen"].append(step)
    assert set(np.asarray(now.params["w"])) == {6.0} and checkpoint.steps(tmp_path) == []
    gate.set()
    saved, data = checkpoints.restore(1, now)
    assert set(np.asarray(saved.params["w"])) == {1.0} and int(saved.step) == 1 and data == {"seen": [1]}
    assert checksums.noted(tmp_path / "checkpoints" / "1")
    checkpoints.close()


def test_one_save_at_a_time_is_written(tmp_path: Path, gate: threading.Event) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {}, 0.0)
    second = threading.Thread(target=checkpoints.save, args=(2, state(2), {}, 0.0))
    second.start()
    second.join(0.5)
    assert second.is_alive(), "it waits for the first"
    gate.set()
    second.join()
    assert checkpoint.steps(tmp_path)[0] == 1
    assert checkpoints.latest() == checkpoint.steps(tmp_path)[-1] == 2
    checkpoints.close()


def test_a_save_does_not_ask_jax_about_preemption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes agree by the number of times that the run has asked."""
    asked: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {}, 0.0)
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [1] and not asked


def test_the_next_save_raises_the_error_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {}, 0.0)
    checkpoints.wait()
    fill_disk(monkeypatch, tmp_path)
    checkpoints.save(2, state(2), {}, 0.0)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(3, state(3), {}, 0.0)
    assert checkpoint.steps(tmp_path) == [1]
    assert set(checkpoint.restore_params(tmp_path / "checkpoints" / "1")["w"]) == {1.0}
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_whose_last_write_fails_does_not_end_as_if_it_were_done(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=rf"cannot write to {tmp_path}: .*no checkpoint was written yet"):
        loop.run(small("vau_r1_sft", model_folder, dataset), tmp_path)
    assert not (tmp_path / "best.json").exists()


def test_a_run_that_fails_finishes_its_last_save(
    model_folder: Path, dataset: Path, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next step fails while that is written."""
    c, step = small("vau_r1_sft", model_folder, dataset), loop.Run.step
    c.steps, c.checkpoint.every = 2, 1

    def fail_at_the_second(run: loop.Run, number: int) -> tuple:
        if number == 0:
            return step(run, number)
        threading.Timer(0.2, gate.set).start()
        raise KeyError("of the second step")

    monkeypatch.setattr(loop.Run, "step", fail_at_the_second)
    with pytest.raises(KeyError, match="of the second step"):
        loop.run(c, tmp_path)
    assert checkpoint.steps(tmp_path) == [1]


def test_metrics_tell_how_long_a_save_held_the_run_up(tmp_path: Path) -> None:
    """In the line after it."""
    log = RunLog(small("vau_r1_sft", tmp_path, tmp_path), tmp_path, 0)
    log.end(1, {"seconds/step": 0.1}, [], "")
    with log.saving():
        time.sleep(0.1)
    for step in (2, 3):
        log.end(step, {"seconds/step": 0.1}, [], "")
    log.close()
    first, second, third = (line["seconds/checkpoint"] for line in read_metrics(tmp_path))
    assert first == third == 0 and 0.1 <= second < 10
