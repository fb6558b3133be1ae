"""The reference of the Python interface: one command, no warnings, every module in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDDEN = ("app", "web")  # see launch/docs.sh


@pytest.mark.long
def test_the_reference_is_made_without_warnings_of_every_module(tmp_path: Path) -> None:
    env = {**os.environ, "VENV": sys.prefix, "EXTRA": "test"}
    command = ["bash", "launch/docs.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    own = ROOT / "vau_jax"
    files = [f for f in own.rglob("*.py") if f.relative_to(own).parts[0].removesuffix(".py") not in HIDDEN]
    files += [file for folder in ("configs", "data_prep", "launch") for file in (ROOT / folder).rglob("*.py")]
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = "/".join(parts if parts[0] == "vau_jax" else ("vau_jax", *parts)).removesuffix("/__init__")
        if file.stem != "__main__":
            assert (tmp_path / f"{name}.html").is_file(), name
    page = (tmp_path / "vau_jax" / "rl" / "grpo.html").read_text()
    assert "group_advantages" in page and "vau_jax.rl" in page
