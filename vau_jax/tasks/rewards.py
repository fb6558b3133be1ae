"""Verifiable rewards: pure JAX over parsed arrays, f(parsed, target) -> float32 [N].

All work under `jit` and `vmap`. Strings never enter: `parsing.parse` made numbers of them.
"""

import jax
import jax.numpy as jnp

from vau_jax.tasks.parsing import INTERVAL, NORMAL, TASKS, Answers, Parsed
from vau_jax.types import Target

QA, GROUNDING = TASKS.index("qa"), TASKS.index("grounding")

REFLECT_WORDS = (
    3,
    100,
    150,
)  # of a reflection: from the first to the second number is best, the third is worth nothing
MOST_COPIED = 0.5  # a reflection with so large a share copied from the first reasoning is none


def format_reward(parsed: Parsed, target: Target) -> jax.Array:
    """1 where the completion keeps the strict rule of `parsing`, else 0."""
    return jnp.asarray(parsed.format_ok, jnp.float32)


def accuracy_reward(parsed: Parsed, target: Target) -> jax.Array:
    """1 where the final answer is right, else 0: the letter, the class, or whether there is an anomaly."""
    return correctness(parsed.final, target)


def tiou_reward(parsed: Parsed, target: Target) -> jax.Array:
    """Temporal IoU of the final interval, in [0, 1]; 0 for tasks other than grounding."""
    return jnp.where(target.task == GROUNDING, interval_score(parsed.final, target), 0.0)


def reflection_reward(parsed: Parsed, target: Target) -> jax.Array:
    """How well the reflection did, in [0, 0.75]: 0.25 for its form, its effect in [-0.25, 0.5], times its length.

    With d and f the scores of draft and final answer (0 or 1, for grounding the temporal IoU):

        effect = f / 4 + f * d / 4 + min(f - d, 0) / 4

    A right draft that is kept earns 0.5, a wrong one that is corrected 0.25, a wrong one that is kept 0, a right one
    that is broken -0.25. More f always pays, and for any f the best draft is one that scores the same: a wrong draft on
    purpose loses. The factor for the length is 1 between the first two REFLECT_WORDS and falls evenly, to 0 without a
    word and at the third. The whole is 0 without form, and where there is no reflection to pay for: no word of first or
    of revised reasoning, MOST_COPIED or more of it copied from the first, or a revised reasoning that states another
    answer than the final one. This is our own formula; its parts follow SRPO (arXiv 2506.01713), whose correction bonus
    could be gamed.
    """
    draft, final = task_score(parsed.draft, target), task_score(parsed.final, target)
    effect = 0.25 * final + 0.25 * final * draft + 0.25 * jnp.minimum(final - draft, 0.0)
    few, many, most = REFLECT_WORDS
    length = jnp.minimum(parsed.reflect_words / few, (most - parsed.reflect_words) / (most - many))
    reasoned = (parsed.think_words > 0) & (parsed.revise_words > 0) & ~parsed.contradicted
    counts = parsed.format_ok & reasoned & (parsed.reflect_copied < MOST_COPIED)
    return jnp.where(counts, jnp.clip(length, 0.0, 1.0) * (0.25 + effect), 0.0).astype(jnp.float32)


def correctness(answers: Answers, target: Target) -> jax.Array:
    """1 where the answer to the example's own task is there and right, else 0; 0 for descriptions."""
    choice = (answers.choice == target.choice) & (answers.choice >= 0)
    label = (answers.label == target.label) & (answers.label >= 0)
    anomaly = answers.anomaly == jnp.where(target.kind == NORMAL, 0, 1)
    right = jnp.where(target.task == QA, choice, jnp.where(target.task == GROUNDING, anomaly, label))
    return right.astype(jnp.float32)


def interval_score(answers: Answers, target: Target) -> jax.Array:
    """Temporal IoU: of two intervals; 1 when both say "no anomaly", 0 when one does; 0 when either is unknown."""
    inner = jnp.minimum(answers.interval[..., 1], target.interval[..., 1])
    inner = inner - jnp.maximum(answers.interval[..., 0], target.interval[..., 0])
    inner = jnp.maximum(inner, 0.0)
    lengths = (answers.interval[..., 1] - answers.interval[..., 0]) + (
        target.interval[..., 1] - target.interval[..., 0]
    )
    iou = inner / jnp.maximum(lengths - inner, 1e-6)
    both_normal = (answers.kind == NORMAL) & (target.kind == NORMAL)
    both_known = (answers.kind == INTERVAL) & (target.kind == INTERVAL)
    return jnp.where(both_known, iou, both_normal.astype(iou.dtype)).astype(jnp.float32)


def task_score(answers: Answers, target: Target) -> jax.Array:
    """What the example's task measures: temporal IoU for grounding, else whether the answer is right; in [0, 1]."""
    return jnp.where(target.task == GROUNDING, interval_score(answers, target), correctness(answers, target))


REWARDS = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    "tiou": tiou_reward,
    "reflection": reflection_reward,
}
