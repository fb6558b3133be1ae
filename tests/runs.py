"""Short training runs: their configs, their command lines for tests that start processes, and what one computed.

A step of AdamW makes much of small gradients: their rounding, which is another on every processor, becomes a whole
step. Tests that compare two ways to compute one thing compare gradients, or go on with steps IN_PROPORTION to them.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from vau_jax.data import loading, pipeline
from vau_jax.data.processor import Processor
from vau_jax.tasks.example import Example
from vau_jax.train.loop import Run

IN_PROPORTION = {"optim.eps": 1.0, "optim.lr": 1.0}  # by elements of gradients of norm 1 at most


def first_gradient(run: Run) -> list[np.ndarray]:
    """That of a run's first update, clipped: AdamW's mean of gradients is then 1 - b1 times it."""
    means = optax.tree_utils.tree_get_all_with_path(jax.device_get(run.learner.state.opt_state), "mu")
    return [leaf / (1 - run.config.optim.b1) for _, tree in means for leaf in jax.tree.leaves(tree)]


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


WITH_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is for x86-64 alone"
)


ROOT = Path(__file__).parents[1]


TRAINING = sorted(p.stem for p in (ROOT / "configs").glob("*vau_r1*.py"))


def small(name: str, model: Path, data: Path, split: str = "train") -> ConfigDict:
    """A config with the test's paths and sizes, and nothing else changed."""
    c = importlib.import_module(f"vau_jax.configs.{name}").get_config()
    c.dtype = "float32"
    c.batch_size = 4
    c.data.csv, c.data.videos = str(data / f"{split}.csv"), str(data / "videos")
    c.data.max_frames, c.data.wording = 8, "short"
    c.data.bucket, c.data.length_window = (128, 576, 48, 64, 12, 64), 8
    if name == "eval":
        c.checkpoint = str(model)
        c.data.max_completion_tokens = 8
        return c
    c.model, c.steps = str(model), 1
    c.data.max_completion_tokens = 16 if c.stage == "rft" else 160
    if c.data.style == "reflection":
        c.data.reflection = str(data / "train_reflection.jsonl")
    return c


def prompts_of(examples: list[Example], processor: Processor, data: ConfigDict) -> pipeline.Prompts:
    """The prompts of examples as a training run has them; `data` is config.data."""
    return pipeline.Prompts(examples, loading.make_loader(processor, data, data.augment))
