"""Floating-point operations: of a training step by formula, and of any program by counting its matrix products.

XLA's own count takes the body of a loop once and a kernel as zero; `count` multiplies by the lengths of scans.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from vau_jax.models.config import QwenVLConfig
from vau_jax.types import Batch, Completions, Vision

# --- By formula ---------------------------------------------------------------------------------------------------


@jax.jit
def sizes(batch: Batch, completions: Completions) -> dict[str, jax.Array]:
    """The real part of a padded batch, as float32 scalars: tokens, query-key pairs, patches."""
    prompts = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)[:, None]  # [B, 1]
    lengths = jnp.sum(completions.mask, axis=2, dtype=jnp.float32)  # [B, G]
    result = {
        "prompt": jnp.sum(prompts),
        "drawn": jnp.sum(lengths),
        "pairs": jnp.sum(prompts * (prompts + 1) / 2) + jnp.sum(lengths * prompts + lengths * (lengths + 1) / 2),
    }
    if isinstance(batch.vision, Vision):
        groups = {"frame": batch.vision.frames, "window": batch.vision.windows or batch.vision.frames}
        for name, group in groups.items():
            each = jnp.sum(group.members < group.slots.shape[1], axis=2, dtype=jnp.float32)
            result |= {"patches": jnp.sum(each), f"{name}_pairs": jnp.sum(each**2)}
    return result


def forward(config: QwenVLConfig, size: dict[str, float]) -> dict[str, float]:
    """Operations of the forward pass of a batch of `sizes`, by part: decoder, head (the completions' logits), tower."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    tokens = size["prompt"] + size["drawn"]
    return {
        "decoder": config.num_layers * (2.0 * weights * tokens + 4.0 * heads * size["pairs"]),
        "head": 2.0 * config.vocab_size * config.hidden_size * size["drawn"],
        "tower": _tower(config, size) if "patches" in size else 0.0,
    }


def _tower(config: QwenVLConfig, size: dict[str, float]) -> float:
    v, unit = config.vision, config.vision.spatial_merge_size**2
    mlp = (3 if v.gated else 2) * v.hidden_size * v.intermediate_size
    embedding = v.hidden_size * v.in_channels * v.temporal_patch_size * v.patch_size**2
    whole = len(v.full_attention_layers) if v.window_size else v.depth
    pairs = whole * size["frame_pairs"] + (v.depth - whole) * size["window_pairs"]
    merged = v.hidden_size * unit
    mergers = (1 + len(v.deepstack_layers)) * merged * (merged + config.hidden_size) / unit
    blocks = v.depth * (4 * v.hidden_size**2 + mlp)
    return 2.0 * size["patches"] * (embedding + blocks + mergers) + 4.0 * v.hidden_size * pairs


# --- By counting --------------------------------------------------------------------------------------------------


def count(function: Callable, *args: Any, **kwargs: Any) -> float:
    """Operations of the matrix products and convolutions in function(*args, **kwargs), in all rounds of its scans.

    A loop of unknown length counts once. Kernels (Pallas) count as nothing: add theirs by formula.
    """
    return _of(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _of(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[1:])
        elif name == "cond":
            total += max(_of(branch.jaxpr) for branch in eqn.params["branches"])
        elif name != "pallas_call":
            rounds = {"scan": eqn.params.get("length"), "shard_map": _devices(eqn.params)}.get(name, 1)
            total += rounds * sum(_of(inner) for inner in _inner(eqn.params))
    return total


def _devices(params: dict[str, Any]) -> int:
    """The number of devices that run the program inside an operation."""
    return params["mesh"].size if "mesh" in params else 1


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs inside an operation's parameters."""
    results = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                results.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                results.append(one)
    return results
