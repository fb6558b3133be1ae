"""Log-probabilities of given tokens from hidden states, in pieces: [tokens, V] in float32 never exists.

The head is a matrix [V, D], a row for each token of the vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp

TOKENS = 256  # of a piece, of each row of the batch
VOCABULARY = 16384  # of a piece, at most, where the vocabulary divides well


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 [..., V] for hidden [..., D] and head [V, D]."""
    return jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def sampling_logits(
    hidden: jax.Array, head: jax.Array, temperature: float | jax.Array, never: tuple[int, ...]
) -> jax.Array:
    """The logits that completions are drawn from and scored with: divided by temperature, `never` tokens impossible."""
    return logits(hidden, head) / temperature + _forbidden(never, head.shape[0])


def _forbidden(never: tuple[int, ...], vocabulary: int) -> jax.Array:
    """What is added to logits [V]: -inf for tokens that are never sampled."""
    return jnp.zeros(vocabulary).at[jnp.asarray(never, jnp.int32)].set(-jnp.inf)


def token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float | jax.Array = 1.0,
    never: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of its distribution, both float32 of the targets' shape.

    hidden [B, ..., D] predicts targets int32 [B, ...]; head is [V, D]. Logits exist for TOKENS tokens of each row and
    VOCABULARY entries at a time. The backward pass computes them again, and adds up the head's gradient in float32.
    """
    b, dim = targets.shape[0], hidden.shape[-1]
    wanted = targets.reshape(b, -1)
    count = wanted.shape[1]
    size = min(TOKENS, count)
    pad = -count % size

    def cut(x: jax.Array) -> jax.Array:
        """[B, S, ...] to pieces [m, B * size, ...]; the batch stays where it is on the devices."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.swapaxes(x.reshape(b, -1, size, *x.shape[2:]), 0, 1).reshape(-1, b * size, *x.shape[2:])

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, b, size), 0, 1).reshape(b, -1)[:, :count].reshape(targets.shape)

    pieces = cut(hidden.reshape(b, count, dim)), head, cut(wanted), jnp.float32(temperature)
    logps, entropy = _score(*pieces, never)
    return join(logps), join(entropy)


def vocabulary_pieces(size: int) -> int:
    """Into how many equal parts a vocabulary of `size` tokens is cut: the least number that divides it and leaves no
    part above VOCABULARY, or 1 when that would leave parts too small to be worth it."""
    count = next(n for n in range(-(-size // VOCABULARY), size + 1) if size % n == 0)
    return count if size // count >= VOCABULARY // 8 else 1


def _rows(head: jax.Array, number: jax.Array, n: int, dtype: jnp.dtype) -> jax.Array:
    """Piece `number` of head [V, D] cut into n: tokens number, n + number, 2 n + number, ... Each device that holds
    consecutive rows then has its share of every piece, and nothing moves between devices."""
    pieces = head.reshape(-1, n, head.shape[1])
    return jax.lax.dynamic_index_in_dim(pieces, number, axis=1, keepdims=False).astype(dtype)


def _scores(h: jax.Array, rows: jax.Array, forbidden: jax.Array, temperature: jax.Array) -> jax.Array:
    """float32 [t, v] of hidden [t, D] and one piece of the head [v, D]."""
    return logits(h, rows) / temperature + forbidden


def _totals(
    h: jax.Array, head: jax.Array, forbidden: jax.Array, targets: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logit of the target, log of the sum of exponentials, and entropy, [t] each; forbidden is [n, V / n]."""
    n = len(forbidden)

    def add(carry: tuple[jax.Array, ...], piece: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        top, total, weighted, chosen = carry
        number, forbidden = piece
        scores = _scores(h, _rows(head, number, n, h.dtype), forbidden, temperature)
        higher = jnp.maximum(top, scores.max(-1))
        mass = jnp.exp(scores - higher[:, None])
        shrink = jnp.exp(top - higher)
        total = total * shrink + mass.sum(-1)
        weighted = weighted * shrink + jnp.sum(mass * jnp.where(mass > 0, scores, 0.0), axis=-1)
        inside = targets % n == number
        found = jnp.take_along_axis(scores, (targets // n)[:, None], axis=1)[:, 0]
        return (higher, total, weighted, jnp.where(inside, found, chosen)), None

    low = jnp.full(h.shape[0], jnp.finfo(jnp.float32).min)
    none = jnp.zeros(h.shape[0])
    (top, total, weighted, chosen), _ = jax.lax.scan(add, (low, none, none, none), (jnp.arange(n), forbidden))
    log_total = top + jnp.log(total)
    return chosen, log_total, log_total - weighted / total


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, never: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [m, t] of hidden [m, t, D], targets [m, t]."""
    return _score_forward(hidden, head, targets, temperature, never)[0]


def _score_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, never: tuple[int, ...]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    forbidden = _forbidden(never, head.shape[0]).reshape(-1, vocabulary_pieces(head.shape[0])).T
    chosen, log_total, entropy = jax.lax.map(
        lambda piece: _totals(piece[0], head, forbidden, piece[1], temperature), (hidden, targets)
    )
    return (chosen - log_total, entropy), (hidden, head, targets, temperature, log_total, entropy)


def _score_backward(
    never: tuple[int, ...], kept: tuple[jax.Array, ...], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    """With p the probabilities, d logp_i / d logit_j = [i = j] - p_j and d entropy / d logit_j = -p_j (log p_j + H)."""
    hidden, head, targets, temperature, log_total, entropy = kept
    n = vocabulary_pieces(head.shape[0])
    forbidden = _forbidden(never, head.shape[0]).reshape(-1, n).T

    def over_vocabulary(
        sums: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        d_hidden, d_head = sums
        number, forbidden = piece
        rows = _rows(head, number, n, hidden.dtype)

        def over_tokens(d_rows: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            h, d_h, targets, log_total, entropy, by_logp, by_entropy = tokens
            logp = _scores(h, rows, forbidden, temperature) - log_total[:, None]
            p = jnp.exp(logp)
            finite = jnp.where(p > 0, logp, 0.0)
            here = (targets % n == number)[:, None] & ((targets // n)[:, None] == jnp.arange(rows.shape[0]))
            g = jnp.where(here, by_logp[:, None], 0.0) - p * (
                by_logp[:, None] + by_entropy[:, None] * (finite + entropy[:, None])
            )
            g = (g / temperature).astype(h.dtype)
            d_rows = d_rows + jnp.einsum("tv,td->vd", g, h, preferred_element_type=jnp.float32)
            return d_rows, d_h + jnp.einsum("tv,vd->td", g, rows, preferred_element_type=jnp.float32)

        tokens = (hidden, d_hidden, targets, log_total, entropy, *grads)
        d_rows, d_hidden = jax.lax.scan(over_tokens, jnp.zeros(rows.shape, jnp.float32), tokens)
        d_head = jax.lax.dynamic_update_index_in_dim(d_head, d_rows.astype(d_head.dtype), number, axis=1)
        return (d_hidden, d_head), None

    blank = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros((head.shape[0] // n, n, head.shape[1]), head.dtype)
    (d_hidden, d_head), _ = jax.lax.scan(over_vocabulary, blank, (jnp.arange(n), forbidden))
    return d_hidden.astype(hidden.dtype), d_head.reshape(head.shape), None, None


_score.defvjp(_score_forward, _score_backward)


def completion_hidden(hidden: jax.Array, prompt_mask: jax.Array, generations: int) -> jax.Array:
    """From packed hidden states [B, T + G * C, D], those that predict each completion token: [B, G, C, D].

    The first token of every completion is predicted by the prompt's last real token, the others by the one before.
    """
    b, t = prompt_mask.shape
    own = hidden[:, t:].reshape(b, generations, -1, hidden.shape[-1])
    last = last_token(hidden[:, :t], prompt_mask)
    first = jnp.broadcast_to(last[:, None, None], (b, generations, 1, hidden.shape[-1]))
    return jnp.concatenate([first, own[:, :, :-1]], axis=2)


def last_token(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The hidden state [B, D] of the last real token of each row of hidden [B, T, D], mask bool [B, T]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
