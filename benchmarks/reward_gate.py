"""Rewards with and without the grammar as a gate, from a model that has not learned the grammar, on the demo's videos.

    python benchmarks/reward_gate.py DIR [--shared=DEMO] [--sft_steps=400] [--steps=150] [--seeds=0]

SFT teaches the answers alone (style direct); then RFT asks for reasoning before them (style think), once with
rewards.gate=form and once with none. DEMO is a folder with the demo's data and frames, made where there is none. Prints
one JSON object: by gate the scores of the held-out videos, the reward, and the share of completions in form.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common.files import dump_json
from vau_jax.configs import demo as demo_config
from vau_jax.eval import evaluate, records
from vau_jax.launch import demo
from vau_jax.rl.scorer import GATES
from vau_jax.train import loop


def config_of(shared: str, seed: int) -> ConfigDict:
    c = demo_config.get_config()
    c.shared, c.seed, c.style = shared, seed, "think"
    return c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shared", default="")
    parser.add_argument("--sft_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    result = {str(seed): run(args, seed) for seed in args.seeds}
    print(dump_json({"sft_steps": args.sft_steps, "rft_steps": args.steps, "by_seed": result}))


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The scores after SFT, and after RFT with each gate."""
    workdir = args.out / f"seed{seed}"
    config = config_of(args.shared, seed)
    demo.use_compiled(config, workdir)
    demo.make_videos(config, workdir)
    demo.make_model(config, workdir)
    demo.decode_videos(config, workdir)
    sft = demo.train_config(config, workdir, "sft")
    sft.steps, sft.data.style, sft.data.reflection = args.sft_steps, "direct", ""
    loop.run(sft, workdir / "sft")
    scores = {"after SFT, asked for reasoning": scored(config, workdir, "sft")}
    for gate in GATES:
        rft = demo.train_config(config, workdir, "rft")
        rft.steps, rft.rewards.gate, rft.rewards.reflection, rft.data.reflection = args.steps, gate, 0.0, ""
        loop.run(rft, workdir / f"rft_{gate}")
        scores[gate] = scored(config, workdir, f"rft_{gate}")
        jax.clear_caches()
    return scores


def scored(config: ConfigDict, workdir: Path, stage: str) -> dict[str, float]:
    """Accuracies and temporal IoU of the held-out videos, asked for reasoning."""
    c = demo.evaluation_config(config, workdir, "sft")
    c.checkpoint, c.name = str(workdir / stage), stage
    found = evaluate.run(c, workdir / "eval" / stage)
    formed = np.mean([record.format_ok[0] for record in records.load(workdir / "eval" / stage)])
    tasks = found["tasks"]
    numbers = {
        "qa": tasks["qa"]["accuracy"],
        "grounding": tasks["grounding"]["mIoU"],
        "classification": tasks["classification"]["multiclass"],
    }
    return {name: round(one["value"], 4) for name, one in numbers.items()} | {"in_form": round(float(formed), 4)}


if __name__ == "__main__":
    main()
