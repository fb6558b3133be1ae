"""Low-rank adapters (LoRA, arXiv 2106.09685): kernel + scale * a @ b, with the kernel left alone.

The factors live in a collection of their own, `lora`, a tree like the parameters' with {"a" [..., in, r], "b" [..., r,
out]} where those have a "kernel". `model.apply({"params": params})` is the model without them: the reference policy.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vau_jax.common.checks import NOT_NEGATIVE, SHARE, check_patterns, check_ranges
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError

DECODER = (r"decoder/layers/.*_proj",)  # every linear layer of the decoder


@dataclass(frozen=True)
class LoRA:
    """Options of adapters: which linear layers, and their kind."""

    rank: int
    alpha: float
    dropout: float = 0.0  # of the adapter's input, in training
    targets: tuple[str, ...] = DECODER  # regexes on full names: "decoder/layers/q_proj", "visual/blocks/attn/qkv"
    rank_stabilised: bool = False  # scale alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise InputError(f"LoRA needs rank >= 1 and 0 <= dropout < 1, found {self.rank} and {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


def check(config: ConfigDict) -> None:
    """Raises InputError for the first invalid setting of config.lora."""
    check_ranges(config, "lora.", {"rank": NOT_NEGATIVE, "dropout": SHARE})
    check_patterns(config, "lora.", ("targets",))


def read(fields: Fields) -> LoRA:
    """The kind described by a file. Raises InputError."""
    targets = fields.raw.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{fields.where}: targets={targets!r}: expected a list of strings")
    return LoRA(
        rank=fields.integer("rank", 1, 2**20),
        alpha=fields.number("alpha", 0, 1e6),
        dropout=fields.number("dropout", 0, 1),
        targets=tuple(targets),
        rank_stabilised=fields.flag("rank_stabilised"),
    )


def layer_of(path: str) -> str | None:
    """The linear layer whose kernel a parameter is: "decoder/layers/q_proj" for "decoder/layers/q_proj/kernel".

    None for other parameters, the patch embedding among them, which is a convolution to other tools.
    """
    return path.removesuffix("/kernel") if path.endswith("/kernel") and path != "visual/patch_embed/kernel" else None


def targets(kernels: dict[str, tuple[int, ...]], lora: LoRA) -> dict[str, tuple[int, ...]]:
    """Layer name -> kernel shape of the layers that get adapters, from all parameters' paths and shapes.

    Raises InputError for a regex that matches no linear layer.
    """
    linear = {name: shape for path, shape in kernels.items() if (name := layer_of(path)) is not None}
    for pattern in lora.targets:
        if not any(re.fullmatch(pattern, name) for name in linear):
            raise InputError(f"LoRA target {pattern!r} matches no linear layer; they are {', '.join(linear)}")
    return {name: s for name, s in linear.items() if any(re.fullmatch(pattern, name) for pattern in lora.targets)}


def init(key: jax.Array, kernels: dict[str, tuple[int, ...]], lora: LoRA, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Fresh adapters, flat: a uniform in ±1 / sqrt(in), b zero, so that training starts at the model itself."""
    flat = {}
    for number, (name, shape) in enumerate(sorted(targets(kernels, lora).items())):
        *stack, inputs, outputs = shape
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, number), (*stack, inputs, lora.rank), dtype, -bound, bound)
        flat[f"{name}/a"], flat[f"{name}/b"] = a, jnp.zeros((*stack, lora.rank, outputs), dtype)
    return flat


def split(trained: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, fully trained parameters) of a tree that has both."""
    adapters: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for name, tree in trained.items():
        if not isinstance(tree, dict):
            whole[name] = tree
        elif set(tree) == {"a", "b"}:
            adapters[name] = tree
        else:
            parts = split(tree)
            adapters |= {name: parts[0]} if parts[0] else {}
            whole |= {name: parts[1]} if parts[1] else {}
    return adapters, whole


def overlay(params: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with those of `whole` replacing their counterparts."""
    below = {name: overlay(params.get(name, {}), x) if isinstance(x, dict) else x for name, x in whole.items()}
    return {**params, **below}


def merge(params: dict[str, Any], trained: dict[str, Any], lora: LoRA, dtype: Any | None = None) -> dict[str, Any]:
    """The parameters with the trained ones merged: adapters added in float32 and rounded once (to `dtype`, or to each
    parameter's own), fully trained parameters replaced unchanged; nested trees.
    """
    adapters, whole = split(trained)
    return overlay(_added(params, adapters, lora, dtype), whole)


def _added(params: Any, adapters: dict[str, Any], lora: LoRA, dtype: Any | None) -> Any:
    if not isinstance(params, dict):
        return params.astype(dtype or params.dtype)
    merged = {name: _added(tree, adapters.get(name, {}), lora, dtype) for name, tree in params.items()}
    if set(adapters) != {"a", "b"}:
        return merged
    kernel, factors = params["kernel"], (adapters[name].astype(jnp.float32) for name in ("a", "b"))
    change = jnp.einsum("...ir,...ro->...io", *factors) * lora.scale
    return {**merged, "kernel": (kernel.astype(jnp.float32) + change).astype(dtype or kernel.dtype)}
