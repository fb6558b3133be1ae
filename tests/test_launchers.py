"""The launchers: what they would do is what their golden files say, and the shell finds nothing wrong with them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "launch"
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"])
RUN = (
    "vau_jax.train",
    "--config=configs/vau_r1_sft.py",
    "--workdir=runs/sft",
    "--config.data.tasks=('qa', 'grounding')",
)
POD = {"PROJECT": "lab", "ZONE": "us-west4-a", "NAME": "pod", "TYPE": "v5litepod-16", "BUCKET": "lab-runs"}
GKE = {
    "PROJECT": "lab",
    "ZONE": "us-west4-a",
    "NAME": "sft",
    "CLUSTER": "c",
    "TYPE": "v5litepod-16",
    "IMAGE": "image:1",
}
JOBSET = {"TOPOLOGY": "4x4", "ACCELERATOR": "tpu-v5-lite-podslice", "HOSTS": "4", "CHIPS": "4"}
CASES = {
    "tpu_vm_create": (POD | {"SPOT": "1"}, ("tpu_vm.sh", "--dry-run", "create")),
    "tpu_vm_setup": (POD, ("tpu_vm.sh", "--dry-run", "setup")),
    "tpu_vm_run": (POD, ("tpu_vm.sh", "--dry-run", "run", *RUN)),
    "tpu_vm_logs": (POD, ("tpu_vm.sh", "--dry-run", "logs")),
    "tpu_vm_status": (POD, ("tpu_vm.sh", "--dry-run", "status")),
    "tpu_vm_delete": (POD, ("tpu_vm.sh", "--dry-run", "delete")),
    "xpk_create": (GKE, ("xpk.sh", "--dry-run", "create", *RUN)),
    "xpk_manifest": (GKE | JOBSET, ("xpk.sh", "manifest", *RUN)),
    "xpk_delete": (GKE, ("xpk.sh", "--dry-run", "delete")),
    "slurm": ({}, ("slurm.sbatch", "--dry-run", *RUN)),
    "local_multi": ({"PORT": "20000"}, ("local_multi.sh", "--dry-run", "2", *RUN)),
}


def call(settings: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **settings}
    run = ["bash", f"launch/{command[0]}", *command[1:]]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_would_be_done(name: str) -> None:
    done = call(CASES[name][0], *CASES[name][1])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


def test_words_survive_the_remote_shell() -> None:
    """The command that a host is sent gives the program the very arguments."""
    sent = call(POD, "tpu_vm.sh", "--dry-run", "run", *RUN).stdout
    command = subprocess.run(["bash", "-c", f"printf '%s\\n' {sent}"], capture_output=True, text=True, check=True)
    remote = command.stdout.splitlines()[-1].removeprefix("--command=")
    words = remote.partition("launch/run.sh ")[2].partition(" > run.log")[0]
    told = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
    assert tuple(told.stdout.splitlines()) == RUN


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert script.name in ("lib.sh", "venv.sh") or "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(
    ("settings", "command", "words"),
    [
        ({}, ("tpu_vm.sh", "create"), "PROJECT is not set"),
        (POD | {"TYPE": "v9-8"}, ("tpu_vm.sh", "--dry-run", "create"), "TYPE=v9-8 is unknown"),
        (POD, ("tpu_vm.sh", "run"), "run what?"),
        (GKE, ("xpk.sh", "manifest", "x"), "TOPOLOGY is not set"),
        ({}, ("slurm.sbatch", "--dry-run", "vau_jax.train"), "--workdir=DIR is needed"),
        ({}, ("local_multi.sh", "none", "x"), "usage:"),
        ({}, ("run.sh",), "usage:"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(settings: dict[str, str], command: tuple[str, ...], words: str) -> None:
    done = call(settings, *command)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


PROGRAM = """
import os, pathlib, signal, sys, time
if __name__ == "__main__":
    tries = pathlib.Path(sys.argv[1])
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if len(tries.read_text()) == 1:
        sys.exit(int(sys.argv[2]))
    if sys.argv[2] == "3":
        sys.exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(60)
"""


@pytest.mark.parametrize(("code", "tries"), [("3", 2), ("2", 1)], ids=["failure", "mistake"])
def test_a_run_that_fails_is_begun_again_but_not_after_a_mistake(code: str, tries: int, tmp_path: Path) -> None:
    (tmp_path / "program_of_a_test.py").write_text(PROGRAM)
    settings = {"RUN_PYTHON": sys.executable, "RESTARTS": "2", "ALONE": "1", "PYTHONPATH": str(tmp_path)}
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "sleep").write_text("#!/bin/sh\n")  # the pause between attempts
    (tmp_path / "sleep").chmod(0o755)
    done = call(settings, "run.sh", "program_of_a_test", str(tmp_path / "tries"), code)
    assert done.returncode == (0 if tries == 2 else 2)
    assert (tmp_path / "tries").read_text() == "x" * tries


def test_sigterm_is_passed_on_to_the_run(tmp_path: Path) -> None:
    (tmp_path / "program_of_a_test.py").write_text(PROGRAM)
    (tmp_path / "tries").write_text("x")
    env = {**os.environ, "RUN_PYTHON": sys.executable, "RESTARTS": "2", "ALONE": "1", "PYTHONPATH": str(tmp_path)}
    command = ["bash", "launch/run.sh", "program_of_a_test", str(tmp_path / "tries"), "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    deadline = time.monotonic() + 30
    while (tmp_path / "tries").read_text() != "xx" and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (tmp_path / "tries").read_text() == "xx", "it was not begun again"
