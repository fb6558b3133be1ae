"""launch/venv.sh on a machine whose Python is too old: uv fetches one, or one line says what else to do."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = """#!/bin/sh
[ "$1" = -c ] && exit 1  # it is neither 3.11 nor 3.12
echo "pip $*" >> "$HOME/log"
[ -e "$HOME/offline" ] && echo "ERROR: No matching distribution found for uv" >&2 && exit 1
while [ "$1" != --target ]; do shift; done
mkdir "$2/bin" && cp "$HOME/uv" "$2/bin/uv"
"""
UV = """#!/bin/sh
echo "uv $*" >> "$HOME/log"
[ "$2" = find ] && echo "$HOME/new" && exit
[ -e "$HOME/broken" ] && printf 'error: no\\n  cause: dns error\\n' >&2 && exit 1
exit 0
"""
NEW = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A machine with all programs of this one except Python and uv; its python3 is old. Its calls are in `log`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            if not program.name.startswith(("python", "uv")) and not (tools / program.name).exists():
                (tools / program.name).symlink_to(program)
    executable(tools / "python3", OLD)
    executable(tmp_path / "uv", UV)
    executable(tmp_path / "new", NEW)
    (tmp_path / "log").touch()
    return tmp_path


def set_up(home: Path, **settings: str) -> subprocess.CompletedProcess:
    env = {"PATH": str(home / "bin"), "HOME": str(home), "VENV": str(home / "venv"), **settings}
    command = ["bash", "-c", "set -e; source launch/venv.sh"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_an_older_python_gets_a_newer_one_by_uv_with_its_pinned_hash(home: Path) -> None:
    done = set_up(home)
    assert done.returncode == 0, done.stderr
    assert (home / "venv" / "bin" / "python").read_text() == NEW
    pip, *uv = (home / "log").read_text().splitlines()
    assert "--require-hashes" in pip and pip.endswith("launch/requirements-uv.txt")
    assert uv == ["uv python install 3.11", "uv python find --system 3.11"]


def test_uv_on_path_is_used(home: Path) -> None:
    executable(home / "bin" / "uv", UV)
    assert set_up(home).returncode == 0
    assert (home / "log").read_text().startswith("uv python install")


@pytest.mark.parametrize(
    ("missing", "reason"), [("offline", "ERROR: No matching distribution found for uv"), ("broken", "cause: dns error")]
)
def test_without_a_network_one_line_names_the_ways_out(missing: str, reason: str, home: Path) -> None:
    (home / missing).touch()
    done = set_up(home)
    assert done.returncode == 2 and not (home / "venv").exists()
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("setup:")]
    assert error.startswith("error: Python 3.11 or 3.12 is needed") and f"({reason})" in error
    assert "PYTHON=" in error and "UV_PYTHON_INSTALL_MIRROR" in error


def test_a_given_python_that_is_too_old_is_an_error_and_nothing_is_fetched(home: Path) -> None:
    done = set_up(home, PYTHON="python3")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (home / "log").read_text()


@pytest.mark.long
def test_the_pinned_uv_installs_a_python_from_a_mirror(home: Path) -> None:
    """uv comes from the package index. Python itself comes from a local archive of one script, which calls the Python
    of this test: that uv's own list of downloads can be reached is not shown."""
    real = str(Path(sys.executable).resolve())
    executable(home / "bin" / "python3", f'#!/bin/sh\n[ "$1" = -c ] && exit 1\nexec {real} "$@"\n')
    python = home / "python"
    (python / "bin").mkdir(parents=True)
    (python / "lib" / "python3.11").mkdir(parents=True)
    (python / "lib" / "python3.11" / "_sysconfigdata__linux_.py").write_text(
        "# system configuration generated and used by the sysconfig module\nbuild_time_vars = {}\n"
    )
    executable(python / "bin" / "python3.11", f'#!/bin/sh\nexec {real} "$@"\n')
    with tarfile.open(home / "python.tar.gz", "w:gz") as archive:
        archive.add(python, "python")
    build = {"name": "cpython", "arch": {"family": platform.machine(), "variant": None}, "os": "linux", "libc": "gnu"}
    build |= {"major": 3, "minor": 11, "patch": 18, "prerelease": "", "variant": None, "build": "1"}
    build |= {"url": (home / "python.tar.gz").as_uri()}
    build |= {"sha256": hashlib.sha256((home / "python.tar.gz").read_bytes()).hexdigest()}
    (home / "downloads.json").write_text(json.dumps({f"cpython-3.11.18-linux-{platform.machine()}-gnu": build}))
    settings = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    command = ["bash", "-c", "source <(sed -n '/^find_python/,/^VENV=/{/^VENV=/d;p}' launch/venv.sh); find_python"]
    env = {"PATH": str(home / "bin"), "HOME": str(home), "UV_PYTHON_DOWNLOADS_JSON_URL": str(home / "downloads.json")}
    done = subprocess.run(command, cwd=ROOT, env=env | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
