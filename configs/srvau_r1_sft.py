"""SRVAU-R1's supervised fine-tuning (arXiv 2602.01004) on reflection records: config.data.reflection names the file."""

from ml_collections import ConfigDict

from vau_jax.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.stage = "sft"
    c.data.style = "reflection"
    return c
