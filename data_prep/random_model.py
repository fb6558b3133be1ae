"""Writes a Qwen-VL with random weights as a complete Hugging Face folder: for the demo, tests and measurements.

    vau data random-model --size=qwen2.5-vl-3b --out=DIR

The architecture is the real one; the tokenizer is a byte-level BPE with Qwen's special tokens and chat structure,
trained on the texts it is given. Both `transformers` and `VideoLM.load` open the folder.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vau_jax import cli
from vau_jax.common import files
from vau_jax.common.files import InputError, dump_json
from vau_jax.models import config as model_config
from vau_jax.models import hf, qwen_vl
from vau_jax.models.config import QwenVLConfig
from vau_jax.types import Params

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = tuple(
    f"<{slash}{tag}>" for tag in ("think", "draft", "reflect", "revise", "answer", "glue") for slash in ("", "/")
)

# How Qwen's tokenizer cuts text before BPE: contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for item in message.content -%}
{%- if item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ item.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; the grammar's tags are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_VISION = {
    "qwen2_vl": {"patch_size": 14, "spatial_patch_size": 14, "mlp_ratio": 4, "hidden_act": "quick_gelu"},
    "qwen2_5_vl": {
        "patch_size": 14,
        "spatial_patch_size": 14,
        "window_size": 112,
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
    "qwen3_vl": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
}


def _rope(family: str, head_dim: int) -> dict[str, Any]:
    """M-RoPE sections in about the published proportions, for any head size."""
    half = head_dim // 2
    if family == "qwen3_vl":
        side = half * 5 // 16
        rope = {"rope_type": "default", "mrope_interleaved": True, "rope_theta": 5e6}
    else:
        side = (half - half // 4) // 2
        rope = {"type": "mrope", "rope_theta": 1e6}
    return {**rope, "mrope_section": [half - 2 * side, side, side]}


def hf_config(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any], family: str
) -> dict[str, Any]:
    """config.json of a model of the given sizes (Hugging Face's field names), in the family's published form."""
    ids = tokenizer.convert_tokens_to_ids
    rope = _rope(family, text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    sizes = {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        **text,
    }
    if family == "qwen3_vl":
        sizes = {
            "tie_word_embeddings": sizes["tie_word_embeddings"],
            "text_config": {"model_type": "qwen3_vl_text", **sizes, "rope_parameters": rope},
        }
    else:
        theta = rope.pop("rope_theta")
        sizes |= {"use_sliding_window": False, "rope_theta": theta, "rope_scaling": rope}
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "torch_dtype": "float32",
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        **sizes,
        "vision_config": {
            "model_type": family,
            "in_channels": 3,
            "in_chans": 3,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            out: text["hidden_size"],
            **_VISION[family],
            **vision,
        },
    }


def write(
    folder: str | os.PathLike,
    texts: Iterable[str],
    vocab_size: int,
    text: dict[str, Any],
    vision: dict[str, Any],
    pixels: tuple[int, int],
    seed: int = 0,
    family: str = "qwen2_5_vl",
    dtype: str = "float32",
    draw: Callable[[QwenVLConfig, int, str], Params] | None = None,
) -> Path:
    """Trains the tokenizer, draws the weights and writes the folder, complete or not at all.

    `text` and `vision` are sizes under Hugging Face's names; `pixels` are the least and most pixels of a frame, or with
    Qwen3-VL of a clip; `draw(config, seed, dtype)` gives other weights than `initial_weights`.
    """
    folder = Path(folder)
    tokenizer = train_tokenizer(texts, vocab_size)
    raw = {**hf_config(tokenizer, text, vision, family), "torch_dtype": dtype}
    config = model_config.from_hf(raw)
    eyes = config.vision
    shared = {
        "patch_size": eyes.patch_size,
        "temporal_patch_size": eyes.temporal_patch_size,
        "merge_size": eyes.spatial_merge_size,
        "image_mean": eyes.image_mean,
        "image_std": eyes.image_std,
        "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
    }
    kind = "Qwen3VL" if family == "qwen3_vl" else "Qwen2VL"
    language = raw.get("text_config", raw)
    written = {
        "config.json": raw,
        "generation_config.json": {"eos_token_id": language["eos_token_id"], "bos_token_id": language["bos_token_id"]},
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **shared},
        "video_preprocessor_config.json": {"video_processor_type": f"{kind}VideoProcessor", **shared},
    }
    with files.new_folder(folder) as part:
        tokenizer.save_pretrained(part)
        for name, value in written.items():
            files.write_text(part / name, dump_json(value, indent=1))
        hf.save_weights(part, (draw or initial_weights)(config, seed, dtype), config)
    return folder


def initial_weights(config: QwenVLConfig, seed: int, dtype: str) -> Params:
    """`qwen_vl.init` in any dtype; beyond float32, one parameter at a time, so that large models fit in memory."""
    key = jax.random.key(seed)
    if dtype == "float32":
        return qwen_vl.init(config, key)
    flat: dict[str, Any] = {}
    for number, (path, shape) in enumerate(hf.parameter_shapes(config).items()):
        if path.endswith(("/kernel", "/embedding", "lm_head", "pos_embed")):
            flat[path] = jax.random.normal(jax.random.fold_in(key, number), shape, dtype) * config.initializer_range
        else:
            flat[path] = jnp.full(shape, float(path.endswith("/weight")), dtype)
    return hf.unflatten(flat)


def write_published(folder: str | os.PathLike, size: str, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A random model of a published size; its tokenizer knows few words, and the vocabulary has the published size."""
    if size not in model_config.SIZES:
        raise InputError(f"--size={size} is unknown: expected one of {', '.join(model_config.SIZES)}")
    raw = model_config.SIZES[size]
    text = raw.get("text_config", {k: v for k, v in raw.items() if k not in ("model_type", "vision_config")})
    text = {name: value for name, value in text.items() if not name.endswith("_token_id") and name != "rope_parameters"}
    bounds = (128 * 28 * 28, 768 * 28 * 28) if raw["model_type"] != "qwen3_vl" else (4096, 24576 * 32 * 32)
    return write(folder, ["What happens?"], 512, text, raw["vision_config"], bounds, seed, raw["model_type"], dtype)


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    write_published(args.out, args.size, args.dtype)
    print(f"{args.out}: {args.size} with random weights, {args.dtype}")


if __name__ == "__main__":
    cli.main("data random-model")
