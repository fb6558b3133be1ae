"""The front door: a video-language model to load, ask and save.

from vau_jax.vlm import VideoLM

vlm = VideoLM.load("path/to/Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
batch = vlm.encode([[{"role": "user", "content": [
    {"type": "video", "video": "clip.mp4", "fps": 2.0},
    {"type": "text", "text": "What happens?"},
]}]])
print(vlm.generate(batch, num_generations=1, max_new_tokens=64, temperature=0.0).text)
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vau_jax import checkpoint, logprobs, sampling, sharding
from vau_jax.data.processor import Message, Processor, collate
from vau_jax.files import InputError
from vau_jax.models import hf, qwen_vl
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.types import Batch, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Generated:
    """Completions of a batch of prompts."""

    tokens: np.ndarray  # int32 [B, G, C]
    logps: np.ndarray  # float32 [B, G, C]: the sampler's log-probabilities
    mask: np.ndarray  # bool [B, G, C]: True up to and including the end token
    text: list[list[str]]  # B lists of G


@dataclass
class VideoLM:
    """A model with its processor and parameters."""

    processor: Processor
    model: QwenVL
    params: Params

    @classmethod
    def load(cls, path: str | os.PathLike, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> "VideoLM":
        """Opens a Hugging Face folder (config.json, tokenizer.json, safetensors) or the workdir of a training run.

        `dtype` ("float32", "bfloat16") is that of parameters and activations; norms, RoPE, softmax and logits are
        float32 always. With a `mesh`, parameters are laid out by `sharding.PARAM_RULES`. Raises InputError for a
        folder that is neither, and for weights that do not fit.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype!r} is unknown: expected one of {', '.join(DTYPES)}")
        folder, run = checkpoint.find_model(path)
        processor = Processor(folder)
        model = QwenVL(processor.config, DTYPES[dtype])
        place = sharding.placer(mesh)
        if run is None:
            return cls(processor, model, hf.load(folder, processor.config, DTYPES[dtype], place))
        params = hf.flatten(checkpoint.restore_params(run))
        return cls(
            processor, model, hf.unflatten({k: place(k, np.asarray(v).astype(dtype)) for k, v in params.items()})
        )

    def encode(self, conversations: Sequence[Sequence[Message]], left: bool = False) -> Batch:
        """Chat messages to a padded batch (padding after the prompt, or before it when `left`).

        A message is {"role", "content"}; content is text or a list of items {"type": "text" | "image" | "video"}. A
        video is a path, or uint8 frames [F, H, W, 3] with the "fps" they were taken at; items take qwen-vl-utils' keys
        (fps, nframes, min_frames, max_frames, min_pixels, max_pixels, total_pixels, resized_height, resized_width,
        video_start, video_end). Raises InputError for what cannot be read.
        """
        rows = [self.processor.encode(messages) for messages in conversations]
        return collate(rows, self.processor.config.vision, left=left)

    def logits(self, batch: Batch) -> jax.Array:
        """float32 [B, T, V]: entry t predicts token t + 1; row b is real where batch.mask[b]."""
        return _logits(self.params, batch, model=self.model)

    def generate(
        self,
        batch: Batch,
        num_generations: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Generated:
        """Samples `num_generations` completions a prompt, all from one prefill; temperature 0 is greedy.

        top_p in (0, 1] and top_k (0: off) restrict each token's distribution, and the log-probabilities with it.
        """
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or num_generations < 1 or max_new_tokens < 1:
            raise InputError(
                "generate wants temperature >= 0, 0 < top_p <= 1, top_k >= 0, num_generations >= 1 and max_new_tokens "
                f">= 1, found {temperature}, {top_p}, {top_k}, {num_generations}, {max_new_tokens}"
            )
        out = sampling.sample(
            self.params,
            batch,
            jax.random.key(seed),
            jnp.float32(temperature or 1.0),
            model=self.model,
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            end_tokens=self.processor.end_tokens,
            greedy=temperature == 0,
            top_p=top_p,
            top_k=top_k,
        )
        tokens, logps, mask = (np.asarray(x) for x in (out.tokens, out.logps, out.mask))
        return Generated(tokens, logps, mask, decode_text(self.processor, tokens, mask))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face folder (safetensors, config, tokenizer, processor), complete or not at all."""
        save_folder(path, self.processor, self.params)


@partial(jax.jit, static_argnames="model")
def _logits(params: Params, batch: Batch, *, model: QwenVL) -> jax.Array:
    hidden = model.apply({"params": params}, batch, method="hidden")
    return logprobs.logits(hidden, qwen_vl.unembedding(params, model.config))


def decode_text(processor: Processor, tokens: np.ndarray, mask: np.ndarray) -> list[list[str]]:
    """The texts of completions [B, G, C], without end and padding tokens."""
    keep = mask & ~np.isin(tokens, processor.end_tokens)
    flat = [
        row[real].tolist()
        for row, real in zip(tokens.reshape(-1, tokens.shape[-1]), keep.reshape(-1, tokens.shape[-1]), strict=True)
    ]
    texts = processor.tokenizer.batch_decode(flat, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [texts[i : i + tokens.shape[1]] for i in range(0, len(texts), tokens.shape[1])]


def save_folder(path: str | os.PathLike, processor: Processor, params: Params) -> None:
    """Copies the processor's folder without its weights, and writes `params` beside it."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(processor.folder, part, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
    hf.save_weights(part, params, processor.config)
    old = path.with_name(path.name + ".old")
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)
