"""SRVAU-R1's reinforcement fine-tuning: format, accuracy, temporal IoU and reflection rewards."""

from ml_collections import ConfigDict

from vau_jax.configs import vau_r1_multi_rft


def get_config() -> ConfigDict:
    c = vau_r1_multi_rft.get_config()
    c.data.style = "reflection"
    c.rewards.reflection = 1.0
    return c
