"""Layers shared by the vision tower and the decoder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vau_jax.common import sharding
from vau_jax.models.lora import LoRA

UNIT_NORMAL = nn.initializers.normal(1.0)  # `qwen_vl.init` scales it by the config's initializer_range

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # by Hugging Face's names
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


# The gradient of values shared by many tokens is a sum over all of them. In bfloat16 a sum of ones stops at 256, so
# these two accumulate in float32, whatever the dtypes of parameters and activations.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_of(table: jax.Array, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows [..., D] of `table` [V, D] in `dtype`, for int32 index [...]."""
    return jnp.take(table.astype(dtype), index, axis=0)


def _rows_backward(dtype: Any, kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    table, index = kept
    total = jnp.zeros(table.shape, jnp.float32).at[index].add(grad.astype(jnp.float32))
    return total.astype(table.dtype), None


rows_of.defvjp(lambda table, index, dtype: (rows_of(table, index, dtype), (table, index)), _rows_backward)


def for_all(shared: jax.Array, like: jax.Array) -> jax.Array:
    """`shared` [..., D] for every token of `like` [..., D], in its shape and dtype."""
    return jnp.broadcast_to(shared.astype(jnp.float32), like.shape).astype(like.dtype)


def left_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 x @ weight.T for x [..., in] and weight [out, in], fast on CPU where x has few rows.

    XLA on CPU reads the left operand of a product in place, and copies the right one to the layout of its kernels; so
    the weight is on the left. The barrier keeps the compiler from swapping the two.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.einsum("fd,md->fm", weight.astype(x.dtype), rows, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """The linear layer used throughout the model: kernel [in, out], with LoRA where collection `lora` has it.

    Decoding on CPU gives it `transposed` [out, in] in place of the kernel, see `left_product`.

    With `parts`, the features are the heads of several projections side by side, and the output has axes for them,
    heads split over the tensor axis of the mesh.
    """

    features: int
    dtype: Any
    lora: LoRA | None = None
    bias: bool = False
    parts: tuple[int, ...] = ()  # (projections, heads, head_dim), which multiply to `features`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "transposed"):
            y = left_product(x, self.get_variable("params", "transposed")).astype(self.dtype)
        else:
            y = self._times(x, self.param("kernel", UNIT_NORMAL, (x.shape[-1], self.features)))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += for_all(bias.reshape(self.parts or -1), y)
        if self.lora is None or not self.has_variable("lora", "a"):
            return y
        if self.lora.dropout and self.has_rng("dropout"):  # only training gives the key
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.lora.dropout), 0)
        a, b = (self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b"))
        return y + self._times(x @ a, b) * jnp.asarray(self.lora.scale, self.dtype)

    def _times(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """x @ kernel. Devices hold consecutive columns of a kernel, which belong to one projection; the kernel is
        resharded by heads, being much smaller than the output.
        """
        kernel = kernel.astype(self.dtype)
        if not self.parts:
            return x @ kernel
        return jnp.tensordot(x, sharding.kernel_by_heads(kernel.reshape(-1, *self.parts)), 1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * for_all(weight, x)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last axis, in float32 (arXiv 1607.06450)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * weight + bias).astype(x.dtype)


def _rows(x: jax.Array) -> jax.Array:
    """x [..., D] as a matrix, whose gradients XLA on CPU computes nearly twice as fast; unchanged where the tensor axis
    is split, since merged axes would be sharded as one.
    """
    return x.reshape(-1, x.shape[-1]) if sharding.tensor_parts() == 1 else x


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    hidden: int
    dtype: Any
    lora: LoRA | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = _rows(x)
        gate = Dense(self.hidden, self.dtype, self.lora, self.bias, name="gate_proj")(rows)
        up = Dense(self.hidden, self.dtype, self.lora, self.bias, name="up_proj")(rows)
        down = Dense(x.shape[-1], self.dtype, self.lora, self.bias, name="down_proj")
        return down(sharding.by_hidden(nn.silu(gate) * up)).reshape(x.shape)


class MLP(nn.Module):
    """fc2(activation(fc1(x))), both with bias."""

    hidden: int
    features: int
    activation: str  # a name in ACTIVATIONS
    dtype: Any
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = _rows(x)
        rows = Dense(self.hidden, self.dtype, self.lora, bias=True, name="fc1")(rows)
        hidden = sharding.by_hidden(ACTIVATIONS[self.activation](rows))
        rows = Dense(self.features, self.dtype, self.lora, bias=True, name="fc2")(hidden)
        return rows.reshape(*x.shape[:-1], self.features)
