"""The pod recipe of launch/README.md, command by command, on processes of this machine with sixteen devices in all."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TITLE = "### From quota to result"
RUN = "bash launch/tpu_vm.sh run "
WEIGHTS = "Qwen2.5-VL-3B-Instruct"
SMALL = {  # what a machine of two cores can do
    "data.max_frames": 8,
    "data.wording": "short",
    "data.bucket": "(128, 576, 48, 64, 12, 64)",
    "dtype": "float32",
}


def recipe() -> list[list[str]]:
    """The words after `tpu_vm.sh run` of each command."""
    text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", text[text.index(TITLE) :], re.DOTALL)[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(RUN), comments=True) for line in lines if line.startswith(RUN)]


def small(command: list[str]) -> list[str]:
    """A command with small sizes after its own options; those of the mesh stay."""
    program = command[0]
    changed = {"vau_jax.train": {"steps": 1, **SMALL, "data.max_completion_tokens": 16, "batch_size": 4}}
    changed["vau_jax.evaluate"] = {**SMALL, "data.max_completion_tokens": 8}
    options = [f"--config.{name}={value}" for name, value in changed.get(program, {}).items()]
    return [*command, *options]


@pytest.mark.long  # three minutes
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_recipe_goes_from_videos_to_the_report(
    hosts: int, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, place in {
        "videos": dataset / "videos",
        "train.csv": dataset / "train.csv",
        "test_msad.csv": dataset / "test.csv",
        WEIGHTS: model_folder,
    }.items():
        (runs / name).symlink_to(place)
    devices = f"--xla_force_host_platform_device_count={16 // hosts}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "RUN_PYTHON": sys.executable, "XLA_FLAGS": devices}
    commands = recipe()
    assert [command[0].removeprefix("vau_jax.") for command in commands] == ["train", "train", "evaluate", "report"]
    for command in commands:
        here = [word.replace("../runs", str(runs)) for word in small(command)]
        called = ["bash", "launch/local_multi.sh", str(hosts), *here]
        done = subprocess.run(called, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-1000:])
    assert (runs / "rft" / "checkpoints" / "1").is_dir()
    page = (runs / "report.html").read_text(encoding="utf-8")
    scores = json.loads((runs / "eval" / "rft" / "metrics.json").read_text())
    assert scores["examples"] == 36 and scores["failed"] == 0, "three questions of each of twelve videos"
    assert f"{scores['tasks']['qa']['accuracy']['value']:.2f}" in page and "test_00000.mp4" in page
