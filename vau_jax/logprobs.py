"""Log-probabilities of given tokens from hidden states, in chunks: [tokens, V] never exists for all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp


def logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """float32 [..., V] for hidden [..., D] and unembedding [D, V]."""
    return jnp.einsum("...d,dv->...v", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)


def sampling_logits(
    hidden: jax.Array, unembedding: jax.Array, temperature: float | jax.Array, never: tuple[int, ...]
) -> jax.Array:
    """The logits that completions are drawn from and scored with: divided by temperature, `never` tokens impossible."""
    scores = logits(hidden, unembedding) / temperature
    return scores.at[..., jnp.asarray(never, jnp.int32)].set(-jnp.inf) if never else scores


@partial(jax.jit, static_argnames=("never", "chunk"))
def token_logps(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    temperature: float | jax.Array = 1.0,
    never: tuple[int, ...] = (),
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of its distribution, both float32 of the targets' shape.

    hidden [..., D] predicts targets int32 [...]. At most `chunk` tokens' logits exist at a time, in the backward pass
    too (they are computed again there).
    """
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = flat_targets.shape[0]
    chunk = min(chunk, count)
    pad = -count % chunk
    flat_hidden = jnp.pad(flat_hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    flat_targets = jnp.pad(flat_targets, (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def score(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logp = jax.nn.log_softmax(sampling_logits(args[0], unembedding, temperature, never))  # [chunk, V]
        safe = jnp.where(jnp.isfinite(logp), logp, 0.0)
        entropy = -jnp.sum(jnp.exp(logp) * safe, axis=-1)
        return jnp.take_along_axis(logp, args[1][:, None], axis=1)[:, 0], entropy

    logps, entropy = jax.lax.map(score, (flat_hidden, flat_targets))
    return logps.reshape(-1)[:count].reshape(targets.shape), entropy.reshape(-1)[:count].reshape(targets.shape)


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
