"""Checkpoints that storage has damaged: they are found, named, and never used."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vau_jax.common import checksums
from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.models import checkpoint
from vau_jax.train import loop
from vau_jax.types import State


def state(value: float) -> State:
    return State(np.zeros((), np.int32), {"w": np.full(3000, value, np.float32)}, ())


def saved(workdir: Path, *steps: int) -> Path:
    checkpoints = checkpoint.Checkpoints(workdir, keep=3)
    for step in steps:
        checkpoints.save(step, state(step), {"place": step}, 1.0)
    checkpoints.close()
    return workdir / "checkpoints" / str(steps[-1])


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, count: int = 20) -> None:
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).choice(len(data), min(count, len(data)), replace=False):
        data[place] ^= 0x55
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {
    "20 flipped bytes": lambda folder: flip(largest(folder / "state")),
    "a flipped byte in each file": lambda folder: [flip(p, 1) for p in folder.rglob("*") if p.is_file()],
    "a file cut short": lambda folder: cut(largest(folder / "state")),
    "a lacking file": lambda folder: largest(folder / "state").unlink(),
    "flipped bytes in the place in the data": lambda folder: flip(folder / "data" / "metadata"),
    "flipped bytes in the score": lambda folder: flip(folder / "metrics" / "metrics", 5),
    "checksums that are none": lambda folder: (folder / checksums.NOTE).write_text("[1"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_run_resumes_from_the_step_before_a_damaged_one(
    damage: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved(tmp_path, 2, 4))
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the checkpoint of step 4 is damaged (") and line.endswith("resumes from step 2")
    assert checkpoints.latest() == checkpoints.best() == 2
    found, place = checkpoints.restore(2, state(0.0))
    assert place == {"place": 2} and set(np.asarray(found.params["w"])) == {2.0}
    checkpoints.save(4, state(4.0), {}, 2.0)
    checkpoints.wait()
    assert set(checkpoint.restore_params(tmp_path / "checkpoints" / "4")["w"]) == {4.0}
    assert (tmp_path / "damaged" / "4").is_dir()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_not_evaluated_and_the_intact_one_is_named(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = saved(tmp_path, 2, 4)
    damage(folder)
    with pytest.raises(InputError, match=rf"{folder} is damaged \(.*step 2 is intact: give {folder.parent / '2'}"):
        checkpoint.restore_params(folder)


def test_damage_to_an_older_step_is_not_met_when_the_best_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 2, 4)
    flip(tmp_path / "checkpoints" / "2" / "metrics" / "metrics", 5)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    assert "step 2 is damaged (metrics/metrics differs" in capsys.readouterr().out
    assert checkpoints.best() == checkpoints.latest() == 4


def test_a_run_without_an_intact_checkpoint_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    for step in (2, 4):
        flip(largest(tmp_path / "checkpoints" / str(step) / "state"))
    with pytest.raises(InputError, match=r"no checkpoint of .* is intact: step 4 .*, step 2 .*; restore a copy"):
        checkpoint.Checkpoints(tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_a_step_whose_checksums_a_kill_has_prevented_is_read_and_errors_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, 2)
    (folder / checksums.NOTE).unlink()
    assert checkpoint.Checkpoints(tmp_path).latest() == 2
    assert "step 2 has no checksums" in capsys.readouterr().out
    assert set(checkpoint.restore_params(folder)["w"]) == {2.0}
    (folder / "state" / "_METADATA").unlink()
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*/2 \(.*no other step of the run is intact"):
        checkpoint.restore_params(folder)


# --- Formats ------------------------------------------------------------------------------------------------------


def stored(workdir: Path, state: State, number: int | None) -> checkpoint.Checkpoints:
    """A checkpoint of a format; None: of the time when there was none."""
    checkpoints = checkpoint.Checkpoints(workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", number)
        checkpoints.save(1, state, {"tokens_seen": 3}, 0.0)
    return checkpoints


def numbers(params: dict[str, object]) -> State:
    return State(jnp.int32(1), jax.tree.map(jnp.float32, params), ())


def test_an_earlier_format_is_resumed(tmp_path: Path) -> None:
    state = numbers({"decoder": {"norm": 2.0}})
    restored, data = stored(tmp_path, state, 1).restore(1, state)
    assert float(restored.params["decoder"]["norm"]) == 2.0 and data == {"tokens_seen": 3}


def test_a_later_format_is_refused_in_a_line(tmp_path: Path) -> None:
    state = numbers({"decoder": {"norm": 2.0}})
    with pytest.raises(InputError, match=r"has format 3, of a later version: this one reads up to 2"):
        stored(tmp_path, state, 3).restore(1, state)


def test_a_motion_prompt_of_format_1_is_refused_in_a_line(tmp_path: Path) -> None:
    state = numbers({"visual": {"motion_prompt": {"m": 1.0, "n": 0.0}}})
    with pytest.raises(InputError, match=r"format 1.*begin another run from it with config\.init_from="):
        stored(tmp_path, state, 1).restore(1, state)


def test_a_config_of_a_later_format_is_refused_in_a_line(tmp_path: Path) -> None:
    config = base.get_config()
    (tmp_path / checkpoint.CHECKPOINTS / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"format": config.format + 1}))
    with pytest.raises(InputError, match="of a later version"):
        loop.check_same_run(config, tmp_path)


def test_of_equal_steps_the_first_is_kept_as_the_best(tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    for step, score in enumerate((0.1, 0.5, 0.5, -np.inf, 0.5), 1):
        checkpoints.save(step, state(step), {}, score)
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [2, 5] and checkpoints.best() == 2
