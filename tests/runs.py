"""A short training run as a command line, for tests that start it in processes of its own."""

from pathlib import Path
from typing import Any


def arguments(stage: str, model: Path, data: Path, workdir: Path, steps: int, **changed: Any) -> list[str]:
    """Of `python -m vau_jax.train`: a checkpoint every two steps; `changed` are fields of the config."""
    values = {
        "stage": stage,
        "model": model,
        "data.csv": data / "train.csv",
        "data.videos": data / "videos",
        "data.reflection": data / "train_reflection.jsonl",
        "data.wording": "short",
        "data.max_frames": 8,
        "data.max_completion_tokens": 128 if stage == "sft" else 16,
        "data.bucket": "(128, 576, 48, 64, 12, 64)",
        "dtype": "float32",
        "batch_size": 4,
        "steps": steps,
        "optim.lr": 1e-3,
        "checkpoint.every": 2,
        **changed,
    }
    options = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/srvau_r1_rft.py", f"--workdir={workdir}", *options]
