"""The optimiser: AdamW with a schedule, gradient clipping, and freezing and weight decay by parameter name."""

import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from vau_jax.common.files import InputError
from vau_jax.models import hf
from vau_jax.types import Params

SCHEDULES = ("constant", "linear", "cosine")


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then constant, or linear or cosine down to `final_lr` * lr."""
    if config.schedule not in SCHEDULES:
        raise InputError(f"optim.schedule={config.schedule!r} is unknown: expected one of {', '.join(SCHEDULES)}")
    rest, end = max(1, steps - config.warmup_steps), config.lr * config.final_lr
    main = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, end, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_lr),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, config.lr, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, main], [config.warmup_steps]) if config.warmup_steps else main


MOTION = "motion_prompt/"  # how the names of a motion prompt's numbers begin


def make(
    config: ConfigDict,
    steps: int,
    params: Params,
    frozen: Params | None = None,
    motion: ConfigDict | None = None,
) -> optax.GradientTransformation:
    """The optimiser for `params` (arrays or shapes) over `steps` updates.

    The numbers of a motion prompt have a learning rate (motion.lr_scale times the others') and weight decay of
    their own.

    Parameters whose name matches one of `freeze` keep their values and have no optimiser slots; those that match one
    of `no_decay` have no weight decay. A pattern that matches neither them nor `frozen` is an InputError.
    """
    names = list(hf.flatten(params)) + list(hf.flatten(frozen or {}))
    for pattern in (*config.freeze, *config.no_decay):
        if not any(re.fullmatch(pattern, name) for name in names):
            raise InputError(f"optim pattern {pattern!r} matches no parameter; names look like {', '.join(names[:3])}")
    rate = schedule(config, steps)
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    decayed = _labels(params, lambda name: not _any(config.no_decay, name))
    groups = {
        "trained": optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(rate, weight_decay=config.weight_decay, mask=decayed, **moments),
        ),
        "frozen": optax.set_to_zero(),
    }
    if motion is not None:
        own_rate = lambda step: motion.lr_scale * rate(step)  # noqa: E731
        groups["motion"] = optax.adamw(own_rate, weight_decay=motion.weight_decay, **moments)

    def group(name: str) -> str:
        if _any(config.freeze, name):
            return "frozen"
        return "motion" if name.startswith(MOTION) else "trained"

    return optax.multi_transform(groups, _labels(params, group))


def stop_frozen(config: ConfigDict, params: Params) -> Params:
    """The same parameters, through which no gradient goes to those that `config.freeze` names: none is computed."""
    if not config.freeze:
        return params
    frozen = _labels(params, lambda name: _any(config.freeze, name))
    return jax.tree.map(lambda stop, x: jax.lax.stop_gradient(x) if stop else x, frozen, params)


def all_frozen(config: ConfigDict, names: list[str]) -> bool:
    """Whether `config.freeze` names all these parameters."""
    return all(_any(config.freeze, name) for name in names)


def _any(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _labels(params: Params, label: Any) -> Params:
    """A tree like params with label(name) in the place of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: label("/".join(k.key for k in path)), params)
