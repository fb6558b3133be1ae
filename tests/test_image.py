"""launch/Dockerfile without Docker: its steps in order, in a folder that stands for the image's root.

Not shown here: the base image (this machine's programs and Python take its place), layers, and what BuildKit sends.
"""

import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launchers import GKE, JOBSET, ROOT, RUN, call

DOCKERFILE = ROOT / "launch" / "Dockerfile"
IGNORE = ROOT / "launch" / "Dockerfile.dockerignore"
FOLDERS = re.compile(r"(?<![\w.])(/vau_jax|/opt/venv)\b")  # the image's own; other paths are the machine's
STUB = """#!/bin/sh
# A Python that makes environments of itself, and notes what else it is asked, and where.
[ "$1" != -c ] || exit 0
if [ "$2" = venv ]; then mkdir -p "$3/bin" && exec cp "$0" "$3/bin/python"; fi
echo "$PWD: $*" >> "{log}"
"""


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


class Build:
    """The steps so far: the image's root, its environment and the current folder."""

    def __init__(self, root: Path, env: dict[str, str], **arguments: str) -> None:
        self.root, self.env, self.arguments, self.folder = root, dict(env), arguments, root
        for word, rest in instructions():
            getattr(self, f"_{word.lower()}")(FOLDERS.sub(rf"{root}\1", rest))

    def sh(self, command: str) -> subprocess.CompletedProcess:
        run = ["sh", "-c", command]
        return subprocess.run(run, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)

    def _from(self, rest: str) -> None:
        assert re.fullmatch(r"python:3\.1[12]-slim-\w+", rest), "an image with Python 3.11 or 3.12"

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self.env[name] = self.arguments.get(name, default)

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.env[name] = string.Template(value).substitute(self.env)

    def _workdir(self, rest: str) -> None:
        self.folder = Path(rest)
        self.folder.mkdir(parents=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        sent = [line[1:] for line in IGNORE.read_text().splitlines() if line.startswith("!")]
        files = [file for source in sources for file in sorted(ROOT.glob(source))]
        assert len(files) == 1 or target.endswith("/")
        for file in files:
            assert file.relative_to(ROOT).parts[0] in sent, f"{IGNORE.name} leaves {file} out"
            if file.is_dir():
                unsent = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(file, self.folder / target, ignore=unsent, dirs_exist_ok=True)
            else:
                (self.folder / target).mkdir(exist_ok=True)
                shutil.copy(file, self.folder / target)

    def _run(self, rest: str) -> None:
        done = self.sh(rest)
        assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"

    def _cmd(self, rest: str) -> None:
        pass


@pytest.fixture(scope="module", params=["tpu", "cuda12"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """All steps, with a Python that only notes what it should install."""
    root = tmp_path_factory.mktemp("image")
    stub = root / "base" / "python3.11"
    stub.parent.mkdir()
    stub.write_text(STUB.format(log=root / "log"))
    stub.chmod(0o755)
    return Build(root, {"PATH": f"{stub.parent}:/usr/bin:/bin", "PYTHON": "python3.11"}, EXTRA=request.param)


def test_packages_are_installed_before_the_code_and_the_project_after_it(build: Build) -> None:
    calls = [line.partition(": ") for line in (build.root / "log").read_text().splitlines()]
    assert {folder for folder, _, _ in calls} == {str(build.root / "vau_jax")}
    last = [call.split()[-1] for _, _, call in calls]
    pins = ["launch/requirements-build.txt", f"launch/requirements-{build.env['EXTRA']}.txt"]
    assert last == [*pins, *pins, "."], "twice, as the second call finds them installed"


def test_the_image_has_what_a_run_needs(build: Build) -> None:
    there = {str(f.relative_to(build.root / "vau_jax")) for f in (build.root / "vau_jax").rglob("*.*")}
    for folder in ("vau_jax", "configs", "data_prep", "launch", "benchmarks"):
        files = [str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob("*.*") if "__pycache__" not in f.parts]
        assert files and set(files) <= there


def test_what_a_gke_host_runs_finds_its_python_in_the_image(build: Build) -> None:
    job = yaml.safe_load(call(GKE | JOBSET, "xpk.sh", "manifest", *RUN).stdout)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (command,) = pod["containers"][0]["args"]
    done = build.sh(FOLDERS.sub(rf"{build.root}\1", command, count=1))
    assert done.returncode == 0, done.stderr
    said = (build.root / "log").read_text().splitlines()[-1]
    assert said == f"{build.root}/vau_jax: -m {' '.join(RUN)} --distributed"


@pytest.mark.long
def test_all_packages_in_an_image_make_the_program_run(tmp_path: Path) -> None:
    """Installs everything (without an extra) from the package index, which takes minutes."""
    build = Build(tmp_path, {"PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin"}, EXTRA="")
    where = "python -c 'import vau_jax, vau_jax.launch; print(vau_jax.__file__)'"
    assert build.sh(f"cd / && {where}").stdout.strip() == str(tmp_path / "vau_jax" / "vau_jax" / "__init__.py")
    done = build.sh("RUN_PYTHON=python ALONE=1 bash launch/run.sh vau_jax.cli config vau_r1_sft")
    assert done.returncode == 0 and "seed" in done.stdout, done.stderr
