"""Sweeps: their trials, what is run, skipped and gone on with, and the table at the end."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launchers import GKE, JOBSET
from vau_jax.common import config_flags
from vau_jax.common.files import InputError
from vau_jax.configs import sweeps
from vau_jax.launch import sweep

ROOT = Path(__file__).parents[1]
SWEEPS = sorted(path for path in (ROOT / "configs" / "sweeps").glob("[a-z]*.py"))
HEAD = """
from vau_jax.configs.sweeps import over, product, zipped
PROGRAM, CONFIG = "tests.sweep_program", "tests/sweep_program.py"
"""


def call(file: Path, workdir: Path, *options: str, **settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/sweep.py", f"--config={file}", f"--workdir={workdir}", *options]
    env = os.environ | settings
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def written(folder: Path, body: str) -> Path:
    file = folder / "my_sweep.py"
    file.write_text(f"{HEAD}def get_hyper():\n    return {body}\n")
    return file


def test_a_sweep_without_jobs_at_once_is_a_mistake(tmp_path: Path) -> None:
    done = call(written(tmp_path, 'over("seed", (0, 1))'), tmp_path / "runs", "--jobs=0")
    assert done.returncode == 2 and done.stderr.startswith("error: argument --jobs: 0: expected at least 1 ")


def test_products_and_zips() -> None:
    a, b = sweeps.over("a", (1, 2)), sweeps.over("b", "xy")
    assert sweeps.product(a, b) == [{"a": i, "b": j} for i in (1, 2) for j in "xy"]
    assert sweeps.zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(ValueError, match="longer"):
        sweeps.zipped(a, sweeps.over("b", "xyz"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_of_the_project_sets_fields_that_its_config_has(file: Path, tmp_path: Path) -> None:
    """Its program's own reading of the flags accepts every trial."""
    module = sweep.load(str(file))
    importlib.import_module(module.PROGRAM)
    found = sweep.trials(module, tmp_path)
    assert len({trial.folder for trial in found}) == len(found) > 2
    for trial in found:
        config, workdir = config_flags.parse(trial.command[2:])
        assert workdir == trial.folder
        assert any(f"seed={config.seed}" in part for part in trial.name.split(","))


def test_trials_are_run_once_and_tabulated(tmp_path: Path) -> None:
    file = written(tmp_path, 'product([{"options": (3, 4)}], over("seed", (0, 2)), over("skill", (0.2, 0.5)))')
    done = call(file, tmp_path / "runs", "--jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "seed=2,skill=0.5" / "done.json").is_file()
    table = (tmp_path / "runs" / "sweep.md").read_text()
    assert "| skill=0.2 | only       | 2 | 0.30 ± 0.14 |" in table
    assert "| skill=0.5 | only       | 2 | 0.60 ± 0.14 |" in table
    page = (tmp_path / "runs" / "sweep.html").read_text()
    assert all(f"seed={seed},skill={skill}" in page for seed in (0, 2) for skill in (0.2, 0.5))
    again = call(file, tmp_path / "runs")
    assert again.stdout.count("is finished") == 4 and "begins" not in again.stdout
    changed = written(tmp_path, 'product([{"options": (3, 5)}], over("seed", (0, 2)), over("skill", (0.2, 0.5)))')
    done = call(changed, tmp_path / "runs", "--jobs=2")
    assert done.stdout.count("begins") == 4 and "is finished" not in done.stdout, "with other settings"


@pytest.mark.parametrize("backend", ["gke", "xpk", "slurm"])
def test_jobs_are_written_for_what_is_not_finished(backend: str, tmp_path: Path) -> None:
    file = written(tmp_path, 'over("seed", (0, 1, 2))')
    (tmp_path / "runs" / "seed=1").mkdir(parents=True)
    (tmp_path / "runs" / "seed=1" / "best.json").write_text("{}")
    done = call(file, tmp_path / "runs", f"--backend={backend}")
    assert done.returncode == 0 and "2 jobs to submit" in done.stdout, done.stderr
    *head, first, second = (tmp_path / "runs" / "jobs.sh").read_text().splitlines()
    assert head[0] == "#!/usr/bin/env bash"
    program = f"tests.sweep_program --config=tests/sweep_program.py --workdir={tmp_path}/runs/seed=0 --config.seed=0"
    start = {
        "gke": r"NAME=seed-0-\w{6} bash launch/xpk.sh manifest",
        "xpk": r"NAME=seed-0-\w{6} bash launch/xpk.sh create",
        "slurm": r"sbatch --job-name=seed-0-\w{6} launch/\S+",
    }
    end = r" \| kubectl apply --filename=-" if backend == "gke" else ""
    assert re.fullmatch(f"{start[backend]} {re.escape(program)}{end}", first)
    assert "seed=2" in second and not (tmp_path / "runs" / "seed=0").exists()


def test_a_sweep_is_submitted_to_gke_as_a_jobset_for_each_trial(tmp_path: Path) -> None:
    """Under a name and with a workdir of its own, which need not be on this machine."""
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\n(cat; echo ---) >> "{tmp_path}/applied"\n')
    (tmp_path / "kubectl").chmod(0o755)
    file = written(tmp_path, 'product(over("seed", (0, 1)), over("options", (("a b", 1),)))')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = call(file, Path("/runs/of a sweep"), "--backend=gke", "--submit", **GKE, **JOBSET, PATH=path)
    assert done.returncode == 0, done.stderr
    sets = [one for one in yaml.safe_load_all((tmp_path / "applied").read_text()) if one]
    assert [one["kind"] for one in sets] == ["JobSet"] * 2
    assert len({one["metadata"]["name"] for one in sets}) == 2
    for seed, one in enumerate(sets):
        pod = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        words = shlex.split(pod["containers"][0]["args"][0])
        assert f"--workdir=/runs/of a sweep/seed={seed}" in words and "--config.options=('a b', 1)" in words


def test_a_sweep_on_this_machine_is_not_submitted(tmp_path: Path) -> None:
    done = call(written(tmp_path, 'over("seed", (0, 1))'), tmp_path / "runs", "--submit")
    assert done.returncode == 2 and "--backend=gke|xpk|slurm" in done.stderr and not (tmp_path / "runs").exists()


def test_a_trial_that_fails_is_reported_and_resumed(tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    file = written(tmp_path, f'zipped(over("seed", (0, 1)), over("broken", ("", {str(flag)!r})))')
    first = call(file, tmp_path / "runs")
    assert first.returncode == 1
    assert f"FAILED with code 2: error: broken={flag}: it is" in first.stdout
    assert "| 1 | 0.00" in first.stdout.splitlines()[-3]
    flag.unlink()
    second = call(file, tmp_path / "runs")
    assert second.returncode == 0 and second.stdout.count("is finished") == 1


HARD = "it's\ntwo  lines; $(id) `id` *"


def test_a_dry_run_prints_what_a_shell_reads_back(tmp_path: Path) -> None:
    file = written(tmp_path, f'over("options", ({HARD!r},))')
    said = call(file, tmp_path / "my runs", "--dry-run").stdout
    show = 'show() { for word; do printf "%s\\0" "$word"; done; }; '
    for shell in ("dash", "bash"):
        read = subprocess.run([shell, "-c", f"{show}show {said}"], capture_output=True, text=True, check=True).stdout
        assert read.split("\0")[-3:-1] == [f"--workdir={tmp_path}/my runs/only", f"--config.options={HARD}"]


def test_every_trial_has_a_name_that_its_backend_takes(tmp_path: Path) -> None:
    file = written(tmp_path, 'over("0", ("x" * 300, "é\\n" * 99, "-", 3))')
    found = sweep.trials(sweep.load(str(file)), tmp_path)
    assert len({trial.folder for trial in found}) == 4 and all(len(t.folder.name.encode()) <= 255 for t in found)
    names = re.findall(r"^NAME=(\S+) bash", sweep.jobs(found, "xpk"), re.MULTILINE)
    assert len(names) == 4 and all(re.fullmatch("[a-z]([-a-z0-9]{0,37}[a-z0-9])?", name) for name in names)


def test_a_dry_run_prints_commands_alone(tmp_path: Path) -> None:
    file = written(tmp_path, 'over("seed", (0, 1))')
    done = call(file, tmp_path / "runs", "--dry-run")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[1].endswith(f"--workdir={tmp_path}/runs/seed=1 --config.seed=1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('over("seed", (1, 1))', "two trials of the sweep have the same settings"),
        (None, "lacks PROGRAM, CONFIG, get_hyper"),
        ("", "configs/sweeps/motion.py"),
        ("[]", "expected a list of"),
        ("over('seed', 1 / 0)", "ZeroDivisionError"),
        ("(", "cannot read .*my_sweep.py: SyntaxError"),
    ],
)
def test_what_is_no_sweep_is_said(body: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "my_sweep.py"
    if body:
        written(tmp_path, body)
    elif body is None:
        file.write_text("x = 1\n")
    with pytest.raises(InputError, match=words):
        sweep.trials(sweep.load(str(file)), tmp_path)
