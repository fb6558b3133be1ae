"""The Qwen2.5-VL vision tower: windowed attention in most layers, whole temporal patches in the others."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vau_jax.models import attention, rope
from vau_jax.models.config import VisionConfig
from vau_jax.models.layers import RMSNorm, SwiGLU, dense
from vau_jax.types import Vision

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's statistics, which every Qwen-VL checkpoint uses
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(patches: jax.Array, channels: int) -> jax.Array:
    """uint8 patches [..., channels * rest] to float32, (x / 255 - mean) / std by channel."""
    by_channel = patches.reshape(*patches.shape[:-1], channels, -1).astype(jnp.float32)
    mean, std = (np.asarray(x, np.float32)[:, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return ((by_channel - 255 * mean) / (255 * std)).reshape(patches.shape)


class VisionAttention(nn.Module):
    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, vision: Vision, angles: jax.Array, whole_frame: jax.Array) -> jax.Array:
        c = self.config
        qkv = dense(3 * c.hidden_size, "qkv", self.dtype, bias=True)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, c.num_heads, c.head_dim), 2, 0)
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)

        def inside(groups: Any) -> jax.Array:
            return attention.grouped_attention(q, k, v, groups.members, groups.slots)

        if len(c.full_attention_layers) == c.depth:
            out = inside(vision.frames)
        else:
            out = jax.lax.cond(whole_frame, lambda: inside(vision.frames), lambda: inside(vision.windows))
        return dense(c.hidden_size, "proj", self.dtype, bias=True)(out.reshape(x.shape))


class VisionBlock(nn.Module):
    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, vision: Vision, angles: jax.Array, whole_frame: jax.Array
    ) -> tuple[jax.Array, None]:
        c = self.config
        attn = VisionAttention(c, self.dtype, name="attn")
        x = x + attn(RMSNorm(1e-6, name="norm1")(x), vision, angles, whole_frame)
        x = x + SwiGLU(c.intermediate_size, self.dtype, bias=True, name="mlp")(RMSNorm(1e-6, name="norm2")(x))
        return x, None


class VisionTower(nn.Module):
    """Patches to visual tokens: `Vision` -> [B, P / merge^2, out_hidden_size]."""

    config: VisionConfig
    dtype: Any
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, vision: Vision) -> jax.Array:
        c = self.config
        pixels = normalise(vision.patches, c.in_channels).astype(self.dtype)
        x = dense(c.hidden_size, "patch_embed", self.dtype)(pixels)  # [B, P, D]
        angles = rope.patch_angles(vision.positions, c.head_dim)
        whole_frame = np.isin(np.arange(c.depth), c.full_attention_layers)  # [L]
        blocks = nn.scan(
            nn.remat(VisionBlock) if self.remat else VisionBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.depth,
            unroll=self.unroll,
        )(c, self.dtype, name="blocks")
        x, _ = blocks(x, vision, angles, jnp.asarray(whole_frame))
        x = RMSNorm(1e-6, name="merger_ln_q")(x)
        x = x.reshape(x.shape[0], -1, c.hidden_size * c.spatial_merge_size**2)  # [B, P / merge^2, D * merge^2]
        x = nn.gelu(dense(x.shape[-1], "merger_in", self.dtype, bias=True)(x), approximate=False)
        return dense(c.out_hidden_size, "merger_out", self.dtype, bias=True)(x)
