"""`tpu_vm.sh keep` on a gcloud that plays a script: what it does when a slice is preempted, and when it gives up."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launchers import POD, RUN, call, read_by

GCLOUD = r"""#!/bin/bash
# States of the queued resource and exit codes of the run, one a line: the next with each question, the last for ever.
next() {
  head -n 1 "$PLAY/$1"
  [ "$(wc -l <"$PLAY/$1")" -le 1 ] || sed -i 1d "$PLAY/$1"
}
case "$*" in
  *queued-resources\ describe*)
    state=$(next states)
    [ "$state" != NONE ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$state"
    ;;
  *code=none*)
    code=$(next codes)
    [ "$code" != silent ] || exit 255
    echo "SSH: Attempting to connect to worker 0..."
    echo "$code 17 $(cat "$PLAY/checksum")"
    ;;
  *queued-resources\ create*) echo create >>"$PLAY/log" ;;
  *queued-resources\ delete*) echo delete >>"$PLAY/log" ;;
  *scp*) echo setup >>"$PLAY/log" ;;
  *launch/run.sh*) echo run >>"$PLAY/log" ;;
esac
"""
STUBS = {"gcloud": GCLOUD, "git": "#!/bin/sh\necho abc\n", "sleep": "#!/bin/sh\n"}


@pytest.fixture
def play(tmp_path: Path) -> Path:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["cksum"], input=" ".join(RUN[:3]) + "\n", capture_output=True, text=True, check=True)
    (tmp_path / "checksum").write_text(done.stdout.split()[0])
    return tmp_path


def keep(play: Path, states: str, codes: str, **settings: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Its end, and what it did to the slice."""
    (play / "states").write_text(states.replace(" ", "\n") + "\n")
    (play / "codes").write_text(codes.replace(" ", "\n") + "\n")
    env = POD | {"PLAY": str(play), "PATH": f"{play}:{os.environ['PATH']}"} | settings
    done = call(env, "tpu_vm.sh", "keep", *RUN[:3])
    return done, (play / "log").read_text().split() if (play / "log").exists() else []


NEW = ["create", "setup", "run"]


def test_a_preempted_slice_is_created_anew_until_the_run_is_done(play: Path) -> None:
    states = "NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDING SUSPENDED WAITING_FOR_RESOURCES ACTIVE ACTIVE ACTIVE"
    done, did = keep(play, states, "none running none running 0")
    assert done.returncode == 0, done.stderr
    assert did == [*NEW, "delete", *NEW]
    assert "done; pod is still there" in done.stderr


def test_a_slice_that_never_comes_ends_it_with_one_error(play: Path) -> None:
    done, did = keep(play, "NONE FAILED", "none", RESTARTS="2")
    assert done.returncode == 1
    assert did == ["create", "delete", "create", "delete", "create"]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "pod is FAILED, and RESTARTS=2 attempts are used up" in error


def test_a_slice_that_is_waited_for_too_long_ends_it(play: Path) -> None:
    (play / "sleep").unlink()
    done, did = keep(play, "NONE WAITING_FOR_RESOURCES", "none", WAIT="1", POLL="1")
    assert done.returncode == 1 and did == ["create"]
    assert "pod was not ACTIVE for WAIT=1 seconds" in done.stderr


def test_called_again_it_finds_its_run_where_it_is(play: Path) -> None:
    done, did = keep(play, "ACTIVE", "running silent running 0")
    assert done.returncode == 0 and did == []


@pytest.mark.parametrize("code", ["75", "lost", "143"])
def test_a_run_that_ended_before_its_time_is_started_again_on_the_same_slice(code: str, play: Path) -> None:
    done, did = keep(play, "ACTIVE", f"running {code} {code} running 0")
    assert done.returncode == 0 and did == ["setup", "run"]


def test_a_run_that_always_ends_before_its_time_is_given_up(play: Path) -> None:
    done, did = keep(play, "ACTIVE", "75")
    assert done.returncode == 1 and did == ["setup", "run"] * 3


@pytest.mark.parametrize(("code", "ends"), [("1", 1), ("2", 2)])
def test_a_run_that_failed_is_not_repeated(code: str, ends: int, play: Path) -> None:
    done, did = keep(play, "ACTIVE", f"running {code}")
    assert done.returncode == ends and did == []
    assert "tpu_vm.sh logs" in done.stderr


@pytest.mark.parametrize("code", ["1", "2"])
def test_a_failure_from_before_is_tried_again(code: str, play: Path) -> None:
    done, did = keep(play, "ACTIVE", f"{code} running 0")
    assert done.returncode == 0 and did == ["setup", "run"]


def test_the_end_of_another_run_does_not_count(play: Path) -> None:
    (play / "checksum").write_text("1")
    done, did = keep(play, "ACTIVE", "0", RESTARTS="1")
    assert done.returncode == 1 and did == ["setup", "run"] * 2
    assert "the run left no trace, and RESTARTS=1" in done.stderr


def test_another_run_is_left_alone(play: Path) -> None:
    (play / "checksum").write_text("1")
    done, did = keep(play, "ACTIVE", "running")
    assert done.returncode == 2 and did == []


def test_a_host_that_does_not_answer_is_replaced(play: Path) -> None:
    states = " ".join(["ACTIVE"] * 11 + ["NONE", "ACTIVE"])
    done, did = keep(play, states, " ".join(["running", *["silent"] * 10, "none", "0"]))
    assert done.returncode == 0 and did == ["delete", *NEW]


def test_a_host_tells_a_run_that_goes_on_from_one_that_was_killed(tmp_path: Path) -> None:
    """The question that is sent, asked of this machine."""
    ask = read_by("bash", call(POD, "tpu_vm.sh", "--dry-run", "keep", *RUN).stdout.splitlines()[-1])[-1]

    def answer() -> str:
        command = ["sh", "-c", ask.removeprefix("--command=")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert answer() == "none - -\n"
    (tmp_path / "vau_jax").mkdir()
    process = subprocess.Popen(["bash", "-c", "read -r _; :", "launch/run.sh"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "vau_jax" / "run.code").write_text(f"running {process.pid} 5\n")
        assert answer() == f"running {process.pid} 5\n"
    finally:
        process.kill()
        process.wait()
    assert answer() == f"lost {process.pid} 5\n"
    (tmp_path / "vau_jax" / "run.code").write_text("75 3 5\n")
    assert answer() == "75 3 5\n"
