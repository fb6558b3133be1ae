"""What the launchers install is what launch/requirements-*.txt list, by version and hash."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = sorted(PROJECT["optional-dependencies"])
UNHASHED = {"torch"}  # requirements-torch.txt says why


def pins(name: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a file and their hashes."""
    text = re.sub(r"\\\n", " ", (LAUNCH / f"requirements-{name}.txt").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(Requirement(line.partition(" --hash")[0]), re.findall(r"--hash=sha256:(\S+)", line)) for line in lines]


def installed(extra: str, python: str, machine: str) -> set[str]:
    """The names that are installed with an extra on a machine."""
    where = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    where |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine}
    found = [pin for name in ("run", extra) if name for pin, _ in pins(name)]
    return {canonicalize_name(pin.name) for pin in found if not pin.marker or pin.marker.evaluate(where)}


@pytest.mark.parametrize("name", ["build", "run", "uv", *EXTRAS])
def test_every_package_has_one_version_and_hashes(name: str) -> None:
    assert pins(name)
    for pin, hashes in pins(name):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url, pin
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes), pin


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_dependency_is_pinned_for_every_machine(extra: str, python: str, machine: str) -> None:
    if (extra, machine) == ("tpu", "aarch64"):
        pytest.skip("libtpu is for x86-64 alone")
    where = {**default_environment(), "platform_machine": machine, "platform_system": "Linux"}
    names = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else ())]
    wanted = [Requirement(name) for name in names]
    here = {canonicalize_name(pin.name) for pin in wanted if not pin.marker or pin.marker.evaluate(where)}
    assert here - UNHASHED <= installed(extra, python, machine)


def test_no_file_names_a_registry() -> None:
    files = list(LAUNCH.glob("requirements-*.txt"))
    assert files
    for path in files:
        assert not re.search(
            r"https?://|--(extra-)?index-url|--find-links|/(opt|home|root|tmp|work)/", path.read_text()
        )


PIP = """#!/bin/sh
echo "$@" >> "{log}"
"""


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_setup_asks_for_hashes(extra: str, tmp_path: Path) -> None:
    """All but the project itself, which has none, and torch."""
    python, log = tmp_path / "venv" / "bin" / "python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    python.write_text(PIP.format(log=log))
    python.chmod(0o755)
    command = ["bash", "-c", f'source launch/venv.sh "{extra}"']
    env = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv")}
    subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
    *packages, project = log.read_text().splitlines()
    assert project.endswith("--no-deps --no-build-isolation --editable .")
    unhashed = [call for call in packages if "--require-hashes" not in call]
    assert len(packages) - len(unhashed) == 2 and all("--no-deps" in call for call in packages if call not in unhashed)
    assert [call.split()[-1] for call in unhashed] == ["launch/requirements-torch.txt"] * (extra == "test")
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
    assert not again.stdout and len(log.read_text().splitlines()) == len(packages) + 1


def test_an_unknown_extra_is_one_line(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "EXTRA": "a\nb"}
    done = subprocess.run(
        ["bash", "launch/run.sh", "x"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "expected app, cuda12" in done.stderr
