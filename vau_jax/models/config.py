"""The sizes of a model, read from a Hugging Face config.json, and those of the published models."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vau_jax.files import InputError, read_json
from vau_jax.models.layers import ACTIVATIONS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


MOTION_FILE = "motion_prompt.json"  # beside a model's config: its Video Motion Prompt, where it has one


@dataclass(frozen=True)
class Motion:
    """The form of a Video Motion Prompt in front of the tower; see motion_prompt.py."""

    signed: bool = True
    order: str = "rgb"


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
    activation: str  # of the blocks' MLP, a name in layers.ACTIVATIONS
    gated: bool = False  # the MLP is a SwiGLU, and norms are RMS norms; else a plain MLP with layer norms
    patch_bias: bool = False
    window_size: int = 0  # pixels; 0: every layer attends to whole frames
    full_attention_layers: tuple[int, ...] = ()  # where there are windows, the layers that do not use them
    position_grid: int = 0  # rows and columns of the learned position table; 0: none
    deepstack_layers: tuple[int, ...] = ()  # layers whose output goes to the first decoder layers too
    tokens_per_second: float = 0.0  # M-RoPE time positions a second of video; 0: one a temporal patch
    image_mean: tuple[float, ...] = CLIP_MEAN  # of pixels in 0..1, by channel
    image_std: tuple[float, ...] = CLIP_STD
    motion: Motion | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class QwenVLConfig:
    vision: VisionConfig
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]  # frequencies that turn with time, height and width
    mrope_interleaved: bool  # the three alternate, instead of standing in three blocks
    qkv_bias: bool
    out_bias: bool  # of o_proj
    qk_norm: bool  # RMS norm of each head's query and key
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    initializer_range: float  # standard deviation of weights drawn at random

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """Tokens that stand for visual features, which a completion has none of."""
        return (self.image_token_id, self.video_token_id)

    @property
    def timestamps(self) -> bool:
        """A video is written as one image after the other, each after its time in text (Qwen3-VL)."""
        return self.model_type == "qwen3_vl"


def _qwen2(v: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": v["embed_dim"],
        "intermediate_size": int(v["embed_dim"] * v["mlp_ratio"]),
        "out_hidden_size": v["hidden_size"],
        "activation": v.get("hidden_act", "quick_gelu"),
    }


def _qwen2_5(v: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": v["hidden_size"],
        "intermediate_size": v["intermediate_size"],
        "out_hidden_size": v["out_hidden_size"],
        "activation": v.get("hidden_act", "silu"),
        "gated": True,
        "window_size": v["window_size"],
        "full_attention_layers": tuple(v["fullatt_block_indexes"]),
        "tokens_per_second": v["tokens_per_second"],
    }


def _qwen3(v: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": v["hidden_size"],
        "intermediate_size": v["intermediate_size"],
        "out_hidden_size": v["out_hidden_size"],
        "activation": v.get("hidden_act", "gelu_pytorch_tanh"),
        "patch_bias": True,
        "position_grid": round(v["num_position_embeddings"] ** 0.5),
        "deepstack_layers": tuple(v["deepstack_visual_indexes"]),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }


# What a family's vision config holds, by model_type.
FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
}


def load(folder: str | Path) -> QwenVLConfig:
    """Reads folder/config.json, and the pixel statistics of the image processor's config where it is there.

    Raises InputError when there is no config, or for a model_type that is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"model folder {folder} has no config.json: give a Hugging Face model folder or a run's workdir"
        )
    config = from_hf(read_json(path), str(path), processor_settings(folder, "image"))
    return with_motion(config, read_motion(folder))


def read_motion(folder: str | Path) -> Motion | None:
    """The form of a folder's motion prompt, None without one. Raises InputError for a damaged file."""
    path = Path(folder) / MOTION_FILE
    if not path.is_file():
        return None
    raw = read_json(path)
    try:
        return Motion(bool(raw["signed"]), str(raw["order"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks {error}: expected m, n, signed and order") from error


def with_motion(config: QwenVLConfig, motion: Motion | None) -> QwenVLConfig:
    """The same model with (or without) a Video Motion Prompt."""
    return replace(config, vision=replace(config.vision, motion=motion))


def processor_settings(folder: str | Path, kind: str) -> dict[str, Any]:
    """The config of the "image" or "video" processor in a folder, empty where there is none.

    transformers 5 writes both into one processor_config.json, earlier versions one file each.
    """
    own = Path(folder) / {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}[kind]
    both = Path(folder) / "processor_config.json"
    if own.is_file():
        return read_json(own)
    return (read_json(both).get(f"{kind}_processor") or {}) if both.is_file() else {}


def from_hf(raw: dict[str, Any], where: str = "config.json", processor: dict[str, Any] | None = None) -> QwenVLConfig:
    """The sizes in a Hugging Face config, whose text fields are nested (transformers 4.52 and later) or flat.

    `processor` is the image processor's config, of which image_mean and image_std are read.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    text, vision = {**raw, **raw.get("text_config", {})}, raw.get("vision_config", {})
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    if text.get("use_sliding_window"):
        raise InputError(f"{where}: use_sliding_window is true; only full attention is supported")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "mrope"):
        raise InputError(f"{where}: rope_type {rope_type!r} is not supported; supported: default, mrope")
    if text.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act {text['hidden_act']!r} is not supported; supported: silu")
    try:
        return _checked(_read(raw, text, _read_vision(model_type, vision, processor or {}), rope), where)
    except KeyError as error:
        raise InputError(f"{where} lacks the field {error.args[0]!r}, which {model_type} needs") from error


def _read_vision(model_type: str, raw: dict[str, Any], processor: dict[str, Any]) -> VisionConfig:
    statistics = {name: tuple(processor[name]) for name in ("image_mean", "image_std") if processor.get(name)}
    return VisionConfig(
        depth=raw["depth"],
        num_heads=raw["num_heads"],
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        patch_size=raw["patch_size"],
        temporal_patch_size=raw["temporal_patch_size"],
        spatial_merge_size=raw["spatial_merge_size"],
        **{**FAMILIES[model_type](raw), **statistics},
    )


def _read(raw: dict[str, Any], text: dict[str, Any], vision: VisionConfig, rope: dict[str, Any]) -> QwenVLConfig:
    heads, third = text["num_attention_heads"], raw["model_type"] == "qwen3_vl"
    bias = text.get("attention_bias", False)
    return QwenVLConfig(
        vision=vision,
        model_type=raw["model_type"],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or text.get("rope_theta", 5e5 if third else 1e6),
        mrope_section=tuple(rope.get("mrope_section", (24, 20, 20) if third else (16, 24, 24))),
        mrope_interleaved=third,
        qkv_bias=bias if third else True,
        out_bias=bias if third else False,
        qk_norm=third,
        tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        image_token_id=raw["image_token_id"],
        video_token_id=raw["video_token_id"],
        vision_start_token_id=raw["vision_start_token_id"],
        vision_end_token_id=raw["vision_end_token_id"],
        initializer_range=text.get("initializer_range", 0.02),
    )


def _checked(c: QwenVLConfig, where: str) -> QwenVLConfig:
    """Raises InputError for sizes that do not fit together."""
    v = c.vision
    rules = {
        f"num_attention_heads {c.num_heads} is no multiple of num_key_value_heads {c.num_kv_heads}": c.num_heads
        % c.num_kv_heads,
        f"mrope_section {c.mrope_section} does not sum to half of head_dim {c.head_dim}": 2 * sum(c.mrope_section)
        - c.head_dim,
        f"vision out_hidden_size {v.out_hidden_size} is not hidden_size {c.hidden_size}": c.hidden_size
        - v.out_hidden_size,
        f"vision hidden_size {v.hidden_size} is no multiple of num_heads {v.num_heads}": v.hidden_size % v.num_heads,
        f"vision head_dim {v.head_dim} is no multiple of 4": v.head_dim % 4,
        f"deepstack_visual_indexes {v.deepstack_layers} do not fit {v.depth} vision and {c.num_layers} text layers": (
            len(v.deepstack_layers) > c.num_layers or max(v.deepstack_layers, default=0) >= v.depth
        ),
        f"vision hidden_act {v.activation!r} is not one of {', '.join(ACTIVATIONS)}": v.activation not in ACTIVATIONS,
        f"vision hidden_act {v.activation!r} of a gated MLP is not silu": v.gated and v.activation != "silu",
    }
    broken = [rule for rule, remainder in rules.items() if remainder]
    if broken:
        raise InputError(f"{where}: {'; '.join(broken)}")
    return c


# --- Published sizes ----------------------------------------------------------------------------------------------

_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_VISION_2 = {"depth": 32, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
_VISION_2_5 = {
    "hidden_size": 1280,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "tokens_per_second": 2,
}


def _text(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, vocab_size: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
    }


def _size2(*text: Any) -> dict[str, Any]:
    vision = {**_VISION_2, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": text[0]}
    rope = {"type": "mrope", "mrope_section": (16, 24, 24), "rope_theta": 1e6}
    return {"model_type": "qwen2_vl", **_TOKENS, **_text(*text), "rope_parameters": rope, "vision_config": vision}


def _size2_5(vision_intermediate: int, *text: Any) -> dict[str, Any]:
    sizes = {"intermediate_size": vision_intermediate, "out_hidden_size": text[0]}
    vision = {**_VISION_2, **_VISION_2_5, **sizes}
    rope = {"type": "mrope", "mrope_section": (16, 24, 24), "rope_theta": 1e6}
    return {"model_type": "qwen2_5_vl", **_TOKENS, **_text(*text), "rope_parameters": rope, "vision_config": vision}


def _size3(vision: tuple[int, int, int, tuple[int, ...]], *text: Any) -> dict[str, Any]:
    depth, hidden, intermediate, deepstack = vision
    eyes = {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "num_heads": 16}
    eyes |= {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": text[0]}
    eyes |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack}
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": (24, 20, 20), "rope_theta": 5e6}
    sizes = {**_text(*text), "head_dim": 128, "rope_parameters": rope}
    tied = sizes["tie_word_embeddings"]
    return {
        "model_type": "qwen3_vl",
        **_TOKENS,
        "tie_word_embeddings": tied,
        "text_config": sizes,
        "vision_config": eyes,
    }


_SMALL_EYES = (24, 1024, 4096, (5, 11, 17))
_LARGE_EYES = (27, 1152, 4304, (8, 16, 24))

# config.json of the published checkpoints, the fields that decide sizes.
# hidden, intermediate, layers, heads, kv heads, vocabulary, tied
SIZES: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": _size2(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-vl-7b": _size2(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-vl-72b": _size2(8192, 29568, 80, 64, 8, 152064, False),
    "qwen2.5-vl-3b": _size2_5(3420, 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-vl-7b": _size2_5(3420, 3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-vl-32b": _size2_5(3456, 5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-vl-72b": _size2_5(3456, 8192, 29568, 80, 64, 8, 152064, False),
    "qwen3-vl-2b": _size3(_SMALL_EYES, 2048, 6144, 28, 16, 8, 151936, True),
    "qwen3-vl-4b": _size3(_SMALL_EYES, 2560, 9728, 36, 32, 8, 151936, True),
    "qwen3-vl-8b": _size3(_LARGE_EYES, 4096, 12288, 36, 32, 8, 151936, False),
    "qwen3-vl-32b": _size3(_LARGE_EYES, 5120, 25600, 64, 64, 8, 151936, False),
}


def named(size: str) -> QwenVLConfig:
    """The config of a published size, such as "qwen2.5-vl-3b". Raises InputError that lists them."""
    if size not in SIZES:
        raise InputError(f"model size {size!r} is unknown: expected one of {', '.join(SIZES)}")
    return from_hf(SIZES[size], size)
