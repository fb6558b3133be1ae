"""Public names of the verifiable rewards; each task's own part is in `vau_jax.tasks`."""

from vau_jax.tasks.rewards import REWARDS

__all__ = ["REWARDS"]
