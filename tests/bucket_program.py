"""A frame cache, a training run that reads it, and an evaluation, all below one folder: a program for tests to kill.

python -m tests.bucket_program MODEL DATA FOLDER
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from tests.runs import small
from vau_jax.data_prep import cache_frames
from vau_jax.eval import evaluate
from vau_jax.train import loop

STEPS, EVERY = 4, 2


def config(model: Path, data: Path) -> ConfigDict:
    """Of the training run."""
    c = small("vau_r1_sft", model, data)
    c.steps, c.checkpoint.every, c.data.tasks = STEPS, EVERY, ("qa",)
    return c


def main(model: Path, data: Path, folder: Path) -> None:
    c = config(model, data)
    cache_frames.run(c, folder / "frames")
    c.data.cache = str(folder / "frames")
    loop.run(c, folder / "run")
    asked = small("eval", model, data, "test")
    asked.checkpoint, asked.data.max_examples, asked.data.tasks = str(folder / "run"), 4, ("qa",)
    evaluate.run(asked, folder / "eval")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
