"""The model equals transformers' torch Qwen2.5-VL with the same random weights.

Tolerance 1e-4 on logits of size 4: float32 sums in another order differ by about 4e-6 here; a wrong mask, position or
patch order moves logits by more than 1e-2.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.conftest import make_model
from vau_jax.data.processor import Encoded, Processor
from vau_jax.models.vision import normalise
from vau_jax.types import Batch
from vau_jax.vlm import VideoLM

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def oracle(model_folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return load_oracle(model_folder)


def load_oracle(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="eager").eval()


def clip(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def ask(frames: np.ndarray, fps: float, text: str = "What happens?") -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "video", "video": frames, "fps": fps}, {"type": "text", "text": text}]}
    ]


def torch_inputs(oracle: Qwen2_5_VLForConditionalGeneration, batch: Batch, rows: list[Encoded]) -> dict:
    """The same batch as transformers takes it; positions and windows are its own."""
    ids, mask = torch.tensor(np.asarray(batch.tokens)).long(), torch.tensor(np.asarray(batch.mask)).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    visuals = [visual for row in rows for visual in row.visuals]
    if not visuals:
        return inputs
    patches = np.concatenate([np.asarray(normalise(visual.patches, 3)) for visual in visuals])
    config = oracle.config.vision_config
    seconds = [visual.time_step / config.tokens_per_second for visual in visuals]
    return {
        **inputs,
        "mm_token_type_ids": torch.where(ids == oracle.config.video_token_id, 2, 0),
        "pixel_values_videos": torch.tensor(patches),
        "video_grid_thw": torch.tensor([[v.grid[0], 2 * v.grid[1], 2 * v.grid[2]] for v in visuals]),
        "second_per_grid_ts": torch.tensor(seconds),
    }


def difference(
    oracle: Qwen2_5_VLForConditionalGeneration, vlm: VideoLM, conversations: list, left: bool = False
) -> float:
    """Largest difference of logits on real tokens."""
    batch = vlm.encode(conversations, left=left)
    rows = [vlm.processor.encode(messages) for messages in conversations]
    with torch.no_grad():
        theirs = oracle(**torch_inputs(oracle, batch, rows)).logits.numpy()
    return float(np.abs(np.asarray(vlm.logits(batch)) - theirs)[np.asarray(batch.mask)].max())


def test_text_logits(vlm: VideoLM, oracle: Qwen2_5_VLForConditionalGeneration) -> None:
    conversations = [[{"role": "user", "content": "What happens in the video?"}], [{"role": "user", "content": "fire"}]]
    assert difference(oracle, vlm, conversations) <= TOLERANCE


@pytest.mark.parametrize("frames", [2, 4, 8], ids=["T=1", "T=2", "T=4"])
@pytest.mark.parametrize("size", [(56, 84), (140, 112), (168, 196)], ids=str)
def test_video_logits(
    vlm: VideoLM,
    oracle: Qwen2_5_VLForConditionalGeneration,
    rng: np.random.Generator,
    frames: int,
    size: tuple[int, int],
) -> None:
    """Non-square sizes; 140 and 168 pixels are no multiple of the 112-pixel windows."""
    assert difference(oracle, vlm, [ask(clip(rng, frames, *size), 1.7)]) <= TOLERANCE


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_two_different_clips_in_a_batch(
    vlm: VideoLM, oracle: Qwen2_5_VLForConditionalGeneration, rng: np.random.Generator, left: bool
) -> None:
    conversations = [
        ask(clip(rng, 8, 56, 84), 2.0),
        ask(clip(rng, 4, 140, 112), 3.0, "What happens in the video? fire"),
    ]
    assert difference(oracle, vlm, conversations, left) <= TOLERANCE


def test_untied_head(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = make_model(tmp_path / "untied", tied=False)
    assert difference(load_oracle(folder), VideoLM.load(folder), [ask(clip(rng, 4, 56, 84), 2.0)]) <= TOLERANCE


def test_positions_equal_get_rope_index(
    vlm: VideoLM, oracle: Qwen2_5_VLForConditionalGeneration, rng: np.random.Generator
) -> None:
    conversations = [ask(clip(rng, 8, 56, 84), 0.7), ask(clip(rng, 4, 140, 112), 2.5)]
    batch, rows = vlm.encode(conversations), [vlm.processor.encode(c) for c in conversations]
    inputs = torch_inputs(oracle, batch, rows)
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    theirs, _ = oracle.model.get_rope_index(**{name: inputs[name] for name in names})
    mask = np.asarray(batch.mask)
    np.testing.assert_array_equal(np.moveaxis(batch.positions, 1, 0)[:, mask], theirs.numpy()[:, mask])


def test_greedy_tokens_equal_generate(
    vlm: VideoLM, oracle: Qwen2_5_VLForConditionalGeneration, rng: np.random.Generator
) -> None:
    conversation = ask(clip(rng, 4, 56, 84), 2.0, "What happens in the video?")
    batch, row = vlm.encode([conversation]), vlm.processor.encode(conversation)
    inputs = torch_inputs(oracle, batch, [row])
    inputs = {
        k: v[:, : len(row.tokens)] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v
        for k, v in inputs.items()
    }
    theirs = oracle.generate(**inputs, max_new_tokens=48, do_sample=False)[0, len(row.tokens) :].tolist()
    ours = vlm.generate(batch, num_generations=1, max_new_tokens=48, temperature=0.0)
    assert ours.tokens[0, 0][ours.mask[0, 0]].tolist() == theirs


def test_logits_change_with_the_video(vlm: VideoLM, rng: np.random.Generator) -> None:
    frames = clip(rng, 4, 56, 84)
    other = frames.copy()
    other[2:] = 255 - other[2:]
    a, b = (np.asarray(vlm.logits(vlm.encode([ask(x, 2.0)])))[0] for x in (frames, other))
    assert np.abs(a - b).max() > 1e-2


def test_save_is_read_back_bit_for_bit(vlm: VideoLM, tmp_path: Path) -> None:
    vlm.save(tmp_path / "copy")
    again = VideoLM.load(tmp_path / "copy")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), vlm.params, again.params))


def test_transformers_opens_what_save_wrote(vlm: VideoLM, tmp_path: Path, rng: np.random.Generator) -> None:
    vlm.save(tmp_path / "copy")
    assert difference(load_oracle(tmp_path / "copy"), vlm, [ask(clip(rng, 4, 56, 84), 2.0)]) <= TOLERANCE


def test_bfloat16_stays_close_to_float32(model_folder: Path, vlm: VideoLM, rng: np.random.Generator) -> None:
    """bfloat16 keeps 8 bits: through 3 + 3 layers the logits (size 4) move by a few parts in a hundred."""
    batch = vlm.encode([ask(clip(rng, 4, 56, 84), 2.0)])
    half = np.asarray(VideoLM.load(model_folder, dtype="bfloat16").logits(batch))
    real = np.asarray(batch.mask)
    assert np.abs(half - np.asarray(vlm.logits(batch)))[real].max() < 0.15


def test_processor_reads_end_tokens(model_folder: Path) -> None:
    processor = Processor(model_folder)
    assert processor.tokenizer.convert_ids_to_tokens(list(processor.end_tokens)) == ["<|im_end|>"]
