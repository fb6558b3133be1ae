"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches to visual tokens.

    patches -> embed (+ learned positions, Qwen3) -> depth x block -> merger -> visual tokens
                                                       |  after some blocks (Qwen3, DeepStack, arXiv 2406.04334)
                                                       +--> a second merger -> first decoder layers

Attention stays inside a temporal patch (a frame), and in most layers of Qwen2.5-VL inside windows of it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vau_jax.common import sharding
from vau_jax.models import attention, motion_prompt, rope
from vau_jax.models.config import VisionConfig
from vau_jax.models.layers import MLP, UNIT_NORMAL, Dense, LayerNorm, RMSNorm, SwiGLU, rows_of
from vau_jax.models.lora import LoRA
from vau_jax.types import Features, Groups, Vision

EPS = 1e-6  # of every norm, in every published tower


def normalise(patches: jax.Array, config: VisionConfig) -> jax.Array:
    """uint8 patches [..., channels * rest] to float32, (x / 255 - mean) / std by channel."""
    by_channel = patches.reshape(*patches.shape[:-1], config.in_channels, -1).astype(jnp.float32)
    mean, std = (np.asarray(x, np.float32)[:, None] for x in (config.image_mean, config.image_std))
    return ((by_channel - 255 * mean) / (255 * std)).reshape(patches.shape)


def norm(config: VisionConfig, name: str) -> nn.Module:
    """The norm of a tower's family: RMSNorm, or LayerNorm."""
    return RMSNorm(EPS, name=name) if config.gated else LayerNorm(EPS, name=name)


class VisionAttention(nn.Module):
    """Attention of patches to those of their window, or of their frame."""

    config: VisionConfig
    dtype: Any
    lora: LoRA | None

    @nn.compact
    def __call__(self, x: jax.Array, vision: Vision, angles: jax.Array, whole_frame: jax.Array) -> jax.Array:
        c = self.config
        parts = 3, c.num_heads, c.head_dim
        qkv = Dense(3 * c.hidden_size, self.dtype, self.lora, True, parts, name="qkv")(x)
        q, k, v = jnp.moveaxis(sharding.by_heads(qkv), 2, 0)
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)

        def inside(groups: Groups) -> jax.Array:
            return attention.grouped_attention(q, k, v, groups)

        if vision.windows is None:
            out = inside(vision.frames)
        else:
            out = jax.lax.cond(whole_frame, lambda: inside(vision.frames), lambda: inside(vision.windows))
        return Dense(c.hidden_size, self.dtype, self.lora, bias=True, name="proj")(out.reshape(x.shape))


class VisionBlock(nn.Module):
    """One block: attention and a feed-forward network, each after a norm and beside a residual."""

    config: VisionConfig
    dtype: Any
    lora: LoRA | None

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array | None],
        vision: Vision,
        angles: jax.Array,
        whole_frame: jax.Array,
        slot: jax.Array,
    ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
        """carry is (x [B, P, D], kept [n + 1, B, P, D]): a block writes its output to kept[slot]; the last is waste."""
        c, (x, kept) = self.config, carry
        attend = VisionAttention(c, self.dtype, self.lora, name="attn")
        x = x + attend(norm(c, "norm1")(x), vision, angles, whole_frame)
        if c.gated:
            mlp = SwiGLU(c.intermediate_size, self.dtype, self.lora, True, name="mlp")
        else:
            mlp = MLP(c.intermediate_size, c.hidden_size, c.activation, self.dtype, self.lora, name="mlp")
        x = x + mlp(norm(c, "norm2")(x))
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
        return (x, kept), None


class Merger(nn.Module):
    """Patches [B, P, D] to visual tokens [B, P / merge^2, out_hidden_size]."""

    config: VisionConfig
    dtype: Any
    lora: LoRA | None
    norm_merged: bool = False  # the norm is over the merged unit, instead of over each patch

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        width = c.hidden_size * c.spatial_merge_size**2
        merged = x.shape[0], -1, width
        x = norm(c, "norm")(x.reshape(merged)) if self.norm_merged else norm(c, "norm")(x).reshape(merged)
        return MLP(width, c.out_hidden_size, "gelu", self.dtype, self.lora, name="mlp")(x)


class VisionTower(nn.Module):
    """`Vision` to `Features`. A motion prompt weighs the normalised pixels, and sows the total of its variation among
    the "losses"."""

    config: VisionConfig
    dtype: Any
    lora: LoRA | None = None
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, vision: Vision) -> Features:
        c = self.config
        pixels = normalise(vision.patches, c)
        weights = motion_prompt.MotionPrompt(c, name="motion_prompt")(vision) if c.motion else None
        if weights is not None:
            self.sow("losses", motion_prompt.VARIATION, motion_prompt.variation_total(weights, vision))
            by_channel = pixels.reshape(*pixels.shape[:2], c.in_channels, -1)
            pixels = (by_channel * weights.reshape(*weights.shape[:2], 1, -1)).reshape(pixels.shape)
        x = Dense(c.hidden_size, self.dtype, bias=c.patch_bias, name="patch_embed")(pixels.astype(self.dtype))
        if c.position_grid:
            table = self.param("pos_embed", UNIT_NORMAL, (c.position_grid**2, c.hidden_size))
            corners = rows_of(table, vision.corners, self.dtype)  # [B, P, 4, D]
            x = x + jnp.einsum("bpcd,bpc->bpd", corners, vision.corner_weights).astype(self.dtype)
        taps = len(c.deepstack_layers)
        kept = jnp.zeros((taps + 1, *x.shape), x.dtype) if taps else None
        x, kept = self._blocks((x, kept), vision)
        tokens = Merger(c, self.dtype, self.lora, name="merger")(x)
        if not taps:
            return Features(tokens, None)
        deepstack = nn.vmap(
            Merger, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True, "dropout": True}, out_axes=1
        )
        return Features(tokens, deepstack(c, self.dtype, self.lora, norm_merged=True, name="deepstack")(kept[:taps]))

    def _blocks(self, carry: tuple[jax.Array, jax.Array | None], vision: Vision) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        numbers = np.arange(c.depth)
        whole_frame = np.isin(numbers, c.full_attention_layers)
        slots = np.asarray([c.deepstack_layers.index(i) if i in c.deepstack_layers else -1 for i in numbers])
        blocks = nn.scan(
            nn.remat(VisionBlock) if self.remat else VisionBlock,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),
            length=c.depth,
            unroll=self.unroll,
        )(c, self.dtype, self.lora, name="blocks")
        angles = rope.patch_angles(vision.positions, c.head_dim)
        slots = np.where(slots < 0, len(c.deepstack_layers), slots)
        return blocks(carry, vision, angles, jnp.asarray(whole_frame), jnp.asarray(slots, jnp.int32))[0]
