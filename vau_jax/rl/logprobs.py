"""Log-probabilities of given tokens from hidden states, in chunks: [tokens, V] in float32 never exists.

The head is a matrix [V, D], a row for each token of the vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vau_jax.common import sharding

TOKENS = 256  # of a chunk, of each row of the batch
VOCABULARY = 16384  # of a chunk, at most, where the vocabulary divides well


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 [..., V] for hidden [..., D] and head [V, D]."""
    return jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def sampling_logits(
    hidden: jax.Array,
    head: jax.Array,
    temperature: float | jax.Array,
    never: tuple[int, ...],
    product: Callable[[jax.Array, jax.Array], jax.Array] = logits,
) -> jax.Array:
    """The logits of the distribution that completions are sampled from and scored with: divided by temperature, `never`
    tokens impossible. `product` computes `logits`.
    """
    return product(hidden, head) / temperature + _forbidden(never, head.shape[0])


def _forbidden(never: tuple[int, ...], vocabulary: int) -> jax.Array:
    """An addend to logits [V]: -inf for tokens that are never sampled."""
    return jnp.zeros(vocabulary).at[jnp.asarray(never, jnp.int32)].set(-jnp.inf)


def token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float | jax.Array = 1.0,
    never: tuple[int, ...] = (),
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of its distribution, both float32 in the targets' shape.

    hidden [B, ..., D] predicts targets int32 [B, ...]; head is [V, D]. Logits exist for TOKENS tokens of each row and
    VOCABULARY entries at a time. The backward pass recomputes them, and accumulates the head's gradient in float32. On
    a `mesh` each device computes its own tokens and its own part of the vocabulary.
    """
    b, dim = targets.shape[0], hidden.shape[-1]
    wanted = targets.reshape(b, -1)
    count = wanted.shape[1]
    size = min(TOKENS, count)
    pad = -count % size

    def cut(x: jax.Array) -> jax.Array:
        """[B, S, ...] to chunks [m, B * size, ...]; the batch keeps its sharding."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.swapaxes(x.reshape(b, -1, size, *x.shape[2:]), 0, 1).reshape(-1, b * size, *x.shape[2:])

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, b, size), 0, 1).reshape(b, -1)[:, :count].reshape(targets.shape)

    given = _Given(cut(hidden.reshape(b, count, dim)), head, cut(wanted), jnp.float32(temperature))
    logps, entropy = _score(given, never, _Layout.of(head.shape, b, mesh))
    return join(logps), join(entropy)


def vocabulary_pieces(size: int) -> int:
    """The number of equal chunks of a vocabulary of `size` tokens: the smallest divisor that leaves no chunk above
    VOCABULARY, or 1 where the chunks would be too small to pay off.
    """
    count = next(n for n in range(-(-size // VOCABULARY), size + 1) if size % n == 0)
    return count if size // count >= VOCABULARY // 8 else 1


class _Given(NamedTuple):
    """Inputs of `_score`, or the partition spec of each."""

    hidden: Any  # [m, t, D]
    head: Any  # [V, D]
    targets: Any  # int32 [m, t]
    temperature: Any  # []


class _Layout(NamedTuple):
    """Sharding of the arrays of `_score`: the mesh axes that they are split over, none on one device.

    Devices exchange one chunk of the head at a time, and sums at the end; left to the compiler, it would be far more in
    each iteration.
    """

    mesh: Mesh | None = None
    tokens: tuple[str, ...] = ()
    vocabulary: str | None = None  # of the head's rows
    width: str | None = None  # of the head's columns; one of `tokens`

    @classmethod
    def of(cls, head: tuple[int, int], rows: int, mesh: Mesh | None) -> "_Layout":
        if mesh is None or mesh.size == 1:
            return cls()
        vocabulary, width = sharding.param_spec("lm_head", head, mesh)
        split = rows % sharding.example_parts(mesh) == 0
        return cls(mesh, sharding.EXAMPLES, vocabulary, width) if split else cls(mesh, (), vocabulary, None)

    def on_each(self, function: Callable, of_tokens: int, gradients: bool) -> Callable:
        """The function of `_Given` and `of_tokens` arrays [m, t], run on each device's shards. It returns the gradients
        by hidden and head, or else three arrays [m, t].
        """
        if self.mesh is None:
            return function
        tokens, head = P(None, self.tokens or None), P(self.vocabulary, self.width)
        given = _Given(tokens, head, tokens, P())
        result = (tokens, head) if gradients else (tokens,) * 3
        places = given, *(tokens,) * of_tokens
        return jax.shard_map(function, mesh=self.mesh, in_specs=places, out_specs=result, check_vma=False)

    def first(self, rows: int) -> jax.Array | int:
        """The first token of this device's shard of the vocabulary, of `rows` tokens."""
        return jax.lax.axis_index(self.vocabulary) * rows if self.vocabulary else 0

    def whole(self, rows: jax.Array) -> jax.Array:
        """[v, D] of a shard of the head with all columns."""
        return jax.lax.all_gather(rows, self.width, axis=1, tiled=True) if self.width else rows

    def own(self, d_rows: jax.Array) -> jax.Array:
        """The sum over all tokens of [v, D], this device's columns of it."""
        if self.width:
            d_rows = jax.lax.psum_scatter(d_rows, self.width, scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_rows, [axis for axis in self.tokens if axis != self.width])

    def over_vocabulary(self, x: jax.Array, reduce: Callable = jax.lax.psum) -> jax.Array:
        return reduce(x, self.vocabulary) if self.vocabulary else x


class _Piece(NamedTuple):
    """A chunk of the vocabulary: consecutive tokens from `start`."""

    start: jax.Array
    rows: jax.Array  # [v, D] of the head
    forbidden: jax.Array  # [v]: 0, or -inf for tokens that are never sampled

    @classmethod
    def cut(cls, head: jax.Array, number: jax.Array, dtype: jnp.dtype, never: tuple[int, ...], layout: _Layout) -> Self:
        """Part `number` of this device's head."""
        size = head.shape[0] // vocabulary_pieces(head.shape[0])
        start = layout.first(head.shape[0]) + number * size
        rows = layout.whole(jax.lax.dynamic_slice_in_dim(head, number * size, size).astype(dtype))
        parts = layout.mesh.shape[layout.vocabulary] if layout.vocabulary else 1
        forbidden = _forbidden(never, head.shape[0] * parts)
        return cls(start, rows, jax.lax.dynamic_slice_in_dim(forbidden, start, size))

    def scores(self, h: jax.Array, temperature: jax.Array) -> jax.Array:
        """float32 [t, v] of hidden [t, D]."""
        return logits(h, self.rows) / temperature + self.forbidden

    def here(self, targets: jax.Array) -> jax.Array:
        """bool [t, v]: which token of this part is the target, if any."""
        return (targets - self.start)[:, None] == jnp.arange(len(self.rows))


# Running, of each token: the largest score, the sums of exp(score - largest) and of that times score, the target's.
_Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _totals(given: _Given, never: tuple[int, ...], layout: _Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logit of the target, log of the sum of exponentials, and entropy, [m, t] each, on one device."""
    hidden, head, targets, temperature = given

    def add(sums: _Sums, number: jax.Array) -> tuple[_Sums, None]:
        piece = _Piece.cut(head, number, hidden.dtype, never, layout)

        def of_tokens(tokens: tuple[jax.Array, ...]) -> _Sums:
            h, targets, top, total, weighted, chosen = tokens
            scores = piece.scores(h, temperature)
            higher = jnp.maximum(top, scores.max(-1))
            mass = jnp.exp(scores - higher[:, None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + mass.sum(-1)
            weighted = weighted * shrink + jnp.sum(mass * jnp.where(mass > 0, scores, 0.0), axis=-1)
            return higher, total, weighted, chosen + jnp.where(piece.here(targets), scores, 0.0).sum(-1)

        return jax.lax.map(of_tokens, (hidden, targets, *sums)), None

    low = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    none = jnp.zeros(targets.shape)
    numbers = jnp.arange(vocabulary_pieces(head.shape[0]))
    (own_top, total, weighted, chosen), _ = jax.lax.scan(add, (low, none, none, none), numbers)
    top = layout.over_vocabulary(own_top, jax.lax.pmax)
    share = jnp.exp(own_top - top)
    total, weighted, chosen = (layout.over_vocabulary(x) for x in (total * share, weighted * share, chosen))
    log_total = top + jnp.log(total)
    return chosen, log_total, log_total - weighted / total


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _score(given: _Given, never: tuple[int, ...], layout: _Layout) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [m, t]."""
    return _score_forward(given, never, layout)[0]


def _score_forward(
    given: _Given, never: tuple[int, ...], layout: _Layout
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Given, jax.Array, jax.Array]]:
    totals = layout.on_each(partial(_totals, never=never, layout=layout), of_tokens=0, gradients=False)
    chosen, log_total, entropy = totals(given)
    return (chosen - log_total, entropy), (given, log_total, entropy)


def _score_backward(
    never: tuple[int, ...],
    layout: _Layout,
    kept: tuple[_Given, jax.Array, jax.Array],
    grads: tuple[jax.Array, jax.Array],
) -> tuple[_Given]:
    gradients = layout.on_each(partial(_gradients, never=never, layout=layout), of_tokens=4, gradients=True)
    return (_Given(*gradients(*kept, *grads), None, None),)


def _gradients(
    given: _Given, *of_tokens: jax.Array, never: tuple[int, ...], layout: _Layout
) -> tuple[jax.Array, jax.Array]:
    """By hidden and head, on one device. `of_tokens` are log_total, entropy and the gradients by logp and entropy.

    With p the probabilities, d logp_i / d logit_j = [i = j] - p_j and d entropy / d logit_j = -p_j (log p_j + H).
    """
    hidden, head, targets, temperature = given
    n = vocabulary_pieces(head.shape[0])

    def add(d_hidden: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        piece = _Piece.cut(head, number, hidden.dtype, never, layout)

        def of_piece(d_rows: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            h, d_h, targets, log_total, entropy, by_logp, by_entropy = tokens
            logp = piece.scores(h, temperature) - log_total[:, None]
            p = jnp.exp(logp)
            finite = jnp.where(p > 0, logp, 0.0)
            g = jnp.where(piece.here(targets), by_logp[:, None], 0.0) - p * (
                by_logp[:, None] + by_entropy[:, None] * (finite + entropy[:, None])
            )
            g = (g / temperature).astype(h.dtype)
            d_rows = d_rows + jnp.einsum("tv,td->vd", g, h, preferred_element_type=jnp.float32)
            return d_rows, d_h + jnp.einsum("tv,vd->td", g, piece.rows, preferred_element_type=jnp.float32)

        blank = jnp.zeros(piece.rows.shape, jnp.float32)
        d_rows, d_hidden = jax.lax.scan(of_piece, blank, (hidden, d_hidden, targets, *of_tokens))
        return d_hidden, layout.own(d_rows).astype(head.dtype)

    d_hidden, d_head = jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), jnp.arange(n))
    return layout.over_vocabulary(d_hidden).astype(hidden.dtype), d_head.reshape(head.shape)


_score.defvjp(_score_forward, _score_backward)


def completion_hidden(hidden: jax.Array, prompt_mask: jax.Array, starts: jax.Array) -> jax.Array:
    """From packed hidden states [B, T + N, D], those that predict each packed token: [B, N, D]; `starts` [B, N] is
    where the completion of each begins.

    The first token of every completion is predicted by the prompt's last real token, the others by the one before.
    """
    t = prompt_mask.shape[1]
    own = hidden[:, t:]
    before = jnp.concatenate([own[:, :1], own[:, :-1]], axis=1)
    last = last_token(hidden[:, :t], prompt_mask)
    # As float32, so that the sum of the G gradients is one in float32.
    first = jnp.broadcast_to(last.astype(jnp.float32)[:, None], own.shape).astype(hidden.dtype)
    return jnp.where((starts == jnp.arange(starts.shape[1]))[..., None], first, before)


def last_token(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The hidden state [B, D] of the last real token of each row of hidden [B, T, D], mask bool [B, T]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
