"""VAU-R1's supervised fine-tuning: reasoning from the annotations, then the answer; learning rate 2e-5."""

from ml_collections import ConfigDict

from vau_jax.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.stage = "sft"
    c.data.style = "think"
    return c
