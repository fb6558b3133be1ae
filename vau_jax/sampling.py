"""Sampling on the device: one prefill a prompt, then G completions that all read the one prompt cache."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vau_jax import logprobs
from vau_jax.models import qwen_vl
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.types import Array, Batch, KVCache, Sampled, Variables

DRAW_BLOCK = 128  # tokens


class _Loop(NamedTuple):
    step: jax.Array  # int32 []: completion tokens drawn
    last: jax.Array  # int32 [B, G]: the newest token, not in the cache yet
    own: KVCache  # [L, B, G, K, C, H]
    tokens: jax.Array  # int32 [B, G, C]
    logps: jax.Array  # float32 [B, G, C]
    mask: jax.Array  # bool [B, G, C]
    done: jax.Array  # bool [B, G]
    stop_state: jax.Array  # int32 [B, G]: how much of a stop string has been read


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


def draw(key: jax.Array, scores: jax.Array) -> jax.Array:
    """One index int32 [...] for logits float32 [..., V], with probability softmax(scores).

    Inverts the distribution function in two steps, first to a block of the vocabulary and then inside it: two random
    numbers a row instead of V (making those costs more than the rest of a small model's step), and sums short enough
    that float32 loses no unlikely token. A token of logit -inf is never drawn.
    """
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    pad = -scores.shape[-1] % DRAW_BLOCK
    weights = jnp.pad(weights, [(0, 0)] * (scores.ndim - 1) + [(0, pad)])
    weights = weights.reshape(*scores.shape[:-1], -1, DRAW_BLOCK)
    chance = jax.random.uniform(key, (2, *scores.shape[:-1], 1))

    def invert(mass: jax.Array, share: jax.Array) -> jax.Array:
        """The first index whose cumulative mass exceeds `share` of the whole, which is below 1."""
        total = jnp.cumsum(mass, axis=-1)
        return jnp.argmax(total > share * total[..., -1:], axis=-1)

    block = invert(weights.sum(-1), chance[0])
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return block * DRAW_BLOCK + invert(inside, chance[1])


@partial(
    jax.jit,
    static_argnames=("model", "num_generations", "max_new_tokens", "end_tokens", "greedy", "top_p", "top_k"),
)
def sample(
    variables: Variables,
    batch: Batch,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    min_new_tokens: int | jax.Array = 0,
    stop_table: Array | None = None,
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

    A completion ends with the first of `end_tokens`, none of which is drawn among the first `min_new_tokens`, or with
    the token that completes a stop string of `stop_table` (see stop_strings.py); that token belongs to it. The loop
    stops when all have ended. Token t is drawn with fold_in(key, t). The log-probabilities are those of the
    distribution drawn from, filters included; greedy ones are those at temperature 1.
    """
    head = qwen_vl.unembedding(variables, model.config)
    never = model.config.never_sampled
    ends = jnp.asarray(end_tokens, jnp.int32)

    def pick(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logprobs.sampling_logits(hidden, head, 1.0 if greedy else temperature, never)  # [B, G, V]
        scores = scores.at[..., ends].add(jnp.where(step < min_new_tokens, -jnp.inf, 0.0))
        if greedy:
            token = jnp.argmax(scores, axis=-1)
        else:
            scores = restrict(scores, top_p, top_k)
            token = draw(jax.random.fold_in(key, step), scores)
        logp = jnp.take_along_axis(scores, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(scores, axis=-1)
        return token.astype(jnp.int32), logp

    def add(loop: _Loop, hidden: jax.Array, own: KVCache) -> _Loop:
        """The loop after one more token, predicted by hidden [B, G, D]."""
        token, logp = pick(hidden, loop.step)
        at, alive = (0, 0, loop.step), ~loop.done
        state = loop.stop_state if stop_table is None else stop_table[loop.stop_state, token]
        done = loop.done | jnp.isin(token, ends)
        return _Loop(
            step=loop.step + 1,
            last=token,
            own=own,
            tokens=jax.lax.dynamic_update_slice(loop.tokens, jnp.where(alive, token, 0)[..., None], at),
            logps=jax.lax.dynamic_update_slice(loop.logps, jnp.where(alive, logp, 0.0)[..., None], at),
            mask=jax.lax.dynamic_update_slice(loop.mask, alive[..., None], at),
            done=done if stop_table is None else done | (state == len(stop_table) - 1),
            stop_state=state,
        )

    hidden, prompt = model.apply(variables, batch, method="prefill")
    b, g, c = batch.tokens.shape[0], num_generations, max_new_tokens
    first = jnp.broadcast_to(logprobs.last_token(hidden, batch.mask)[:, None], (b, g, hidden.shape[-1]))
    layers, _, kv_heads, _, dim = prompt.k.shape
    blank = jnp.zeros((layers, b, g, kv_heads, c, dim), prompt.k.dtype)
    start = _Loop(
        step=jnp.int32(0),
        last=jnp.zeros((b, g), jnp.int32),
        own=KVCache(blank, blank),
        tokens=jnp.zeros((b, g, c), jnp.int32),
        logps=jnp.zeros((b, g, c)),
        mask=jnp.zeros((b, g, c), bool),
        done=jnp.zeros((b, g), bool),
        stop_state=jnp.zeros((b, g), jnp.int32),
    )

    def body(loop: _Loop) -> _Loop:
        at = loop.step - 1  # of the newest token
        hidden, new = model.apply(variables, loop.last, batch, at, (prompt, loop.own), method="decode")
        own = KVCache(*(_write(old, x, at) for old, x in ((loop.own.k, new.k), (loop.own.v, new.v))))
        return add(loop, hidden, own)

    loop = add(start, first, start.own)
    loop = jax.lax.while_loop(lambda s: (s.step < c) & ~jnp.all(s.done), body, loop)
    return Sampled(loop.tokens, loop.logps, loop.mask)


def _write(cache: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Puts new [L, B, G, K, H] at completion position `step` of cache [L, B, G, K, C, H]."""
    return jax.lax.dynamic_update_slice(cache, new[..., None, :], (0, 0, 0, 0, step, 0))
