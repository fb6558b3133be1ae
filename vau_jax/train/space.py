"""The disk space that a run needs in its workdir, printed before its first step."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from vau_jax.common import files
from vau_jax.models import checkpoint
from vau_jax.types import State

COMPRESSED = 0.45  # of weights that came as bfloat16 and are kept as float32; of trained ones, and of moments, 0.95
LOGGED = 2**11  # bytes of a line of metrics.jsonl, or of samples.jsonl, roughly


def check(config: ConfigDict, state: State, workdir: Path) -> None:
    """Prints what the rest of the run in `workdir` needs there, and what is free; `state` are arrays, or shapes.

    Raises InputError where it is certain not to fit.
    """
    there = checkpoint.steps(workdir)
    done = there[-1] if there else 0
    every, keep = config.checkpoint.every, config.checkpoint.keep
    to_come = -(-config.steps // every) - done // every
    if config.eval.csv:  # each step that is the best so far is saved too
        to_come = config.steps - done
    # The newest, the best, and the one that is written before one of these goes; the best may be among the newest.
    most, least = (max(1, min(n - len(there), to_come)) for n in (keep + 2, keep + 1))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    logs = (config.steps - done) / config.log_every * LOGGED * (1 + config.batch_size)
    files.check_space(
        f"{most} more checkpoint{'s' * (most > 1)} of {files.size_text(size)} before compression",
        workdir,
        most * size + logs,
        least * size * COMPRESSED,
        "choose another --workdir" + f", or set config.checkpoint.keep (now {keep}) lower" * (keep > 1 and least > 1),
    )
