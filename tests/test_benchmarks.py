"""The benchmarks run from the command line and end with one JSON object; how fast is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
