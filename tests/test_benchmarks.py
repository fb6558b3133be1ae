"""The benchmarks run from the command line and end with one JSON object; how fast is not tested."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import efficiency

ROOT = Path(__file__).parents[1]


def last_line(*command: str) -> dict:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_grpo_step(model_folder: Path) -> None:
    sizes = ["--frames=4", "--side=56", "--group=2", "--new=4", "--steps=2", "--warmup=1"]
    result = last_line("benchmarks/grpo_step.py", f"--model={model_folder}", "--exact", *sizes)
    assert result["visual_tokens"] == 2 * 2 * 2
    assert result["padded"] == result["shape"]
    assert result["shape"]["windows"] == result["shape"]["frames"] == 2, "a window holds the whole of a small frame"
    assert 0 < sum(result["split"].values()) <= result["sec_per_step"]
    assert result["completion_tokens_per_s"] > 0


def test_video_pipeline(tmp_path: Path) -> None:
    sizes = ["--sizes", "96x64", "--seconds", "4", "--rounds=1", "--workers", "1"]
    result = last_line("benchmarks/video_pipeline.py", *sizes, f"--clips={tmp_path}")
    assert result["frames_per_s"] > 0
    assert result["clips"]["96x64_4s"]["frames"] == {"ours": 8, "reference": 8, "cached": 8}


def test_goodput_is_what_saves_restarts_and_lost_steps_leave() -> None:
    """A checkpoint every hundred steps of 2 s; of six hours, ten minutes are spent in a restart."""
    hours = partial(efficiency.goodput, 6, 2.0)
    assert hours(copy=0.0, write=0.0, restart=0.0, notice=True) == 1
    assert hours(copy=0.0, write=0.0, restart=600.0, notice=True) == pytest.approx(35 / 36)
    assert hours(copy=10.0, write=50.0, restart=600.0, notice=True) == pytest.approx(200 / 210 * (1 - 660 / 21600))
    assert hours(copy=10.0, write=50.0, restart=600.0, notice=False) == pytest.approx(200 / 210 * (1 - 750 / 21600))
    assert hours(copy=0.0, write=400.0, restart=0.0, notice=True) == pytest.approx(0.5 * (1 - 400 / 21600))
    assert efficiency.goodput(0.1, 2.0, copy=1.0, write=10.0, restart=600.0, notice=True) == 0


def test_a_save_and_a_restart_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    costs = efficiency.measured(gb=0.02)
    assert 0.1 < costs.start < 120 and 1e6 < costs.save < 1e11 and 1e6 < costs.read < 1e11
    assert not list(tmp_path.iterdir())
