"""A prompt read once by G completions gives the same numbers as G repeated prompts: log-probabilities and gradients."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_models import targets_of, two_prompts, with_adapters
from vau_jax.models.lora import LoRA
from vau_jax.rl import sampling
from vau_jax.train import update
from vau_jax.types import Batch, Completions, Variables
from vau_jax.vlm import VideoLM

G, C = 3, 7


@pytest.fixture(scope="module")
def vlm(family_folder: Path) -> VideoLM:
    return VideoLM.load(family_folder)


@pytest.fixture(scope="module")
def adapted(vlm: VideoLM) -> VideoLM:
    return with_adapters(vlm, LoRA(rank=4, alpha=6.0, targets=targets_of(vlm)))


@pytest.fixture(scope="module")
def batch(vlm: VideoLM) -> Batch:
    return two_prompts(vlm)


@pytest.fixture(scope="module")
def completions(vlm: VideoLM) -> Completions:
    """Completions of unequal length."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, vlm.processor.config.vocab_size - 64, (2, G, C)).astype(np.int32)
    return Completions(tokens, np.arange(C) < rng.integers(2, C + 1, (2, G, 1)))


def forms(batch: Batch, completions: Completions) -> list[tuple[Batch, Completions]]:
    """The prompt once for its G completions, and the prompt before each of them."""
    wide = jax.tree.map(lambda x: np.repeat(x, G, axis=0), batch)
    flat = jax.tree.map(lambda x: x.reshape(-1, 1, C), completions)
    return [(batch, completions), (wide, flat)]


def scored(vlm: VideoLM, batch: Batch, completions: Completions, length: int | None = None) -> Any:
    """Log-probabilities as a function of variables."""
    return jax.jit(lambda variables: update.policy_logps(variables, batch, completions, vlm.model, 0.9, length)[0])


def total(vlm: VideoLM, batch: Batch, completions: Completions, length: int | None = None) -> Any:
    """A scalar that weighs every real token differently, as a function of variables."""

    def value(variables: Variables) -> jax.Array:
        logps, _ = update.policy_logps(variables, batch, completions, vlm.model, 0.9, length)
        flat = (logps * completions.mask).reshape(-1)
        return jnp.sum(flat * jnp.cos(jnp.arange(flat.size)))

    return value


CASES = pytest.mark.parametrize(("kind", "left"), [("vlm", False), ("adapted", True)], ids=["full", "lora-left"])


@CASES
def test_log_probs_equal_the_repeated_form(
    kind: str, left: bool, completions: Completions, request: pytest.FixtureRequest
) -> None:
    vlm = request.getfixturevalue(kind)
    batch = two_prompts(vlm, left)
    shared, naive = (scored(vlm, *form)(vlm.variables) for form in forms(batch, completions))
    mask = np.asarray(completions.mask)
    np.testing.assert_allclose(np.asarray(shared)[mask], np.asarray(naive).reshape(2, G, C)[mask], rtol=1e-5)


@CASES
def test_every_gradient_equals_the_repeated_form(
    kind: str, left: bool, completions: Completions, request: pytest.FixtureRequest
) -> None:
    """Of all parameters, and of adapters with their base held; 1e-5 of the largest entry."""
    vlm = request.getfixturevalue(kind)
    batch, trained = two_prompts(vlm, left), "params" if kind == "vlm" else "lora"

    def gradient(form: tuple[Batch, Completions]) -> dict:
        value = total(vlm, *form)
        return jax.jit(jax.grad(lambda part: value({**vlm.variables, trained: part})))(vlm.variables[trained])

    shared, naive = (gradient(form) for form in forms(batch, completions))
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(shared)[0], jax.tree.leaves(naive), strict=True):
        scale = float(jnp.abs(b).max())
        assert scale > 0, f"{path} has no gradient"
        assert float(jnp.abs(a - b).max()) <= 1e-5 * scale, path


PACKED = (12, 2 * C)  # lengths: all that is needed and no more, and whole blocks


@pytest.fixture(scope="module")
def unequal(completions: Completions) -> Completions:
    """Completions that together are shorter than two whole ones."""
    return Completions(completions.tokens, np.arange(C) < np.asarray([[C, 1, 4], [2, 6, 3]])[..., None])


@CASES
def test_log_probs_of_packed_completions_equal_the_plain_form(
    kind: str, left: bool, unequal: Completions, request: pytest.FixtureRequest
) -> None:
    vlm = request.getfixturevalue(kind)
    batch, mask = two_prompts(vlm, left), np.asarray(unequal.mask)
    plain = np.asarray(scored(vlm, batch, unequal)(vlm.variables))
    for length in PACKED:
        packed = np.asarray(scored(vlm, batch, unequal, length)(vlm.variables))
        np.testing.assert_allclose(packed[mask], plain[mask], rtol=1e-5)
        assert not packed[~mask].any()


@CASES
def test_every_gradient_of_packed_completions_equals_the_plain_form(
    kind: str, left: bool, unequal: Completions, request: pytest.FixtureRequest
) -> None:
    """1e-5 of the largest entry of each parameter's gradient."""
    vlm = request.getfixturevalue(kind)
    batch, trained = two_prompts(vlm, left), "params" if kind == "vlm" else "lora"

    def gradient(length: int | None) -> dict:
        value = total(vlm, batch, unequal, length)
        return jax.jit(jax.grad(lambda part: value({**vlm.variables, trained: part})))(vlm.variables[trained])

    plain = gradient(None)
    for length in PACKED:
        for a, b in zip(jax.tree.leaves(gradient(length)), jax.tree.leaves(plain), strict=True):
            assert float(jnp.abs(a - b).max()) <= 1e-5 * float(jnp.abs(b).max())


def test_log_probs_equal_the_whole_sequence(vlm: VideoLM) -> None:
    """A prompt and a completion as one plain sequence give the same log-probabilities."""
    prompt = [{"role": "user", "content": "What happens in the video?"}]
    row = vlm.processor.encode(prompt)
    extra = np.asarray([5, 9, 14, 20], np.int32)
    batch = vlm.encode([prompt])
    packed, _ = update.policy_logps(
        vlm.variables, batch, Completions(extra[None, None], np.ones((1, 1, 4), bool)), vlm.model, 1.0
    )
    tokens = np.concatenate([row.tokens, extra])[None]
    n = tokens.shape[1]
    positions = np.broadcast_to(np.arange(n, dtype=np.int32), (1, 3, n))
    plain = Batch(tokens, np.ones((1, n), bool), positions, np.full((1, n), -1, np.int32), np.asarray([n]), None)
    scores = np.array(vlm.logits(plain))[0, len(row.tokens) - 1 : -1]
    scores[:, list(vlm.processor.config.never_sampled)] = -np.inf
    expected = np.asarray(jax.nn.log_softmax(scores))[np.arange(4), extra]
    np.testing.assert_allclose(np.asarray(packed)[0, 0], expected, atol=2e-5)


def test_a_completion_does_not_see_its_neighbours(vlm: VideoLM, batch: Batch, completions: Completions) -> None:
    tokens = completions.tokens.copy()
    tokens[:, 1] = (tokens[:, 1] + 17) % 256
    before, _ = update.policy_logps(vlm.variables, batch, completions, vlm.model, 1.0)
    after, _ = update.policy_logps(vlm.variables, batch, Completions(tokens, completions.mask), vlm.model, 1.0)
    np.testing.assert_array_equal(np.asarray(before)[:, [0, 2]], np.asarray(after)[:, [0, 2]])


def test_visual_pads_are_never_sampled(vlm: VideoLM, batch: Batch) -> None:
    """With the head turned so that a pad token would always win, it still never appears."""
    pads = np.asarray(vlm.processor.config.never_sampled)
    embedding = np.asarray(vlm.params["embed_tokens"]["embedding"]).copy()
    embedding[pads] *= 100
    params = {**vlm.params, "embed_tokens": {"embedding": jnp.asarray(embedding)}}
    out = sampling.sample(
        {"params": params},
        batch,
        jax.random.key(0),
        model=vlm.model,
        num_generations=8,
        max_new_tokens=16,
        end_tokens=(2,),
    )
    assert not np.isin(np.asarray(out.tokens)[np.asarray(out.mask)], pads).any()


def test_seed_decides_the_sample(vlm: VideoLM, batch: Batch) -> None:
    first, same, other = (vlm.generate(batch, 4, 12, seed=seed).tokens for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
