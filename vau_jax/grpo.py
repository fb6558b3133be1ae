"""Group-relative policy optimisation: advantages and losses, as pure functions of arrays.

N completions, G of each prompt one after the other; C completion tokens. Reductions and log-probabilities are float32
or wider. The exact forms are those of TRL's GRPOTrainer, tested against its numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vau_jax.files import InputError

Array = jax.Array
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")
KL_FORMS = ("k1", "k2", "k3")
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Array,
    num_generations: int,
    scale: str = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    weights: Sequence[float] | Array | None = None,
) -> Array:
    """Advantages [N] of rewards [N], or of R rewards a completion [N, R] summed with `weights` [R] (default: ones).

    (r - mean of the group) / (std + eps), where std is the group's ("group"), the batch's ("batch"), or the division is
    left out ("none"). Equal rewards in a group give 0. A reward that is NaN is absent: it counts as 0 in the sum, and
    a completion without any keeps advantage 0. arXiv 2402.03300, equation 3; "none": arXiv 2503.20783.
    """
    if num_generations < 2:
        raise InputError(f"num_generations={num_generations}: a group needs at least 2 completions to compare")
    if scale not in SCALES:
        raise InputError(f"scale={scale!r} is unknown: expected one of {', '.join(SCALES)}")
    rewards = jnp.asarray(rewards)
    columns = rewards[:, None] if rewards.ndim == 1 else rewards
    if columns.shape[0] % num_generations:
        raise InputError(f"{columns.shape[0]} rewards do not split into groups of num_generations={num_generations}")
    weights = jnp.ones(columns.shape[1]) if weights is None else jnp.asarray(weights)
    total = jnp.sum(jnp.nan_to_num(columns) * weights, axis=1)
    total = jnp.where(jnp.all(jnp.isnan(columns), axis=1), jnp.nan, total)
    groups = total.reshape(-1, num_generations)
    centred = groups - jnp.nanmean(groups, axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (jnp.nanstd(groups, axis=1, keepdims=True, ddof=ddof) + eps)
    elif scale == "batch":
        centred = centred / (jnp.nanstd(total, ddof=ddof) + eps)
    return jnp.nan_to_num(centred).reshape(-1)


def kl_divergence(logps: Array, ref_logps: Array, form: str) -> Array:
    """Per-token estimate of KL(policy || reference): k1, k2 or k3 of http://joschu.net/blog/kl-approx.html.

    k3 is never negative and has the right gradient as a loss term; k1's gradient vanishes in expectation on policy.
    """
    if form not in KL_FORMS:
        raise InputError(f"kl={form!r} is unknown: expected one of {', '.join(KL_FORMS)}")
    log_ratio = ref_logps - logps
    if form == "k1":
        return -log_ratio
    return 0.5 * jnp.square(log_ratio) if form == "k2" else jnp.exp(log_ratio) - log_ratio - 1.0


def loss(logps: Array, batch: Mapping[str, Array], config: Any) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch and its metrics, both differentiable in logps [N, C].

    batch: `mask` [N, C], `advantages` [N]; `old_logps` [N, C], by default the policy's own (one update a rollout);
    `ref_logps` [N, C] unless beta is 0. config: `loss_type`, `beta`, `kl`, `epsilon_low`, `epsilon_high`,
    `max_completion_length`; optional `delta`, an upper bound of the ratio in the unclipped branch (dual clip).

    loss_type: "grpo" mean over completions of the mean over tokens; "bnpo" mean over all tokens (arXiv 2503.14476);
    "dr_grpo" sum over N * max_completion_length (arXiv 2503.20783); "dapo" sum over the tokens of the generation batch,
    `num_items` in batch, by default this batch's; "gspo" as grpo with the ratio of the whole completion
    (arXiv 2507.18071); "cispo" the capped ratio weighs the log-probability, epsilon_high is the cap itself
    (arXiv 2506.13585), normalised as dapo.
    """
    if config.loss_type not in LOSS_TYPES:
        raise InputError(f"loss_type={config.loss_type!r} is unknown: expected one of {', '.join(LOSS_TYPES)}")
    mask = jnp.asarray(batch["mask"]).astype(logps.dtype)
    advantages = jnp.asarray(batch["advantages"])[:, None]
    old_logps = jax.lax.stop_gradient(batch.get("old_logps", logps))
    per_token, metrics = _policy_term(logps, old_logps, mask, advantages, config)
    if config.beta:
        kl = kl_divergence(logps, batch["ref_logps"], config.kl)
        per_token = per_token + config.beta * kl
        metrics["kl"] = masked_mean(kl, mask)
    return _aggregate(per_token, mask, batch.get("num_items"), config), metrics


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over the entries where mask is 1; 0 when there are none."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


def _policy_term(
    logps: Array, old_logps: Array, mask: Array, advantages: Array, config: Any
) -> tuple[Array, dict[str, Array]]:
    """-(clipped ratio) * advantage for each token [N, C], and how often it was clipped."""
    log_ratio = logps - old_logps
    if config.loss_type == "gspo":
        lengths = jnp.maximum(mask.sum(1, keepdims=True), 1.0)
        log_ratio = jnp.sum(log_ratio * mask, axis=1, keepdims=True) / lengths
    ratio = jnp.exp(log_ratio)
    if config.loss_type == "cispo":
        capped = jax.lax.stop_gradient(jnp.minimum(ratio, config.epsilon_high))
        over = (ratio > config.epsilon_high) & (advantages > 0)
        return -capped * advantages * logps, {"clip/high": masked_mean(over, mask)}
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    delta = getattr(config, "delta", None)
    free = jnp.minimum(ratio, delta) if delta else ratio
    term = -jnp.minimum(free * advantages, jnp.clip(ratio, low, high) * advantages)
    below = jnp.broadcast_to((ratio < low) & (advantages < 0), mask.shape)
    above = jnp.broadcast_to((ratio > high) & (advantages > 0), mask.shape)
    return term, {"clip/low": masked_mean(below, mask), "clip/high": masked_mean(above, mask)}


def _aggregate(per_token: Array, mask: Array, num_items: Array | None, config: Any) -> Array:
    """One number from per-token losses [N, C] (or [N, 1]), by loss type."""
    masked = jnp.where(mask > 0, per_token, 0.0)
    if config.loss_type in ("grpo", "gspo"):
        return jnp.mean(masked.sum(1) / jnp.maximum(mask.sum(1), 1.0))
    if config.loss_type == "dr_grpo":
        return masked.sum() / (mask.shape[0] * config.max_completion_length)
    if config.loss_type == "bnpo" or num_items is None:
        num_items = jnp.maximum(mask.sum(), 1.0)
    return masked.sum() / num_items
