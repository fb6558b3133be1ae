"""The front door: a video-language model to load, ask and save.

from vau_jax.vlm import VideoLM

vlm = VideoLM.load("path/to/Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
batch = vlm.encode([[{"role": "user", "content": [
    {"type": "video", "video": "clip.mp4", "fps": 2.0},
    {"type": "text", "text": "What happens?"},
]}]])
print(vlm.generate(batch, num_generations=1, max_new_tokens=64, temperature=0.0).text)
"""

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import files, sharding
from vau_jax.common.files import InputError, dump_json
from vau_jax.data.processor import Message, Processor
from vau_jax.data.stop_strings import stop_table
from vau_jax.models import checkpoint, hf, lora, motion_prompt, peft, qwen_vl
from vau_jax.models import config as model_config
from vau_jax.models.config import Motion
from vau_jax.models.lora import LoRA
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import logprobs, sampling
from vau_jax.types import Batch, Params, Sampled, Variables

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
    """A model with its processor, parameters and, after LoRA training, adapters."""

    processor: Processor
    model: QwenVL
    params: Params
    adapters: Params | None = None  # LoRA's factors, of the kind in model.lora

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        adapter: str | os.PathLike | None = None,
        merge: bool = False,
    ) -> "VideoLM":
        """Opens a Hugging Face folder (config.json, tokenizer.json, safetensors) or the workdir of a training run.

        `dtype` ("float32", "bfloat16") is that of parameters and activations; norms, RoPE, softmax and logits are
        float32 always. With a `mesh`, parameters are laid out by `sharding.PARAM_RULES`, and this process reads only
        what its devices hold. `adapter` is a PEFT folder (adapter_config.json, adapter_model.safetensors) to put on.
        A run's adapters, which stay in float32, are added in with `merge`: to the weights as they are stored, in
        float32, and rounded to `dtype` once.
        Raises InputError for a folder that is neither, and for weights that do not fit.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype!r} is unknown: expected one of {', '.join(DTYPES)}")
        vlm = (cls._whole if merge or adapter else cls._open)(path, dtype, mesh)
        if adapter is None:
            return vlm
        kind, flat = peft.load(adapter, vlm.processor.config)
        if motion := model_config.read_motion(adapter):
            flat |= _motion_numbers(motion_prompt.read_file(adapter))
            vlm = vlm._with_motion_config(motion)
        return vlm._with_adapters(kind, flat, mesh)

    @classmethod
    def _whole(
        cls,
        path: str | os.PathLike,
        dtype: str,
        mesh: jax.sharding.Mesh | None,
        stored: bool = False,
        users: tuple[Path, ...] = (),
    ) -> "VideoLM":
        """Like `_open`, with a run's adapters added in."""
        if checkpoint.find_model(path).adapter is None:
            return cls._open(path, dtype, mesh, stored, users)
        return cls._open(path, dtype, mesh, True, users).merged(dtype)

    @classmethod
    def _open(
        cls,
        path: str | os.PathLike,
        dtype: str,
        mesh: jax.sharding.Mesh | None,
        stored: bool = False,
        users: tuple[Path, ...] = (),
    ) -> "VideoLM":
        """With `stored`, parameters keep the dtype that they are stored in, or float32 where adapters were added in.
        `users` are the runs whose adapters belong on this model."""
        result = checkpoint.find_model(path)
        if (here := Path(path).resolve()) in users:
            raise InputError(f"{path} holds adapters for itself ({checkpoint.ADAPTER}): name the model they belong to")
        if result.adapter is not None:  # the checkpoint holds adapters alone: the rest is where the run started
            source = checkpoint.find_source(result.adapter.base, result.folder.parent)
            base = cls._whole(source, "float32" if stored else dtype, mesh, stored, (*users, here))
            flat = _restored(result.step_folder)
            base = base._with_motion_config(model_config.read_motion(result.folder))
            return base._with_adapters(result.adapter.lora, flat, mesh)
        processor = Processor(result.folder)
        model = QwenVL(processor.config, DTYPES[dtype], mesh=mesh)
        held = None if stored else DTYPES[dtype]
        if result.step_folder is None:
            params = hf.load(result.folder, processor.config, held, sharding.layout(mesh))
            if processor.motion:
                numbers = _motion_numbers(motion_prompt.read_file(processor.folder))
                params = lora.overlay(params, _to_devices(numbers, "float32", mesh))
            return cls(processor, model, params)
        return cls(processor, model, _to_devices(_restored(result.step_folder), held, mesh))

    def _with_adapters(self, kind: LoRA, flat: dict[str, np.ndarray], mesh: jax.sharding.Mesh | None) -> "VideoLM":
        adapters = _to_devices(flat, jnp.float32, mesh)
        return VideoLM(self.processor, self.model.clone(lora=kind), self.params, adapters)

    def _with_motion_config(self, motion: Motion | None) -> "VideoLM":
        """The model with a motion prompt of this form, whose parameters are set later; None: unchanged."""
        if motion is None:
            return self
        processor = copy.copy(self.processor)
        processor.config = model_config.with_motion(processor.config, motion)
        return VideoLM(processor, self.model.clone(config=processor.config), self.params, self.adapters)

    def with_motion(self, config: ConfigDict) -> "VideoLM":
        """The model with a Video Motion Prompt as `config` (config.motion) describes it, at its initial values; a model
        that has one already keeps it. Raises InputError for an invalid setting.
        """
        if self.processor.motion:
            return self
        motion_prompt.check(config)
        m, n = motion_prompt.STARTS[config.start]
        numbers = _to_devices(_motion_numbers({"m": m, "n": n}), "float32", self.model.mesh)
        formed = self._with_motion_config(Motion(config.signed, config.order))
        return VideoLM(formed.processor, formed.model, lora.overlay(self.params, numbers), self.adapters)

    @property
    def variables(self) -> Variables:
        """What `model.apply` takes."""
        return qwen_vl.with_adapters(self.params, self.adapters)

    def merged(self, dtype: str | None = None) -> "VideoLM":
        """The same model with the adapters added into the parameters, in float32 and rounded once: to the parameters'
        own dtype, or to `dtype`, which the activations get too."""
        if self.adapters is None:
            return self
        held = DTYPES[dtype] if dtype else None
        params = jax.jit(lora.merge, static_argnums=(2, 3))(self.params, self.adapters, self.model.lora, held)
        model = self.model.clone(lora=None, dtype=held or self.model.dtype)
        return VideoLM(self.processor, model, params)

    def encode(self, conversations: Sequence[Sequence[Message]], left: bool = False) -> Batch:
        """Chat messages to a padded batch (padding after the prompt, or before it when `left`).

        A message is {"role", "content"}; content is text or a list of items {"type": "text" | "image" | "video"}. A
        video is a path, or uint8 frames [F, H, W, 3] with the "fps" they were taken at; items take qwen-vl-utils' keys
        (fps, nframes, min_frames, max_frames, min_pixels, max_pixels, total_pixels, resized_height, resized_width,
        video_start, video_end). Sizes are rounded up to few buckets, so that prompts of like length share a compiled
        program. Raises InputError for what cannot be read.
        """
        rows = [self.processor.encode(messages) for messages in conversations]
        return self.processor.collate(rows, left=left)

    def logits(self, batch: Batch) -> jax.Array:
        """float32 [B, T, V]: entry t predicts token t + 1; row b is real where batch.mask[b]."""
        return _logits(self.variables, batch, model=self.model)

    def generate(
        self,
        batch: Batch,
        num_generations: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        min_new_tokens: int = 0,
        stop_strings: Sequence[str] = (),
        repetition_penalty: float = 1.0,
        watch: Callable[[Generated], None] | None = None,
    ) -> Generated:
        """Samples `num_generations` completions a prompt, all from one prefill; temperature 0 is greedy.

        top_p in (0, 1] and top_k (0: off) restrict each token's distribution and the log-probabilities with it; so does
        `repetition_penalty`, transformers' own. A completion ends with one of the folder's end tokens, with the token
        that completes one of `stop_strings`, or after `max_new_tokens`; no end token is sampled among the first
        `min_new_tokens`. What ends it belongs to it (an end token is left out of the text). Decoding stops when all
        completions have ended. `watch` sees what there is so far every few tokens, for texts that are shown while they
        are written; what it raises ends the decoding.
        Raises InputError for options out of their range; a temperature above 0 is at least 0.01.
        """

        def read(out: Sampled) -> Generated:
            tokens, logps, mask = (np.asarray(x) for x in (out.tokens, out.logps, out.mask))
            return Generated(tokens, logps, mask, self.processor.decode_completions(tokens, mask))

        stops = None
        if stop_strings:
            stops = stop_table(stop_strings, self.processor.token_bytes)
        out = sampling.sample(
            self.variables,
            batch,
            jax.random.key(seed),
            temperature,
            min_new_tokens,
            stops,
            model=self.model,
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            end_tokens=self.processor.end_tokens,
            greedy=temperature == 0,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            watch=watch and (lambda sampled: watch(read(sampled))),
        )
        return read(out)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face folder (safetensors, config, tokenizer, processor), complete or not at all.

        Adapters are added in. Parameters keep their dtype: a folder loaded in its own dtype is saved bit for bit.
        """
        save_folder(path, self.processor, self.merged().params)

    def save_adapter(self, path: str | os.PathLike) -> None:
        """Writes the adapters alone as a PEFT folder, complete or not at all."""
        if self.adapters is None:
            raise InputError("this model has no adapters to save: train with config.lora.rank, or load with adapter=")
        flat = {name: x for name, x in hf.flatten(self.adapters).items() if not name.startswith(motion_prompt.PREFIX)}
        peft.save(path, self.model.lora, flat, self.processor.config, str(self.processor.folder))
        if motion := self.processor.motion:
            motion_prompt.write_file(path, motion, self.variables["params"]["visual"]["motion_prompt"])


def _restored(step_folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint by path; those of format 1 had a motion prompt beside the tower, not in it."""
    flat = hf.flatten(checkpoint.restore_params(step_folder))
    return {f"visual/{name}" if name.startswith("motion_prompt/") else name: x for name, x in flat.items()}


def _motion_numbers(numbers: dict[str, float]) -> dict[str, np.ndarray]:
    return {motion_prompt.PREFIX + name: np.float32(value) for name, value in numbers.items()}


def _to_devices(flat: dict[str, np.ndarray], dtype: Any | None, mesh: jax.sharding.Mesh | None) -> Params:
    """Host arrays by path to a tree of parameters on the mesh, a motion prompt's two numbers in float32 always; `dtype`
    None: as they are."""
    layout = sharding.layout(mesh)

    def one(path: str, x: np.ndarray) -> jax.Array:
        own = np.float32 if path.startswith(motion_prompt.PREFIX) else dtype or x.dtype
        return jax.device_put(np.asarray(x).astype(own), layout(path, x.shape))

    return hf.unflatten({path: one(path, x) for path, x in flat.items()})


@partial(jax.jit, static_argnames="model")
def _logits(variables: Variables, batch: Batch, *, model: QwenVL) -> jax.Array:
    hidden = model.apply(variables, batch, method="hidden")
    return logprobs.logits(hidden, model.head(variables))


def save_folder(path: str | os.PathLike, processor: Processor, params: Params) -> None:
    """Copies the processor's folder without its weights, and writes `params` beside it, complete or not at all."""
    with files.new_folder(path) as part:
        shutil.copytree(processor.folder, part, ignore=shutil.ignore_patterns(*WEIGHT_FILES), dirs_exist_ok=True)
        raw = files.read_json(part / "config.json")
        dtype = str(jax.tree.leaves(params)[0].dtype)
        raw |= {name: dtype for name in ("dtype", "torch_dtype") if name in raw}
        files.write_text(part / "config.json", dump_json(raw, indent=2))
        hf.save_weights(part, params, processor.config)
        if processor.motion:
            motion_prompt.write_file(part, processor.motion, params["visual"]["motion_prompt"])
