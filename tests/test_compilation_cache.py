"""Compiled programs are kept: a run that is restarted compiles nothing, and a folder that fails stops no run."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs import ROOT, arguments
from vau_jax.common import compiled
from vau_jax.common.compiled import FOLDER, Programs, Store
from vau_jax.common.metric_writer import read_metrics
from vau_jax.configs import base
from vau_jax.configs import eval as eval_config
from vau_jax.eval import evaluate
from vau_jax.models import checkpoint
from vau_jax.train import loop
from vau_jax.types import State

FINGERPRINT = """
import jax
from jax._src.lib import xla_client
print(xla_client.get_topology_for_devices(jax.devices()).fingerprint())
"""
MISS = re.compile(r"COMPILATION CACHE MISS for '(\w+)'")


def start(args: list[str], processes: int = 1, program: str = "train", **variables: str) -> subprocess.Popen:
    """A program that names all that it has to compile, with the default for its cache."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"JAX_EXPLAIN_CACHE_MISSES": "1", "RUN_PYTHON": sys.executable, **variables}
    command = [sys.executable, "-m", f"vau_jax.{program}", *args]
    if processes > 1:
        command = ["bash", "launch/local_multi.sh", str(processes), f"vau_jax.{program}", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def missed(process: subprocess.Popen) -> list[str]:
    """The programs that were compiled."""
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    return MISS.findall(output)


def misses(workdir: Path) -> float:
    """Those that the first process has counted."""
    return read_metrics(workdir)[-1]["compile/cache_misses"]


@pytest.mark.parametrize("stage", ["sft", pytest.param("rft", marks=pytest.mark.long)])
def test_a_run_that_was_preempted_compiles_nothing_again(
    stage: str, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    args = arguments(stage, model_folder, dataset, workdir, 4, **{"checkpoint.every": 1})
    process = start(args)
    while not (workdir / "checkpoints" / "1").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    first = missed(process)
    assert "jit__whole" in first and misses(workdir) <= len(first)
    assert missed(start(args)) == []
    assert misses(workdir) == 0 and len(read_metrics(workdir)) == 4
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700


@pytest.mark.long
@pytest.mark.parametrize("stage", ["sft", "rft"])
def test_another_run_of_two_processes_beside_the_first_compiles_nothing(
    stage: str, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """In neither of the processes."""
    runs = [arguments(stage, model_folder, dataset, tmp_path / name, 2) for name in ("first", "second")]
    assert missed(start(runs[0], 2)).count("jit__whole") in (2, 4), "in both, of the lengths of two batches"
    assert missed(start(runs[1], 2)) == []


def test_an_evaluation_beside_another_compiles_nothing(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    given = [f"--config.checkpoint={model_folder}", f"--config.data.csv={dataset / 'test.csv'}"]
    given += [f"--config.data.videos={dataset / 'videos'}", "--config.data.max_completion_tokens=4"]
    given += ["--config.data.max_examples=2", "--config.data.max_frames=4", "--config.batch_size=2"]
    assert "jit__start" in missed(start([*given, f"--workdir={tmp_path / 'first'}"], program="evaluate"))
    assert missed(start([*given, f"--workdir={tmp_path / 'second'}"], program="evaluate")) == []


def test_the_same_question_again_compiles_nothing(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    video = next((dataset / "videos").glob("test_*.mp4"))
    args = [f"--model={model_folder}", f"--video={video}", "--task=describe", "--max_new_tokens=4"]
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert "jit__start" in missed(start(args, program="ask", **home))
    assert missed(start(args, program="ask", **home)) == []


def test_the_key_of_a_program_names_what_the_cpu_can_do() -> None:
    """So that a folder may be shared by machines: their topology, which the key holds, is another without AVX."""

    def fingerprint(flags: str) -> str:
        env = {**os.environ, "XLA_FLAGS": flags}
        return subprocess.run(
            [sys.executable, "-c", FINGERPRINT], env=env, capture_output=True, text=True, check=True
        ).stdout

    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the instruction sets of x86-64")
    assert fingerprint("") != fingerprint("--xla_cpu_max_isa=SSE4_2")


def test_an_entry_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = Store(str(tmp_path))
    for key in ("a", "b"):
        store.put(key, b"program")
        assert store.get(key) is None
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_leaves_no_half_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: int) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(SystemExit):
        Store(str(tmp_path)).put("a", b"program")
    monkeypatch.undo()
    assert Store(str(tmp_path)).get("a") is None
    (part,) = tmp_path.iterdir()
    os.utime(part, (0, 0))
    compiled._open(tmp_path, own=True)
    Store(str(tmp_path)).put("a", b"program")
    assert Store(str(tmp_path)).get("a") == b"program"


@pytest.fixture
def unset() -> Iterator[None]:
    """JAX without a folder of compiled programs."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def test_another_users_folder_is_not_used(
    unset: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs in it would run as this user."""
    (tmp_path / FOLDER).mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    compiled.use(compiled.AUTO, tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir is None
    told = capsys.readouterr().out
    assert told.startswith("warning: compiled programs are not kept") and str(tmp_path / FOLDER) in told


def test_a_folder_that_cannot_be_made_is_a_warning(
    unset: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    compiled.use(str(tmp_path / "file" / "folder"))
    assert jax.config.jax_compilation_cache_dir is None and "Not a directory" in capsys.readouterr().out


def test_commands_without_a_workdir_keep_programs_in_the_users_cache(
    unset: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.use(compiled.AUTO)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "vau_jax" / "compiled")


def test_evaluations_inside_a_run_share_the_folder_of_its_runs(unset: None, tmp_path: Path) -> None:
    for workdir in ("rft", "rft/eval", "eval/rft"):
        compiled.use(compiled.AUTO, tmp_path / workdir)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / FOLDER)
        jax.config.update("jax_compilation_cache_dir", None)


def test_the_folder_is_no_part_of_what_was_run(dataset: Path, tmp_path: Path) -> None:
    trained, evaluated = base.get_config(), eval_config.get_config()
    (tmp_path / "config.json").write_text(trained.to_json_best_effort())
    checkpoint.Checkpoints(tmp_path).save(1, State(np.int32(1), {}, {}), {}, 0.0)
    evaluated.data.csv = str(dataset / "test.csv")
    before = evaluate._fingerprint(evaluated, [])
    trained.compilation_cache = evaluated.compilation_cache = "/another/folder"
    loop.check_same_run(trained, tmp_path)
    assert evaluate._fingerprint(evaluated, []) == before


def test_programs_that_the_cache_holds_are_no_misses() -> None:
    programs = Programs()
    jax.monitoring.record_event_duration_secs(compiled.COMPILED, 1.0)
    jax.monitoring.record_event(compiled.HIT)
    jax.monitoring.record_event_duration_secs(compiled.COMPILED, 0.5)
    assert programs.take() == {"compile/programs": 2, "compile/seconds": 1.5, "compile/cache_misses": 1}
    assert programs.take() == {"compile/programs": 0, "compile/seconds": 0.0, "compile/cache_misses": 1}
