"""Log-probabilities in pieces equal the plain ones, values and gradients, in float32 to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vau_jax.rl import logprobs


@pytest.fixture
def arrays(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        rng.normal(size=(3, 11, 16)).astype(np.float32),
        rng.normal(size=(50, 16)).astype(np.float32),
        rng.integers(0, 48, (3, 11)),
    )


def plain(
    hidden: jax.Array, head: jax.Array, targets: np.ndarray, temperature: float, never: tuple[int, ...]
) -> jax.Array:
    scores = jnp.matmul(hidden, head.T) / temperature
    scores = scores.at[..., list(never)].set(-jnp.inf)
    return jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]


@pytest.fixture(params=[(1, 50), (4, 50), (33, 25), (256, 10), (3, 5)], ids=str)
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and words of a piece: one at a time, some, all."""
    tokens, words = request.param
    monkeypatch.setattr(logprobs, "TOKENS", tokens)
    monkeypatch.setattr(logprobs, "VOCABULARY", words)
    assert logprobs.vocabulary_pieces(50) == 50 // words


def plain_entropy(hidden: jax.Array, head: jax.Array, temperature: float, never: tuple[int, ...]) -> jax.Array:
    scores = jnp.delete(jnp.matmul(hidden, head.T) / temperature, jnp.asarray(never), axis=-1)
    logp = jax.nn.log_softmax(scores)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@pytest.mark.usefixtures("pieces")
def test_values_do_not_depend_on_the_pieces(arrays: tuple) -> None:
    logps, entropy = logprobs.token_logps(*arrays, 0.7, (48, 49))
    np.testing.assert_allclose(logps, plain(*arrays, 0.7, (48, 49)), atol=1e-5)
    np.testing.assert_allclose(entropy, plain_entropy(*arrays[:2], 0.7, (48, 49)), atol=1e-5)


@pytest.mark.usefixtures("pieces")
def test_gradients_equal_the_plain_form(arrays: tuple) -> None:
    """Those of log-probabilities and of entropies, by hidden states and by the head."""
    hidden, head, targets = arrays
    weigh = jnp.cos(jnp.arange(33.0)).reshape(3, 11)

    def ours(h: jax.Array, w: jax.Array) -> jax.Array:
        logps, entropy = logprobs.token_logps(h, w, targets, 0.7, (49,))
        return jnp.sum(weigh * logps + jnp.sin(weigh) * entropy)

    def theirs(h: jax.Array, w: jax.Array) -> jax.Array:
        logps, entropy = plain(h, w, targets, 0.7, (49,)), plain_entropy(h, w, 0.7, (49,))
        return jnp.sum(weigh * logps + jnp.sin(weigh) * entropy)

    for a, b in zip(jax.grad(ours, (0, 1))(hidden, head), jax.grad(theirs, (0, 1))(hidden, head), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_heads_gradient_is_added_up_in_float32(rng: np.random.Generator) -> None:
    """In bfloat16 it is as near to float64 as rounding the result once allows, over 64 pieces of tokens."""
    hidden = rng.normal(size=(1, 64 * logprobs.TOKENS, 8)).astype(np.float32)
    head, targets = rng.normal(size=(32, 8)).astype(np.float32), rng.integers(0, 32, hidden.shape[:2])
    low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    ours = jax.grad(lambda w: logprobs.token_logps(low[0], w, targets)[0].sum())(low[1])
    h, w = (np.asarray(x, np.float64) for x in low)
    scores = h[0] @ w.T
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = (np.eye(32)[targets[0]] - p).T @ h[0]
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=2**-7, atol=2**-7 * np.abs(expected).max())


def test_no_array_holds_all_tokens_times_the_vocabulary() -> None:
    """The compiled gradient for 8192 tokens and 65536 words needs a small part of one such array (2 GiB)."""
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((2, 4096, 64), "float32"), ((65536, 64), "float32"), ((2, 4096), "int32"))
    ]
    gradient = jax.jit(jax.grad(lambda h, w, t: logprobs.token_logps(h, w, t)[0].sum(), (0, 1)))
    compiled = gradient.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20


@pytest.mark.parametrize("size", [151936, 152064, 151669, 50021, 1024])
def test_published_vocabularies_are_cut_into_parts_that_divide_them(size: int) -> None:
    count = logprobs.vocabulary_pieces(size)
    assert size % count == 0
    assert size // count <= logprobs.VOCABULARY or count == 1


def test_the_last_real_token_is_found(rng: np.random.Generator) -> None:
    hidden = rng.normal(size=(3, 6, 2)).astype(np.float32)
    mask = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(logprobs.last_token(hidden, mask), hidden[[0, 1, 2], [2, 5, 0]])
