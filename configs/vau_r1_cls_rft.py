"""VAU-R1's reinforcement fine-tuning for classification: format and accuracy rewards, learning rate 2e-6."""

from ml_collections import ConfigDict

from vau_jax.configs import vau_r1_multi_rft


def get_config() -> ConfigDict:
    c = vau_r1_multi_rft.get_config()
    c.data.tasks = ("classification",)
    c.optim.lr = 2e-6
    c.rewards.tiou = 0.0
    return c
