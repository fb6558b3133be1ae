"""The sizes of a model, read from a Hugging Face config.json, and those of the published models."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, read_json
from vau_jax.models.layers import ACTIVATIONS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Far above any published model, and small enough that computations on a config are fast and fit in memory.
FILE_BYTES = 2**24  # size limit of a JSON file in a model folder
MOST_LAYERS = 1024
MOST_UNITS = 2**20  # heads, channels and hidden units
MOST_TOKENS = 2**24  # of a vocabulary
MOST_PIXELS = 2**40  # Qwen3-VL bounds a complete clip

MOTION_FILE = "motion_prompt.json"  # in a model folder: its Video Motion Prompt, where it has one
ORDERS = ("rgb", "bgr")  # of the colour channels


@dataclass(frozen=True)
class Motion:
    """Options of a Video Motion Prompt in front of the tower; see motion_prompt.py."""

    signed: bool = True
    order: str = "rgb"


@dataclass(frozen=True)
class VisionConfig:
    """The sizes of a vision tower."""

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
    """The sizes of a model, its tower's and its special tokens."""

    vision: VisionConfig | None  # None: a model of text alone
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
    mrope_section: tuple[int, ...]  # frequencies for time, height and width
    mrope_interleaved: bool  # the three alternate, instead of forming three blocks
    qkv_bias: bool
    out_bias: bool  # of o_proj
    qk_norm: bool  # RMS norm of each head's query and key
    tie_word_embeddings: bool
    initializer_range: float  # standard deviation of randomly initialised weights
    image_token_id: int | None = None  # these four are None without a vision tower
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """Tokens that represent visual features, which never occur in a completion."""
        return (self.image_token_id, self.video_token_id) if self.vision else ()

    @property
    def motion(self) -> Motion | None:
        """The Video Motion Prompt in front of the tower, None without one."""
        return self.vision.motion if self.vision else None

    @property
    def timestamps(self) -> bool:
        """A video is written as a sequence of images, each after its time as text (Qwen3-VL)."""
        return self.model_type == "qwen3_vl"


def _qwen2(v: Fields) -> dict[str, Any]:
    width = v.integer("embed_dim", 1, MOST_UNITS)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * v.number("mlp_ratio", 1 / width, 64)),
        "out_hidden_size": v.integer("hidden_size", 1, MOST_UNITS),
        "activation": v.word("hidden_act", ACTIVATIONS, "quick_gelu"),
    }


def _qwen2_5(v: Fields) -> dict[str, Any]:
    return {
        **_widths(v),
        "activation": v.word("hidden_act", ("silu",), "silu"),
        "gated": True,
        "window_size": v.integer("window_size", 1, 2**16),
        "full_attention_layers": v.integers("fullatt_block_indexes", 0, MOST_LAYERS, range(MOST_LAYERS)),
        "tokens_per_second": v.number("tokens_per_second", 1e-3, 1e3),
    }


def _qwen3(v: Fields) -> dict[str, Any]:
    entries = v.integer("num_position_embeddings", 1, 2**20)
    side = math.isqrt(entries)
    if side**2 != entries:
        raise InputError(f"{v.where}: num_position_embeddings={entries}: expected the square of a table's side")
    return {
        **_widths(v),
        "activation": v.word("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        "patch_bias": True,
        "position_grid": side,
        "deepstack_layers": v.integers("deepstack_visual_indexes", 0, MOST_LAYERS, range(MOST_LAYERS)),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }


def _widths(v: Fields) -> dict[str, int]:
    return {name: v.integer(name, 1, MOST_UNITS) for name in ("hidden_size", "intermediate_size", "out_hidden_size")}


# What a family's vision config holds, by model_type; None for models of text alone.
FAMILIES: dict[str, Callable[[Fields], dict[str, Any]] | None] = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen2": None,
    "qwen3": None,
}


def load(folder: str | Path) -> QwenVLConfig:
    """Reads folder/config.json, and the pixel statistics of the image processor's config where it is there.

    Raises InputError when there is no config, for a model_type that is not supported, and for a field that is absent,
    of another type or out of range, or does not fit the others.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"model folder {folder} has no config.json: give a Hugging Face model folder or a run's workdir"
        )
    config = _from_fields(Fields(read_json(path, FILE_BYTES), str(path)), processor_settings(folder, "image"))
    if config.vision:
        processor_settings(folder, "video").check_sizes(config.vision)
    return with_motion(config, read_motion(folder))


def read_motion(folder: str | Path) -> Motion | None:
    """The form of a folder's motion prompt, None without one. Raises InputError for a damaged file."""
    path = Path(folder) / MOTION_FILE
    if not path.is_file():
        return None
    fields = Fields(read_json(path, FILE_BYTES), str(path))
    return Motion(fields.flag("signed"), fields.word("order", ORDERS))


def with_motion(config: QwenVLConfig, motion: Motion | None) -> QwenVLConfig:
    """The same model with (or without) a Video Motion Prompt. Raises InputError where it has no vision tower for it."""
    if config.vision is None:
        if motion:
            raise InputError(f"a {config.model_type} model has no vision tower, which a Video Motion Prompt needs")
        return config
    return replace(config, vision=replace(config.vision, motion=motion))


@dataclass(frozen=True)
class ProcessorSettings:
    """The config of an image or video processor; an absent field is None, or here empty."""

    fields: Fields

    def pixels(self) -> dict[str, int | None]:
        """The least and most pixels, under the names of VideoOptions."""
        size, f = self.fields.object("size", {}), self.fields
        least = f.integer("min_pixels", 1, MOST_PIXELS, size.integer("shortest_edge", 1, MOST_PIXELS, None))
        most = f.integer("max_pixels", 1, MOST_PIXELS, size.integer("longest_edge", 1, MOST_PIXELS, None))
        if least and most and least > most:
            raise InputError(f"{f.where}: the least number of pixels, {least}, is above the most, {most}")
        return {"min_pixels": least, "max_pixels": most}

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """image_mean and image_std where present."""
        result = {
            "image_mean": self.fields.numbers("image_mean", 0, 1, (3,), ()),
            "image_std": self.fields.numbers("image_std", 1e-3, 1e3, (3,), ()),
        }
        return {name: values for name, values in result.items() if values}

    def check_sizes(self, vision: VisionConfig) -> None:
        """Raises InputError where the processor's patches differ from the model's."""
        ours = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
        for name, size in {**ours, "merge_size": vision.spatial_merge_size}.items():
            self.fields.integer(name, size, size, size)


def processor_settings(folder: str | Path, kind: str) -> ProcessorSettings:
    """The config of the "image" or "video" processor in a folder, empty where there is none.

    transformers 5 writes both into one processor_config.json, earlier versions one file each.
    """
    own = Path(folder) / {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}[kind]
    both = Path(folder) / "processor_config.json"
    if own.is_file():
        return ProcessorSettings(Fields(read_json(own, FILE_BYTES), str(own)))
    if both.is_file():
        return ProcessorSettings(Fields(read_json(both, FILE_BYTES), str(both)).object(f"{kind}_processor", {}))
    return ProcessorSettings(Fields({}, str(own)))


def from_hf(raw: dict[str, Any], where: str = "config.json") -> QwenVLConfig:
    """The sizes in a Hugging Face config, whose text fields are nested (transformers 4.52 and later) or flat."""
    return _from_fields(Fields(raw, where), ProcessorSettings(Fields({}, where)))


def _from_fields(config: Fields, processor: ProcessorSettings) -> QwenVLConfig:
    model_type = config.raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{config.where}: model_type {reprlib.repr(model_type)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    read = FAMILIES[model_type]
    vision = _read_vision(config.object("vision_config"), read, processor) if read else None
    text = Fields({**config.raw, **config.object("text_config", {}).raw}, config.where)
    if text.flag("use_sliding_window", False):
        raise InputError(f"{config.where}: use_sliding_window is true; only full attention is supported")
    scaling, parameters = text.object("rope_scaling", {}), text.object("rope_parameters", {})
    rope = Fields({**scaling.raw, **parameters.raw}, parameters.where if parameters.raw else scaling.where)
    for name in ("rope_type", "type"):
        rope.word(name, ("default", "mrope"), "default")
    text.word("hidden_act", ("silu",), "silu")
    return _checked(_read(config, text, vision, rope), config.where)


def _read_vision(v: Fields, read: Callable[[Fields], dict[str, Any]], processor: ProcessorSettings) -> VisionConfig:
    for name in ("in_channels", "in_chans"):
        v.integer(name, 3, 3, 3)  # frames are RGB
    vision = VisionConfig(
        depth=v.integer("depth", 1, MOST_LAYERS),
        num_heads=v.integer("num_heads", 1, MOST_UNITS),
        in_channels=3,
        patch_size=v.integer("patch_size", 1, 256),
        temporal_patch_size=v.integer("temporal_patch_size", 1, 64),
        spatial_merge_size=v.integer("spatial_merge_size", 1, 16),
        **{**read(v), **processor.statistics()},
    )
    processor.check_sizes(vision)
    return vision


def _read(config: Fields, text: Fields, vision: VisionConfig | None, rope: Fields) -> QwenVLConfig:
    third = config.raw["model_type"] in ("qwen3_vl", "qwen3")
    heads = text.integer("num_attention_heads", 1, MOST_UNITS)
    width = text.integer("hidden_size", 1, MOST_UNITS)
    head_dim = text.integer("head_dim", 2, MOST_UNITS, 128 if third and not vision else width // heads)
    vocab = text.integer("vocab_size", 1, MOST_TOKENS)
    bias = text.flag("attention_bias", False)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    theta, section = (5e5, (24, 20, 20)) if third else (1e6, (16, 24, 24))
    if vision is None:  # where a token's three positions are equal, M-RoPE is RoPE, whatever the sections
        theta, section = 1e4, (head_dim // 2, 0, 0)
    return QwenVLConfig(
        vision=vision,
        model_type=config.raw["model_type"],
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=text.integer("intermediate_size", 1, MOST_UNITS),
        num_layers=text.integer("num_hidden_layers", 1, MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=text.integer("num_key_value_heads", 1, heads, heads),
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", 1e-12, 1e-1),
        rope_theta=rope.number("rope_theta", 1, 1e12, text.number("rope_theta", 1, 1e12, theta)),
        mrope_section=rope.integers("mrope_section", 0, MOST_UNITS, (3,), section) if vision else section,
        mrope_interleaved=third and vision is not None,
        qkv_bias=bias if third else True,
        out_bias=bias if third else False,
        qk_norm=third,
        tie_word_embeddings=config.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False)),
        initializer_range=text.number("initializer_range", 0, 1, 0.02),
        **{name: config.integer(name, 0, vocab - 1) for name in (tokens if vision else ())},
    )


def _checked(c: QwenVLConfig, where: str) -> QwenVLConfig:
    """Raises InputError for sizes that do not fit together."""
    broken_where = {
        f"num_attention_heads {c.num_heads} is not a multiple of num_key_value_heads {c.num_kv_heads}": c.num_heads
        % c.num_kv_heads,
        f"mrope_section {c.mrope_section} does not sum to half of head_dim {c.head_dim}": 2 * sum(c.mrope_section)
        - c.head_dim,
        **(_checked_vision(c, c.vision) if c.vision else {}),
    }
    broken = [rule for rule, is_broken in broken_where.items() if is_broken]
    if broken:
        raise InputError(f"{where}: {'; '.join(broken)}")
    return c


def _checked_vision(c: QwenVLConfig, v: VisionConfig) -> dict[str, Any]:
    """Rules that the sizes of the tower may break -> whether they do."""
    unit = v.patch_size * v.spatial_merge_size
    layers = f"do not fit {v.depth} vision and {c.num_layers} text layers, each once and in order"
    deep = v.deepstack_layers
    return {
        f"vision out_hidden_size {v.out_hidden_size} is not hidden_size {c.hidden_size}": c.hidden_size
        - v.out_hidden_size,
        f"vision hidden_size {v.hidden_size} is not a multiple of num_heads {v.num_heads}": v.hidden_size % v.num_heads,
        f"vision head_dim {v.head_dim} is not a multiple of 4": v.head_dim % 4,
        f"window_size {v.window_size} is smaller than {unit}, a merged patch": 0 < v.window_size < unit,
        f"fullatt_block_indexes {v.full_attention_layers} do not fit {v.depth} vision layers": max(
            v.full_attention_layers, default=0
        )
        >= v.depth,
        f"deepstack_visual_indexes {deep} {layers}": len(deep) > c.num_layers
        or max(deep, default=0) >= v.depth
        or sorted(set(deep)) != list(deep),
        "image_token_id and video_token_id are the same": c.image_token_id == c.video_token_id,
    }


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


SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def published_name(raw: Mapping[str, Any]) -> str:
    """The name of the published checkpoint, such as Qwen2.5-VL-3B, whose sizes a config.json has; empty for none."""
    for size, known in SIZES.items():
        text, found = (config.get("text_config", config) for config in (known, raw))
        alike = all(found.get(name) == text[name] for name in (*SIZE_FIELDS, "vocab_size"))
        eyes = raw.get("vision_config", {})
        if (
            alike
            and raw.get("model_type") == known["model_type"]
            and eyes.get("depth") == known["vision_config"]["depth"]
        ):
            return size.replace("qwen", "Qwen").replace("vl", "VL").replace("b", "B")
    return ""
