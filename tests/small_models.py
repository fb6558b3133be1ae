"""Small models of each family as Hugging Face folders, with weights that hide nothing."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from vau_jax.data_prep import random_model
from vau_jax.datasets import synthetic
from vau_jax.models import hf, lora
from vau_jax.models.config import QwenVLConfig
from vau_jax.models.lora import LoRA
from vau_jax.types import Batch, Params
from vau_jax.vlm import VideoLM

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "qwen2_vl": {"depth": 3, "embed_dim": 48, "mlp_ratio": 2, "num_heads": 4},
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    },
}
FAMILIES = tuple(VISION)


def revealing_weights(config: QwenVLConfig, seed: int, dtype: str) -> Params:
    """Every parameter at random, none at zero or one, so that nothing can be left out unseen."""
    rng = np.random.default_rng(seed)
    return hf.unflatten(
        {
            name: (rng.normal(1.0 if name.endswith("/weight") else 0.0, 0.1, shape)).astype(dtype)
            for name, shape in hf.parameter_shapes(config).items()
        }
    )


def make_model(
    folder: Path,
    tied: bool = True,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    **sizes: int,
) -> Path:
    texts = ["What happens in the video? a fire breaks out, 0 calm 1 calm 2 fire [12.0, 30.5]", *synthetic.KINDS]
    text = {**TEXT, **({"head_dim": 24} if family == "qwen3_vl" else {}), **sizes, "tie_word_embeddings": tied}
    eyes = {**VISION[family], **(vision or {})}
    bounds = 28 * 28, 64 * 28 * 28
    return random_model.write(folder, texts, 512, text, eyes, bounds, seed, family, draw=revealing_weights)


def writing_model(folder: Path, text: str) -> Path:
    """A model that answers whatever it is asked with `text`, in which no token may stand twice.

    Its layers do nothing, and its head knows one follower of each token.
    """

    def draw(config: QwenVLConfig, seed: int, dtype: str) -> Params:
        rng = np.random.default_rng(seed)
        flat = {
            name: np.full(shape, 1.0 if "norm" in name else 0.0, dtype)
            for name, shape in hf.parameter_shapes(config).items()
        }
        table = rng.normal(0, 1, flat["embed_tokens/embedding"].shape).astype(dtype)
        flat["embed_tokens/embedding"] = table / np.linalg.norm(table, axis=1, keepdims=True)
        tokenizer = random_model.train_tokenizer([text] * 9, 512)
        written = tokenizer("\n" + text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert len(set(written)) == len(written), "a token stands twice"
        flat["lm_head"][written[1:]] = flat["embed_tokens/embedding"][written[:-1]]
        return hf.unflatten(flat)

    sizes, eyes = {**TEXT, "tie_word_embeddings": False}, VISION["qwen2_5_vl"]
    return random_model.write(folder, [text] * 9, 512, sizes, eyes, (28 * 28, 64 * 28 * 28), draw=draw)


EVERYWHERE = (r"decoder/layers/.*_proj", r"visual/blocks/.*", r"visual/(merger|deepstack)/mlp/fc[12]")


def with_adapters(vlm: VideoLM, kind: LoRA) -> VideoLM:
    """Random adapters, none at zero."""
    shapes = {path: leaf.shape for path, leaf in hf.flatten(vlm.params).items()}
    fresh = lora.init(jax.random.key(0), shapes, kind)
    rng = np.random.default_rng(1)
    flat = {name: rng.normal(0, 0.15, leaf.shape).astype(np.float32) for name, leaf in fresh.items()}
    return vlm._with_adapters(kind, flat, None)


def targets_of(vlm: VideoLM) -> tuple[str, ...]:
    deep = vlm.processor.vision.deepstack_layers
    return EVERYWHERE if deep else (*EVERYWHERE[:2], r"visual/merger/mlp/fc[12]")


def two_prompts(vlm: VideoLM, left: bool = False) -> Batch:
    """Of different length, one with a longer clip; padded after the prompt, or before it."""
    rng = np.random.default_rng(1)
    n = vlm.processor.factor
    clips = [rng.integers(0, 256, (f, 2 * n, 3 * n, 3), dtype=np.uint8) for f in (4, 8)]
    texts = ["What happens in the video? a fire breaks out", "fire?"]
    items = [
        [{"type": "video", "video": c, "fps": 2.0}, {"type": "text", "text": t}]
        for c, t in zip(clips, texts, strict=True)
    ]
    return vlm.encode([[{"role": "user", "content": content}] for content in items], left=left)
