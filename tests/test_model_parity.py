"""Every family equals transformers' torch model with the same random weights.

Tolerance 1e-4 on logits of size 4: float32 sums in another order differ by about 4e-6 here; a wrong mask, position or
patch order moves logits by more than 1e-2.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import ask, difference, image, video
from tests.small_models import FAMILIES, make_model
from vau_jax.data.processor import Processor
from vau_jax.models import hf
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import logprobs
from vau_jax.types import Params
from vau_jax.vlm import VideoLM

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(family_folder: Path) -> VideoLM:
    return VideoLM.load(family_folder)


@pytest.fixture(scope="module")
def theirs(family_folder: Path) -> PreTrainedModel:
    return oracle.load(family_folder)


def unit(model: VideoLM) -> int:
    return model.processor.factor


def test_text_logits(model: VideoLM, theirs: PreTrainedModel) -> None:
    conversations = [[{"role": "user", "content": "What happens in the video?"}], [{"role": "user", "content": "fire"}]]
    assert difference(theirs, model, conversations) <= TOLERANCE


@pytest.mark.parametrize("frames", [2, 4, 8, 16], ids=["T=1", "T=2", "T=4", "T=8"])
@pytest.mark.parametrize("size", [(2, 3), (5, 4), (6, 7)], ids=["2x3", "5x4", "6x7"])
def test_video_logits(
    model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator, frames: int, size: tuple[int, int]
) -> None:
    """Non-square sizes in merged units; 5 and 6 are no multiple of Qwen2.5-VL's windows of 4."""
    height, width = (side * unit(model) for side in size)
    assert difference(theirs, model, [ask(video(rng, frames, height, width, fps=1.7))]) <= TOLERANCE


def test_image_logits(model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator) -> None:
    n = unit(model)
    conversations = [
        ask(image(rng, 3 * n, 2 * n)),
        ask(image(rng, 2 * n, 5 * n), image(rng, n, n), image(rng, 4 * n, 4 * n)),
    ]
    assert difference(theirs, model, conversations) <= TOLERANCE


def test_images_and_videos_mixed(model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator) -> None:
    n = unit(model)
    conversations = [
        ask(image(rng, 3 * n, 2 * n), video(rng, 4, 2 * n, 3 * n, 2.0), image(rng, n, 2 * n)),
        ask(video(rng, 6, n, 2 * n, 4.0), video(rng, 2, 2 * n, 2 * n, 0.5)),
    ]
    assert difference(theirs, model, conversations) <= TOLERANCE


def test_every_gradient_equals_torch(model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator) -> None:
    """Of log-probabilities that are weighed unevenly, by every parameter: within 2e-5 of its largest entry."""
    n, config = unit(model), model.processor.config
    batch, given = oracle.conversation_inputs(
        model, [ask(video(rng, 6, 3 * n, 2 * n)), ask(image(rng, 2 * n, n), text="fire")]
    )
    tokens, real = np.asarray(batch.tokens)[:, 1:], np.asarray(batch.mask)[:, 1:]
    weights = np.where(real, np.cos(np.arange(real.size)).reshape(real.shape), 0).astype(np.float32)

    def ours(params: Params) -> jax.Array:
        hidden = model.model.apply({"params": params}, batch, method="hidden")[:, :-1]
        head = QwenVL(config).head({"params": params})
        return jnp.sum(weights * logprobs.token_logps(hidden, head, tokens)[0])

    grads = jax.jit(jax.grad(ours))(model.params)
    logps = torch.log_softmax(theirs(**given).logits[:, :-1], -1)
    picked = logps.gather(-1, torch.tensor(tokens).long()[..., None])[..., 0]
    theirs.zero_grad()
    (picked * torch.tensor(weights)).sum().backward()
    found = dict(hf._tensors(grads, config))
    expected = {hf.plain_name(name): p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    expected = {hf.published_name(name, config): grad for name, grad in expected.items()}
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name].reshape(grad.shape), grad, atol=2e-5 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_two_different_clips_in_a_batch(
    model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator, left: bool
) -> None:
    n = unit(model)
    conversations = [
        ask(video(rng, 8, 2 * n, 3 * n, 2.0)),
        ask(video(rng, 4, 5 * n, 4 * n, 3.0), text="What happens in the video? fire"),
    ]
    assert difference(theirs, model, conversations, left) <= TOLERANCE


def test_a_text_prompt_beside_a_video_prompt(model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator) -> None:
    n = unit(model)
    conversations = [ask(text="fire"), ask(video(rng, 4, 2 * n, 3 * n))]
    assert difference(theirs, model, conversations) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_untied_head(tmp_path: Path, rng: np.random.Generator, family: str) -> None:
    folder = make_model(tmp_path / "untied", tied=False, family=family)
    model = VideoLM.load(folder)
    n = unit(model)
    assert difference(oracle.load(folder), model, [ask(video(rng, 4, 2 * n, 3 * n))]) <= TOLERANCE


def test_a_qwen3_with_attention_biases(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = make_model(tmp_path / "bias", family="qwen3_vl", attention_bias=True)
    model = VideoLM.load(folder)
    n = unit(model)
    assert difference(oracle.load(folder), model, [ask(video(rng, 4, 2 * n, 3 * n))]) <= TOLERANCE


SHAPES = st.fixed_dictionaries(
    {
        "family": st.sampled_from(FAMILIES),
        "layers": st.integers(1, 4),
        "depth": st.integers(1, 4),
        "kv_heads": st.sampled_from([1, 2, 3]),
        "share": st.sampled_from([1, 2, 3]),
        "head_dim": st.sampled_from([8, 16, 24, 32]),
        "vision_heads": st.sampled_from([1, 2, 3]),
        "vision_head_dim": st.sampled_from([8, 12, 20]),
        "tied": st.booleans(),
        "frames": st.integers(1, 9),
        "rows": st.integers(1, 6),
        "columns": st.integers(1, 6),
        "fps": st.sampled_from([0.4, 1.0, 2.0, 3.3, 30.0]),
    }
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(s=SHAPES)
def test_any_size_and_depth(tmp_path_factory: pytest.TempPathFactory, s: dict) -> None:
    eyes = {"depth": s["depth"], "num_heads": s["vision_heads"]}
    eyes["embed_dim" if s["family"] == "qwen2_vl" else "hidden_size"] = s["vision_heads"] * s["vision_head_dim"]
    if s["family"] == "qwen2_5_vl":
        eyes["fullatt_block_indexes"] = list(range(0, s["depth"], 2))
    if s["family"] == "qwen3_vl":
        eyes["deepstack_visual_indexes"] = list(range(min(s["depth"], s["layers"])))[-2:]
    heads = s["kv_heads"] * s["share"]
    folder = make_model(
        tmp_path_factory.mktemp("shape") / "model",
        s["tied"],
        s["family"],
        vision=eyes,
        hidden_size=heads * s["head_dim"],
        num_hidden_layers=s["layers"],
        num_attention_heads=heads,
        num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"],
    )
    model, rng = VideoLM.load(folder), np.random.default_rng(0)
    n = unit(model)
    item = video(rng, s["frames"], s["rows"] * n, s["columns"] * n, s["fps"])
    assert difference(oracle.load(folder), model, [ask(item)]) <= TOLERANCE


def test_positions_equal_get_rope_index(model: VideoLM, theirs: PreTrainedModel, rng: np.random.Generator) -> None:
    n = unit(model)
    conversations = [
        ask(video(rng, 8, 2 * n, 3 * n, 0.7), image(rng, n, 3 * n)),
        ask(video(rng, 4, 5 * n, 4 * n, 2.5)),
    ]
    batch, given = oracle.conversation_inputs(model, conversations)
    names = ["input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask"]
    names += ["second_per_grid_ts"] if "second_per_grid_ts" in given else []
    expected, _ = theirs.model.get_rope_index(**{name: given[name] for name in names})
    mask = np.asarray(batch.mask)
    np.testing.assert_array_equal(np.moveaxis(batch.positions, 1, 0)[:, mask], expected.numpy()[:, mask])


def test_logits_change_with_the_video(model: VideoLM, rng: np.random.Generator) -> None:
    n = unit(model)
    item = video(rng, 4, 2 * n, 3 * n)
    other = {**item, "video": np.concatenate([item["video"][:2], 255 - item["video"][2:]])}
    a, b = (np.asarray(model.logits(model.encode([ask(x)])))[0] for x in (item, other))
    assert np.abs(a - b).max() > 1e-2


def test_bfloat16_stays_close_to_float32(family_folder: Path, model: VideoLM, rng: np.random.Generator) -> None:
    """bfloat16 keeps 8 bits: through 3 + 3 layers the logits (size 4) move by a few parts in a hundred."""
    n = unit(model)
    batch = model.encode([ask(video(rng, 4, 2 * n, 3 * n))])
    half = np.asarray(VideoLM.load(family_folder, dtype="bfloat16").logits(batch))
    real = np.asarray(batch.mask)
    assert np.abs(half - np.asarray(model.logits(batch)))[real].max() < 0.15


def test_bfloat16_is_as_close_as_torch_in_bfloat16(
    family_folder: Path, model: VideoLM, rng: np.random.Generator
) -> None:
    """Both round; neither may stray from float32 much farther than the other."""
    n = unit(model)
    batch, given = oracle.conversation_inputs(model, [ask(video(rng, 4, 2 * n, 3 * n))])
    exact = np.asarray(model.logits(batch))
    ours = np.asarray(VideoLM.load(family_folder, dtype="bfloat16").logits(batch))
    with torch.no_grad():
        theirs = oracle.load(family_folder).to(torch.bfloat16)(**given).logits.float().numpy()
    real = np.asarray(batch.mask)
    assert np.abs(ours - exact)[real].mean() <= 1.5 * np.abs(theirs - exact)[real].mean()


def test_an_unsupported_family_names_the_supported(tmp_path: Path) -> None:
    from vau_jax.common.files import InputError
    from vau_jax.models import config

    with pytest.raises(InputError, match="qwen2_vl, qwen2_5_vl, qwen3_vl"):
        config.from_hf({"model_type": "llava"})


def test_processor_reads_end_tokens(model_folder: Path) -> None:
    processor = Processor(model_folder)
    assert processor.tokenizer.convert_ids_to_tokens(list(processor.end_tokens)) == ["<|im_end|>"]
