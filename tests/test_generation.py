"""Generation: the same greedy tokens as transformers, every option, distributions, few compiled programs."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests import oracle
from tests.oracle import ask, image, video
from tests.small_models import FAMILIES, make_model
from vau_jax.common.files import InputError
from vau_jax.data import stop_strings
from vau_jax.data.shapes import Shape
from vau_jax.rl import logprobs, sampling
from vau_jax.train import update
from vau_jax.types import Batch, Completions
from vau_jax.vlm import VideoLM

PROMPTS = ("What happens?", "What happens in the video? a fire breaks out", "fire")


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 10))])
def test_greedy_equals_transformers_for_128_tokens(tmp_path: Path, seed: int) -> None:
    """Ten random models of all families, sizes and kinds of prompt; no end token cuts them short."""
    family = FAMILIES[seed % 3]
    folder = make_model(tmp_path / "model", seed % 2 == 0, family, seed, num_hidden_layers=1 + seed % 3)
    vlm, rng = VideoLM.load(folder), np.random.default_rng(seed)
    n = vlm.processor.factor
    items = [
        [video(rng, 2 + seed, (1 + seed % 3) * n, 2 * n, 0.5 + seed)],
        [image(rng, 2 * n, n), video(rng, 4, n, 3 * n)],
        [],
    ][seed % 3 if seed else 0]
    batch, given = oracle.conversation_inputs(vlm, [ask(*items, text=PROMPTS[seed % 3])])
    length = int(np.asarray(batch.mask).sum())
    given = {
        k: v[:, :length] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in given.items()
    }
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    pads = [[token] for token in vlm.processor.config.never_sampled]
    expected = oracle.load(folder).generate(**given, **options, bad_words_ids=pads)[0, length:].tolist()
    ours = vlm.generate(batch, max_new_tokens=128, min_new_tokens=128, temperature=0.0)
    assert ours.tokens[0, 0][ours.mask[0, 0]].tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.8, *(pytest.param(p, marks=pytest.mark.long) for p in (1.05, 0.8))])
def test_a_repetition_penalty_is_that_of_transformers(tmp_path: Path, family: str, penalty: float) -> None:
    """Tokens of the prompt and of the completion so far are less likely, or with less than 1 more."""
    folder = make_model(tmp_path / "model", False, family, seed=3)
    vlm, rng = VideoLM.load(folder), np.random.default_rng(3)
    n = vlm.processor.factor
    batch, given = oracle.conversation_inputs(vlm, [ask(video(rng, 4, 2 * n, 3 * n))])
    length = int(np.asarray(batch.mask).sum())
    given = {
        k: v[:, :length] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in given.items()
    }
    options = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, "repetition_penalty": penalty}
    pads = [[token] for token in vlm.processor.config.never_sampled]
    expected = oracle.load(folder).generate(**given, **options, bad_words_ids=pads)[0, length:].tolist()
    ours = vlm.generate(batch, max_new_tokens=48, min_new_tokens=48, temperature=0.0, repetition_penalty=penalty)
    plain = vlm.generate(batch, max_new_tokens=48, min_new_tokens=48, temperature=0.0)
    assert ours.tokens[0, 0].tolist() == expected
    assert penalty == 1.05 or ours.tokens[0, 0].tolist() != plain.tokens[0, 0].tolist()


@pytest.fixture(scope="module")
def batch(vlm: VideoLM) -> Batch:
    rng = np.random.default_rng(1)
    return vlm.encode([ask(video(rng, 4, 56, 84)), ask(video(rng, 8, 84, 56), text=PROMPTS[1])])


def test_the_samplers_log_probs_are_the_trainers(family_folder: Path) -> None:
    vlm, rng = VideoLM.load(family_folder), np.random.default_rng(1)
    n = vlm.processor.factor
    batch = vlm.encode([ask(video(rng, 4, 2 * n, 3 * n)), ask(image(rng, n, n), text=PROMPTS[1])])
    out = vlm.generate(batch, num_generations=4, max_new_tokens=24, temperature=0.8, seed=3)
    scored, _ = update.policy_logps(vlm.variables, batch, Completions(out.tokens, out.mask), vlm.model, 0.8)
    np.testing.assert_allclose(out.logps[out.mask], np.asarray(scored)[out.mask], atol=1e-4)


def test_no_end_token_before_the_least_length(vlm: VideoLM, batch: Batch) -> None:
    ends = vlm.processor.end_tokens
    shortest = [
        vlm.generate(batch, 64, 12, temperature=3.0, seed=5, min_new_tokens=least).mask.sum(-1).min()
        for least in (0, 9)
    ]
    assert shortest[0] < 9 <= shortest[1]
    out = vlm.generate(batch, 64, 12, temperature=3.0, seed=5, min_new_tokens=9)
    assert not np.isin(out.tokens[..., :9], ends).any()


def test_any_of_several_end_tokens_ends_a_completion(vlm: VideoLM, batch: Batch) -> None:
    free = vlm.generate(batch, 8, 16, temperature=1.0, seed=2)
    ends = tuple(int(token) for token in np.unique(free.tokens[free.mask])[:40])
    out = sampling.sample(
        vlm.variables,
        batch,
        jax.random.key(2),
        model=vlm.model,
        num_generations=8,
        max_new_tokens=16,
        end_tokens=ends,
    )
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    np.testing.assert_array_equal(tokens[mask], free.tokens[mask], "the draws before the end are the same")
    for row, real in zip(tokens.reshape(-1, 16), mask.reshape(-1, 16), strict=True):
        first = next((i for i, token in enumerate(row) if token in ends and real[i]), 15)
        assert real.sum() == first + 1


def test_stop_strings_end_the_text(vlm: VideoLM, batch: Batch) -> None:
    """A string that the free text holds: each completion ends with the token that completes its first occurrence."""
    free = vlm.generate(batch, 8, 24, temperature=1.0, seed=4)
    whole = [text for group in free.text for text in group]
    stop = next(text[i : i + 3] for text in whole for i in range(4, len(text) - 3) if text[i : i + 3].isprintable())
    cut = vlm.generate(batch, 8, 24, temperature=1.0, seed=4, stop_strings=[stop, "never written"])
    stopped = 0
    for tokens, mask, before in zip(cut.tokens.reshape(-1, 24), cut.mask.reshape(-1, 24), whole, strict=True):
        written = tokens[mask & ~np.isin(tokens, vlm.processor.end_tokens)]
        text, without_last = (vlm.processor.tokenizer.decode(part) for part in (written, written[:-1]))
        assert before.startswith(text)
        assert (stop in text) == (stop in before)
        assert stop not in without_last, "it ended with the token that completed the string"
        stopped += stop in text and text != before
    assert stopped


def test_the_stop_machine_finds_what_a_search_finds() -> None:
    """All strings of tokens over a small alphabet, overlapping stop strings, tokens that hold or cross them."""
    tokens = [b"a", b"b", b"ab", b"ba", b"aab", "é".encode(), "é".encode()[:1], "é".encode()[1:], b""]
    stops = ["aba", "bb", "é"]
    table = stop_strings.stop_table(stops, tokens)
    for sequence in itertools.product(range(len(tokens)), repeat=4):
        state, found = 0, False
        written = b""
        for token in sequence:
            state = table[state, token]
            written += tokens[token]
            found = any(stop.encode() in written for stop in stops)
            assert (state == len(table) - 1) == found, (sequence, written)


def test_token_bytes_spell_what_the_tokenizer_decodes(vlm: VideoLM) -> None:
    tokenizer = vlm.processor.tokenizer
    text = "What happens in the video? \n <think>é 漢字 12.5</think><|im_end|>"
    ids = tokenizer(text)["input_ids"]
    spelt = vlm.processor.token_bytes
    assert b"".join(spelt[i] for i in ids).decode() == text


def test_decoding_stops_when_all_have_ended(vlm: VideoLM, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop on the device runs as often as the longest completion is long, not to the limit of 61."""
    free = vlm.generate(batch, 2, 8, temperature=0.0)
    ends = tuple(int(token) for token in {*free.tokens[0, 0, 2:3], *free.tokens[1, 0, 4:5]})
    drawn, original = [], logprobs.sampling_logits

    def counting(*args: Any) -> jax.Array:
        jax.debug.callback(lambda: drawn.append(1))
        return original(*args)

    monkeypatch.setattr(logprobs, "sampling_logits", counting)
    options = {"model": vlm.model, "num_generations": 2, "max_new_tokens": 61, "end_tokens": ends, "greedy": True}
    out = sampling.sample(vlm.variables, batch, jax.random.key(0), **options)
    jax.effects_barrier()
    assert len(drawn) == np.asarray(out.mask).sum(-1).max() <= 5


STRAGGLING = {"end_tokens": tuple(range(100, 130)), "temperature": 1.5}  # most completions end soon, some very late


def straggling(vlm: VideoLM, new: int) -> tuple[dict[str, Any], Batch]:
    rng = np.random.default_rng(5)
    n = vlm.processor.factor
    batch = vlm.encode([ask(video(rng, 2 + i, n, 2 * n), text=PROMPTS[i % 3]) for i in range(4)])
    options = {"model": vlm.model, "num_generations": 8, "max_new_tokens": new, **STRAGGLING}
    return options, batch


def test_gathering_stragglers_changes_nothing(vlm: VideoLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, masks and log-probabilities whether or not the batch shrinks and its cache grows."""
    options, batch = straggling(vlm, 40)
    monkeypatch.setattr(sampling, "row_shapes", lambda shape, least: [shape])
    plain = sampling.sample(vlm.variables, batch, jax.random.key(1), **options)
    shapes, original = [], sampling._resize

    def watched(*args: Any, shape: tuple[int, int, int], **kwargs: Any) -> Any:
        shapes.append(shape)
        return original(*args, shape=shape, **kwargs)

    monkeypatch.undo()
    monkeypatch.setattr(sampling, "_resize", watched)
    monkeypatch.setattr(sampling, "FIRST_CACHE", 4)
    gathered = sampling.sample(vlm.variables, batch, jax.random.key(1), **options)
    assert min(b * g for b, g, _ in shapes) <= 2 < 32 == max(b * g for b, g, _ in shapes)
    assert sorted({room for *_, room in shapes}) == [16, 40]
    np.testing.assert_array_equal(gathered.mask, plain.mask)
    np.testing.assert_array_equal(gathered.tokens, plain.tokens)
    np.testing.assert_allclose(gathered.logps, plain.logps, atol=2e-5)


def test_a_straggler_is_decoded_in_a_small_batch(vlm: VideoLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are decoded, step by step, are always the fewest that hold what is left."""
    options, batch = straggling(vlm, 60)
    rows, original = [], logprobs.sampling_logits

    def counting(hidden: jax.Array, *args: Any) -> jax.Array:
        shape = hidden.shape[:2]
        jax.debug.callback(lambda: rows.append(shape))
        return original(hidden, *args)

    monkeypatch.setattr(logprobs, "sampling_logits", counting)
    out = sampling.sample(vlm.variables, batch, jax.random.key(1), **options)
    jax.effects_barrier()
    alive = np.asarray(out.mask).sum(-1)  # [B, G] lengths
    for step, (b, g) in enumerate(rows):
        left = alive > step
        fits = [(4, 8), (4, 2), (1, 2)]
        assert (b, g) == [fit for fit in fits if fit[0] >= left.any(1).sum() and fit[1] >= left.sum(1).max()][-1], step
    assert len(rows) == alive.max()
    assert rows[-1][0] * rows[-1][1] < 32


def test_the_batches_of_decoding_follow_from_the_lengths(vlm: VideoLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options, batch = straggling(vlm, 60)
    seen, original = [], sampling._advance

    def watched(variables: Any, prompts: Any, loop: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((*loop.done.shape, loop.own.k.shape[4]))
        return original(variables, prompts, loop, *args, **kwargs)

    monkeypatch.setattr(sampling, "_advance", watched)
    monkeypatch.setattr(sampling, "FIRST_CACHE", 8)
    out = sampling.sample(vlm.variables, batch, jax.random.key(1), **options)
    expected = [batch for batch, _ in itertools.groupby(sampling.steps(np.asarray(out.mask).sum(-1), 60))]
    assert [batch for batch, _ in itertools.groupby(seen)] == expected and len(expected) > 3


def test_room_for_longer_prompts_changes_nothing_but_the_programs(vlm: VideoLM) -> None:
    """The loop that decodes for one length of prompts is that of all."""
    options, batch = straggling(vlm, 12)
    plain = sampling.sample(vlm.variables, batch, jax.random.key(1), **options)
    room = batch.tokens.shape[1] + 64
    wide = sampling.sample(vlm.variables, batch, jax.random.key(1), prompt_room=room, **options)
    np.testing.assert_array_equal(wide.tokens, plain.tokens)
    np.testing.assert_allclose(wide.logps, plain.logps, atol=1e-5)
    longer = vlm.processor.collate([vlm.processor.encode(ask(text="fire"))] * 4, Shape(room - 8))
    before = sampling._advance._cache_size()
    sampling.sample(vlm.variables, longer, jax.random.key(1), prompt_room=room, **options)
    assert sampling._advance._cache_size() == before


def test_padding_on_either_side_gives_the_same_tokens(family_folder: Path) -> None:
    """A text prompt, a short and a long clip in one batch, each as when it is alone."""
    vlm, rng = VideoLM.load(family_folder), np.random.default_rng(3)
    n = vlm.processor.factor
    conversations = [ask(text="fire"), ask(video(rng, 2, n, 2 * n)), ask(video(rng, 8, 3 * n, 2 * n, 1.0))]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "temperature": 0.0}
    right, left = (vlm.generate(vlm.encode(conversations, left=side), **options).tokens for side in (False, True))
    np.testing.assert_array_equal(left, right)
    for conversation, tokens in zip(conversations, right, strict=True):
        np.testing.assert_array_equal(vlm.generate(vlm.encode([conversation]), **options).tokens[0], tokens)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (1.0, 5), (0.6, 0), (0.7, 8)])
def test_frequencies_follow_the_distribution(vlm: VideoLM, top_p: float, top_k: int) -> None:
    """Chi-square of 8192 first tokens, temperature 0.7, filters included, over the 20 likeliest tokens and the rest."""
    batch = vlm.encode([ask(text="fire")])
    out = vlm.generate(batch, num_generations=8192, max_new_tokens=1, temperature=0.7, top_p=top_p, top_k=top_k)
    scores = np.asarray(vlm.logits(batch), np.float64)[0, np.asarray(batch.mask)[0].sum() - 1] / 0.7
    scores[list(vlm.processor.config.never_sampled)] = -np.inf
    order = np.argsort(-scores)
    p = np.exp(scores - scores.max())
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        p /= p.sum()
    assert p[np.unique(out.tokens)].min() > 0
    top = order[: min(20, np.count_nonzero(p))]
    counts = np.asarray([(out.tokens == token).sum() for token in top])
    rest = 1 - p[top].sum()
    observed = counts if rest < 1e-9 else np.append(counts, 8192 - counts.sum())
    expected = p[top] / p[top].sum() * counts.sum() if rest < 1e-9 else 8192 * np.append(p[top], rest)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(out.logps[0, :, 0]), p[out.tokens[0, :, 0]], rtol=1e-4)


def test_one_program_a_bucket(vlm: VideoLM, rng: np.random.Generator) -> None:
    """Prompts and clips of many lengths compile once for each padded shape; the decoding loop, which reads no patches,
    once for each length of prompts."""
    shapes, before = set(), sampling.compiled_programs()
    for frames, words in itertools.product((5, 6, 7, 8), (1, 2, 3, 4)):
        batch = vlm.encode([ask(video(rng, frames, 56, 56), text="fire " * words)])
        shapes.add((batch.tokens.shape, batch.vision.patches.shape, batch.vision.frames.members.shape))
        vlm.generate(batch, 2, 5, temperature=0.5 + words, seed=frames, min_new_tokens=words)
    assert len(shapes) <= 4
    assert sampling.compiled_programs() - before == len(shapes) + len({tokens for tokens, *_ in shapes})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": 1e-6},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"num_generations": 0},
    ],
    ids=str,
)
def test_impossible_options_are_named(vlm: VideoLM, batch: Batch, options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(InputError, match=f"^{name}={options[name]}: expected"):
        vlm.generate(batch, **options)


def test_an_empty_stop_string_is_refused(vlm: VideoLM, batch: Batch) -> None:
    with pytest.raises(InputError, match="empty"):
        vlm.generate(batch, stop_strings=[""])


def few_of_many(vocabulary: int, kept: int, seed: int) -> np.ndarray:
    """Logits [vocabulary] of which `kept`, at random places, are above -inf."""
    rng = np.random.default_rng(seed)
    scores = np.full(vocabulary, -np.inf, np.float32)
    scores[rng.choice(vocabulary, kept, replace=False)] = rng.normal(0, 2, kept)
    return scores


@pytest.mark.parametrize(("vocabulary", "kept"), [(151936, 50), (1000, 300), (100, 1)])
def test_no_random_number_draws_an_impossible_token(vocabulary: int, kept: int) -> None:
    """Least and largest numbers, and those at each step of the distribution function, in the choice of the block and
    inside it: sums of float32 do not grow evenly."""
    invert = jax.jit(lambda scores, chance: jax.lax.map(lambda c: sampling.invert(scores, c), chance))
    edges = np.float32([0, 1e-30, 2**-24, 0.5, 1 - 2**-24, 1])
    for seed in range(5):
        scores = few_of_many(vocabulary, kept, seed)
        blocks = np.exp(np.pad(scores, (0, -vocabulary % 128), constant_values=-np.inf)).reshape(-1, 128)
        inside = blocks[blocks.sum(1) > 0]
        steps = jnp.cumsum(blocks.sum(1)), *jnp.cumsum(inside, axis=1)
        steps = np.concatenate([edges, *(np.asarray(x / x[-1]) for x in steps)])
        shares = np.unique([steps, *(np.nextafter(steps, np.float32(at)) for at in (0, 1))])
        shares = np.resize(shares, -(-len(shares) // 1024) * 1024)  # one program
        chance = np.stack([shares, np.random.default_rng(seed).permutation(shares)], axis=-1)
        assert np.isfinite(scores[invert(scores, chance)]).all()


def test_the_least_random_number_draws_no_token_that_is_all_but_impossible() -> None:
    """The first random number of this key is 0, at which the distribution function of a first block of probability
    1e-26 begins."""
    key = jax.random.key(780233)
    assert jax.random.uniform(key, (2,))[0] == 0
    scores = np.where(np.arange(1000) < sampling.DRAW_BLOCK, -60.0, 0.0).astype(np.float32)
    assert sampling.draw(key, scores) >= sampling.DRAW_BLOCK


@pytest.mark.parametrize("top_p", [1e-30, 1e-9, 0.5, 1 - 2**-24, 1])
def test_the_best_token_is_always_kept(top_p: float) -> None:
    """Also of many that are alike, one of which has more than top_p alone."""
    for scores in (np.zeros(1000, np.float32), few_of_many(1000, 1, 0), few_of_many(1000, 900, 0)):
        kept = np.asarray(sampling.restrict(scores, top_p, 0))
        assert np.isfinite(kept[scores.argmax()]) and not np.isnan(kept).any()
