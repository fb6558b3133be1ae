"""An ordinary installation: the wheel, in an environment with nothing but what it asks for, from any folder."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes build/ beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "vau_jax", "configs", "data_prep", "launch"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the wheel and the packages of requirements-run.txt, which are links to those installed here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    pins = (ROOT / "launch" / "requirements-run.txt").read_text()
    for name in re.findall(r"^([\w.-]+)==", pins, re.MULTILINE):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(sysconfig.get_path("purelib")) / top
            if not (site / top).exists():
                (site / top).symlink_to(target)
    command = [sys.executable, "-m", "pip", "--python", folder, "install", "-q", "--no-deps", wheel]
    subprocess.run(command, check=True)
    return folder


def test_the_wheel_has_one_package_and_everything_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vau_jax"}
    wanted = [
        f.relative_to(ROOT) for folder in ("configs", "data_prep", "launch") for f in (ROOT / folder).rglob("*.py")
    ]
    assert [str(file) for file in wanted if f"vau_jax/{file}" not in names] == []
    own = [file.relative_to(ROOT) for file in (ROOT / "vau_jax").rglob("*.*") if file.suffix not in (".md", ".pyc")]
    assert [str(file) for file in own if str(file) not in names] == []


def test_using_it_asks_for_no_package_of_the_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith("METADATA")]
        asked = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)", file.read(name).decode(), re.MULTILINE)
    always = {package for package, rest in asked if "extra ==" not in rest}
    tests = {package for package, rest in asked if re.search(r"extra == .test.", rest)}
    assert len(always) > 15 and len(tests) > 8 and not always & tests - {"transformers"}


def run(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    env |= {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    command = [environment / "bin" / "vau", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_it_works_from_any_folder(environment: Path, tmp_path: Path) -> None:
    """Help, a config by name, a random model, and the doctor's job from end to end: videos, SFT, RFT, report."""
    assert "vau compile-check" in run(environment, tmp_path, "--help").stdout
    config = run(environment, tmp_path, "config", "configs/vau_r1_qa_rft.py", "--changed")
    assert "stage = 'rft'" in config.stdout, config.stderr
    sweep = run(environment, tmp_path, "sweep", "--config=seeds", "--workdir=s", "--dry-run")
    assert sweep.stdout.count("vau_jax.launch.demo --config=configs/demo.py") == 3, sweep.stderr
    doctor = run(environment, tmp_path, "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    found = {
        line.split()[1]: line.split()[0] for line in doctor.stdout.splitlines() if not line.startswith(("all", "next"))
    }
    assert found.pop("endpoint") == "skipped" and found.keys() >= {"devices", "decoders", "disk", "self-test"}
    assert not any(state == "error" for state in found.values())
    assert os.listdir(tmp_path) == []
