"""The optimiser: AdamW with a schedule, gradient clipping, and freezing and weight decay by parameter name."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from vau_jax.common.checks import NOT_NEGATIVE, SHARE, check_choices, check_patterns, check_ranges
from vau_jax.common.files import InputError
from vau_jax.models import hf
from vau_jax.types import Params

SCHEDULES = ("constant", "linear", "cosine")
BIASES = ".*/bias"  # a pattern of the default config, which matches nothing in a model without biases

RANGES = {
    "lr": NOT_NEGATIVE,
    "b1": SHARE,
    "b2": SHARE,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "final_lr": NOT_NEGATIVE,
    "clip_norm": (1e-12, 1e12),
}


def check(config: ConfigDict) -> None:
    """Raises InputError for the first invalid setting of config.optim."""
    check_choices(config, "optim.", {"schedule": SCHEDULES})
    check_ranges(config, "optim.", RANGES)
    check_patterns(config, "optim.", ("freeze", "no_decay"))


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then constant, or linear or cosine down to `final_lr` * lr."""
    check_choices(config, "optim.", {"schedule": SCHEDULES})
    rest, end = max(1, steps - config.warmup_steps), config.lr * config.final_lr
    main = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, end, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_lr),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, config.lr, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, main], [config.warmup_steps]) if config.warmup_steps else main


class Group(NamedTuple):
    """Parameters whose full name matches `pattern` have their own learning rate (relative to the others') and weight
    decay, and their gradients are not clipped with the others'.
    """

    pattern: str
    lr_scale: float
    weight_decay: float


def make(
    config: ConfigDict,
    steps: int,
    params: Params,
    frozen: Params | None = None,
    groups: Sequence[Group] = (),
) -> optax.GradientTransformation:
    """The optimiser for `params` (arrays or shapes) over `steps` updates.

    Parameters in one of `groups` are trained as that says, also where `config.freeze` names them. Of the others those
    whose name matches one of `freeze` keep their values and have no optimiser slots; those that match one of `no_decay`
    have no weight decay. A pattern that matches neither them nor `frozen` is an InputError;
    BIASES alone may.
    """
    names = list(hf.flatten(params)) + list(hf.flatten(frozen or {}))
    for pattern in (*config.freeze, *config.no_decay):
        if pattern != BIASES and not any(re.fullmatch(pattern, name) for name in names):
            raise InputError(f"optim pattern {pattern!r} matches no parameter; names look like {', '.join(names[:3])}")
    rate = schedule(config, steps)
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    decayed = _labels(params, lambda name: not _any(config.no_decay, name))
    transforms = {
        "trained": optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(rate, weight_decay=config.weight_decay, mask=decayed, **moments),
        ),
        "frozen": optax.set_to_zero(),
    }
    for group in groups:
        own_rate = partial(_scaled, rate, group.lr_scale)
        transforms[group.pattern] = optax.adamw(own_rate, weight_decay=group.weight_decay, **moments)

    def label(name: str) -> str:
        own = next((group.pattern for group in groups if re.fullmatch(group.pattern, name)), None)
        return own or ("frozen" if _any(config.freeze, name) else "trained")

    return optax.multi_transform(transforms, _labels(params, label))


def _scaled(rate: optax.Schedule, scale: float, step: jax.Array) -> jax.Array:
    return scale * rate(step)


def stop_frozen(config: ConfigDict, params: Params, groups: Sequence[Group] = ()) -> Params:
    """The same parameters, with gradients stopped for those that `config.freeze` names: none is computed."""
    if not config.freeze:
        return params
    own = tuple(group.pattern for group in groups)
    frozen = _labels(params, lambda name: _any(config.freeze, name) and not _any(own, name))
    return jax.tree.map(lambda stop, x: jax.lax.stop_gradient(x) if stop else x, frozen, params)


def all_frozen(config: ConfigDict, names: list[str]) -> bool:
    """Whether `config.freeze` names all these parameters."""
    return all(_any(config.freeze, name) for name in names)


def _any(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _labels(params: Params, label: Any) -> Params:
    """A tree like params with label(name) as leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: label("/".join(k.key for k in path)), params)
