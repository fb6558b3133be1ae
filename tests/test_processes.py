"""Runs of several processes on this machine: the same as of one process, and what happens when one of them ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs import IN_PROPORTION, arguments
from vau_jax.common import checksums
from vau_jax.common.files import read_json
from vau_jax.common.metric_writer import read_metrics
from vau_jax.models import checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 4
SECOND = "state/ocdbt.process_1"  # where the second of several processes writes its part of a checkpoint
SAME = {"rtol": 1e-4, "atol": 1e-6}  # sums of float32 in other orders, four steps long


def options(stage: str, model: Path, data: Path, workdir: Path, steps: int = STEPS) -> list[str]:
    changed = {"rollout.temperature": 0.5, **IN_PROPORTION}
    if stage == "rft":
        changed |= {"user_rewards": "(('tests.reward_functions:told', 1.0),)", "data.difficulty.enabled": True}
        changed |= {"grpo.kl_in": "reward", "grpo.scale": "batch", "rollout.max_draws": 3}
        changed |= {"eval.csv": data / "test.csv", "eval.every": 2, "eval.max_examples": 7, "eval.share": 1.0}
    return arguments(stage, model, data, workdir, steps, **changed)


def start(
    processes: int, args: list[str], told: Path | None = None, python: str | Path = sys.executable
) -> subprocess.Popen:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "RUN_PYTHON": str(python), "TOLD": str(told or "")}
    env["PREEMPTED_CODE"] = "75"
    command = ["bash", "launch/local_multi.sh", str(processes), "vau_jax.train", *args]
    if processes == 1:
        command, env["ALONE"] = ["bash", "launch/run.sh", "vau_jax.train", *args], "1"
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(processes: int, args: list[str], told: Path | None = None) -> str:
    process = start(processes, args, told)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def signal_one(number: int, workdir: Path, what: signal.Signals, step: int) -> None:
    """Sends a signal to process `number` of the run as soon as its metrics show `step`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        file = workdir / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            os.kill(json.loads((workdir / "heartbeats" / f"{number:05d}.json").read_text())["pid"], what)
            return
        time.sleep(0.002)
    raise AssertionError("the run did not come to that step")


def curve(workdir: Path, *names: str) -> np.ndarray:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step is written once"
    return np.asarray([[line[name] for name in names] for line in lines])


def final(workdir: Path) -> list[np.ndarray]:
    return jax.tree.leaves(checkpoint.restore_params(workdir / "checkpoints" / str(STEPS)))


@pytest.mark.long
@pytest.mark.parametrize("others", [1, 4])
def test_sft_preempted_on_two_processes_resumes_on_another_number(
    others: int, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """SIGTERM to one of them; the whole run is that of one process."""
    run(1, options("sft", model_folder, dataset, tmp_path / "one"))
    args = options("sft", model_folder, dataset, tmp_path / "many")
    process = start(2, args)
    signal_one(1, tmp_path / "many", signal.SIGTERM, 1)
    began = time.monotonic()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output[-3000:]
    assert time.monotonic() - began < 60
    step = json.loads((tmp_path / "many" / "preempted.json").read_text())["step"]
    assert step < STEPS and checkpoint.steps(tmp_path / "many")[-1] == step
    output = run(others, args)
    assert not (tmp_path / "many" / "preempted.json").exists()
    assert len(re.findall(r"sft: 4/4", output)) == 1, "one process alone tells how far the run is"
    names = ("loss", "grad_norm", "tokens_seen", "data/failed_videos")
    np.testing.assert_allclose(curve(tmp_path / "many", *names), curve(tmp_path / "one", *names), **SAME)
    assert len(list((tmp_path / "many" / "heartbeats").iterdir())) == others


@pytest.fixture(scope="module")
def rft_of_two(model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rft")
    run(2, options("rft", model_folder, dataset, folder / "run"), folder / "told")
    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_rft_of_several_processes_is_that_of_one(
    processes: int, rft_of_two: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """With difficulty, KL in the reward, a batch-wide scale and groups without variance replaced, which all look at the
    whole batch."""
    several = rft_of_two / "run"
    if processes != 2:
        several = tmp_path / "several"
        run(processes, options("rft", model_folder, dataset, several))
    run(1, options("rft", model_folder, dataset, tmp_path / "one"), tmp_path / "told")
    names = ("loss", "grad_norm", "reward", "reward_std", "length/mean", "tokens_seen")
    names += ("final_score", "difficulty/hard", "groups_without_variance", "dynamic/draws", "dynamic/replaced")
    found = curve(several, *names)
    np.testing.assert_allclose(found, curve(tmp_path / "one", *names), **SAME)
    assert found[:, -1].max() > 0, "no group was replaced"
    evaluated = [
        [{name: x for name, x in line.items() if name.startswith("eval/")} for line in read_metrics(folder)]
        for folder in (several, tmp_path / "one")
    ]
    assert evaluated[0] == evaluated[1] and [len(line) > 5 for line in evaluated[0]] == [False, True, False, True]


@pytest.mark.long
def test_rewards_beside_log_probabilities_are_those_of_one_process(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Without further draws: each process scores its rows while all compute the reference together."""
    for processes, folder in ((2, tmp_path / "two"), (1, tmp_path / "one")):
        run(processes, [*options("rft", model_folder, dataset, folder), "--config.rollout.max_draws=1"])
    names = ("loss", "kl", "grad_norm", "reward", "reward_std", "final_score")
    np.testing.assert_allclose(curve(tmp_path / "two", *names), curve(tmp_path / "one", *names), **SAME)


def test_what_processes_tell_each_other_soon_compiles_nothing(rft_of_two: Path) -> None:
    """Lists of names, scores and counts that have another length at each step."""
    programs = curve(rft_of_two / "run", "compile/programs")[:, 0]
    assert programs[0] > 0 and programs[-1] == 0, programs


@pytest.mark.long
def test_a_run_of_two_processes_compiles_nothing_after_its_tenth_step(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    run(2, options("rft", model_folder, dataset, tmp_path / "run", 30))
    programs = [line["compile/programs"] for line in read_metrics(tmp_path / "run")]
    assert len(programs) == 30 and programs[0] > 0 and not any(programs[10:])


def test_every_file_of_a_checkpoint_has_a_hash_by_the_process_that_has_written_it(rft_of_two: Path) -> None:
    folder = rft_of_two / "run" / "checkpoints" / str(STEPS)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    notes = {name for name in files if name.startswith("checksums.")}
    assert notes == {"checksums.json", "checksums.00001.json"} and set(checksums.noted(folder)) == files - notes
    second = read_json(folder / "checksums.00001.json")
    assert second and all(name.startswith(f"{SECOND}/") for name in second)
    assert not checksums.damage(folder)


def test_rewards_are_computed_once_and_where_the_samples_are(
    rft_of_two: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Of four prompts a step each of two processes reads and scores two, with four completions each."""
    by_process = defaultdict(list)
    for line in (rft_of_two / "told").read_text().splitlines():
        pid, name = line.split(" ", 1)
        by_process[pid].append(name)
    draws = int(curve(rft_of_two / "run", "dynamic/draws").sum())
    assert sorted(map(len, by_process.values())) == [draws * 2 * 4] * 2
    first, second = ([names[i : i + 8] for i in range(0, len(names), 8)] for names in by_process.values())
    assert all(not set(a) & set(b) for a, b in zip(first, second, strict=True))


@pytest.mark.long  # three minutes; of an evaluation, and of one process, in the short list
def test_the_others_end_when_one_is_killed_and_the_run_resumes_to_the_same_bits(
    rft_of_two: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    args = options("rft", model_folder, dataset, tmp_path / "killed")
    process = start(2, args)
    signal_one(1, tmp_path / "killed", signal.SIGKILL, 3)
    began = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert process.returncode not in (0, 2)
    assert re.search(r"\[0\] error: process 0 of 2 ends because it lost process 1 \(.*, pid \d+, last seen", output)
    run(2, args)
    for a, b in zip(final(rft_of_two / "run"), final(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(curve(rft_of_two / "run", "loss"), curve(tmp_path / "killed", "loss"))


@pytest.mark.long
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_all_with_its_error(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """The second of two, whose files may not grow to what that takes."""
    python = tmp_path / "python"
    limit = f'[ "$JAX_PROCESS_ID" = 0 ] || {{ ulimit -f 100; trap "" XFSZ; }}\nexec {sys.executable} "$@"\n'
    python.write_text(f"#!/bin/bash\n{limit}")
    python.chmod(0o755)
    began = time.monotonic()
    process = start(2, options("sft", model_folder, dataset, tmp_path / "run"), python=python)
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, 75) and time.monotonic() - began < 240
    assert re.search(rf"^\[1\] error: cannot write to {tmp_path / 'run'}: ", output, re.MULTILINE), output[-3000:]
    assert checkpoint.steps(tmp_path / "run") == []


def test_what_two_processes_tell_each_other(tmp_path: Path) -> None:
    """The first process's mistake is that of both, a workdir is the first's, a file of answers each one's own."""
    (tmp_path / "answers.00003.jsonl").write_text('{"paid": 3}\n{"cut sho')
    command = ["bash", "launch/local_multi.sh", "2", "tests.two_processes", str(tmp_path)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "RUN_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    for number in range(2):
        told = json.loads(re.search(rf"^\[{number}\] told (.*)$", done.stdout, re.MULTILINE)[1])
        assert told["found"] == {"process": 0} and told["error"] == "the first says no"
        assert re.match(rf"{tmp_path} is in use by process \d+ on .* since ", told["held"])
        assert told["damage"] == ["", f"4 differs from what was written, {SECOND}/5 cannot be read"]
        assert told["programs"] <= 12, "texts of 60 lengths up to 100 kB"
    assert set(read_json(tmp_path / "checkpoint" / "checksums.json")) == {"0", "2", "4", "6"}
    assert set(read_json(tmp_path / "checkpoint" / "checksums.00001.json")) == {f"{SECOND}/{n}" for n in (1, 3, 5)}
    first, second, _ = sorted(tmp_path.glob("answers*"))
    assert first.name == "answers.00001.jsonl" and first.read_text() == '{"paid": 3}\n{"paid": 1}\n'
    assert second.name == "answers.00003.jsonl"
    assert (tmp_path / "answers.jsonl").read_text() == '{"paid": 3}\n{"paid": 0}\n'


def test_without_a_cluster_the_way_out_is_named(tmp_path: Path) -> None:
    args = ["--config=configs/vau_r1_sft.py", f"--workdir={tmp_path}", "--distributed"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COORD")}
    command = [sys.executable, "-m", "vau_jax.train", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "JAX_COORDINATOR_ADDRESS" in done.stderr and "Traceback" not in done.stderr
