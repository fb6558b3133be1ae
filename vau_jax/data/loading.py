"""One example as a prompt: its video's frames as patches, the question as tokens, and what the right answer weighs.

Everything random about an example comes from the generator that its loader is given.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vau_jax.data.processor import Encoded, Message, Processor, Visual
from vau_jax.data.shapes import Size
from vau_jax.data.video import clips
from vau_jax.data.video.clips import Clip, Probe, VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.data.video.frame_cache import FrameCache
from vau_jax.tasks import TASKS, prompts
from vau_jax.tasks.example import Example

GREY = 128
EASY, HARD = "easy", "hard"


class Prompt(NamedTuple):
    """The prompt of an example, as text and encoded."""

    prompt: str
    encoded: Encoded
    messages: list[Message]
    visuals: list[Visual]


@dataclass(frozen=True)
class Loaded:
    """An example with sampled frames and encoded prompt."""

    example: Example  # with its choices in the order shown
    prompt: str
    encoded: Encoded
    target_tokens: np.ndarray  # int32 [C]
    target_weights: np.ndarray  # float32 [C]
    failure: str | None  # why the video could not be used: it has grey frames and weight 0 in the loss
    reason: str = ""  # the same in a word, for counting
    damage: str = ""  # undecodable parts of a video that is used
    cached: bool = False  # the frames came from the cache
    seconds: float = 0.0  # length of the clip
    variants: dict[str, Prompt] = field(default_factory=dict)  # other prompts, by the level of difficulty they are for
    messages: list[Message] = field(default_factory=list)  # the prompt as chat messages, to go on from
    visuals: list[Visual] = field(default_factory=list)  # of its videos
    shape_number: int = 0  # the planned shape that its batch is expected to have


@dataclass
class Loader:
    """Loads an example as `Loaded`; `rng` decides shuffling and augmentation, and nothing else does."""

    processor: Processor
    config: ConfigDict
    cache: FrameCache
    augment: bool
    blind: bool = False
    text: str = ""  # asked of every example instead of its task's prompt

    def __post_init__(self) -> None:
        self.templates = prompts.load_templates(self.config.templates)

    def __call__(self, example: Example, rng: np.random.Generator) -> Loaded:
        videos, cached, failure = self._clips(example)
        example = in_order(example, rng, self.config.shuffle_options)
        if self.augment and not failure:
            videos = [augment(clip, rng) for clip in videos]
        if self.blind:
            videos = [replace(clip, frames=np.full_like(clip.frames, GREY)) for clip in videos]
        visuals = [self.processor.encode_clip(clip) for clip in videos]
        asked = self._prompt(example, visuals)
        tokens, weights = self._target(example)
        return Loaded(
            example=example,
            prompt=asked.prompt,
            encoded=asked.encoded,
            messages=asked.messages,
            visuals=asked.visuals,
            target_tokens=tokens,
            target_weights=weights * (failure is None),
            failure=str(failure) if failure else None,
            reason=failure.reason if failure else "",
            damage="; ".join(clip.damage for clip in videos if clip.damage),
            cached=cached,
            seconds=sum(clip.duration for clip in videos),
            variants=self._variants(example, videos, visuals, rng) if self.config.difficulty.enabled else {},
        )

    def size(self, example: Example) -> Size | None:
        """The size that its prompt will have by what is known of its video; None where that is nothing, or of several
        videos."""
        known = [example.meta.get(name) for name in ("duration", "fps", "width", "height")]
        if example.media and not (len(example.media) == 1 and all(known)):
            return None
        options = video_options(self.config, self.processor.video_options) if example.media else None
        try:
            visuals = [self.processor.without_pixels(Probe(*known), options) for _ in example.media]
        except VideoError:
            return None
        _, prompt = self._asked(example, len(visuals))
        return self.processor.size_of_text(prompt, visuals)

    def _prompt(self, example: Example, visuals: list[Visual], hint: str = "") -> Prompt:
        messages, prompt = self._asked(example, len(visuals), hint)
        return Prompt(prompt, self.processor.encode_text(prompt, visuals), messages, visuals)

    def _asked(self, example: Example, videos: int, hint: str = "") -> tuple[list[Message], str]:
        """The prompt as messages, and formatted."""
        c = self.config
        text = (self.text or prompts.question(example, c.style, c.wording, self.templates)) + hint
        shown, said = [{"type": "video"}] * videos, [{"type": "text", "text": text}]
        content = said + shown if self.templates.text_first else shown + said
        messages = [{"role": "user", "content": content}]
        return messages, self.processor.chat_text(messages)

    def _variants(
        self, example: Example, videos: Sequence[Clip], visuals: list[Visual], rng: np.random.Generator
    ) -> dict[str, Prompt]:
        """Prompts for examples on which the policy is good, and for those on which it fails; see rl/difficulty.py."""
        c = self.config.difficulty
        worse = [replace(clip, frames=harder(clip.frames, rng, c.noise, c.drop)) for clip in videos]
        easy = [self.processor.encode_clip(clip) for clip in worse]
        hint = TASKS[example.task].hint(example)
        return {EASY: self._prompt(example, easy), HARD: self._prompt(example, visuals, f"\nHint: {hint}")}

    def _clips(self, example: Example) -> tuple[list[Clip], bool, VideoError | None]:
        """The frames of each video and whether all were cached; grey frames where a video cannot be used."""
        if not example.media:
            return [], True, None
        options = video_options(self.config, self.processor.video_options)
        sampling = self.processor.sampling(options)
        try:
            read = [self.cache.read(path, sampling) for path in example.media]
            return [clip for clip, _ in read], all(cached for _, cached in read), None
        except VideoError as error:
            side = 2 * sampling.factor
            count = sampling.multiple + sampling.options.lead
            grey = Clip(np.full((count, side, side, 3), GREY, np.uint8), 1.0 / options.fps)
            return [grey] * len(example.media), False, error

    def _target(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the right completion, end token last, and the weight of each in the SFT loss."""
        c = self.config
        spans = prompts.completion(example, c.style, c.section_weights)
        weight_of_character = np.concatenate([np.full(len(span.text), span.weight) for span in spans])
        encoded = self.processor.tokenizer(
            "".join(span.text for span in spans), add_special_tokens=False, return_offsets_mapping=True
        )
        weights = [
            weight_of_character[min(start, len(weight_of_character) - 1)] for start, _ in encoded["offset_mapping"]
        ]
        tokens = [*encoded["input_ids"], self.processor.end_tokens[0]]
        return np.asarray(tokens, np.int32), np.asarray([*weights, 1.0], np.float32)


def make_loader(processor: Processor, config: ConfigDict, augment: bool, blind: bool = False, text: str = "") -> Loader:
    """A loader that decodes videos that are not in config.cache in config.workers processes."""
    cache = FrameCache(config.cache, DecoderPool(config.workers, config.video_seconds).read)
    return Loader(processor, config, cache, augment, blind, text)


def video_options(config: ConfigDict, default: VideoOptions) -> VideoOptions:
    """The sampling that config.data asks for: its own numbers, then its budget's, then `default`, the model's."""
    names = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
    given = {name: config[name] for name in names if config[name]}
    return VideoOptions.from_item(clips.BUDGETS[config.budget] | given, default)


def in_order(example: Example, rng: np.random.Generator, shuffle: bool) -> Example:
    """The example with its choices in the order in which they are shown: another one with `shuffle`, for tasks where
    the order has no meaning."""
    task = TASKS[example.task]
    # Four numbers are drawn also where nothing is shuffled, so that augmentation does not depend on the task.
    count = len(example.choices) if task.shuffles else 4
    order = tuple(rng.permutation(count)) if shuffle else tuple(range(count))
    shift = example.rotation % max(1, len(order))
    return task.shuffled(example, order[shift:] + order[:shift])


def rng_of(example: Example, seed: int) -> np.random.Generator:
    """The randomness of an example in an evaluation, from the seed and the example's id alone."""
    return np.random.default_rng([seed, *hashlib.sha256(example.id.encode()).digest()])


def augment(clip: Clip, rng: np.random.Generator) -> Clip:
    """A random flip, shift and colour change, the same for all frames; events and their times are unchanged."""
    frames = clip.frames
    if rng.random() < 0.5:
        frames = frames[:, :, ::-1]
    frames = _translate(frames, *(int(x) for x in rng.integers(-6, 7, 2)))
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07, 3)
    table = np.clip(np.arange(256)[:, None] * gain + rng.uniform(-12, 12), 0, 255).astype(np.uint8)  # [256, 3]
    return replace(clip, frames=np.stack([table[frames[..., c], c] for c in range(3)], axis=-1))


def harder(frames: np.ndarray, rng: np.random.Generator, noise: float, drop: float) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] with noise of standard deviation `noise` (grey levels), or, as often, with a share
    `drop` of them replaced by the one before."""
    if rng.random() < 0.5:
        noisy = frames + rng.normal(0.0, noise, frames.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    kept = rng.random(len(frames)) >= drop
    kept[0] = True
    return frames[np.maximum.accumulate(np.where(kept, np.arange(len(frames)), 0))]


def _translate(frames: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Moves the picture by (dy, dx) pixels, repeating its border."""
    rows = np.clip(np.arange(frames.shape[1]) - dy, 0, frames.shape[1] - 1)
    cols = np.clip(np.arange(frames.shape[2]) - dx, 0, frames.shape[2] - 1)
    return frames[:, rows][:, :, cols]
