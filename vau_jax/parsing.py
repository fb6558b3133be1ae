"""Public names of the completion parser; the parser itself is in `vau_jax.tasks`."""

from vau_jax.tasks.parsing import TASKS, Parsed, parse, targets

__all__ = ["TASKS", "Parsed", "parse", "targets"]
