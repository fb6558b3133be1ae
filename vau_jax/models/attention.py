"""Attention over several sets of keys at once, with one softmax.

G completions of a prompt read the prompt's keys, which exist once, and their own:

                   prompt keys   own keys
    prompt  [T]  |  causal     |           |
    compl.  [G]  |  all        |  causal   |     each completion sees its own row only

Scores and softmax are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # finite, so that a row without any visible key gives a number and not NaN


class Keys(NamedTuple):
    """One set of keys and values; rank 4 is shared by all G, rank 5 belongs to each."""

    k: jax.Array  # [B, S, K, H] or [B, G, S, K, H]
    v: jax.Array
    mask: jax.Array  # bool, broadcastable to [B, G, Q, S]: True where the query sees the key


def attend(q: jax.Array, parts: list[Keys]) -> jax.Array:
    """Attention of q [B, G, Q, N, H] over the union of `parts` -> [B, G, Q, N, H]; N is a multiple of K."""
    kv_heads = parts[0].k.shape[-2]
    b, g, length, heads, dim = q.shape
    grouped = q.reshape(b, g, length, kv_heads, heads // kv_heads, dim) * dim**-0.5
    scores = []
    for part in parts:
        spec = "bgqkrh,bskh->bkrgqs" if part.k.ndim == 4 else "bgqkrh,bgskh->bkrgqs"
        score = jnp.einsum(spec, grouped, part.k, preferred_element_type=jnp.float32)
        scores.append(jnp.where(part.mask[:, None, None], score, HIDDEN))
    top = jnp.max(jnp.stack([score.max(-1) for score in scores]), axis=0)[..., None]
    weights = [jnp.exp(score - jax.lax.stop_gradient(top)) for score in scores]
    total = sum(weight.sum(-1) for weight in weights)  # [B, K, R, G, Q]
    out = 0.0
    for part, weight in zip(parts, weights, strict=True):
        spec = "bkrgqs,bskh->bgqkrh" if part.k.ndim == 4 else "bkrgqs,bgskh->bgqkrh"
        out += jnp.einsum(spec, weight.astype(part.v.dtype), part.v, preferred_element_type=jnp.float32)
    out = out / jnp.transpose(total, (0, 3, 4, 1, 2))[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def causal_mask(length: int) -> jax.Array:
    """bool [1, 1, length, length]: a position sees itself and what comes before."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def prefix_attention(q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, generations: int) -> jax.Array:
    """Attention of one packed sequence, prompt then completions: q [B, T + G * C, N, H] -> the same shape.

    prompt_mask is bool [B, T]; generations is G, 0 for a prompt alone. Padding inside a completion lies after its
    real tokens, where the causal mask already hides it.
    """
    t = prompt_mask.shape[1]
    seen = prompt_mask[:, None, None, :]
    prompt = attend(q[:, None, :t], [Keys(k[:, :t], v[:, :t], causal_mask(t) & seen)])[:, 0]
    if generations == 0:
        return prompt
    split = [x[:, t:].reshape(x.shape[0], generations, -1, *x.shape[2:]) for x in (q, k, v)]
    own = Keys(split[1], split[2], causal_mask(split[0].shape[2]))
    completions = attend(split[0], [Keys(k[:, :t], v[:, :t], seen), own])
    return jnp.concatenate([prompt, completions.reshape(q[:, t:].shape)], axis=1)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt: Keys,
    own: Keys,
) -> jax.Array:
    """Attention of one new token in each of G completions: q [B, G, N, H] -> [B, G, N, H].

    `prompt` holds the prompt's keys (shared), `own` the completion's earlier ones; k, v [B, G, K, H] are the token's.
    """
    itself = Keys(k[:, :, None], v[:, :, None], jnp.ones((1, 1, 1, 1), bool))
    return attend(q[:, :, None], [prompt, own, itself])[:, :, 0]


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array, members: jax.Array, slots: jax.Array) -> jax.Array:
    """Attention inside groups of patches: q, k, v [B, P, N, H] -> [B, P, N, H]; see `types.Groups`."""
    b, p, heads, dim = q.shape
    grouped = [_to_groups(x.reshape(b, p, -1), members, slots).reshape(*members.shape, heads, dim) for x in (q, k, v)]
    out = attend(grouped[0], [Keys(grouped[1], grouped[2], (members < p)[:, :, None, :])])
    return _to_patches(out.reshape(b, -1, heads * dim), members, slots).reshape(q.shape)


# Members and slots undo each other, so that the gradient of one gather is the other gather, where automatic
# differentiation would scatter (several times slower).


@jax.custom_vjp
def _to_groups(x: jax.Array, members: jax.Array, slots: jax.Array) -> jax.Array:
    """Patches [B, P, D] in the order of the groups, [B, n_groups * size, D]; zeros in padding."""
    flat = members.reshape(members.shape[0], -1)
    inside = (flat < x.shape[1])[..., None]
    return jnp.where(inside, jnp.take_along_axis(x, jnp.minimum(flat, x.shape[1] - 1)[..., None], axis=1), 0)


@jax.custom_vjp
def _to_patches(x: jax.Array, members: jax.Array, slots: jax.Array) -> jax.Array:
    """The inverse: [B, n_groups * size, D] to [B, P, D]. A padding patch reads slot 0, and gives it no gradient."""
    return jnp.take_along_axis(x, slots[..., None], axis=1)


def _from_patches(index: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
    return _to_groups(grad, *index), None, None


def _from_groups(index: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
    members, slots = index
    real = jnp.take_along_axis(members.reshape(slots.shape[0], -1), slots, axis=1) == jnp.arange(slots.shape[1])
    return jnp.where(real[..., None], _to_patches(grad, members, slots), 0), None, None


_to_groups.defvjp(lambda x, *index: (_to_groups(x, *index), index), _from_groups)
_to_patches.defvjp(lambda x, *index: (_to_patches(x, *index), index), _from_patches)
