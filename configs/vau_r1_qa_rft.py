"""VAU-R1's reinforcement fine-tuning for multiple-choice questions: format and accuracy rewards."""

from ml_collections import ConfigDict

from vau_jax.configs import vau_r1_multi_rft


def get_config() -> ConfigDict:
    c = vau_r1_multi_rft.get_config()
    c.data.tasks = ("qa",)
    c.rewards.tiou = 0.0
    return c
