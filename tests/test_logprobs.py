"""Chunked log-probabilities equal the plain ones, values and gradients, in float32 to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vau_jax import logprobs


@pytest.fixture
def arrays(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        rng.normal(size=(3, 11, 16)).astype(np.float32),
        rng.normal(size=(16, 50)).astype(np.float32),
        rng.integers(0, 48, (3, 11)),
    )


def plain(
    hidden: jax.Array, head: jax.Array, targets: np.ndarray, temperature: float, never: tuple[int, ...]
) -> jax.Array:
    scores = jnp.matmul(hidden, head) / temperature
    scores = scores.at[..., list(never)].set(-jnp.inf)
    return jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 7, 33, 1024])
def test_values_do_not_depend_on_the_chunk(arrays: tuple, chunk: int) -> None:
    logps, entropy = logprobs.token_logps(*arrays, 0.7, (48, 49), chunk)
    np.testing.assert_allclose(logps, plain(*arrays, 0.7, (48, 49)), atol=1e-5)
    scores = np.asarray(arrays[0] @ arrays[1], np.float64)[..., :48] / 0.7
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=1e-4)


def test_gradients_equal_the_plain_form(arrays: tuple) -> None:
    hidden, head, targets = arrays
    weigh = jnp.cos(jnp.arange(33.0)).reshape(3, 11)
    ours = jax.grad(lambda h, w: jnp.sum(weigh * logprobs.token_logps(h, w, targets, 0.7, (49,), 8)[0]), (0, 1))(
        hidden, head
    )
    theirs = jax.grad(lambda h, w: jnp.sum(weigh * plain(h, w, targets, 0.7, (49,))), (0, 1))(hidden, head)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_array_holds_all_tokens_times_the_vocabulary() -> None:
    """The compiled gradient for 4096 tokens and 8192 words needs far less than one [tokens, words] array (128 MiB)."""
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((4096, 64), "float32"), ((64, 8192), "float32"), ((4096,), "int32"))
    ]
    compiled = (
        jax.jit(jax.grad(lambda h, w, t: logprobs.token_logps(h, w, t, chunk=256)[0].sum())).lower(*shapes).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_the_last_real_token_is_found(rng: np.random.Generator) -> None:
    hidden = rng.normal(size=(3, 6, 2)).astype(np.float32)
    mask = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(logprobs.last_token(hidden, mask), hidden[[0, 1, 2], [2, 5, 0]])
