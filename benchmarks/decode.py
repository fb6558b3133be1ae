"""Speed of sampling: ours beside transformers' `generate`, on the same folder and machine, in one run.

    python benchmarks/decode.py                      a 32M model on any machine; torch comes with the test extra
    python benchmarks/decode.py --size=qwen2.5-vl-3b --dtype=bfloat16 --baseline=none        on a GPU

Both draw G completions of one video prompt, with no end token allowed, after a warm-up that compiles. Runs of the two
alternate, and medians are reported. The last line is one JSON object:

    tokens_per_s         all completions' tokens over the whole call; seconds: the spread of such calls
    decode_tokens_per_s  without the first token of each, over the time after the first token
    first_token_s        the call for one token: vision tower, prompt, first draw
    padded               tokens and patches of the prompt as `encode` pads it; transformers gets no padding
    utilisation          where the device is known: bytes that a decoding step must read (parameters of the decoder and
                         the head, caches) over its time and the memory's bandwidth; FLOPs of the prefill likewise;
                         padding is not counted
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import processor, spread  # beside this file

from vau_jax.common.chips import chip
from vau_jax.common.files import dump_json, exit_on_input_error
from vau_jax.data_prep import random_model
from vau_jax.models import hf
from vau_jax.types import Batch
from vau_jax.vlm import DTYPES, VideoLM

TEXT_32M = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
VISION_32M = {"depth": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 8, "fullatt_block_indexes": [2, 5]}


def prompt(vlm: VideoLM, frames: int, side: int) -> Batch:
    """One clip of `frames` frames of `side` x `side` merged patches, and a short question."""
    pixels = side * vlm.processor.factor
    clip = np.random.default_rng(0).integers(0, 256, (frames, pixels, pixels, 3), dtype=np.uint8)
    item = {"type": "video", "video": clip, "fps": 2.0, "resized_height": pixels, "resized_width": pixels}
    return vlm.encode([[{"role": "user", "content": [item, {"type": "text", "text": "What happens?"}]}]])


def real_patches(batch: Batch) -> np.ndarray:
    """bool [B, frames, size]: entries of the groups of patches by frame that are no padding."""
    return np.asarray(batch.vision.frames.members) < batch.vision.patches.shape[1]


def ours(vlm: VideoLM, batch: Batch, generations: int) -> Callable[[int], None]:
    def call(new: int) -> None:
        out = vlm.generate(batch, generations, new, temperature=1.0, min_new_tokens=new)
        assert out.mask.all()

    return call


def transformers_generate(
    folder: Path, vlm: VideoLM, batch: Batch, generations: int, dtype: str
) -> Callable[[int], None]:
    """The same call of transformers' torch model."""
    import torch
    import torchvision_operators  # noqa: F401 - beside this file, and before anything of transformers
    from transformers import AutoModelForImageTextToText

    from vau_jax.models.vision import normalise

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.pad_token_id = 0
    config, length = vlm.processor.config, int(np.asarray(batch.mask).sum())
    ids = torch.tensor(np.asarray(batch.tokens))[:, :length].long()
    real = real_patches(batch)
    frames, count = int(real.any(-1).sum()), int(real.sum())
    side = round((count / frames) ** 0.5)
    patches = np.asarray(normalise(batch.vision.patches[0, :count], config.vision))
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(ids == config.video_token_id, 2, 0),
        "pixel_values_videos": torch.tensor(patches, dtype=getattr(torch, dtype)),
        "video_grid_thw": torch.tensor([[frames, side, side]]),
    }
    if config.model_type == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([1.0])

    def call(new: int) -> None:
        with torch.no_grad():
            out = model.generate(
                **given, do_sample=True, num_return_sequences=generations, max_new_tokens=new, min_new_tokens=new
            )
        assert out.shape == (generations, length + new)

    return call


def measure(calls: dict[str, Callable[[int], None]], new: int, generations: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which the calls alternate."""
    times: dict[str, dict[int, list[float]]] = {name: {1: [], new: []} for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            for count in (1, new):
                began = time.perf_counter()
                call(count)
                if number:  # the first round compiles and warms caches
                    times[name][count].append(time.perf_counter() - began)
    result = {}
    for name, by_count in times.items():
        first, whole = (float(np.median(by_count[count])) for count in (1, new))
        result[name] = {
            "tokens_per_s": generations * new / whole,
            "decode_tokens_per_s": generations * (new - 1) / (whole - first),
            "first_token_s": first,
            "seconds_per_step": (whole - first) / (new - 1),
            "seconds": spread(by_count[new]),
        }
    return result


def utilisation(vlm: VideoLM, batch: Batch, generations: int, new: int, measured: dict[str, float]) -> dict[str, Any]:
    """Shares of the device's memory bandwidth (decoding) and FLOPs (prefill) that the program needed at least."""
    known = chip(jax.devices()[0].device_kind)
    if known is None:
        return {}
    bandwidth, flops = known.bandwidth, known.flops
    c, flat = vlm.processor.config, hf.flatten(vlm.params)
    size = {name: leaf.nbytes for name, leaf in flat.items()}
    head = size["embed_tokens/embedding" if c.tie_word_embeddings else "lm_head"]
    read = sum(n for name, n in size.items() if name.startswith("decoder/")) + head
    width = jax.tree.leaves(vlm.params)[0].dtype.itemsize
    tokens, patches = int(np.asarray(batch.mask).sum()), real_patches(batch).sum()
    keys = tokens + generations * new / 2
    read += 2 * c.num_layers * keys * c.num_kv_heads * c.head_dim * width
    decoder = sum(leaf.size for name, leaf in flat.items() if name.startswith("decoder/"))
    vision = sum(leaf.size for name, leaf in flat.items() if name.startswith("visual/blocks"))
    attention = 2 * c.num_layers * tokens**2 * c.num_heads * c.head_dim  # causal: half of 4 T^2 N H
    work = 2 * decoder * tokens + 2 * vision * patches + attention
    return {
        "device": jax.devices()[0].device_kind,
        "decode_bandwidth": read / measured["seconds_per_step"] / bandwidth,
        "prefill_flops": work / measured["first_token_s"] / flops,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model or Path(scratch) / "model")
        if args.size:
            random_model.write_published(folder, args.size, args.dtype)
        elif not args.model:
            random_model.write(folder, ["What happens?"], 512, TEXT_32M, VISION_32M, (3136, 1 << 20))
        vlm = VideoLM.load(folder, args.dtype)
        batch = prompt(vlm, args.frames, args.side)
        calls = {"vau_jax": ours(vlm, batch, args.generations)}
        if args.baseline == "transformers":
            calls["transformers"] = transformers_generate(folder, vlm, batch, args.generations, args.dtype)
        measured = measure(calls, args.new, args.generations, args.rounds)
    mine, theirs = measured["vau_jax"], measured.get("transformers")
    result = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(vlm.params)),
        "prompt_tokens": int(np.asarray(batch.mask).sum()),
        "visual_tokens": int((np.asarray(batch.visual_index) >= 0).sum()),
        "padded": {"tokens": batch.tokens.shape[1], "patches": batch.vision.patches.shape[1]},
        "generations": args.generations,
        "new_tokens": args.new,
        "dtype": args.dtype,
        "processor": processor(),
        **mine,
        "utilisation": utilisation(vlm, batch, args.generations, args.new, mine),
    }
    if theirs:
        result["transformers"] = theirs
        result["decode_speedup"] = mine["decode_tokens_per_s"] / theirs["decode_tokens_per_s"]
        result["first_token_speedup"] = theirs["first_token_s"] / mine["first_token_s"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: a random 32M model")
    parser.add_argument("--size", help="a random model of a published size instead")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--baseline", default="transformers", choices=("transformers", "none"))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=6, help="merged patches along a frame's side")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens of each completion")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    exit_on_input_error(lambda: print(dump_json(run(args))))


if __name__ == "__main__":
    main()
