"""Settings that no training run can have, found before anything is loaded."""

import math
import re
from collections.abc import Sequence
from functools import reduce

from ml_collections import ConfigDict

from vau_jax.common.files import InputError, check_range
from vau_jax.rl import grpo, sampling
from vau_jax.tasks import prompts, rewards
from vau_jax.train import update
from vau_jax.vlm import DTYPES

RANGES = {  # least and most
    "steps": (1, math.inf),
    "log_every": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "seed": (0, 2**31 - 1),
    "unroll": (1, math.inf),
    "optim.lr": (0, math.inf),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "lora.rank": (0, math.inf),
    "lora.dropout": (0, 1),
    "batch_size": (1, math.inf),
    "micro_batches": (1, math.inf),
    "data.max_completion_tokens": (1, math.inf),
    "data.difficulty.memory": (1, math.inf),
    "data.difficulty.noise": (0, math.inf),
    "data.difficulty.drop": (0, 1),
}
DATA_RANGES = {
    "fps": (1e-3, 1e3),
    "min_frames": (1, math.inf),
    "max_frames": (1, math.inf),
    "min_pixels": (0, math.inf),
    "max_pixels": (0, math.inf),
    "total_pixels": (0, math.inf),
    "max_examples": (0, math.inf),
    "length_window": (1, math.inf),
    "workers": (1, math.inf),
    "video_seconds": (1e-6, 1e6),
}
RFT_RANGES = {
    "rollout.num_generations": (2, math.inf),  # a group is compared
    "rollout.max_draws": (1, math.inf),
    "rollout.reward_workers": (1, math.inf),
    "grpo.iterations": (1, math.inf),
    "grpo.beta": (0, math.inf),
    "grpo.reference_every": (0, math.inf),
    "grpo.reference_mix": (0, 1),
    "grpo.epsilon_low": (0, math.inf),
    "grpo.epsilon_high": (0, math.inf),
    "grpo.delta": (0, math.inf),
    "grpo.importance_cap": (1, math.inf),
    "grpo.regression_eps": (1e-6, math.inf),
}


def check(config: ConfigDict) -> None:
    """Raises InputError for the first such setting."""
    c = config
    choices = {
        "stage": (c.stage, tuple(update.STAGES)),
        "dtype": (c.dtype, tuple(DTYPES)),
        "grpo.loss_type": (c.grpo.loss_type, grpo.LOSS_TYPES),
        "grpo.scale": (c.grpo.scale, grpo.SCALES),
        "grpo.kl": (c.grpo.kl, grpo.KL_FORMS),
        "grpo.kl_in": (c.grpo.kl_in, ("loss", "reward")),
        "grpo.importance": (c.grpo.importance, ("auto", "always", "never")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown: expected one of {', '.join(known)}")
    _check_ranges(c, RANGES)
    check_data(c.data)
    check_patterns(c, ("optim.freeze", "optim.no_decay", "lora.targets"))
    if len(c.profile_steps) != 2:
        raise InputError(f"profile_steps={tuple(c.profile_steps)}: expected the first and the last step of a trace")
    if c.stage == "rft":
        _check_rft(c)
    if c.stage == "sft" and c.data.style in prompts.WITH_DRAFT and not c.data.reflection:
        raise InputError(
            f"SFT with data.style={c.data.style} needs the records to learn from: set config.data.reflection"
        )
    if c.batch_size % c.micro_batches:
        raise InputError(f"micro_batches={c.micro_batches} does not divide batch_size={c.batch_size}")


def check_data(data: ConfigDict) -> None:
    """The same for config.data, which evaluations have too."""
    _check_ranges(data, DATA_RANGES, "data.")
    for task, weight in data.task_weights.items():
        check_range(f"data.task_weights.{task}", weight, 0)


def check_patterns(config: ConfigDict, names: Sequence[str]) -> None:
    """Raises InputError for what is no regular expression."""
    for name in names:
        for pattern in reduce(getattr, name.split("."), config):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error


def _check_ranges(config: ConfigDict, ranges: dict[str, tuple[float, float]], prefix: str = "") -> None:
    for name, (least, most) in ranges.items():
        check_range(prefix + name, reduce(getattr, name.split("."), config), least, most)


def _check_rft(c: ConfigDict) -> None:
    """The same for settings of sampling, rewards and loss."""
    r, limit = c.rollout, c.data.max_completion_tokens
    _check_ranges(c, RFT_RANGES)
    sampling.check(
        "rollout.",
        max_new_tokens=limit,
        temperature=r.temperature,
        top_p=r.top_p,
        top_k=r.top_k,
        min_new_tokens=r.min_new_tokens,
    )
    if c.lora.rank and c.lora.dropout:
        raise InputError(
            f"lora.dropout={c.lora.dropout} with stage=rft: completions are sampled, and their log-probabilities "
            "computed, without dropout, so that the update's ratios would be its noise: set lora.dropout=0"
        )
    check_range("grpo.overlong_buffer", c.grpo.overlong_buffer, 0, limit)
    for name, weight in c.rewards.items():
        check_range(f"rewards.{name}", weight)
    built_in = [name for name, weight in c.rewards.items() if weight]
    if not (built_in or c.user_rewards or c.grpo.overlong_buffer):
        raise InputError("no reward has a weight: set one of config.rewards, or config.user_rewards")
    unearned = [f"rewards.{name}={c.rewards[name]}" for name in built_in if name in rewards.REWARDS]
    if c.data.style == "direct" and unearned:
        raise InputError(
            f"data.style=direct earns nothing of {', '.join(unearned)}, which want reasoning before the answer: take "
            f"another style ({', '.join(style for style in prompts.STYLES if style != 'direct')}), or weights 0 and "
            "config.user_rewards"
        )
