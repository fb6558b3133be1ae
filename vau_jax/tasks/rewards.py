"""Verifiable rewards: pure JAX over parsed arrays, f(parsed, target) -> float32 [N].

All work under `jit` and `vmap`. Strings never enter: `parsing.parse` has turned them into arrays. Each
task defines its own score.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vau_jax.tasks import TASKS
from vau_jax.tasks.base import Task
from vau_jax.tasks.columns import Columns
from vau_jax.tasks.parsing import Parsed

Reward = Callable[[Parsed, Columns], jax.Array]

# Words of a reflection: from the first number to the second the factor is 1, at the third it is 0.
REFLECT_WORDS = (3, 100, 150)
MOST_COPIED = 0.5  # a reflection with this share or more copied from the first reasoning earns nothing


def format_reward(parsed: Parsed, target: Columns) -> jax.Array:
    """1 where the completion keeps the strict rule of `parsing`, else 0."""
    return jnp.asarray(parsed.format_ok, jnp.float32)


def accuracy_reward(parsed: Parsed, target: Columns) -> jax.Array:
    """1 where the final answer is right, else 0: the letter, the class, or whether there is an anomaly."""
    return correctness(parsed.final, target)


def reflection_reward(parsed: Parsed, target: Columns) -> jax.Array:
    """The quality of the reflection, in [0, 0.75]: 0.25 for its format plus its effect in [-0.25, 0.5], times its
    length factor.

    With d and f the scores of draft and final answer (0 or 1, for grounding the temporal IoU):

        effect = f / 4 + f * d / 4 + min(f - d, 0) / 4

    A right draft that is kept earns 0.5, a wrong one that is corrected 0.25, a wrong one that is kept 0, a right one
    that is broken -0.25. A higher f always pays, and for any f the best draft is one with the same score: a
    deliberately wrong draft loses. The length factor is 1 between the first two REFLECT_WORDS and falls linearly to 0
    at no words and at the third.

    The reward is 0 without the right format, and where there is no reflection to reward: no word of first or of revised
    reasoning, MOST_COPIED or more of it copied from the first, or a revised reasoning that states another answer than
    the final one.

    This formula is our own; its parts follow SRPO (arXiv 2506.01713), whose correction bonus could be gamed.
    """
    draft, final = task_score(parsed.draft, target), task_score(parsed.final, target)
    effect = 0.25 * final + 0.25 * final * draft + 0.25 * jnp.minimum(final - draft, 0.0)
    few, many, most = REFLECT_WORDS
    length = jnp.minimum(parsed.reflect_words / few, (most - parsed.reflect_words) / (most - many))
    reasoned = (parsed.think_words > 0) & (parsed.revise_words > 0) & ~parsed.contradicted
    counts = parsed.format_ok & reasoned & (parsed.reflect_copied < MOST_COPIED)
    return jnp.where(counts, jnp.clip(length, 0.0, 1.0) * (0.25 + effect), 0.0).astype(jnp.float32)


def correctness(answers: Columns, target: Columns) -> jax.Array:
    """1 where the answer to the example's own task exists and is right, else 0; 0 for descriptions."""
    return _by_task(target, lambda task: task.correct(answers, target))


def task_score(answers: Columns, target: Columns) -> jax.Array:
    """The measure of the example's task: temporal IoU for grounding, else whether the answer is right; in [0, 1]."""
    return _by_task(target, lambda task: task.score(answers, target))


def verifiable(target: Columns) -> jax.Array:
    """bool [N]: whether the example's task has answers that are right or wrong."""
    return _by_task(target, lambda task: jnp.full(target.task.shape, task.verifiable)) > 0


def _by_task(target: Columns, value: Callable[[Task], jax.Array]) -> jax.Array:
    """float32 [N]: `value` of each example's task."""
    result = jnp.zeros(jnp.shape(target.task), jnp.float32)
    for index, task in enumerate(TASKS.values()):
        result = jnp.where(target.task == index, jnp.asarray(value(task), jnp.float32), result)
    return result


def _of_task(index: int, reward: Callable[[Columns, Columns], jax.Array]) -> Reward:
    """A task's own reward: 0 for examples of other tasks."""

    def of_task(parsed: Parsed, target: Columns) -> jax.Array:
        return jnp.where(target.task == index, reward(parsed.final, target), 0.0)

    of_task.__doc__ = reward.__doc__
    return of_task


REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    **{name: _of_task(i, f) for i, task in enumerate(TASKS.values()) for name, f in task.rewards.items()},
    "reflection": reflection_reward,
}
