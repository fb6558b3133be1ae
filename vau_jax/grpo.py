"""Public names of GRPO: group advantages and policy losses, functions of arrays. The code is in `vau_jax.rl.grpo`."""

from vau_jax.rl.grpo import group_advantages, loss

__all__ = ["group_advantages", "loss"]
