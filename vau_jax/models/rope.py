"""Rotary position embeddings: 2-D for patches, M-RoPE (time, height, width) for tokens. Angles are float32."""

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """float32 [dim / 2]: theta^(-2i / dim), the usual RoPE frequencies (arXiv 2104.09864)."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)


def mrope_axes(sections: tuple[int, ...], interleaved: bool) -> np.ndarray:
    """int [H / 2]: whether a frequency belongs to the time (0), height (1) or width (2) position.

    `sections` is the number of frequencies of each of the three: consecutive ones (Qwen2-VL, arXiv 2409.12191, section
    2.1), or `interleaved` as t h w t h w ... until a section is used up, and time from there on (Qwen3-VL).
    """
    if not interleaved:
        return np.repeat(np.arange(len(sections)) % 3, sections)
    i = np.arange(sum(sections))
    return np.where(i < 3 * np.asarray(sections)[i % 3], i % 3, 0)


def mrope_angles(
    positions: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...], interleaved: bool
) -> jax.Array:
    """Angles [B, S, H / 2] for positions int32 [B, 3, S]; see `mrope_axes`."""
    axis = mrope_axes(sections, interleaved)
    per_frequency = jnp.take(positions, axis, axis=1).astype(jnp.float32)  # [B, H / 2, S]
    return jnp.swapaxes(per_frequency, 1, 2) * inverse_frequencies(head_dim, theta)


def patch_angles(positions: jax.Array, head_dim: int, theta: float = 10000.0) -> jax.Array:
    """Angles [B, P, H / 2] for the (row, column) of each patch, int32 [B, P, 2]: half the frequencies for each."""
    freqs = inverse_frequencies(head_dim // 2, theta)  # [H / 4]
    angles = positions[..., None].astype(jnp.float32) * freqs  # [B, P, 2, H / 4]
    return angles.reshape(*positions.shape[:-1], head_dim // 2)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates x [..., S, N, H] by angles [..., S, H / 2]; dimension i pairs with i + H / 2. Computed in float32."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
