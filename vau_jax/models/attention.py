"""Attention over several sets of keys at once, with one softmax.

The completions of a prompt lie one after the other behind it (see `packing`). They read the prompt's keys, which exist
once, and their own:

                          prompt keys   keys of completions
    prompt       [T]    |  causal     |                      |
    completions  [N]    |  all        |  causal, from where  |
                        |             |  the own one begins  |

Scores and softmax are float32. `IMPLEMENTATIONS` are ways to compute the same on different hardware.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec as P

from vau_jax.common import sharding
from vau_jax.common.files import InputError
from vau_jax.models import flash
from vau_jax.models.flash import HIDDEN
from vau_jax.types import Groups

MOST_SCORES = 1 << 22  # scores of one head and one row that exist at a time; more are computed in chunks
CAUSAL_BLOCKS, LEAST_BLOCK = 4, 128  # of a prompt's queries: their number, at most, and their length, at least
SPLASH_BLOCK = 512  # queries and keys of one step of the TPU kernel, at most


class Keys(NamedTuple):
    """One set of keys and values; rank 4 is shared by all G, rank 5 belongs to each."""

    k: jax.Array  # [B, K, S, H] or [B, G, K, S, H]
    v: jax.Array
    mask: jax.Array  # bool [B or 1, G or 1, S]: which keys exist
    ahead: int | None = None  # query i attends to keys up to i + ahead; None: to all
    segments: jax.Array | None = None  # int32 [B, G, S]: a query attends to the keys of its own segment; None: to all


class _Part(NamedTuple):
    """The contribution of one set of keys to a query: softmax sums relative to the set's own largest score."""

    out: jax.Array  # float32 [B, G, K, R, Q, H]: sum of exp(score - top) * v
    top: jax.Array  # float32 [B, G, K, R, Q]: the largest score
    total: jax.Array  # float32 [B, G, K, R, Q]: sum of exp(score - top)


def attend(q: jax.Array, parts: list[Keys], segments: jax.Array | None = None) -> jax.Array:
    """Attention of q [B, G, Q, N, H] over the union of `parts` -> [B, G, Q, N, H]; N is a multiple of K. `segments`
    int32 [B, G, Q] are those of the queries, where a part has segments.

    The reference implementation. Where a head would have more than MOST_SCORES scores they are computed in chunks; the
    backward pass recomputes them, so that no scores are kept.
    """
    g, length = q.shape[1:3]
    keys = sum(part.k.shape[-2] for part in parts)
    if g * length * keys <= MOST_SCORES:
        return _attend(q, parts, segments)
    if length * keys <= MOST_SCORES:
        return _over_groups(q, parts, segments, MOST_SCORES // (length * keys))
    return _over_queries(q, parts, segments, max(1, MOST_SCORES // (g * keys)))


def _over_groups(q: jax.Array, parts: list[Keys], segments: jax.Array | None, at_once: int) -> jax.Array:
    """`attend` for `at_once` groups at a time."""
    own = {i: (part.k, part.v) for i, part in enumerate(parts) if part.k.ndim == 5}
    wide = _wide(parts)
    mask = [jnp.broadcast_to(part.mask, (part.mask.shape[0], *q.shape[1:2], part.mask.shape[2])) for part in parts]
    given = q, own, mask, segments, [part.segments for part in parts]

    def one(group: Any) -> jax.Array:
        q, own, mask, segments, of_keys = jax.tree.map(lambda x: x[:, None], group)
        chosen = [
            Keys(*own.get(i, (part.k, part.v)), mask[i], part.ahead, of_keys[i])
            for i, part in enumerate(_narrow(wide, q.dtype))
        ]
        return _attend(q, chosen, segments)[:, 0]

    out = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), given), batch_size=at_once)
    return jnp.moveaxis(out, 0, 1)


def _over_queries(q: jax.Array, parts: list[Keys], segments: jax.Array | None, at_once: int) -> jax.Array:
    """`attend` for `at_once` queries at a time."""
    length = q.shape[2]

    def cut(x: jax.Array) -> jax.Array:
        """[B, G, Q, ...] to pieces [m, B, G, at_once, ...]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % at_once)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, at_once, *x.shape[3:]), 2, 0)

    wide, pieces = _wide(parts), jax.tree.map(cut, (q, segments))

    def one(piece: Any) -> jax.Array:
        (q, segments), first_row = piece
        return _attend(q, _narrow(wide, q.dtype), segments, first_row)

    out = jax.lax.map(one, (pieces, jnp.arange(len(pieces[0])) * at_once))
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], -1, *q.shape[3:])[:, :, :length]


def _wide(parts: list[Keys]) -> list[Keys]:
    """The keys that all chunks read, as float32: their gradient is then summed over the chunks in float32."""
    return [part._replace(k=part.k.astype(jnp.float32), v=part.v.astype(jnp.float32)) for part in parts]


def _narrow(parts: list[Keys], dtype: Any) -> list[Keys]:
    """The inverse of `_wide`."""
    return [part._replace(k=part.k.astype(dtype), v=part.v.astype(dtype)) for part in parts]


def _attend(q: jax.Array, parts: list[Keys], segments: jax.Array | None, first_row: jax.Array | int = 0) -> jax.Array:
    """`attend` at once; the queries are rows from `first_row` on."""
    kv_heads = parts[0].k.shape[-3]
    b, g, length, heads, dim = q.shape
    grouped = q.reshape(b, g, length, kv_heads, heads // kv_heads, dim) * dim**-0.5
    grouped = jnp.transpose(grouped, (0, 1, 3, 4, 2, 5))  # [B, G, K, R, Q, H]
    arrays = [part._replace(ahead=None) for part in parts]
    rows = _Rows(jnp.int32(first_row), segments)
    out = _softmax(grouped, arrays, rows, tuple(part.ahead for part in parts))
    return jnp.transpose(out, (0, 1, 4, 2, 3, 5)).reshape(q.shape)


class _Rows(NamedTuple):
    """Which queries are computed."""

    first: jax.Array  # int32 []: number of the first
    segments: jax.Array | None  # int32 [B, G, Q]


_Ahead = tuple[int | None, ...]  # Keys.ahead of each part


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(q: jax.Array, parts: list[Keys], rows: _Rows, ahead: _Ahead) -> jax.Array:
    """q [B, G, K, R, Q, H], scaled, over all parts -> the same shape."""
    return _softmax_forward(q, parts, rows, ahead)[0]


def _softmax_forward(q: jax.Array, parts: list[Keys], rows: _Rows, ahead: _Ahead) -> tuple[jax.Array, tuple[Any, ...]]:
    results = [_attend_part(q, part._replace(ahead=n), rows) for part, n in zip(parts, ahead, strict=True)]
    top = jnp.max(jnp.stack([part.top for part in results]), axis=0)
    shares = [jnp.exp(part.top - top) for part in results]
    total = sum(share * part.total for share, part in zip(shares, results, strict=True))
    out = sum(share[..., None] * part.out for share, part in zip(shares, results, strict=True)) / total[..., None]
    out = out.astype(q.dtype)
    return out, (q, parts, rows, out, top + jnp.log(total))


def _softmax_backward(ahead: _Ahead, kept: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array, list[Keys], None]:
    """With weights w = exp(score - log_total): d_score = w * (d_w - sum over H of d_out * out), d_w = d_out . v
    (FlashAttention, arXiv 2205.14135, appendix B.4)."""
    q, parts, queries, out, log_total = kept
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_q, d_parts = jnp.zeros(q.shape, jnp.float32), []
    for part, limit in zip(parts, ahead, strict=True):
        k, v = part.k, part.v
        one = k.ndim == 4  # shared by all G: heads come before groups, see _attend_part
        swap = (lambda x: jnp.swapaxes(x, 1, 2)) if one else (lambda x: x)
        keys, rows = ("bksh", "bkgrqh") if one else ("bgksh", "bgkrqh")
        pairs, turned = (
            rows.replace("h", "s"),
            keys[:-2] + "hs",
        )  # sums over rows come out transposed: no copy of the scores
        mine, theirs = swap(q), swap(d_out).astype(v.dtype)
        weights = jnp.exp(_scores(mine, part._replace(ahead=limit), queries) - swap(log_total)[..., None])
        d_weights = jnp.einsum(f"{rows},{keys}->{pairs}", theirs, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - swap(inner)[..., None])).astype(k.dtype)
        d_v = jnp.einsum(f"{rows},{pairs}->{turned}", theirs, weights.astype(v.dtype))
        d_k = jnp.einsum(f"{rows},{pairs}->{turned}", mine, d_scores)
        d_q += swap(jnp.einsum(f"{pairs},{keys}->{rows}", d_scores, k, preferred_element_type=jnp.float32))
        d_parts.append(Keys(jnp.swapaxes(d_k, -1, -2), jnp.swapaxes(d_v, -1, -2), None))
    return d_q.astype(q.dtype), d_parts, None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _attend_part(q: jax.Array, keys: Keys, queries: _Rows) -> _Part:
    """q [B, G, K, R, Q, H], scaled, over one set of keys."""
    shared = keys.k.ndim == 4
    q = jnp.swapaxes(q, 1, 2) if shared else q  # one product of a head's queries with the shared keys
    scores = _scores(q, keys, queries)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    spec = "bkgrqs,bksh->bkgrqh" if shared else "bgkrqs,bgksh->bgkrqh"
    out = jnp.einsum(spec, weights.astype(keys.v.dtype), keys.v, preferred_element_type=jnp.float32)
    part = _Part(out, top, weights.sum(-1))
    return _Part(*(jnp.swapaxes(x, 1, 2) for x in part)) if shared else part


def _scores(q: jax.Array, keys: Keys, queries: _Rows) -> jax.Array:
    """float32 [B, K, G, R, Q, S] of q [B, K, G, R, Q, H] with shared keys, or [B, G, K, ...] with a group's own."""
    shared = keys.k.ndim == 4
    spec = "bkgrqh,bksh->bkgrqs" if shared else "bgkrqh,bgksh->bgkrqs"
    scores = jnp.einsum(spec, q, keys.k, preferred_element_type=jnp.float32)
    mask = keys.mask[:, :, None]  # [B, G, Q, S]
    if keys.ahead is not None:
        mask = mask & ((queries.first + keys.ahead + jnp.arange(q.shape[4]))[:, None] >= jnp.arange(keys.k.shape[-2]))
    if keys.segments is not None:
        mask = mask & (queries.segments[..., None] == keys.segments[:, :, None])
    mask = jnp.expand_dims(mask, (1, 3) if shared else (2, 3))
    return jnp.where(mask, scores, HIDDEN)


# --- Prompts and completions as one packed sequence ---------------------------------------------------------------


class Layout(NamedTuple):
    """Where the completions behind a prompt lie (see `packing`)."""

    starts: jax.Array  # int32 [B, N]: the place at which the completion of each token begins
    longest: int  # no completion has more tokens
    fixed: bool  # each begins at a multiple of `longest`


def prefix_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_mask: jax.Array,
    layout: Layout | None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of one packed sequence, prompt then completions: q [B, T + N, Heads, H] -> the same shape.

    prompt_mask is bool [B, T]; layout is None for a prompt alone. Padding of completions comes after their real tokens,
    where the causal mask already hides it. Outputs at padding tokens are undefined. `implementation` is a name in
    IMPLEMENTATIONS, or "auto" for the best one on this machine.
    """
    name = best(q.dtype) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise InputError(f"attention={name!r} is unknown: expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, k, v, prompt_mask, layout)


def best(dtype: Any) -> str:
    """The implementation for this machine: the TPU kernel, cuDNN where the dtype allows it, else plain jnp."""
    backend = jax.default_backend()
    if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "splash" if backend == "tpu" else "jnp"


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, layout: Layout | None) -> jax.Array:
    """Plain jnp."""
    t = prompt_mask.shape[1]
    k_prompt, v_prompt = (jnp.swapaxes(x[:, :t], 1, 2) for x in (k, v))
    prompt = _causal(q[:, None, :t], k_prompt, v_prompt, prompt_mask[:, None])[:, 0]
    return _with_completions(prompt, q, k, v, prompt_mask, layout)


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Causal `attend` of q [B, 1, S, N, H] over k, v [B, K, S, H], in blocks of queries that leave out the keys after
    their own: four blocks compute five eighths of the scores, and each block's are small enough for a CPU's cache."""
    length = q.shape[2]
    block = -(-length // max(1, min(CAUSAL_BLOCKS, length // LEAST_BLOCK)))
    outs = []
    for begin in range(0, length, block):
        end = min(length, begin + block)
        seen = Keys(k[:, :, :end], v[:, :, :end], mask[:, :, :end], ahead=begin)
        outs.append(attend(q[:, :, begin:end], [seen]))
    return jnp.concatenate(outs, axis=2)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, layout: Layout | None) -> jax.Array:
    """The prompt by XLA's jax.nn.dot_product_attention, completions by plain jnp."""
    return _with_completions(_library(q, k, v, prompt_mask, "xla"), q, k, v, prompt_mask, layout)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, layout: Layout | None) -> jax.Array:
    """The prompt by cuDNN's flash attention, completions by `flash`."""
    prompt = _library(q, k, v, prompt_mask, "cudnn")
    if layout is None:
        return prompt
    return jnp.concatenate([prompt, _flash(q, k, v, prompt_mask, layout)], axis=1)


def _library(q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, implementation: str) -> jax.Array:
    """Attention of the prompt, [B, T, Heads, H]."""
    t = prompt_mask.shape[1]
    mask = jnp.broadcast_to(prompt_mask[:, None, None], (q.shape[0], 1, t, t))
    return jax.nn.dot_product_attention(
        q[:, :t], k[:, :t], v[:, :t], mask=mask, is_causal=True, implementation=implementation
    )


def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, layout: Layout, interpret: bool = False
) -> jax.Array:
    """Attention of the completions, [B, N, Heads, H], by the GPU kernel; `interpret` runs it anywhere, slowly."""
    kernel = partial(flash.completions, longest=layout.longest, interpret=interpret)
    return _on_each_device(kernel, q[:, prompt_mask.shape[1] :], k, v, prompt_mask, layout.starts)


def _with_completions(
    prompt: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, layout: Layout | None
) -> jax.Array:
    """Appends the completions' outputs to the prompt's.

    They are computed in blocks as long as the longest completion, whose tokens so read keys of their own block and of
    the one before, and no others.
    """
    if layout is None:
        return prompt
    b, t, length = *prompt_mask.shape, layout.starts.shape[1]
    size = layout.longest if length % layout.longest == 0 else length
    blocks = [x[:, t:].reshape(b, length // size, size, *x.shape[2:]) for x in (q, k, v)]
    read = [jnp.swapaxes(x[:, :t], 1, 2) for x in (k, v)]
    starts = layout.starts.reshape(b, -1, size)
    own, ahead, segments = blocks[1:], 0, None
    if not layout.fixed:
        segments = starts
    if not layout.fixed and length > size:
        own, ahead = [_with_previous(x, 0) for x in own], size
        segments = _with_previous(starts, -1)
    own = [jnp.swapaxes(x, 2, 3) for x in own]
    there = jnp.ones((1, 1, own[0].shape[3]), bool)
    parts = [Keys(*read, prompt_mask[:, None]), Keys(*own, there, ahead, segments)]
    completions = attend(blocks[0], parts, None if layout.fixed else starts)
    return jnp.concatenate([prompt, completions.reshape(q[:, t:].shape)], axis=1)


def _with_previous(x: jax.Array, before: int) -> jax.Array:
    """Each block of x [B, n, S, ...] behind the one before it, [B, n, 2 * S, ...]; `before` is before the first."""
    previous = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2), constant_values=before)
    return jnp.concatenate([previous, x], axis=2)


class PackedMask(splash_mask._ComputableMask):
    """The mask of a packed sequence for the TPU kernel, computed block by block: never [S, S] in memory.

    A query is one int32: its row, and how many rows before it its completion begins (0 in the prompt). It attends to
    keys up to its row that belong to the prompt or to its own completion. Where completions begin is known when the
    program runs (`numbers`); the blocks that are computed are those that any completions of at most `longest` tokens
    need, behind a `prompt` of T.
    """

    BITS = 15
    MOST = 1 << BITS  # tokens of a completion; a sequence may have twice as many

    def __init__(self, length: int, prompt: int, longest: int) -> None:
        if length > 2 * self.MOST or longest > self.MOST:
            raise InputError(
                f"a packed sequence of {length} tokens with completions of up to {longest} is too long for the TPU "
                f"kernel: at most {2 * self.MOST} and {self.MOST}; set config.attention=jnp"
            )

        def visible(q: Any, kv: Any) -> Any:
            row, since = q >> self.BITS, q & self.MOST - 1
            return (kv <= row) & ((kv < prompt) | (kv >= row - since))

        super().__init__((length, length), visible)
        self.layout = (length, prompt, longest)
        rows = np.arange(length, dtype=np.int32)
        earliest = np.maximum(prompt, rows - max(0, longest - 1))
        self.q_sequence = self.numbers(rows, np.where(rows < prompt, rows, earliest).astype(np.int32))

    @classmethod
    def numbers(cls, rows: Any, begins: Any) -> Any:
        """int32: queries at `rows`, whose completions begin at the rows `begins` (those of the prompt at their own)."""
        return (rows << cls.BITS) + rows - begins

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedMask) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_mask: jax.Array,
    layout: Layout | None,
    interpret: bool = False,
) -> jax.Array:
    """The whole packed sequence by one Pallas kernel on TPU; `interpret` runs it anywhere, slowly."""
    none = Layout(jnp.zeros((q.shape[0], 0), jnp.int32), 0, fixed=True)
    starts, longest, _ = layout or none
    kernel = partial(_splash_alone, longest=longest, interpret=interpret)
    return _on_each_device(kernel, q, k, v, prompt_mask, starts)


def _on_each_device(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_mask: jax.Array,
    starts: jax.Array,
) -> jax.Array:
    """A kernel, which XLA cannot split, on each device of the mesh for its examples and heads."""
    mesh = sharding.ambient()
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, prompt_mask, starts)
    parts = mesh.shape["tensor"]
    heads = "tensor" if q.shape[2] % parts == 0 else None
    if heads:  # fewer kv heads than devices: each has copies of the heads that its queries read
        copies = next(
            n for n in range(1, q.shape[2] + 1) if k.shape[2] * n % parts == 0 == q.shape[2] % (k.shape[2] * n)
        )
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    examples = sharding.EXAMPLES if q.shape[0] % sharding.example_parts(mesh) == 0 else None
    place, rows = P(examples, None, heads), P(examples)
    split = jax.shard_map(kernel, in_specs=(place, place, place, rows, rows), out_specs=place, check_vma=False)
    return split(q, k, v, prompt_mask, starts)


def _splash_alone(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_mask: jax.Array,
    starts: jax.Array,
    longest: int,
    interpret: bool,
) -> jax.Array:
    """The kernel on one device."""
    b, length, heads, dim = q.shape
    t = prompt_mask.shape[1]
    pad = -length % 128
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
    # Padding attends only to padding, and no real token attends to it.
    real = jnp.pad(jnp.concatenate([prompt_mask, jnp.ones((b, length - t), bool)], axis=1), ((0, 0), (0, pad)))
    mask = PackedMask(length + pad, t, longest)
    block = next(size for size in (SPLASH_BLOCK, 384, 256, 128) if (length + pad) % size == 0)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(_BLOCKS, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    rows = jnp.arange(length + pad, dtype=jnp.int32)
    begins = jnp.broadcast_to(rows, (b, length + pad)).at[:, t:length].set(t + starts)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, numbers: jax.Array) -> jax.Array:
        return _with_numbers(kernel, numbers)(q, k, v, splash.SegmentIds(ids, ids))

    out = jax.vmap(one)(q * dim**-0.5, k, v, real.astype(jnp.int32), PackedMask.numbers(rows, begins))
    return jnp.swapaxes(out, 1, 2)[:, :length]


def _with_numbers(kernel: splash.SplashAttentionKernel, numbers: jax.Array) -> splash.SplashAttentionKernel:
    """The kernel with other numbers of its queries than those that its blocks were chosen for."""
    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    changed = (info if info is None else info._replace(q_sequence=numbers) for info in infos)
    return splash.SplashAttentionKernel(*changed, **kernel.kwargs)


_BLOCKS = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
_BLOCKS += ("block_q_dq", "block_kv_dq")

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "jnp": _reference,
    "xla": _xla,
    "cudnn": _cudnn,
    "splash": _splash,
}


# --- Decoding -----------------------------------------------------------------------------------------------------


def decode_attention(q: jax.Array, k: jax.Array, v: jax.Array, prompt: Keys, own: Keys) -> jax.Array:
    """Attention of one new token in each of G completions: q [B, G, N, H] -> [B, G, N, H].

    `prompt` holds the prompt's keys (shared), `own` the completion's earlier ones; k, v [B, G, K, H] are the token's.
    """
    itself = Keys(k[:, :, :, None], v[:, :, :, None], jnp.ones((1, 1, 1), bool))
    return attend(q[:, :, None], [prompt, own, itself])[:, :, 0]


# --- Groups of patches --------------------------------------------------------------------------------------------


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array, groups: Groups) -> jax.Array:
    """Attention of patches to those of their own segment: q, k, v [B, P, N, H] -> [B, P, N, H]."""
    b, p, heads, dim = q.shape
    members, slots = groups.members, groups.slots
    q, k, v = (_to_groups(x.reshape(b, p, -1), members, slots).reshape(*members.shape, heads, dim) for x in (q, k, v))
    keys = Keys(jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3), members < p, segments=groups.segments)
    out = attend(q, [keys], groups.segments)
    return _to_patches(out.reshape(b, -1, heads * dim), members, slots).reshape(b, p, heads, dim)


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
