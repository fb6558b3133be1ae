"""The sizes of a model, read from a Hugging Face config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vau_jax.files import InputError, read_json

SUPPORTED = ("qwen2_5_vl",)


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int  # pixels
    full_attention_layers: tuple[int, ...]
    tokens_per_second: float  # M-RoPE time positions a second of video

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class QwenVLConfig:
    vision: VisionConfig
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    initializer_range: float  # standard deviation of weights drawn at random

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """Tokens that stand for visual features, which a completion has none of."""
        return (self.image_token_id, self.video_token_id)


def load(folder: str | Path) -> QwenVLConfig:
    """Reads folder/config.json. Raises InputError when there is none, or for a model_type that is not supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"model folder {folder} has no config.json: give a Hugging Face model folder or a run's workdir"
        )
    return from_hf(read_json(path), str(path))


def from_hf(raw: dict[str, Any], where: str = "config.json") -> QwenVLConfig:
    """The sizes in a Hugging Face config, whose text fields are nested (transformers 4.52 and later) or flat."""
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED:
        raise InputError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    text, vision = {**raw, **raw.get("text_config", {})}, raw.get("vision_config", {})
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    if text.get("use_sliding_window"):
        raise InputError(f"{where}: use_sliding_window is true; only full attention is supported")
    try:
        return _checked(_read(raw, text, vision, rope), where)
    except KeyError as error:
        raise InputError(f"{where} lacks the field {error.args[0]!r}, which {model_type} needs") from error


def _checked(c: QwenVLConfig, where: str) -> QwenVLConfig:
    """Raises InputError for sizes that do not fit together."""
    rules = {
        f"num_attention_heads {c.num_heads} is no multiple of num_key_value_heads {c.num_kv_heads}": c.num_heads
        % c.num_kv_heads,
        f"mrope_section {c.mrope_section} does not sum to half of head_dim {c.head_dim}": 2 * sum(c.mrope_section)
        - c.head_dim,
        f"vision out_hidden_size {c.vision.out_hidden_size} is not hidden_size {c.hidden_size}": c.hidden_size
        - c.vision.out_hidden_size,
        f"vision head_dim {c.vision.head_dim} is no multiple of 4": c.vision.head_dim % 4,
    }
    broken = [rule for rule, remainder in rules.items() if remainder]
    if broken:
        raise InputError(f"{where}: {'; '.join(broken)}")
    return c


def _read(raw: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], rope: dict[str, Any]) -> QwenVLConfig:
    heads = text["num_attention_heads"]
    return QwenVLConfig(
        vision=VisionConfig(
            depth=vision["depth"],
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_heads=vision["num_heads"],
            out_hidden_size=vision["out_hidden_size"],
            in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            spatial_merge_size=vision["spatial_merge_size"],
            window_size=vision["window_size"],
            full_attention_layers=tuple(vision["fullatt_block_indexes"]),
            tokens_per_second=vision["tokens_per_second"],
        ),
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or text.get("rope_theta", 1e6),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        image_token_id=raw["image_token_id"],
        video_token_id=raw["video_token_id"],
        initializer_range=text.get("initializer_range", 0.02),
    )
