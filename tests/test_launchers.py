"""The launchers: what they would do is what their golden files say, and the shell finds nothing wrong with them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launchers import GKE, JOBSET, POD, ROOT, RUN, call, read_by

GOLDEN = Path(__file__).parent / "data" / "launch"
OTHER_SCRIPTS = [ROOT / "launch" / "slurm.sbatch", ROOT / "benchmarks" / "gpu.sh", ROOT / ".ci" / "run"]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *OTHER_SCRIPTS])
CASES = {
    "tpu_vm_create": (POD | {"SPOT": "1"}, ("tpu_vm.sh", "--dry-run", "create")),
    "tpu_vm_setup": (POD, ("tpu_vm.sh", "--dry-run", "setup")),
    "tpu_vm_run": (POD, ("tpu_vm.sh", "--dry-run", "run", *RUN)),
    "tpu_vm_keep": (POD, ("tpu_vm.sh", "--dry-run", "keep", *RUN)),
    "tpu_vm_logs": (POD, ("tpu_vm.sh", "--dry-run", "logs")),
    "tpu_vm_status": (POD, ("tpu_vm.sh", "--dry-run", "status")),
    "tpu_vm_delete": (POD, ("tpu_vm.sh", "--dry-run", "delete")),
    "xpk_create": (GKE, ("xpk.sh", "--dry-run", "create", *RUN)),
    "xpk_manifest": (GKE | JOBSET, ("xpk.sh", "manifest", *RUN)),
    "xpk_delete": (GKE, ("xpk.sh", "--dry-run", "delete")),
    "slurm": ({}, ("slurm.sbatch", "--dry-run", *RUN)),
    "local_multi": ({"PORT": "20000"}, ("local_multi.sh", "--dry-run", "2", *RUN)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_would_be_done(name: str) -> None:
    done = call(CASES[name][0], *CASES[name][1])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


HARD = (
    "vau_jax.train",
    "--config.data.tasks=('qa', \"grounding\")",
    "two\nlines\n\n  - name: x\n",
    "\ttab, $HOME, `id`, $(id), ${x}, \\n, \\, %s, !!",
    "",
    "-n",
    "*",
    "~",
    "#",
    "'",
    "$'\\n'",
    "é\u2028\u0085\x01\x7f🎥",
)


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize("launcher", ["tpu_vm", "manifest", "slurm", "local_multi"])
def test_words_survive_every_shell(launcher: str, shell: str) -> None:
    """What a host is sent, or the terminal shows, gives the program the very arguments."""
    if launcher == "tpu_vm":
        sent = read_by(shell, call(POD, "tpu_vm.sh", "--dry-run", "run", *HARD).stdout)[-1]
        told = sent.partition("launch/run.sh ")[2].rpartition(" > run.log")[0]
    elif launcher == "manifest":
        job = yaml.safe_load(call(GKE | JOBSET, "xpk.sh", "manifest", *HARD).stdout)
        pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        (sent,) = pod["containers"][0]["args"]
        assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", sent), "a single dollar may begin a variable of Kubernetes"
        told = sent.replace("$$", "$").partition("launch/run.sh ")[2]
    elif launcher == "slurm":
        said = call({}, "slurm.sbatch", "--dry-run", *HARD, "--workdir=x").stdout
        told = said.partition("launch/run.sh ")[2].rpartition(" --workdir=x\n")[0]
    else:
        told = call({}, "local_multi.sh", "--dry-run", "1", *HARD).stdout.partition("launch/run.sh ")[2].rstrip("\n")
    assert read_by(shell, told) == list(HARD)


@pytest.mark.parametrize("name", ["true", "null", "on", "n"])
def test_a_manifest_keeps_names_that_yaml_would_read_otherwise(name: str) -> None:
    job = yaml.safe_load(call(GKE | JOBSET | {"NAME": name}, "xpk.sh", "manifest", *RUN).stdout)
    assert job["metadata"]["name"] == name


def pod_of(**settings: str) -> dict:
    """The template of a host's pod."""
    job = yaml.safe_load(call(GKE | JOBSET | settings, "xpk.sh", "manifest", *RUN).stdout)
    return job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_a_manifest_mounts_a_bucket_as_runs() -> None:
    """By the driver of GKE, which takes effect only with its annotation, as the account that may use the bucket."""
    pod = pod_of(ACCOUNT="trainer")
    assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert pod["spec"]["serviceAccountName"] == "trainer"
    runs = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "runs")
    attributes = {"bucketName": "lab-runs", "mountOptions": "implicit-dirs"}
    assert runs["csi"] == {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}


def test_a_manifest_mounts_a_claim_as_runs() -> None:
    pod = pod_of(BUCKET="", CLAIM="filestore")
    assert "metadata" not in pod
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "filestore"}} in pod["spec"]["volumes"]


@pytest.mark.parametrize("storage", ["BUCKET", "CLAIM"])
def test_what_a_manifest_mounts_are_its_volumes(storage: str) -> None:
    pod = pod_of(**({"BUCKET": "", "CLAIM": ""} | {storage: "lab-runs"}))["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"runs": "/runs", "shm": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]


@pytest.mark.parametrize(("slices", "placed"), [("1", False), ("2", True)])
def test_slices_get_node_pools_of_their_own(slices: str, placed: bool) -> None:
    job = yaml.safe_load(call(GKE | JOBSET | {"SLICES": slices}, "xpk.sh", "manifest", *RUN).stdout)
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert (job["metadata"].get("annotations", {}).get(key) == "cloud.google.com/gke-nodepool") == placed


INJECTED = "a\n    evil: true"
MANIFEST, CREATE = ("xpk.sh", "manifest", "x"), ("xpk.sh", "--dry-run", "create", "x")
SETTINGS = [
    *((GKE | JOBSET | {name: INJECTED}, MANIFEST) for name in ("NAME", "IMAGE", *JOBSET, "RESTARTS", "SLICES")),
    *((GKE | {name: INJECTED}, CREATE) for name in ("NAME", "PROJECT", "ZONE", "CLUSTER", "TYPE", "IMAGE")),
    *((POD | {name: INJECTED}, ("tpu_vm.sh", "--dry-run", "create")) for name in ("NAME", "PROJECT", "ZONE", "TYPE")),
    *((GKE | JOBSET | {"NAME": name}, MANIFEST) for name in ("A", "-a", "a-", "1a", "a_b", "a" * 40, "é")),
    (GKE | JOBSET | {"BUCKET": "", "CLAIM": INJECTED}, MANIFEST),
    (GKE | JOBSET | {"ACCOUNT": INJECTED}, MANIFEST),
    (GKE | JOBSET | {"CLAIM": "runs"}, MANIFEST),
    (POD | {"BUCKET": "x; id"}, ("tpu_vm.sh", "--dry-run", "setup")),
    (POD | {"RESTARTS": "1; id"}, ("tpu_vm.sh", "--dry-run", "run", "x")),
    (POD | {"PORT": "1; id"}, ("tpu_vm.sh", "--dry-run", "run", "x")),
    (POD | {"PORT": "65536"}, ("tpu_vm.sh", "--dry-run", "run", "x")),
    *((POD | {name: "x"}, ("tpu_vm.sh", "--dry-run", "keep", "x")) for name in ("POLL", "WAIT")),
    (POD | {"REVISION": "-x"}, ("tpu_vm.sh", "--dry-run", "setup")),
    (POD | {"WORKER": "-1"}, ("tpu_vm.sh", "--dry-run", "logs")),
    ({"PORT": "x"}, ("local_multi.sh", "--dry-run", "2", "x")),
    ({"RESTARTS": "many"}, ("run.sh", "--dry-run", "x")),
    ({"RESTARTS": "many"}, ("slurm.sbatch", "--dry-run", "x", "--workdir=x")),
    ({"PREEMPTED_CODE": "130"}, ("run.sh", "--dry-run", "x")),
    ({}, ("run.sh", "--dry-run", "--version")),
    (GKE, ("xpk.sh", "--dry-run", "create", "x", "two\nlines")),
]


@pytest.mark.parametrize(("settings", "command"), SETTINGS, ids=map(str, range(len(SETTINGS))))
def test_a_setting_of_another_kind_is_one_line(settings: dict[str, str], command: tuple[str, ...]) -> None:
    done = call(settings, *command)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert (len(done.stderr.splitlines()) == 1 and "expected" in done.stderr) or "no line breaks" in done.stderr


def linter(name: str) -> str:
    """The path of a program whose package is for x86-64 alone."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"no {name}: its package is for x86-64 alone")


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([linter("hadolint"), ROOT / "launch" / "Dockerfile"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([linter("shellcheck"), "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert script.name in ("lib.sh", "venv.sh") or "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(
    ("settings", "command", "words"),
    [
        ({}, ("tpu_vm.sh", "create"), "PROJECT is not set"),
        (POD | {"TYPE": "v9-8"}, ("tpu_vm.sh", "--dry-run", "create"), "TYPE=v9-8 is unknown"),
        (POD, ("tpu_vm.sh", "run"), "run what?"),
        (GKE, ("xpk.sh", "manifest", "x"), "TOPOLOGY is not set"),
        (GKE | JOBSET | {"BUCKET": ""}, ("xpk.sh", "manifest", "x"), "BUCKET is not set"),
        ({}, ("slurm.sbatch", "--dry-run", "vau_jax.train"), "--workdir=DIR is needed"),
        ({}, ("local_multi.sh", "none", "x"), "N=none cannot be used: expected a number of processes"),
        ({}, ("local_multi.sh", "2"), "usage:"),
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    tries = pathlib.Path(sys.argv[1])
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if len(tries.read_text()) == 1:
        sys.exit(int(sys.argv[2]))
    if sys.argv[2] == "3":
        sys.exit(0)
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
    env |= {"PREEMPTED_CODE": "75"}
    command = ["bash", "launch/run.sh", "program_of_a_test", str(tmp_path / "tries"), "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    deadline = time.monotonic() + 30
    while (tmp_path / "tries").read_text() != "xx" and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert (tmp_path / "tries").read_text() == "xx", "it was not begun again"


NOTE = """
import pathlib, sys
note = pathlib.Path(sys.argv[1].partition("=")[2]) / "preempted.json"
note.touch() if sys.argv[2] == "preempted" else note.unlink(missing_ok=True)
"""


@pytest.mark.parametrize(("end", "code"), [("preempted", 75), ("done", 0)])
def test_a_preempted_run_ends_with_the_code_that_was_asked_for(end: str, code: int, tmp_path: Path) -> None:
    """Also on a host that got no signal; a note of an earlier end is gone when the program ends well."""
    (tmp_path / "program_of_a_test.py").write_text(NOTE)
    (tmp_path / "preempted.json").touch()
    settings = {"RUN_PYTHON": sys.executable, "ALONE": "1", "PYTHONPATH": str(tmp_path), "PREEMPTED_CODE": "75"}
    assert call(settings, "run.sh", "program_of_a_test", f"--workdir={tmp_path}", end).returncode == code


@pytest.mark.parametrize("code", ["0", "2"])
def test_the_exit_code_is_left_in_a_file(code: str, tmp_path: Path) -> None:
    """With the checksum of the program and its arguments, by which a launcher knows its own run."""
    said = "import pathlib, sys; print(pathlib.Path(sys.argv[1]).read_text()); sys.exit(int(sys.argv[2]))"
    (tmp_path / "program_of_a_test.py").write_text(said)
    file = tmp_path / "run.code"
    settings = {"RUN_PYTHON": sys.executable, "ALONE": "1", "PYTHONPATH": str(tmp_path), "CODE_FILE": str(file)}
    words = ("program_of_a_test", str(file), code)
    during = call(settings, "run.sh", *words).stdout.split()
    sum_of_words = subprocess.run(["cksum"], input=" ".join(words) + "\n", capture_output=True, text=True, check=True)
    assert during[0] == "running" and during[2] == sum_of_words.stdout.split()[0]
    assert file.read_text().split() == [code, *during[1:]]


@pytest.mark.parametrize(("count", "ends", "did"), [("", 0, "requeue 7"), ("1", 0, "requeue 7"), ("2", 1, "")])
def test_a_preempted_job_goes_back_into_the_queue_so_often(count: str, ends: int, did: str, tmp_path: Path) -> None:
    (tmp_path / "preempted.json").touch()
    for name in ("srun", "scontrol", "bash"):  # bash sets up the packages
        (tmp_path / name).write_text(f'#!/bin/sh\n[ {name} != scontrol ] || echo "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "RESTARTS": "2",
        "SLURM_RESTART_COUNT": count,
    }
    command = ["/bin/bash", "launch/slurm.sbatch", "vau_jax.train", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == ends and done.stdout.strip() == did
    assert ("RESTARTS" in done.stderr) == bool(ends)
