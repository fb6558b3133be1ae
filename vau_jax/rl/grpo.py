"""Group-relative policy optimisation: advantages and losses, as pure functions of arrays.

N completions, grouped by prompt, G each; C completion tokens. Reductions and log-probabilities are float32
or wider. The exact forms are those of TRL's GRPOTrainer, tested against it; "reg_grpo" is not in TRL.

Every loss is a sum over tokens of a term times a weight, and the weights come from the mask and from two numbers alone:
how many completions and how many tokens the whole update has. So a batch may be computed in parts and the parts added.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vau_jax.common.checks import COUNT, NOT_NEGATIVE, SHARE, check_choices, check_ranges
from vau_jax.common.files import InputError, check_range

Array = jax.Array
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "reg_grpo")
KL_FORMS = ("k1", "k2", "k3")
SCALES = ("group", "batch", "none")
CHOICES = {
    "loss_type": LOSS_TYPES,
    "scale": SCALES,
    "kl": KL_FORMS,
    "kl_in": ("loss", "reward"),
    "importance": ("auto", "always", "never"),
}
RANGES = {
    "iterations": COUNT,
    "beta": NOT_NEGATIVE,
    "reference_every": NOT_NEGATIVE,
    "reference_mix": SHARE,
    "epsilon_low": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "delta": NOT_NEGATIVE,
    "importance_cap": COUNT,
    "regression_eps": (1e-6, math.inf),
}


def check(config: ConfigDict, max_new_tokens: int) -> None:
    """Raises InputError for the first invalid setting of config.grpo."""
    check_choices(config, "grpo.", CHOICES)
    check_ranges(config, "grpo.", RANGES)
    check_range("grpo.overlong_buffer", config.overlong_buffer, 0, max_new_tokens)


# --- Advantages ---------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Array,
    num_generations: int,
    scale: str = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    weights: Sequence[float] | Array | None = None,
    per_reward: bool = False,
) -> Array:
    """Advantages [N] of rewards [N], or of R rewards a completion [N, R] summed with `weights` [R] (default: ones).

    (r - mean of the group) / (std + eps), where std is the group's ("group"), the batch's ("batch"), or the division is
    left out ("none"). Equal rewards in a group give 0. A reward that is NaN is absent: it counts as 0 in the sum, and
    a completion without any keeps advantage 0. arXiv 2402.03300, equation 3; "none": arXiv 2503.20783.

    With `per_reward` each reward is normalised in its group by itself before the weighted sum, which is then normalised
    over the batch; `scale` is not read (GDPO, arXiv 2601.05242).
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
    absent = jnp.all(jnp.isnan(columns), axis=1)
    if per_reward:
        groups = columns.reshape(-1, num_generations, columns.shape[1])
        columns = _standardise(groups, 1, ddof, eps).reshape(columns.shape)
    total = jnp.where(absent, jnp.nan, jnp.sum(jnp.nan_to_num(columns) * weights, axis=1))
    if per_reward:
        return jnp.nan_to_num(_standardise(total, 0, ddof, eps))
    groups = total.reshape(-1, num_generations)
    if scale == "group":
        return jnp.nan_to_num(_standardise(groups, 1, ddof, eps)).reshape(-1)
    centred = groups - jnp.nanmean(groups, axis=1, keepdims=True)
    spread = jnp.nanstd(total, ddof=ddof) + eps if scale == "batch" else 1.0
    return jnp.nan_to_num(centred / spread).reshape(-1)


def _standardise(values: Array, axis: int, ddof: int, eps: float) -> Array:
    """(values - mean) / (std + eps) along an axis; NaN entries are left out."""
    mean = jnp.nanmean(values, axis=axis, keepdims=True)
    return (values - mean) / (jnp.nanstd(values, axis=axis, keepdims=True, ddof=ddof) + eps)


def overlong_penalty(lengths: Array, limit: int, buffer: int) -> Array:
    """A reward in [-1, 0] for completions of `lengths` tokens [N]: 0 up to limit - buffer, then decreasing linearly to
    -1 at `limit` and beyond (DAPO's soft overlong punishment, arXiv 2503.14476, equation 13).
    """
    return -jnp.clip((jnp.asarray(lengths) - (limit - buffer)) / buffer, 0.0, 1.0)


def kl_divergence(logps: Array, ref_logps: Array, form: str) -> Array:
    """Per-token estimate of KL(policy || reference): k1, k2 or k3 of http://joschu.net/blog/kl-approx.html.

    k3 is never negative and has the right gradient as a loss term; k1's gradient vanishes in expectation on policy, so
    that it belongs into the reward.
    """
    if form not in KL_FORMS:
        raise InputError(f"kl={form!r} is unknown: expected one of {', '.join(KL_FORMS)}")
    log_ratio = ref_logps - logps
    if form == "k1":
        return -log_ratio
    return 0.5 * jnp.square(log_ratio) if form == "k2" else jnp.exp(log_ratio) - log_ratio - 1.0


# --- Losses -------------------------------------------------------------------------------------------------------


def loss(logps: Array, batch: Mapping[str, Array], config: Any) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch and its metrics, both differentiable in logps [N, C].

    batch: `mask` [N, C], `advantages` [N]; `old_logps` [N, C], by default the policy's own (one update a rollout);
    `ref_logps` [N, C] where the loss has a KL term; `sampler_logps` [N, C] with importance_cap; `entropies` [N, C] with
    entropy_bonus. For a part of an update, `num_completions` and `num_tokens` of the whole (see `totals`).

    config: `loss_type`, `beta`, `kl`, `epsilon_low`, `epsilon_high`, `max_completion_length`. Optional: `delta`, an
    upper bound of the ratio in the unclipped branch (dual clip, arXiv 1912.09729); `kl_in` "loss" (default) or
    "reward", where the KL is no term of the loss; `importance_cap`, above 0 the policy term of a token is weighed by
    min(old policy / sampler, cap); `entropy_bonus`, times the mean entropy of tokens, taken off the loss;
    `num_generations` and `regression_eps` for reg_grpo.

    loss_type: "grpo" mean over completions of the mean over tokens; "bnpo" mean over all tokens (arXiv 2503.14476);
    "dr_grpo" sum over N * max_completion_length (arXiv 2503.20783); "dapo" the same as bnpo, since a rollout is one
    update's batch; "gspo" as grpo with the ratio of the whole completion (arXiv 2507.18071); "cispo" the capped ratio
    weighs the log-probability, epsilon_high is the cap itself (arXiv 2506.13585), normalised as dapo; "reg_grpo" see
    `predicted_advantages`.
    """
    if config.loss_type not in LOSS_TYPES:
        raise InputError(f"loss_type={config.loss_type!r} is unknown: expected one of {', '.join(LOSS_TYPES)}")
    mask = jnp.asarray(batch["mask"]).astype(logps.dtype)
    whole = {**totals(batch), **{name: batch[name] for name in ("num_completions", "num_tokens") if name in batch}}
    advantages = jnp.asarray(batch["advantages"])[:, None]
    old_logps = jax.lax.stop_gradient(batch.get("old_logps", logps))
    per_token, metrics = _policy_term(logps, old_logps, mask, advantages, config)
    cap = getattr(config, "importance_cap", 0.0)
    if cap:
        correction = jnp.exp(old_logps - batch["sampler_logps"])
        per_token = per_token * jnp.minimum(correction, cap)
        metrics["importance_capped"] = masked_mean(correction > cap, mask)
    if config.beta:
        kl = kl_divergence(logps, batch["ref_logps"], config.kl)
        metrics["kl"] = masked_mean(kl, mask)
        per_token = per_token + (config.beta * kl if getattr(config, "kl_in", "loss") == "loss" else 0.0)
    value = jnp.sum(jnp.where(mask > 0, per_token, 0.0) * _token_weights(mask, whole, config))
    bonus = getattr(config, "entropy_bonus", 0.0)
    if bonus:
        value = value - bonus * jnp.sum(jnp.where(mask > 0, batch["entropies"], 0.0)) / whole["num_tokens"]
    return value, metrics


def totals(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch-wide numbers that the token weights of an update depend on, as float32 scalars."""
    mask = jnp.asarray(batch["mask"])
    count = jnp.float32(mask.size // mask.shape[-1])
    return {"num_completions": count, "num_tokens": jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)}


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over the entries where mask is 1; 0 when there are none."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


def predicted_advantages(log_ratio: Array, mask: Array, num_generations: int, eps: float) -> Array:
    """What Reg-GRPO regresses on the advantages: the group-normalised log-ratio of completions, [N].

    With r = sum over tokens of log(policy / old policy), it is (r - mean) / sqrt(var + eps^2), mean and variance
    (ddof 1) over the group's completions that have tokens in the loss. The loss is the mean of
    (advantage - prediction)^2, without ratio or clip, after Reg-GRPO (DeepVideo-R1, arXiv 2506.07464), which divides by
    the standard deviation alone. That has no derivative where a rollout begins (all r = 0); eps = 1 makes the first
    gradient twice that of the policy gradient with whole-completion log-probabilities.
    """
    groups = jnp.sum(log_ratio * mask, axis=1).reshape(-1, num_generations)
    there = (mask.sum(1) > 0).reshape(-1, num_generations)
    count = jnp.maximum(there.sum(1, keepdims=True), 1)
    centred = groups - jnp.sum(groups * there, axis=1, keepdims=True) / count
    variance = jnp.sum(jnp.square(centred) * there, axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return (centred / jnp.sqrt(variance + eps**2)).reshape(-1)


def _policy_term(
    logps: Array, old_logps: Array, mask: Array, advantages: Array, config: Any
) -> tuple[Array, dict[str, Array]]:
    """The policy's term of each token [N, C] or completion [N, 1], and the share that was clipped."""
    log_ratio = logps - old_logps
    if config.loss_type == "reg_grpo":
        eps = getattr(config, "regression_eps", 1.0)
        error = advantages[:, 0] - predicted_advantages(log_ratio, mask, config.num_generations, eps)
        return jnp.square(error)[:, None], {}
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


def _token_weights(mask: Array, whole: Mapping[str, Array], config: Any) -> Array:
    """The weight [N, C] of each token's term, 0 outside the mask."""
    if config.loss_type in ("grpo", "gspo", "reg_grpo"):
        return mask / jnp.maximum(mask.sum(1, keepdims=True), 1.0) / whole["num_completions"]
    if config.loss_type == "dr_grpo":
        return mask / (whole["num_completions"] * config.max_completion_length)
    return mask / whole["num_tokens"]
