"""Users need no torch: the whole front door works where it cannot be imported. A command starts quickly."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import importlib.machinery, sys
finder, find = importlib.machinery.PathFinder, importlib.machinery.PathFinder.find_spec
finder.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)  # not installed
import numpy as np
from vau_jax import evaluate, report, train
from vau_jax.vlm import VideoLM
vlm = VideoLM.load(sys.argv[1])
video = {"type": "video", "video": np.zeros((4, 56, 84, 3), np.uint8), "fps": 2.0}
batch = vlm.encode([[{"role": "user", "content": [video, {"type": "text", "text": "What?"}]}]])
assert vlm.generate(batch, 2, 4).tokens.shape == (1, 2, 4)
vlm.save(sys.argv[2])
assert "torch" not in sys.modules
"""


def test_the_front_door_works_without_torch(model_folder: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-c", SCRIPT, str(model_folder), str(tmp_path / "copy")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("module", ["vau_jax.train", "vau_jax.evaluate", "vau_jax.ask", "vau_jax.launch.compile_check"])
def test_a_mistake_is_reported_before_slow_packages_are_imported(module: str) -> None:
    """Each of them takes as long to import as all others together."""
    slow = {"torch", "transformers", "sklearn", "scipy.stats", "nltk", "httpx2", "tensorboardX", "plotly", "gradio"}
    script = f"import sys, {module}; print(*sorted({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_test_extra_names_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("torch" in name for name in project["dependencies"])
    with_torch = [
        extra for extra, names in project["optional-dependencies"].items() if any("torch" in n for n in names)
    ]
    assert with_torch == ["test"]
