"""Completion tokens a second of larger rollouts, on paper: of a published size on one chip, by the batches that
decoding goes through.

    python benchmarks/rollout_batch.py [--size=qwen2.5-vl-3b] [--chip="NVIDIA H200"] [--batch_size=8] [--group=8]

A decoding step takes as long as its memory traffic or its operations, whichever is longer: it reads the weights in
bfloat16 once, the caches of its prompts and the room of its completions' own caches, whatever the number of rows. So a
rollout of more prompts reads the weights for more tokens, and the longest completion holds up fewer steps a token.
Lengths are log-normal with mean 250. Prints a Markdown table and one JSON object last.
"""

import argparse
import math

import numpy as np

from vau_jax.common.chips import CHIPS, Chip
from vau_jax.common.files import dump_json
from vau_jax.models import config as model_config
from vau_jax.models.config import QwenVLConfig
from vau_jax.rl import sampling

MEAN, SPREAD = 250, 0.7  # of completions: tokens, and the deviation of their logarithm
ROLLOUTS = (1, 2, 4, 8)  # update batches in a rollout
WIDTH = 2  # bytes of bfloat16


def weights_of(c: QwenVLConfig) -> int:
    """Parameters that a decoding step multiplies with: the decoder's matrices and the head."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
    return c.num_layers * layer + c.vocab_size * c.hidden_size


def step_seconds(c: QwenVLConfig, chip: Chip, rows: tuple[int, int, int], prompt: int) -> float:
    """Of a decoding step of (B, G, room for completion tokens) = `rows`, with caches of `prompt` tokens."""
    prompts, generations, room = rows
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * WIDTH  # bytes of its keys and values
    read = weights_of(c) * WIDTH + token * prompts * (prompt + generations * room)
    pairs = prompts * generations * (prompt + room)
    work = 2.0 * weights_of(c) * prompts * generations + 4.0 * c.num_layers * c.num_heads * c.head_dim * pairs
    return max(read / chip.bandwidth, work / chip.flops)


def seconds(c: QwenVLConfig, chip: Chip, lengths: np.ndarray, prompt: int, new: int) -> float:
    """Of sampling completions of these lengths [B, G]."""
    return sum(step_seconds(c, chip, rows, prompt) for rows in sampling.steps(lengths, new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="qwen2.5-vl-3b", choices=model_config.SIZES)
    parser.add_argument("--chip", default="NVIDIA H200", choices=CHIPS)
    for name, default in {"batch_size": 8, "group": 8, "new": 1024, "prompt": 4096, "draws": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    c, chip = model_config.from_hf(model_config.SIZES[args.size]), CHIPS[args.chip]
    rng, result = np.random.default_rng(0), {}
    print("| prompts at once | completion tokens/s | relative |\n| --- | --- | --- |")
    for rollout in ROLLOUTS:
        shape = (args.draws, rollout * args.batch_size, args.group)
        drawn = np.clip(np.rint(rng.lognormal(math.log(MEAN) - SPREAD**2 / 2, SPREAD, shape)), 1, args.new).astype(int)
        spent = sum(seconds(c, chip, lengths, args.prompt, args.new) for lengths in drawn)
        result[rollout] = drawn.sum() / spent
        print(f"| {shape[1]} | {result[rollout]:,.0f} | {result[rollout] / result[1]:.2f} |")
    print(dump_json({"completion_tokens_per_s": result, "size": args.size, "chip": args.chip}))


if __name__ == "__main__":
    main()
