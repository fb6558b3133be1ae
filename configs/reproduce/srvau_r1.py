"""SRVAU-R1's experiments (arXiv 2602.01004): reflection SFT, then RFT, and the ablations that its summary names.

Neither its code nor its settings are published: these are our own, the same in all rows, so that rows differ in what
they ablate alone. Records are of `vau data reflection`; `launch/reproduce.py` makes them.
"""

from typing import Any

from ml_collections import ConfigDict

from vau_jax.configs.reproduce import Row, config_of

OURS = (("epochs", 1.0), ("batch_size", 8), ("data.shuffle_options", True))
SFT = (*OURS, ("optim.lr", 2e-5))
RFT = (*OURS, ("optim.lr", 1e-6), ("rollout.num_generations", 8), ("rewards.tiou", 1.0))
REFLECT = (("data.style", "reflection"),)
REWARDED = (*REFLECT, ("rewards.reflection", 1.0))
PLAIN = (("data.style", "think"),)
TWO_PASS = (("data.style", "two_pass"),)
WITHOUT_MSAD = (("data.sources", ("ucf", "ecva")),)  # grounding is tested on MSAD, out of domain

TASKS = ("qa", "grounding", "classification")
TESTED = ("qa_think", "tag_think", "cls_think")


def scale(share: float) -> tuple[tuple[str, Any], ...]:
    """The ablation of data scale: part of the records."""
    return (("data.share", share),)


ROWS = {
    "sft_reflection": Row("sft", TASKS, changed=(*SFT, *REFLECT), teacher="model", tested=TESTED),
    "rft_reflection": Row("rft", TASKS, "sft_reflection", (*RFT, *REWARDED), tested=(*TESTED, "qa_direct", "vau_eval")),
    "sft_no_reflection": Row("sft", TASKS, changed=(*SFT, *PLAIN), tested=TESTED),
    "rft_no_reflection": Row("rft", TASKS, "sft_no_reflection", (*RFT, *PLAIN), tested=TESTED),
    "sft_two_pass": Row("sft", TASKS, changed=(*SFT, *TWO_PASS), teacher="model", tested=TESTED),
    "rft_two_pass": Row("rft", TASKS, "sft_two_pass", (*RFT, *TWO_PASS), tested=TESTED),
    "sft_scale_25": Row("sft", TASKS, changed=(*SFT, *REFLECT, *scale(0.25)), teacher="model", tested=TESTED),
    "rft_scale_25": Row("rft", TASKS, "sft_scale_25", (*RFT, *REWARDED), tested=TESTED),
    "sft_scale_50": Row("sft", TASKS, changed=(*SFT, *REFLECT, *scale(0.5)), teacher="model", tested=TESTED),
    "rft_scale_50": Row("rft", TASKS, "sft_scale_50", (*RFT, *REWARDED), tested=TESTED),
    "sft_teacher_rules": Row("sft", TASKS, changed=(*SFT, *REFLECT), teacher="rules", tested=TESTED),
    "rft_teacher_rules": Row("rft", TASKS, "sft_teacher_rules", (*RFT, *REWARDED), tested=TESTED),
    "sft_out_of_domain": Row(
        "sft", TASKS, changed=(*SFT, *REFLECT, *WITHOUT_MSAD), teacher="model", tested=("tag_think",)
    ),
    "rft_out_of_domain": Row(
        "rft", TASKS, "sft_out_of_domain", (*RFT, *REWARDED, *WITHOUT_MSAD), tested=("tag_think", "tag_direct")
    ),
}


def get_config(row: Any = "") -> ConfigDict:
    """The config of a row of ROWS."""
    return config_of(ROWS, row, "reproduce/srvau_r1")
