"""Writes a small Qwen2.5-VL with random weights as a complete Hugging Face folder, for the demo and the tests.

The architecture is the real one; the tokenizer is a byte-level BPE with Qwen's special tokens and chat structure,
trained on the texts it is given. Both `transformers` and `VideoLM.load` open the folder.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vau_jax.files import write_text
from vau_jax.models import config as model_config
from vau_jax.models import hf, qwen_vl

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


def hf_config(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL of the given sizes (Hugging Face's field names), in the published flat form."""
    ids = tokenizer.convert_tokens_to_ids
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    quarter = head_dim // 8
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [quarter, (head_dim // 2 - quarter) // 2, (head_dim // 2 - quarter) // 2],
        },
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        **text,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "tokens_per_second": 2,
            "out_hidden_size": text["hidden_size"],
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
) -> Path:
    """Trains the tokenizer, draws the weights and writes the folder, complete or not at all.

    `text` and `vision` are sizes under Hugging Face's names; `pixels` are the least and most pixels of a frame.
    """
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(part)
    raw = hf_config(tokenizer, text, vision)
    size = {"size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]}}
    shared = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, **size}
    files = {
        "config.json": raw,
        "generation_config.json": {"eos_token_id": raw["eos_token_id"], "bos_token_id": raw["bos_token_id"]},
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **shared},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", **shared},
    }
    for name, value in files.items():
        write_text(part / name, json.dumps(value, indent=1))
    config = model_config.from_hf(raw)
    hf.save_weights(part, qwen_vl.init(config, jax.random.key(seed)), config)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
