"""Evaluation as VAU-R1's code does it (GVCLab/VAU-R1 at 845c33b): frames, pixels, protocol, options as in the file, and
the checkpoint's own repetition penalty; its temperature of 1e-6 is greedy here.

    vau evaluate --config=reproduce/evaluate:qa_think --workdir=DIR --config.checkpoint=RUN \
        --config.data.csv=JOINED/test_msad.csv --config.data.videos=JOINED

`_think` asks for reasoning before the answer, `_direct` for the answer alone, whatever the run was trained with; a run
of reflection is asked in its own style instead of `_think` with --config.data.style=reflection.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vau_jax.configs import eval as evaluation


class Asked(NamedTuple):
    """One way of asking a split."""

    task: str
    fps: float
    budget: str
    files: tuple[str, ...]  # annotation files that have it, by the stem of their names


FILES = ("test_msad", "test_ucf_crime", "test_ecva")
ASKED = {
    "qa": Asked("qa", 1.0, "vau_r1_qa", FILES),
    "tag": Asked("grounding", 2.0, "vau_r1_eval", FILES),
    "cls": Asked("classification", 2.0, "vau_r1_eval", FILES),
    "vau_eval": Asked("description", 1.0, "vau_r1_qa", FILES),
}
ROWS = ("qa_think", "qa_direct", "tag_think", "tag_direct", "cls_think", "cls_direct", "vau_eval", "vau_eval_single")


def asked(row: str) -> Asked:
    """What a row asks."""
    return ASKED["vau_eval" if row.startswith("vau_eval") else row.partition("_")[0]]


def get_config(row: Any = "") -> ConfigDict:
    """The config of a row of ROWS. Raises ValueError for another."""
    if row not in ROWS:
        raise ValueError(f"--config=reproduce/evaluate:{row}: expected ROW to be one of {', '.join(ROWS)}")
    c, own = evaluation.get_config(), asked(row)
    c.name = row
    c.batch_size = 1  # a prompt may have 115,200 visual tokens
    c.repetition_penalty = 0.0  # the checkpoint's own
    c.description_turns = 2 if row == "vau_eval" else 1
    c.data.tasks = (own.task,)
    c.data.style = "direct" if row.endswith("direct") else "think"
    c.data.protocol = "paper"
    c.data.shuffle_options = False
    c.data.fps, c.data.budget = own.fps, own.budget
    return c
