"""VAU-R1's reinforcement fine-tuning (arXiv 2505.23504), all three tasks mixed in one run."""

from ml_collections import ConfigDict

from vau_jax.configs import base


def get_config() -> ConfigDict:
    """GRPO with the paper's settings: G = 4, temperature 1, beta 0.04, learning rate 1e-6, everything trained."""
    c = base.get_config()
    c.stage = "rft"
    c.data.tasks = ("qa", "grounding", "classification")
    c.optim.lr = 1e-6
    c.rewards.tiou = 1.0
    return c
