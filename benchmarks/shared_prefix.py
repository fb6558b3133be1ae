"""What a prompt that is read once for its G completions saves in the update, beside our own repeated form.

    python benchmarks/shared_prefix.py       curves over G, P (prompt tokens), C (completion tokens), V (vocabulary)

Each point is the gradient of the completions' log-probabilities by all parameters of a 25M decoder (text alone,
float32, no rematerialisation), with seconds (median of 3) and peak memory as XLA plans it: temporary arrays and
results, without the parameters. Points of more than --most-tokens are compiled but not run. `whole_logits_mb` is the
peak with a plain log-softmax over [tokens, V]. The last line is one JSON object.
"""

import argparse
import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from grpo_step import TEXT_32M, VISION_32M  # beside this file

from vau_jax.common.files import dump_json
from vau_jax.data_prep import random_model
from vau_jax.models import config as model_config
from vau_jax.models import qwen_vl
from vau_jax.models.config import QwenVLConfig
from vau_jax.models.packing import pack
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import logprobs
from vau_jax.train import update
from vau_jax.types import Batch, Completions

CURVES = {
    "G": [{"G": g} for g in (2, 4, 8, 16, 32)],
    "P": [{"P": p} for p in (300, 1024, 2048, 4096, 8192)],
    "C": [{"C": c} for c in (64, 128, 256, 512)],
    "V": [{"V": v, "C": 256} for v in (1024, 32768, 151936)],
}
USUAL = {"G": 8, "P": 1024, "C": 64, "V": 1024}


def decoder(vocabulary: int) -> QwenVLConfig:
    tokenizer = random_model.train_tokenizer(["What happens?"], 512)
    raw = random_model.hf_config(tokenizer, TEXT_32M, VISION_32M, "qwen2_5_vl")
    return dataclasses.replace(model_config.from_hf(raw), vocab_size=vocabulary)


def packed(rows: int, groups: int, prompt: int, length: int) -> tuple[Batch, Completions]:
    """`rows` prompts with `groups` completions each."""
    position = np.broadcast_to(np.arange(prompt, dtype=np.int32), (rows, prompt))
    tokens = position % 500
    batch = Batch(
        tokens=tokens,
        mask=np.ones((rows, prompt), bool),
        positions=np.broadcast_to(position[:, None], (rows, 3, prompt)),
        visual_index=np.full((rows, prompt), -1, np.int32),
        next_position=np.full(rows, prompt, np.int32),
        vision=None,
    )
    return batch, Completions(np.ones((rows, groups, length), np.int32), np.ones((rows, groups, length), bool))


def whole_logits(variables: Any, batch: Batch, completions: Completions, model: QwenVL) -> jax.Array:
    packing = pack(completions)
    hidden = model.apply(variables, batch, completions, packing, method="hidden")
    predicting = logprobs.completion_hidden(hidden, batch.mask, packing.starts)
    scores = jax.nn.log_softmax(logprobs.logits(predicting, model.head(variables)))
    return jnp.take_along_axis(scores, packing.take(completions.tokens)[..., None], axis=-1)


def measure(loss: Any, params: Any, data: tuple[Batch, Completions], run: bool) -> dict[str, float]:
    """Seconds and planned peak memory of the gradient."""
    program = jax.jit(jax.grad(lambda p, d: loss({"params": p}, *d).sum())).lower(params, data).compile()
    plan = program.memory_analysis()
    result = {"peak_mb": (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 1e6}
    if run:
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(program(params, data))
            seconds.append(time.perf_counter() - began)
        result["seconds"] = float(np.median(seconds[1:]))
    return result


def point(sizes: dict[str, int], most_tokens: int) -> dict[str, Any]:
    s = USUAL | sizes
    config = decoder(s["V"])
    model, params = QwenVL(config), qwen_vl.init(config, jax.random.key(0))

    def ours(variables: Any, batch: Batch, completions: Completions) -> jax.Array:
        return update.policy_logps(variables, batch, completions, model, 1.0)[0]

    tokens = {"shared": s["P"] + s["G"] * s["C"], "repeated": s["G"] * (s["P"] + s["C"])}
    data = {
        "shared": packed(1, s["G"], s["P"], s["C"]),
        "repeated": packed(s["G"], 1, s["P"], s["C"]),
    }
    results = {
        name: {"tokens": tokens[name]} | measure(ours, params, data[name], tokens[name] <= most_tokens) for name in data
    }
    plain = measure(lambda *a: whole_logits(*a, model), params, data["shared"], False)
    results["whole_logits_mb"] = plain["peak_mb"]
    if "seconds" in results["repeated"]:
        results["times_faster"] = results["repeated"]["seconds"] / results["shared"]["seconds"]
    return s | results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="*", default=list(CURVES), choices=CURVES)
    parser.add_argument("--most-tokens", type=int, default=20_000)
    args = parser.parse_args()
    load, result = os.getloadavg()[0], {}
    for name in args.curves:
        result[name] = []
        for sizes in CURVES[name]:
            result[name].append(point(sizes, args.most_tokens))
            print(dump_json(result[name][-1]), flush=True)
    print(dump_json({"load": load, "curves": result}))


if __name__ == "__main__":
    main()
