"""Messages and frames to model inputs: tokens, M-RoPE positions, patches and their groups, all computed on the host.

The model never computes an integer itself: every index it needs comes from here, with static shapes.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, read_json
from vau_jax.data import chat_template
from vau_jax.data.groups import group_numbers
from vau_jax.data.shapes import Shape, Size, batch_shape
from vau_jax.data.stop_strings import token_bytes
from vau_jax.data.video import clips
from vau_jax.data.video.clips import Clip, Probe, Sampling, VideoOptions
from vau_jax.data.video.decoders import VideoError
from vau_jax.models import config as model_config
from vau_jax.models.config import FILE_BYTES, VisionConfig
from vau_jax.models.config import Motion as MotionConfig
from vau_jax.types import Batch, Groups, Motion, Vision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]


@dataclass(frozen=True)
class Visual:
    """One clip or image as patches."""

    patches: np.ndarray  # uint8 [P, patch_dim]
    grid: tuple[int, int, int]  # merged units: temporal patches, rows, columns
    time_step: float = 1.0  # M-RoPE time positions from one temporal patch to the next
    times: tuple[float, ...] | None = None  # seconds at the middle of each temporal patch; None: a still image
    before: np.ndarray | None = None  # uint8 [P, patch_dim]: the same one frame earlier, for a motion prompt
    goes_on: bool = False  # the next temporal patch of the same clip as the previous visual

    @property
    def token_count(self) -> int:
        return int(np.prod(self.grid))


@dataclass(frozen=True)
class Encoded:
    """One prompt, not padded."""

    tokens: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [3, T]
    visual_index: np.ndarray  # int32 [T]
    visuals: list[Visual]

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1

    @property
    def size(self) -> Size:
        return Size(len(self.tokens), tuple(visual.grid for visual in self.visuals))


# --- Frames to patches --------------------------------------------------------------------------------------------


def patchify(frames: np.ndarray, config: VisionConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [F, H, W, 3] to patches uint8 [P, patch_dim] and the grid of merged units.

    Patches come in Hugging Face's order: temporal patch, merged row, merged column, then the merge^2 patches of a
    unit; inside a patch channel, frame, row, column. A last incomplete temporal patch repeats the last frame.
    """
    size, depth, merge = config.patch_size, config.temporal_patch_size, config.spatial_merge_size
    if pad := -len(frames) % depth:
        frames = np.concatenate([frames, frames[-1:].repeat(pad, axis=0)])
    count, height, width, channels = frames.shape
    t, h, w = count // depth, height // (size * merge), width // (size * merge)
    blocks = frames.reshape(t, depth, h, merge, size, w, merge, size, channels)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t h w mh mw c depth size size
    return np.ascontiguousarray(blocks).reshape(t * h * w * merge**2, -1), (t, h, w)


def patch_positions(grid: tuple[int, int, int], merge: int) -> np.ndarray:
    """int32 [P, 2]: row and column of each patch in its frame, in patch order."""
    t, h, w = grid
    rows, cols = np.meshgrid(np.arange(h * merge), np.arange(w * merge), indexing="ij")
    order = np.stack([rows, cols], -1).reshape(h, merge, w, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return np.tile(order, (t, 1)).astype(np.int32)


def patch_groups(grid: tuple[int, int, int], config: VisionConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(frames, windows): int32 patch numbers of each temporal patch, and of each attention window (none without)."""
    t, h, w = grid
    merge = config.spatial_merge_size
    units = np.arange(t * h * w * merge**2, dtype=np.int32).reshape(t, h, w, merge**2)
    if not config.window_size:
        return list(units.reshape(t, -1)), []
    side = config.window_size // merge // config.patch_size  # merged units
    windows = [
        units[i, y : y + side, x : x + side].reshape(-1)
        for i in range(t)
        for y in range(0, h, side)
        for x in range(0, w, side)
    ]
    return list(units.reshape(t, -1)), windows


def table_corners(grid: tuple[int, int, int], config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """int32 [P, 4] and float32 [P, 4]: the position of each patch in the learned position table.

    The table's corners are the frame's; a patch between entries takes its four neighbours' by bilinear shares.
    """
    side, sizes = config.position_grid, np.asarray(grid[1:]) * config.spatial_merge_size
    positions = patch_positions(grid, config.spatial_merge_size).astype(np.float32)
    place = positions * np.float32(side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)  # [P, 2]
    low = np.floor(place).astype(np.int32)
    high_share = place - low
    ends = np.stack([low, np.minimum(low + 1, side - 1)])  # [2, P, 2]
    shares = np.stack([1 - high_share, high_share])
    index = ends[:, None, :, 0] * side + ends[None, :, :, 1]  # [2, 2, P]
    weights = shares[:, None, :, 0] * shares[None, :, :, 1]
    return index.reshape(4, -1).T.astype(np.int32), weights.reshape(4, -1).T.astype(np.float32)


def encode_visual(
    frames: np.ndarray,
    config: VisionConfig,
    seconds_per_frame: float | None = None,
    times: np.ndarray | None = None,
) -> Visual:
    """Patches of a clip whose frames are at `times` [F] seconds, or of a still image without `seconds_per_frame`.

    For a model with a motion prompt the first frame only serves to compute the motion of the second; it has no patches.
    """
    before = None
    if config.motion and seconds_per_frame is not None:
        before, _ = patchify(frames[:-1], config)
        frames, times = frames[1:], np.arange(1, len(frames)) * seconds_per_frame if times is None else times[1:]
    patches, grid = patchify(frames, config)
    if seconds_per_frame is None:
        return Visual(patches, grid)
    depth = config.temporal_patch_size
    stamps = seconds_per_frame * np.arange(len(frames)) if times is None else times
    step = config.tokens_per_second * depth * seconds_per_frame if config.tokens_per_second else 1.0
    return Visual(patches, grid, step, _middles(stamps, depth), before)


def _middles(stamps: np.ndarray, depth: int) -> tuple[float, ...]:
    """The middle of each temporal patch of `depth` frames, of which the last may lack some."""
    stamps = np.pad(stamps, (0, -len(stamps) % depth), mode="edge")
    return tuple(((stamps[::depth] + stamps[depth - 1 :: depth]) / 2).tolist())


def one_by_one(visual: Visual) -> list[Visual]:
    """A clip as its temporal patches, one still image each."""
    t, h, w = visual.grid
    befores = [None] * t if visual.before is None else np.split(visual.before, t)
    parts = zip(np.split(visual.patches, t), befores, strict=True)
    return [Visual(p, (1, h, w), before=b, goes_on=i > 0) for i, (p, b) in enumerate(parts)]


# --- Tokens and positions -----------------------------------------------------------------------------------------


def mrope_positions(is_visual: np.ndarray, visuals: Sequence[Visual]) -> np.ndarray:
    """int32 [3, T]: time, row and column of every token, as transformers' `get_rope_index` gives them.

    Text advances all three by one. A visual token has its temporal patch times the clip's time step (truncated), its
    row and its column, counted from the start of the visual. The text after it starts max(rows, columns) later.
    """
    parts, start, at, remaining = [], 0, 0, iter(visuals)
    while at < len(is_visual):
        if not is_visual[at]:
            length = int(np.argmax(is_visual[at:])) if is_visual[at:].any() else len(is_visual) - at
            parts.append(np.tile(np.arange(length) + start, (3, 1)))
            start, at = start + length, at + length
            continue
        visual = next(remaining)
        t, h, w = visual.grid
        times = (np.arange(t) * np.float32(visual.time_step)).astype(np.int64)
        grid = np.meshgrid(times, np.arange(h), np.arange(w), indexing="ij")
        parts.append(np.stack(grid).reshape(3, -1) + start)
        start, at = start + max(h, w), at + visual.token_count
    return np.concatenate(parts, axis=1).astype(np.int32)


TOKENIZER = "tokenizer.json"
TOKENIZER_BYTES = 2**26  # six times that of Qwen3-VL
TEMPLATE_BYTES = 2**20
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)  # read by transformers too


def _tokenizer(folder: Path, config: model_config.QwenVLConfig) -> "PreTrainedTokenizerFast":
    """A folder's tokenizer. Raises InputError for a damaged one, and for one that does not match the model."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise InputError(f"model folder {folder} has no {TOKENIZER}: copy the tokenizer files beside the weights")
    if path.stat().st_size > TOKENIZER_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes, expected at most {TOKENIZER_BYTES}")
    for name in SETTINGS:
        if (folder / name).exists():
            settings = Fields(read_json(folder / name, FILE_BYTES), str(folder / name))
            if "fast_tokenizer_files" in settings.raw:
                raise InputError(f"{settings.where}: fast_tokenizer_files names other files to read: take it out")
    for template in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        if not template.is_file() or template.stat().st_size > TEMPLATE_BYTES:
            raise InputError(f"{template} is not a chat template: expected a file of at most {TEMPLATE_BYTES} bytes")
    # tokenizer.json is complete; AutoTokenizer would import PyTorch where it is installed.
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - slow to import: mistakes are reported before

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), model_max_length=sys.maxsize)
        tokenizer("a", add_special_tokens=False)  # settings of a wrong type fail on use
        largest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # a damaged file can raise anything in the libraries
        raise InputError(f"cannot read the tokenizer of {folder}: {' '.join(str(error).split())[:300]}") from error
    if largest >= config.vocab_size:
        raise InputError(f"{path} has token {largest}, but config.json: vocab_size={config.vocab_size}")
    marks = [config.vision_start_token_id, config.vision_end_token_id, *config.never_sampled] if config.vision else []
    if absent := [mark for mark, token in zip(marks, tokenizer.convert_ids_to_tokens(marks), strict=True) if not token]:
        raise InputError(f"{path} lacks the tokens {absent}, which config.json names for images and videos")
    return tokenizer


class Processor:
    """Everything in a model folder except the weights: sizes, tokenizer, chat template, pixel budgets."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Raises InputError for a folder without config or tokenizer."""
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):  # pathlib's raises for names that no file system takes
            raise InputError(f"model folder {folder} does not exist (config.model)")
        self.config = model_config.load(folder)
        self.tokenizer = _tokenizer(self.folder, self.config)
        self.image_options, self.video_options = self._pixel_budgets() if self.config.vision else (VideoOptions(),) * 2
        self.end_tokens = self._end_tokens()
        self.read_video = clips.read  # or that of a decode_worker.DecoderPool, for untrusted files

    def _pixel_budgets(self) -> tuple[VideoOptions, VideoOptions]:
        """Default sampling of images and videos."""
        tokens = self.factor**2  # pixels of one visual token
        image, clip = VideoOptions(min_pixels=4 * tokens, max_pixels=1280 * tokens), VideoOptions()
        if self.config.timestamps:  # Qwen3-VL bounds a clip as a whole
            image = VideoOptions(min_pixels=64 * tokens, max_pixels=16384 * tokens)
            clip = VideoOptions(min_pixels=4096, max_pixels=24576 * tokens, per_clip=True)

        def within(kind: str, default: VideoOptions) -> VideoOptions:
            return VideoOptions.from_item(model_config.processor_settings(self.folder, kind).pixels(), default)

        return within("image", image), within("video", clip)

    def _end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a completion: generation_config.json's, or the tokenizer's end token."""
        path, most = self.folder / "generation_config.json", self.config.vocab_size - 1
        fields = Fields(read_json(path, FILE_BYTES) if path.is_file() else {}, str(path))
        if isinstance(fields.raw.get("eos_token_id"), list):
            return fields.integers("eos_token_id", 0, most, range(1, 65))
        last = fields.integer("eos_token_id", 0, most, self.tokenizer.eos_token_id)
        if last is None:
            raise InputError(f"{self.folder} names no end token (generation_config.json or tokenizer_config.json)")
        return (last,)

    @property
    def repetition_penalty(self) -> float:
        """That of generation_config.json, with which transformers decodes by itself; 1 without."""
        path = self.folder / "generation_config.json"
        fields = Fields(read_json(path, FILE_BYTES) if path.is_file() else {}, str(path))
        return fields.number("repetition_penalty", 0.01, 100.0, 1.0)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token id; ids without a token have none."""
        return token_bytes(self.tokenizer, self.config.vocab_size)

    @property
    def vision(self) -> VisionConfig:
        """Sizes of the vision tower. Raises InputError for a model without one."""
        if self.config.vision is None:
            raise InputError(
                f"{self.folder} is a {self.config.model_type} model, which reads text alone: give it examples without "
                "images and videos, or choose a Qwen-VL model"
            )
        return self.config.vision

    @property
    def factor(self) -> int:
        """Frame sides are multiples of this, in pixels."""
        return self.vision.patch_size * self.vision.spatial_merge_size

    def sampling(self, options: VideoOptions) -> Sampling:
        """How videos are read for this model."""
        lead = 1 if self.motion else 0
        return Sampling(replace(options, lead=lead), self.factor, self.vision.temporal_patch_size)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Chat messages to one prompt that ends where the assistant's turn begins; items: see `VideoLM.encode`."""
        visuals = []
        for message in messages:
            content = message["content"]
            for item in content if not isinstance(content, str) else ():
                if item["type"] == "video":
                    visuals.append(self._video(item))
                elif item["type"] == "image":
                    visuals.append(self._image(item))
                elif item["type"] != "text":
                    raise InputError(f"content type {item['type']!r} is unknown: expected text, image or video")
        return self.encode_text(self.chat_text(messages), visuals)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Messages formatted by the folder's chat template, up to where the assistant's turn begins.

        Raises InputError for a folder without a template, and for one that is invalid or does not end.
        """
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise InputError(
                f"model folder {self.folder} has no chat template: copy chat_template.jinja or tokenizer_config.json "
                "beside the weights"
            )
        values = {"tools": None, "documents": None, "add_generation_prompt": True}
        values |= {**self.tokenizer.special_tokens_map, "messages": _without_data(messages)}
        return chat_template.render(template, values, f"model folder {self.folder}")

    @property
    def motion(self) -> MotionConfig | None:
        """The model's motion prompt, None without one."""
        return self.config.motion

    @property
    def patches_per_token(self) -> int:
        """Patches that become one visual token."""
        return self.vision.spatial_merge_size**2

    def collate(
        self, rows: Sequence[Encoded], shape: Shape | None = None, pad_token: int = 0, left: bool = False
    ) -> Batch:
        """Encoded prompts as a batch, see `collate`."""
        return collate(rows, self.config.vision, shape, pad_token, left)

    def decode_completions(self, tokens: np.ndarray, mask: np.ndarray) -> list[list[str]]:
        """The texts of completions [B, G, C], without end and padding tokens."""
        keep = (mask & ~np.isin(tokens, self.end_tokens)).reshape(-1, tokens.shape[-1])
        flat = [row[real].tolist() for row, real in zip(tokens.reshape(keep.shape), keep, strict=True)]
        texts = self.tokenizer.batch_decode(flat, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [texts[i : i + tokens.shape[1]] for i in range(0, len(texts), tokens.shape[1])]

    def encode_text(self, text: str, visuals: list[Visual]) -> Encoded:
        """A formatted prompt, with one pad token for each visual."""
        ids, pads, visuals = self._tokens(text, visuals)
        repeats = np.ones(len(ids), np.int64)
        repeats[pads] = [visual.token_count for visual in visuals]
        is_visual = pads.repeat(repeats)
        index = np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32)
        return Encoded(ids.repeat(repeats), mrope_positions(is_visual, visuals), index, visuals)

    def size_of_text(self, text: str, visuals: list[Visual]) -> Size:
        """The size of what `encode_text` gives."""
        ids, _, visuals = self._tokens(text, visuals)
        tokens = len(ids) + sum(visual.token_count - 1 for visual in visuals)
        return Size(tokens, tuple(visual.grid for visual in visuals))

    def _tokens(self, text: str, visuals: list[Visual]) -> tuple[np.ndarray, np.ndarray, list[Visual]]:
        """The tokens of a formatted prompt int32 [T], which of them stand for a visual, and the visuals."""
        if self.config.timestamps:
            text, visuals = self._with_timestamps(text, visuals)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        pads = np.isin(ids, self.config.never_sampled)
        if pads.sum() != len(visuals):
            raise InputError(f"the prompt has {pads.sum()} places for images or videos, but {len(visuals)} were given")
        return ids, pads, visuals

    def _with_timestamps(self, text: str, visuals: list[Visual]) -> tuple[str, list[Visual]]:
        """Writes every clip as a sequence of frames, each after its time: `<1.5
        seconds><|vision_start|>...<|vision_end|>`.

        As Qwen3-VL was released (transformers 4.57): the sequence replaces the clip's own start and end marks.
        """
        start, pad, end = self.tokenizer.convert_ids_to_tokens(
            [self.config.vision_start_token_id, self.config.video_token_id, self.config.vision_end_token_id]
        )
        before, *after = text.split(pad)
        clips = [visual for visual in visuals if visual.times is not None]
        if len(after) != len(clips):
            raise InputError(f"the prompt has {len(after)} places for videos, but {len(clips)} were given")
        parts = [before]
        for clip, rest in zip(clips, after, strict=True):
            row = "".join(f"<{seconds:.1f} seconds>{start}{pad}{end}" for seconds in clip.times)
            if parts[-1].endswith(start) and rest.startswith(end):
                parts[-1], rest = parts[-1].removesuffix(start), rest.removeprefix(end)
            parts += [row, rest]
        stills = [still for v in visuals for still in ([v] if v.times is None else one_by_one(v))]
        return "".join(parts), stills

    def _video(self, item: Message) -> Visual:
        options = VideoOptions.from_item(item, self.video_options)
        source = item["video"]
        if isinstance(source, str | os.PathLike):
            sampling = self.sampling(options)
            with _as_input():
                clip = self.read_video(source, sampling.options, sampling.factor, sampling.multiple)
        else:
            frames = _checked_frames(np.asarray(source), 4, "video")
            depth = self.vision.temporal_patch_size
            with _as_input():
                size = clips.frame_size(*frames.shape[1:3], len(frames), options, self.factor, depth)
            resized = clips.resize(frames, *size)
            if self.motion:
                resized = np.concatenate([resized[:1], resized])  # nothing moves in the first of given frames
            clip = Clip(resized, 1.0 / options.fps)
        return self.encode_clip(clip)

    def encode_clip(self, clip: Clip) -> Visual:
        """The patches of a decoded clip."""
        return encode_visual(clip.frames, self.vision, clip.seconds_per_frame, clip.times)

    def without_pixels(self, video: Probe, options: VideoOptions) -> Visual:
        """A video as `encode_clip` will have it, but for its pixels. Raises VideoError for one that has no size."""
        sampling, depth = self.sampling(options), self.vision.temporal_patch_size
        count = clips.frame_count(video.duration, round(video.duration * video.fps), options, depth)
        height, width = clips.frame_size(video.height, video.width, count, options, self.factor, depth)
        grid = -(-count // depth), height // self.factor, width // self.factor
        stamps = np.arange(count) * video.duration / (count + sampling.options.lead)
        patches = np.empty((math.prod(grid) * self.patches_per_token, 0), np.uint8)
        return Visual(patches, grid, times=_middles(stamps, depth))

    def _image(self, item: Message) -> Visual:
        source = item["image"]
        if isinstance(source, str | os.PathLike):
            with _as_input():
                source = clips.read_image(source)
        frame = _checked_frames(np.asarray(source), 3, "image")[None]
        options = VideoOptions.from_item(item, self.image_options)
        with _as_input():
            size = clips.frame_size(*frame.shape[1:3], 1, options, self.factor, 1)
        return encode_visual(clips.resize(frame, *size), self.vision)


@contextmanager
def _as_input() -> Iterator[None]:
    """Turns a VideoError into an InputError: here the user named the file."""
    try:
        yield
    except VideoError as error:
        raise InputError(str(error)) from error


def _checked_frames(frames: np.ndarray, rank: int, what: str) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != rank or frames.shape[-1] != 3 or 0 in frames.shape:
        shape = "[F, H, W, 3]" if rank == 4 else "[H, W, 3]"
        raise InputError(f"a {what} is a path or uint8 {shape}, found {frames.dtype} {list(frames.shape)}")
    return frames


def _without_data(messages: Sequence[Message]) -> list[Message]:
    """The messages as input of a chat template: content items by type, without frames."""
    plain = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [item if item["type"] == "text" else {"type": item["type"]} for item in content]
        filled = {name: value for name, value in message.items() if value is not None}
        plain.append({**filled, "content": content})
    return plain


# --- Padding to batches -------------------------------------------------------------------------------------------


def collate(
    rows: Sequence[Encoded],
    config: VisionConfig | None,
    shape: Shape | None = None,
    pad_token: int = 0,
    left: bool = False,
) -> Batch:
    """Pads prompts to one batch of `shape`, which is large enough (None: the least rounded shape). Padding tokens come
    after the prompt, or before it when `left`."""
    shape = shape or batch_shape([row.size for row in rows], config)
    count = len(rows)
    tokens = np.full((count, shape.tokens), pad_token, np.int32)
    mask = np.zeros((count, shape.tokens), bool)
    positions = np.zeros((count, 3, shape.tokens), np.int32)
    index = np.full((count, shape.tokens), -1, np.int32)
    for b, row in enumerate(rows):
        length = len(row.tokens)
        place = slice(shape.tokens - length, None) if left else slice(0, length)
        tokens[b, place], mask[b, place] = row.tokens, True
        positions[b, :, place], index[b, place] = row.positions, row.visual_index
    next_position = np.asarray([row.next_position for row in rows], np.int32)
    vision = _collate_vision(rows, config, shape) if shape.patches else None
    return Batch(tokens, mask, positions, index, next_position, vision)


def _collate_vision(rows: Sequence[Encoded], config: VisionConfig, shape: Shape) -> Vision:
    count, unit = len(rows), config.spatial_merge_size**2
    total = -(-shape.patches // unit) * unit
    patches = np.zeros((count, total, config.in_channels * config.temporal_patch_size * config.patch_size**2), np.uint8)
    vision = Vision(
        patches=patches,
        positions=np.zeros((count, total, 2), np.int32),
        frames=_empty_groups(count, total, shape.frames, shape.frame_size),
        windows=_empty_groups(count, total, shape.windows, shape.window_size) if config.window_size else None,
        corners=np.zeros((count, total, 4), np.int32) if config.position_grid else None,
        corner_weights=np.zeros((count, total, 4), np.float32) if config.position_grid else None,
        motion=_no_motion(patches) if config.motion else None,
    )
    for b, row in enumerate(rows):
        at, all_frames, all_windows = 0, [], []
        for visual in row.visuals:
            place = slice(at, at + len(visual.patches))
            frames, windows = patch_groups(visual.grid, config)
            all_frames += [patches + at for patches in frames]
            all_windows += [patches + at for patches in windows]
            vision.patches[b, place] = visual.patches
            vision.positions[b, place] = patch_positions(visual.grid, config.spatial_merge_size)
            if vision.corners is not None:
                vision.corners[b, place], vision.corner_weights[b, place] = table_corners(visual.grid, config)
            if vision.motion is not None and visual.before is not None:
                vision.motion.before[b, place], vision.motion.moves[b, place] = visual.before, True
            at = place.stop
        _fill_groups(vision.frames, b, all_frames)
        if vision.windows is not None:
            _fill_groups(vision.windows, b, all_windows)
        if vision.motion is not None:
            _link(vision.motion.following[b], row.visuals)
    return vision


def _no_motion(patches: np.ndarray) -> Motion:
    count, total, _ = patches.shape
    none = np.full((count, total), total, np.int32)
    return Motion(np.zeros_like(patches), np.zeros((count, total), bool), none)


def _link(following: np.ndarray, visuals: Sequence[Visual]) -> None:
    """Writes for every patch of a row's clips the patch at the same position one temporal patch later."""
    at = 0
    for visual in visuals:
        size = len(visual.patches) // visual.grid[0]
        if visual.before is not None:
            first = at - size if visual.goes_on else at
            linked = np.arange(first, at + len(visual.patches) - size)
            following[linked] = linked + size
        at += len(visual.patches)


def _empty_groups(count: int, patches: int, groups: int, size: int) -> Groups:
    whole = count, groups, size
    return Groups(
        members=np.full(whole, patches, np.int32),
        segments=np.full(whole, -1, np.int32),
        slots=np.zeros((count, patches), np.int32),
    )


def _fill_groups(groups: Groups, b: int, segments: Sequence[np.ndarray]) -> None:
    """Writes the segments of a row, each the numbers of its patches."""
    _, count, size = groups.members.shape
    used, held = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for group, patches in zip(group_numbers(map(len, segments), size), segments, strict=True):
        place = slice(used[group], used[group] + len(patches))
        groups.members[b, group, place], groups.segments[b, group, place] = patches, held[group]
        groups.slots[b, patches] = group * size + np.arange(place.start, place.stop)
        used[group], held[group] = place.stop, held[group] + 1
