"""Sampling on the device: one prefill a prompt, then G completions that all read the one prompt cache."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vau_jax import logprobs
from vau_jax.models import qwen_vl
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.types import Batch, KVCache, Params, Sampled


class _Loop(NamedTuple):
    step: jax.Array  # int32 []
    last: jax.Array  # int32 [B, G]: the newest token, not in the cache yet
    own: KVCache  # [L, B, G, C, K, H]
    tokens: jax.Array  # int32 [B, G, C]
    logps: jax.Array  # float32 [B, G, C]
    done: jax.Array  # bool [B, G]


def restrict(scores: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """Sets logits outside the `top_k` best (0: all) and outside the smallest set of mass `top_p` (1: all) to -inf."""
    if top_k:
        kth = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores < kth, -jnp.inf, scores)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        last = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < last, -jnp.inf, scores)
    return scores


@partial(
    jax.jit,
    static_argnames=("model", "num_generations", "max_new_tokens", "end_tokens", "greedy", "top_p", "top_k"),
)
def sample(
    params: Params,
    batch: Batch,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    *,
    model: QwenVL,
    num_generations: int,
    max_new_tokens: int,
    end_tokens: tuple[int, ...],
    greedy: bool = False,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Sampled:
    """Draws G = num_generations completions of at most C = max_new_tokens tokens for each prompt.

    A completion ends with the first of `end_tokens`, which belongs to it; the loop stops when all have ended. Token t
    is drawn with fold_in(key, t). The log-probabilities are those of the distribution drawn from, filters included;
    greedy ones are those at temperature 1.
    """
    variables = {"params": params}
    head = qwen_vl.unembedding(params, model.config)
    never = model.config.never_sampled

    def pick(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logprobs.sampling_logits(hidden, head, 1.0 if greedy else temperature, never)  # [B, G, V]
        if greedy:
            token = jnp.argmax(scores, axis=-1)
        else:
            scores = restrict(scores, top_p, top_k)
            token = jax.random.categorical(jax.random.fold_in(key, step), scores)
        logp = jnp.take_along_axis(jax.nn.log_softmax(scores), token[..., None], axis=-1)[..., 0]
        return token.astype(jnp.int32), logp

    hidden, prompt = model.apply(variables, batch, method="prefill")
    b, g, c = batch.tokens.shape[0], num_generations, max_new_tokens
    first = jnp.broadcast_to(logprobs.last_token(hidden, batch.mask)[:, None], (b, g, hidden.shape[-1]))
    token, logp = pick(first, jnp.int32(0))
    blank = jnp.zeros((prompt.k.shape[0], b, g, c, *prompt.k.shape[-2:]), prompt.k.dtype)
    loop = _Loop(
        step=jnp.int32(0),
        last=token,
        own=KVCache(blank, blank),
        tokens=jnp.zeros((b, g, c), jnp.int32).at[..., 0].set(token),
        logps=jnp.zeros((b, g, c)).at[..., 0].set(logp),
        done=jnp.isin(token, jnp.asarray(end_tokens)),
    )

    def body(loop: _Loop) -> _Loop:
        hidden, new = model.apply(variables, loop.last, batch, loop.step, (prompt, loop.own), method="decode")
        own = KVCache(*(_write(old, x, loop.step) for old, x in ((loop.own.k, new.k), (loop.own.v, new.v))))
        token, logp = pick(hidden, loop.step + 1)
        at = (0, 0, loop.step + 1)
        return _Loop(
            step=loop.step + 1,
            last=token,
            own=own,
            tokens=jax.lax.dynamic_update_slice(loop.tokens, jnp.where(loop.done, 0, token)[..., None], at),
            logps=jax.lax.dynamic_update_slice(loop.logps, jnp.where(loop.done, 0.0, logp)[..., None], at),
            done=loop.done | jnp.isin(token, jnp.asarray(end_tokens)),
        )

    loop = jax.lax.while_loop(lambda s: (s.step < c - 1) & ~jnp.all(s.done), body, loop)
    return Sampled(loop.tokens, loop.logps, completion_mask(loop.tokens, end_tokens, loop.step + 1))


def _write(cache: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Puts new [L, B, G, K, H] at completion position `step` of cache [L, B, G, C, K, H]."""
    return jax.lax.dynamic_update_slice(cache, new[:, :, :, None], (0, 0, 0, step, 0, 0))


def completion_mask(tokens: jax.Array, end_tokens: tuple[int, ...], length: jax.Array | int) -> jax.Array:
    """bool [B, G, C]: True up to and including the first end token, nowhere from `length` on."""
    ended = jnp.isin(tokens, jnp.asarray(end_tokens)).astype(jnp.int32)
    before = jnp.cumsum(ended, axis=-1) - ended
    return (before == 0) & (jnp.arange(tokens.shape[-1]) < length)
