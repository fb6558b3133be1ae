"""Layers that the vision tower and the decoder share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

UNIT_NORMAL = nn.initializers.normal(1.0)  # `qwen_vl.init` scales it by the config's initializer_range


def dense(features: int, name: str, dtype: Any, bias: bool = False) -> nn.Dense:
    """A linear layer as everywhere in the model: kernel [in, out]."""
    return nn.Dense(features, use_bias=bias, name=name, dtype=dtype, kernel_init=UNIT_NORMAL)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * weight.astype(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    hidden: int
    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = dense(self.hidden, "gate_proj", self.dtype, self.bias)(x)
        up = dense(self.hidden, "up_proj", self.dtype, self.bias)(x)
        return dense(x.shape[-1], "down_proj", self.dtype, self.bias)(nn.silu(gate) * up)
