"""Attention of packed completions on GPUs: flash attention by Pallas (Triton), which keeps no scores in memory.

A completion's tokens read the prompt's keys and those of their own completion (see `packing`), with one softmax over
both: a block of queries goes over the blocks of prompt keys, then over those from where its first completion begins.
The backward pass computes the scores again, once for the queries' gradient and once for that of keys and values
(FlashAttention-2, arXiv 2307.08691).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

HIDDEN = -1e30  # finite, so that a row without any visible key gives a number and not NaN
BLOCK = 64  # queries and keys of one step


def completions(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_mask: jax.Array,
    starts: jax.Array,
    longest: int,
    interpret: bool = False,
) -> jax.Array:
    """Attention of completions q [B, N, Heads, H] over the prompt's keys and their own, k and v [B, T + N, K, H], on
    one device -> [B, N, Heads, H].

    prompt_mask is bool [B, T]; starts [B, N] and `longest` are those of `attention.Layout`. `interpret` runs the
    kernels anywhere, slowly.
    """
    n, dim, t = q.shape[1], q.shape[3], prompt_mask.shape[1]
    more, width = -n % BLOCK, pl.next_power_of_2(max(16, dim)) - dim
    more_keys = more + -(t + n + more) % BLOCK  # a block of queries reads keys up to its last row

    def laid_out(x: jax.Array, more: int) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, more), (0, width)))

    real = jnp.pad(prompt_mask.astype(jnp.int32), ((0, 0), (0, n + more_keys)))
    begins = jnp.pad(t + starts.astype(jnp.int32), ((0, 0), (0, more)), mode="edge")
    arrays = laid_out(q * dim**-0.5, more), laid_out(k, more_keys), laid_out(v, more_keys), real, begins
    return jnp.swapaxes(_attention(*arrays, (t, longest, interpret)), 1, 2)[:, :n, :, :dim]


_Settings = tuple[int, int, bool]  # tokens of the prompt and of the longest completion; interpret


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, begins: jax.Array, settings: _Settings
) -> jax.Array:
    """q [B, Heads, N, H], scaled; k, v [B, K, S, H] -> the shape of q; N and S are multiples of BLOCK. `real` [B, S] is
    1 for the prompt's keys that exist, else 0; `begins` [B, N] is the key at which a query's completion begins."""
    return _forward(q, k, v, real, begins, settings)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, begins: jax.Array, settings: _Settings
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    prompt, _, interpret = settings
    kernel = partial(_forward_kernel, prompt=prompt)
    results = [q, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)]
    out, log_total = _run(kernel, [q, begins], [k, v, real], results, interpret)
    return out, (q, k, v, real, begins, out, log_total)


def _backward(
    settings: _Settings, kept: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    prompt, longest, interpret = settings
    q, k, v, real, begins, out, log_total = kept
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries = [q, begins, d_out, log_total, inner]
    (d_q,) = _run(partial(_queries_kernel, prompt=prompt), queries, [k, v, real], [q], interpret)
    # Of each query head, so that there is work for all cores with few kv heads and a small batch.
    each = jax.ShapeDtypeStruct((*q.shape[:2], *k.shape[2:]), jnp.float32)
    kernel = partial(_keys_kernel, prompt=prompt, longest=longest)
    d_kv = _run(kernel, [k, v, real], queries, [each, each], interpret)
    d_k, d_v = (x.reshape(*k.shape[:2], -1, *k.shape[2:]).sum(2).astype(k.dtype) for x in d_kv)
    return d_q, d_k, d_v, None, None


_attention.defvjp(_forward, _backward)


def _run(
    kernel: Callable[..., None], blocks: list[jax.Array], whole: list[jax.Array], results: list[Any], interpret: bool
) -> list[jax.Array]:
    """Runs a kernel once for each example, query head and block of rows of `results`. It sees its block of each array
    in `blocks` and `results`, and the whole of those in `whole`."""
    b, heads, length, width = results[0].shape
    return pl.pallas_call(
        kernel,
        grid=(b, heads, length // BLOCK),
        in_specs=[_spec(x, heads, False) for x in blocks] + [_spec(x, heads, True) for x in whole],
        out_specs=[_spec(x, heads, False) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=interpret,
    )(*blocks, *whole)


def _spec(x: Any, heads: int, whole: bool) -> pl.BlockSpec:
    """Rows of x [B, L], [B, K, L] or [B, K, L, H] for a query head: all, or a block of them."""
    length = x.shape[min(2, x.ndim - 1)]
    shared = heads // x.shape[1]

    def index(b: jax.Array, head: jax.Array, block: jax.Array) -> tuple[Any, ...]:
        rows = 0 if whole else block
        return (b, rows) if x.ndim == 2 else (b, jax.lax.div(head, shared), rows, 0)[: x.ndim]

    return pl.BlockSpec((None,) * min(2, x.ndim - 1) + (length if whole else BLOCK, *x.shape[3:]), index)


# --- The kernels --------------------------------------------------------------------------------------------------


def _forward_kernel(
    q_ref: Any, begins_ref: Any, k_ref: Any, v_ref: Any, real_ref: Any, out_ref: Any, log_total_ref: Any, prompt: int
) -> None:
    q, begins, rows = q_ref[...], begins_ref[...], prompt + _rows(pl.program_id(2))

    def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = carry
        block = _block(number)
        v = v_ref[block]
        scores = _scores(q, k_ref[block], rows, begins, _rows(number), real_ref[block])
        larger = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, share = jnp.exp(scores - larger[:, None]), jnp.exp(top - larger)
        out = share[:, None] * out + _dot(weights.astype(v.dtype), v)
        return out, larger, share * total + jnp.sum(weights, axis=1)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(BLOCK, HIDDEN, jnp.float32), jnp.zeros(BLOCK, jnp.float32)
    out, top, total = _over_keys(step, nothing, begins, prompt)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = top + jnp.log(total)


def _queries_kernel(
    q_ref: Any,
    begins_ref: Any,
    d_out_ref: Any,
    log_total_ref: Any,
    inner_ref: Any,
    k_ref: Any,
    v_ref: Any,
    real_ref: Any,
    d_q_ref: Any,
    prompt: int,
) -> None:
    q, begins, rows = q_ref[...], begins_ref[...], prompt + _rows(pl.program_id(2))
    d_out, log_total, inner = d_out_ref[...], log_total_ref[...], inner_ref[...]

    def step(number: jax.Array, d_q: jax.Array) -> jax.Array:
        block = _block(number)
        k = k_ref[block]
        scores = _scores(q, k, rows, begins, _rows(number), real_ref[block])
        weights = jnp.exp(scores - log_total[:, None])
        d_scores = weights * (_dot(d_out, v_ref[block].T) - inner[:, None])
        return d_q + _dot(d_scores.astype(k.dtype), k)

    d_q_ref[...] = _over_keys(step, jnp.zeros(q.shape, jnp.float32), begins, prompt).astype(d_q_ref.dtype)


def _keys_kernel(
    k_ref: Any,
    v_ref: Any,
    real_ref: Any,
    q_ref: Any,
    begins_ref: Any,
    d_out_ref: Any,
    log_total_ref: Any,
    inner_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
    prompt: int,
    longest: int,
) -> None:
    k, v, real = k_ref[...], v_ref[...], real_ref[...]
    first_key = pl.program_id(2) * BLOCK
    keys = _rows(pl.program_id(2))

    def step(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_k, d_v = carry
        block = _block(number)
        q, d_out = q_ref[block], d_out_ref[block]
        scores = _scores(q, k, prompt + _rows(number), begins_ref[block], keys, real)
        weights = jnp.exp(scores - log_total_ref[block][:, None])
        d_scores = weights * (_dot(d_out, v.T) - inner_ref[block][:, None])
        return d_k + _dot(d_scores.astype(q.dtype).T, q), d_v + _dot(weights.astype(d_out.dtype).T, d_out)

    # All queries read the prompt's keys; of the completions' keys those of at most `longest` rows do.
    blocks, place = q_ref.shape[0] // BLOCK, first_key - prompt
    last = jnp.minimum(blocks, _blocks(place + BLOCK + longest))
    nothing = jnp.zeros(k.shape, jnp.float32)
    d_k_ref[...], d_v_ref[...] = jax.lax.fori_loop(
        jax.lax.div(jnp.maximum(place, 0), BLOCK), jnp.where(place < 0, blocks, last), step, (nothing, nothing)
    )


def _over_keys(step: Callable[[jax.Array, Any], Any], carry: Any, begins: jax.Array, prompt: int) -> Any:
    """`step`(block of keys, carry) for those that a block of queries reads."""
    of_prompt = -(-prompt // BLOCK)
    first = jnp.maximum(of_prompt, jax.lax.div(jnp.min(begins), BLOCK))
    last = _blocks(prompt + (pl.program_id(2) + 1) * BLOCK)
    carry = jax.lax.fori_loop(0, of_prompt, step, carry)
    return jax.lax.fori_loop(first, last, step, carry)


def _scores(
    q: jax.Array, k: jax.Array, rows: jax.Array, begins: jax.Array, keys: jax.Array, real: jax.Array
) -> jax.Array:
    """float32 [queries, keys]; `rows` and `keys` are their places among all keys."""
    own = (keys[None] >= begins[:, None]) & (keys[None] <= rows[:, None])
    return jnp.where(own | (real[None] > 0), _dot(q, k.T), HIDDEN)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _rows(block: jax.Array) -> jax.Array:
    return block * BLOCK + jnp.arange(BLOCK)


def _block(number: jax.Array) -> Any:
    return pl.ds(number * BLOCK, BLOCK)


def _blocks(rows: jax.Array) -> jax.Array:
    """The number of blocks that hold so many rows."""
    return jax.lax.div(rows + BLOCK - 1, BLOCK)
