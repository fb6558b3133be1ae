"""Seconds of a whole GRPO step: rollout, rewards, reference, update; ours, and the alternatives beside it.

    python benchmarks/grpo_step.py                                     a random 32M model, one prompt, on any machine
    python benchmarks/grpo_step.py --compare=trl --compare=tunix --tunix-python=/path/to/venv/bin/python
    python benchmarks/grpo_step.py --size=qwen2.5-vl-3b --dtype=bfloat16 --lora=16           on a GPU

Ours is the trainer itself on a video file, its prompts padded as in any run with the default config.data.bucket; peers
do not pad. With --exact ours does not either, as where all clips are alike and the bucket is set for them. Every
completion has all its tokens (no early stop), and compilation and the first step are left out. TRL has no video: it
gets as many images as give the same number of visual tokens. Tunix has neither: it gets a prompt of as many text
tokens, with the same decoder. Each peer runs in the Python that its option names, and all take turns, step by step. The
last line is one JSON object:

    sec_per_step    median; spread: extremes and quartiles; split: medians of its parts
    tokens_per_s    all tokens of prompts and completions
    shape, padded   sizes of a prompt, and what it is padded to (fields of Shape in vau_jax/data/processor.py)
    load            of the machine before and after: other work spoils figures
    mfu_update      on known devices: FLOPs that the update must do, over its time and the device's peak
    host_share      of a step that the device waits: data, rewards, and what no part counts
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decode import VISION_32M  # beside this file
from machine import processor, spread
from ml_collections import ConfigDict

from vau_jax.common.files import dump_json, exit_on_input_error
from vau_jax.configs import vau_r1_multi_rft
from vau_jax.data import loading, pipeline
from vau_jax.data.processor import Processor
from vau_jax.data.shapes import Shape, least_shape
from vau_jax.data_prep import random_model
from vau_jax.datasets import synthetic
from vau_jax.train import loop
from vau_jax.vlm import DTYPES

TEXT_32M = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
PEERS = Path(__file__).parent / "peers"
DEVICE = ("rollout", "score", "update")  # parts of a step in which the device works
PARTS = ("data", "reward", *DEVICE)


def make_data(folder: Path, frames: int, side: int) -> None:
    """One video of `frames` frames, two a second, and its annotation."""
    noise = np.random.default_rng(0).integers(0, 256, (frames, side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
    images = (np.kron(image, np.ones((8, 8, 1), np.uint8))[:side, :side] for image in noise)
    (folder / "videos").mkdir()
    synthetic.encode(folder / "videos" / "clip.mp4", images, Fraction(2))
    row = {
        "Video Name": "clip.mp4",
        "Question": "What happens?",
        **{f"Option {n}": text for n, text in enumerate(("a fire", "a fight", "a fall", "nothing"), start=1)},
        "Correct Option": "A",
        "Key Object": "a fire",
        "Description": "A fire.",
        "Reasoning": "",
        "Anomaly Class": "Fire",
        "Start Time": "0.0",
        "End Time": "1.0",
    }
    (folder / "rows.jsonl").write_text(dump_json(row) + "\n")


def make_config(args: argparse.Namespace, model: Path, data: Path) -> ConfigDict:
    c = vau_r1_multi_rft.get_config()
    c.model, c.dtype, c.batch_size, c.steps = str(model), args.dtype, args.prompts, args.steps + args.warmup
    c.data.csv, c.data.videos, c.data.tasks = str(data / "rows.jsonl"), str(data / "videos"), ("qa",)
    c.data.time_rules, c.data.wording = "msad", "short"
    c.data.min_frames = c.data.max_frames = args.frames
    c.data.min_pixels = c.data.max_pixels = args.side**2
    c.data.total_pixels = args.frames * args.side**2
    c.data.max_completion_tokens = c.rollout.min_new_tokens = args.new
    c.grpo.importance = "never"  # nor would there be min_new_tokens
    c.rollout.num_generations, c.grpo.beta, c.remat, c.unroll = args.group, args.beta, args.remat, args.unroll
    c.lora.rank = args.lora
    c.optim.freeze = ("visual/.*",) if args.freeze_vision else ()
    if args.reward_seconds:
        os.environ["REWARD_SECONDS"] = str(args.reward_seconds)
        c.user_rewards, c.rollout.reward_workers = (("slow_reward:wait", 1.0),), args.prompts * args.group
    return c


def shape_of_prompts(c: ConfigDict) -> Shape:
    """The smallest shape of a batch of the config's only example."""
    processor = Processor(c.model)
    example = pipeline.load_examples(c.data)[0][0]
    loaded = loading.make_loader(processor, c.data, augment=False)(example, np.random.default_rng(0))
    return least_shape([loaded.encoded.size], processor.vision)


class Peer:
    """A peer's script in its own Python, which makes a step when it is its turn; see peers/turns.py."""

    def __init__(self, name: str, args: argparse.Namespace, given: dict[str, Any], log: Path) -> None:
        command = [getattr(args, f"{name}_python"), str(PEERS / f"{name}_step.py")]
        command += [dump_json(vars(args) | {"compare": None} | given)]
        self.warmup, self.seconds, self.log = args.warmup, [], log
        with log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            self.process = subprocess.Popen(command, **pipes)  # noqa: S603 - our own script

    def step(self) -> None:
        """One step of the peer; none once it has ended."""
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return
        answer = self.process.stdout.readline()
        if answer:
            self.seconds.append(json.loads(answer))

    def result(self) -> dict[str, Any]:
        """After the last step."""
        rest = self.process.stdout.read()
        if self.process.wait():
            return {"error": self.log.read_text().strip().splitlines()[-1:], "returncode": self.process.returncode}
        return summary(self.seconds[self.warmup :]) | json.loads(rest) | {"steps": self.seconds}


def summary(seconds: list[float]) -> dict[str, Any]:
    return {"sec_per_step": float(np.median(seconds)), "spread": spread(seconds)}


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Ours, and beside it each peer under its name; all make one step in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        make_data(Path(scratch), args.frames, args.side)
        config = make_config(args, model, Path(scratch))
        shape = shape_of_prompts(config)
        if args.exact:
            config.data.bucket = tuple(shape)
        run = loop.Run(config)
        given = {"model": str(model), "prompt_tokens": shape.tokens}
        peers = {name: Peer(name, args, given, Path(scratch) / f"{name}.log") for name in args.compare or ()}
        steps = []
        for number in range(args.warmup + args.steps):
            metrics, _ = run.step(number)
            assert metrics["length/min"] == args.new, "every completion has all its tokens"
            steps.append(metrics)
            for peer in peers.values():
                peer.step()
        padded = run.feed.collate.shape(run.feed.next().examples)
        return ours(args, run, shape, padded, steps[args.warmup :]) | {n: peer.result() for n, peer in peers.items()}


def _host_share(step: dict[str, float]) -> float:
    """Of one step that the device waits."""
    return 1 - sum(step.get(f"seconds/{name}", 0.0) for name in DEVICE) / step["seconds/step"]


def ours(
    args: argparse.Namespace, run: loop.Run, shape: Shape, padded: Shape, steps: list[dict[str, float]]
) -> dict[str, Any]:
    """Figures of our steps after the warm-up."""

    def all_of(name: str) -> list[float]:
        return [step[f"seconds/{name}"] for step in steps if f"seconds/{name}" in step] or [0.0]

    times = summary(all_of("step"))
    seconds = times["sec_per_step"]
    split = {name: float(np.median(all_of(name))) for name in PARTS}
    result = {
        **times,
        "split": split,
        "host_share": float(np.median([_host_share(step) for step in steps])),
        "tokens_per_s": args.prompts * (shape.tokens + args.group * args.new) / seconds,
        "completion_tokens_per_s": args.prompts * args.group * args.new / seconds,
        "prompt_tokens": shape.tokens,
        "visual_tokens": shape.patches // run.processor.patches_per_token,
        "shape": shape._asdict(),
        "padded": padded._asdict(),
        "parameters": sum(x.size for x in jax.tree.leaves(run.learner.base or run.learner.state.params)),
    }
    if "mfu" in steps[0]:
        result["mfu_update"] = float(np.median([step["mfu"] for step in steps]))
    return {"device": jax.devices()[0].device_kind, "processor": processor(), **result}


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(args.model or Path(scratch) / "model")
        if args.size:
            random_model.write_published(model, args.size, args.dtype)
        elif not args.model:
            random_model.write(model, ["What happens?"], 512, TEXT_32M, VISION_32M, (784, 1 << 24))
        load = {"before": os.getloadavg()[0]}
        given = ("prompts", "group", "new", "frames", "side", "exact", "dtype", "beta")
        result = {name: getattr(args, name) for name in given} | measure(args, model)
    load["after"] = os.getloadavg()[0]
    for name in args.compare or ():
        if "sec_per_step" in result[name]:
            result[f"times_faster_than_{name}"] = result[name]["sec_per_step"] / result["sec_per_step"]
    return result | {"load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: a random 32M Qwen2.5-VL")
    parser.add_argument("--size", help="a random model of a published size instead")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--prompts", type=int, default=1, help="a step")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=168, help="pixels of a frame's side, a multiple of 28")
    parser.add_argument("--exact", action="store_true", help="pad nothing")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL term; 0: no reference")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps before, with compilation")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all parameters are trained")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--remat", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--unroll", type=int, default=1, help="layers in one round of the scan")
    parser.add_argument(
        "--reward-seconds", type=float, default=0.0, help="a reward that takes so long, as a judge does"
    )
    parser.add_argument("--compare", action="append", choices=("trl", "tunix"))
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter with trl; here: the test extra's")
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter with google-tunix")
    args = parser.parse_args()
    exit_on_input_error(lambda: print(dump_json(run(args))))


if __name__ == "__main__":
    main()
