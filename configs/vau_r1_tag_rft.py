"""VAU-R1's reinforcement fine-tuning for temporal grounding: temporal IoU, format and accuracy rewards."""

from ml_collections import ConfigDict

from vau_jax.configs import vau_r1_multi_rft


def get_config() -> ConfigDict:
    c = vau_r1_multi_rft.get_config()
    c.data.tasks = ("grounding",)
    return c
