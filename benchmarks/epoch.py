"""The shapes, programs and padding of an epoch, by the training pipeline's own code, without a video or a device.

    python benchmarks/epoch.py [--table=CSV] [--lengths=FILE] [--config=vau_r1_qa_rft] [--batch_size=8] [--group=8]
        [--new=1024] [--micro_batches=4] [--devices=1] [--model=DIR] [--step_seconds=S --compile_seconds=S]

Walks a table of clips (columns video, seconds, fps, width, height) as a run of the config does: the shapes planned, the
order of examples, the batches, the parts of an update, what their completions are packed into, and the batches that
decoding goes through. Lengths of completions come from a file, one a line, or are log-normal with mean 220. Prints one
JSON object last: `prompt_shapes`, `update_programs`, `score_programs`, `decode_programs` and so on are numbers of
programs that are compiled, `real_..._share` are shares of the padded sizes that are real.

`compile_share`, of the time of an epoch that begins with nothing compiled, needs --step_seconds and --compile_seconds
(of a program): those in metrics.jsonl of a run, or for a published size those of launch/compile_check.py.

benchmarks/vau_bench_clips.csv, the default table, is drawn (`--draw=FILE`) with the published durations of VAU-Bench's
3,600 training and validation videos (arXiv 2505.23504, a figure's bins of 10 s up to 100 s, then wider), and the sizes
and rates of its data sets: UCF-Crime 320x240 at 30 frames a second, MSAD mostly 1280x720 and 1920x1080, ECVA mixed.
"""

import argparse
import csv
import importlib
import itertools
import math
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vau_jax.common.files import dump_json
from vau_jax.data import loading, pipeline
from vau_jax.data.processor import Processor
from vau_jax.data.shapes import Need, Shape, Size
from vau_jax.data_prep import random_model
from vau_jax.rl import sampling
from vau_jax.tasks.example import Example
from vau_jax.train import parts

TABLE = Path(__file__).parent / "vau_bench_clips.csv"
COLUMNS = ("video", "seconds", "fps", "width", "height")
BINS = ((3, 10, 150), (10, 20, 505), (20, 30, 590), (30, 40, 310), (40, 50, 210), (50, 60, 205), (60, 70, 200))
BINS += ((70, 80, 135), (80, 90, 110), (90, 100, 110), (100, 150, 410), (150, 200, 210), (200, 250, 100))
BINS += ((250, 300, 70), (300, 900, 310))  # seconds from, to, videos
SOURCES = {  # videos, sizes by weight, frames a second
    "msad": (384, {(1280, 720): 5, (1920, 1080): 4, (640, 480): 1}, (25.0, 30.0)),
    "ucf": (1194, {(320, 240): 1}, (30.0,)),
    "ecva": (
        1361,
        {(1280, 720): 5, (1920, 1080): 3, (640, 360): 3, (640, 480): 2, (854, 480): 2, (352, 288): 1}
        | {(720, 1280): 2, (406, 720): 1, (576, 1024): 1, (480, 854): 1},  # portrait
        (24.0, 25.0, 29.97, 30.0),
    ),
}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 4, "fullatt_block_indexes": [0]}
WORDS = ("what", "does", "the", "man", "in", "a", "dark", "jacket", "do", "near", "white", "car", "and", "why", "not")
QUESTION_WORDS, OPTION_WORDS = (17, 3.5), (10, 3.5)  # mean and deviation, as in VAU-Bench's val.csv
MEAN_LENGTH, SPREAD = 220, 0.6  # of completions: tokens, and the deviation of their logarithm


def draw_table(path: Path, seed: int = 0) -> None:
    """Writes a table of 2,939 clips, as many as VAU-Bench's train.csv has rows."""
    rng, rows = np.random.default_rng(seed), []
    chance = np.asarray([count for *_, count in BINS]) / sum(count for *_, count in BINS)
    for source, (count, sizes, rates) in SOURCES.items():
        weights = np.asarray(list(sizes.values())) / sum(sizes.values())
        for number in range(count):
            low, high, _ = BINS[rng.choice(len(BINS), p=chance)]
            width, height = list(sizes)[rng.choice(len(sizes), p=weights)]
            rows.append(
                (f"{source}_{number:04}.mp4", f"{rng.uniform(low, high):.2f}", rng.choice(rates), width, height)
            )
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def examples_of(path: Path, seed: int) -> list[Example]:
    """A question about each clip of a table, with as many words as those of VAU-Bench have."""
    rng = np.random.default_rng(seed)

    def text(mean: float, deviation: float) -> str:
        return " ".join(rng.choice(WORDS, max(3, round(rng.normal(mean, deviation)))))

    result = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(row[name]) for name in ("fps", "width", "height")}
            meta = {"video": row["video"], "duration": float(row["seconds"]), **numbers}
            options = tuple(text(*OPTION_WORDS) for _ in range(4))
            asked = text(*QUESTION_WORDS) + "?"
            example = Example(f"{row['video']}/qa", "qa", (Path(row["video"]),), asked, options, {"answer": 0}, meta)
            result.append(example)
    return result


def lengths_of(args: argparse.Namespace, count: int) -> np.ndarray:
    """int [count]: tokens of the completions."""
    rng = np.random.default_rng(1)
    if args.lengths:
        known = np.asarray(Path(args.lengths).read_text().split(), int)
        return np.clip(rng.choice(known, count), 1, args.new)
    drawn = rng.lognormal(math.log(MEAN_LENGTH) - SPREAD**2 / 2, SPREAD, count)
    return np.clip(np.rint(drawn), 1, args.new).astype(int)


class Epoch:
    """What an epoch compiles, and what it pads."""

    def __init__(self, prompts: pipeline.Prompts, args: argparse.Namespace, shares: tuple[float, ...]) -> None:
        self.prompts, self.args, self.plan = prompts, args, prompts.plan
        self.lengths = parts.lengths(shares, args.group, args.new)
        self.programs: dict[str, set[Any]] = {name: set() for name in ("update", "score", "decode", "resize", "vision")}
        self.shapes: set[Shape] = set()
        self.used: set[int] = set()  # lengths that completions are packed into
        self.real, self.padded = Counter[str](), Counter[str]()
        self.steps = self.last_new = 0  # steps so far, and the last of them that needed a new program

    def add(self, sizes: list[Size], expected: int, completions: np.ndarray) -> None:
        """A batch of prompts of `sizes`, with completions of these lengths [B, G]."""
        shape, before = self.plan.shape(sizes, expected), self._count()
        self.shapes.add(shape)
        needs = [Need(size, self.plan.config) for size in sizes]
        self._pad("prompt", sum(size.tokens for size in sizes), len(sizes) * shape.tokens)
        patches = sum(need.patches for need in needs)
        self._pad("patch", patches, len(sizes) * shape.patches)
        self._pad("window", patches if shape.windows else 0, len(sizes) * shape.windows * shape.window_size)
        self._pad("frame", patches, len(sizes) * shape.frames * shape.frame_size)
        for part in parts.split(completions.sum(1), self.args.micro_batches, self.args.devices, self.lengths):
            rows = len(sizes) // self.args.micro_batches
            self.used.add(part.length)
            self._pad("completion", 0, rows * part.length)
            self.programs["update"].add((shape, part.length))
            self.programs["score"].add((shape, part.length))
        self._pad("completion", int(completions.sum()), 0)
        self._decode(shape, completions)
        self.steps += 1
        self.last_new = self.steps if self._count() > before else self.last_new

    def _count(self) -> int:
        return sum(map(len, self.programs.values()))

    def _pad(self, name: str, real: int, padded: int) -> None:
        self.real[name] += real
        self.padded[name] += padded

    def _decode(self, shape: Shape, completions: np.ndarray) -> None:
        """The programs of sampling: with planned shapes the caches of all prompts have room for the longest."""
        self.programs["decode"].add(shape)  # prefill
        if self.args.freeze_vision:
            self.programs["vision"].add(shape)
        steps = sampling.steps(completions, self.args.new, self.args.devices)
        own = 0 if self.plan.shapes else shape.tokens
        steps = [(own, *batch) for batch, _ in itertools.groupby(steps)]
        self.programs["decode"] |= {*steps}
        self.programs["resize"] |= {*itertools.pairwise(steps)}

    def result(self) -> dict[str, Any]:
        counts = {f"{name}_programs": len(found) for name, found in self.programs.items()}
        if self.args.micro_batches > 1:
            counts["update_programs"] += 1  # the optimiser's step
        shares = {f"real_{name}_share": self.real[name] / padded for name, padded in self.padded.items() if padded}
        return {
            "prompt_shapes": len(self.shapes),
            "completion_lengths": len(self.used),
            **counts,
            "programs": sum(counts.values()),
            "last_step_with_a_new_program": self.last_new,
            **shares,
        }


def walk(prompts: pipeline.Prompts, args: argparse.Namespace, config: ConfigDict) -> dict[str, Any]:
    """One epoch."""
    count = len(prompts.examples) // args.batch_size
    lengths = lengths_of(args, count * args.batch_size * args.group).reshape(count, args.batch_size, args.group)
    ordered = pipeline.in_batches(prompts, args.batch_size, config.seed)
    epoch = Epoch(prompts, args, config.data.completion_shares)
    for number in range(count):
        rows = [ordered[number * args.batch_size + row] for row in range(args.batch_size)]
        sizes = [prompts.sizes[example.id] for example, _ in rows]
        epoch.add(sizes, rows[0][1], lengths[number])
    return {"steps": count, **epoch.result(), "shapes": [shape._asdict() for shape in prompts.plan.shapes]}


def config_of(args: argparse.Namespace) -> ConfigDict:
    c = importlib.import_module(f"vau_jax.configs.{args.config.replace('/', '.')}").get_config()
    c.data.max_completion_tokens, c.rollout.num_generations = args.new, args.group
    c.batch_size, c.data.tasks = args.batch_size, ("qa",)
    c.data.shapes, c.data.length_window = args.shapes, args.window
    return c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--lengths", default="", help="a file of completion lengths")
    parser.add_argument("--config", default="vau_r1_qa_rft")
    parser.add_argument("--model", default="", help="model folder; empty: tokenizer of the texts, sizes of Qwen2.5-VL")
    for name, default in {"batch_size": 8, "group": 8, "new": 1024, "micro_batches": 4, "devices": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shapes", type=int, default=4, help="planned prompt shapes; 0: each batch is rounded")
    parser.add_argument("--window", type=int, default=128, help="batches whose examples are sorted together")
    parser.add_argument("--freeze_vision", action="store_true")
    parser.add_argument("--step_seconds", type=float, default=0.0, help="of a step")
    parser.add_argument("--compile_seconds", type=float, default=0.0, help="of a program")
    parser.add_argument("--draw", type=Path, help="write the default table there, and nothing else")
    args = parser.parse_args()
    if args.draw:
        draw_table(args.draw)
        return
    if args.batch_size % (args.micro_batches * args.devices):
        parser.error(f"--micro_batches={args.micro_batches} x --devices={args.devices} do not divide the batch")
    began, config = time.monotonic(), config_of(args)
    examples = examples_of(args.table, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            texts = [" ".join((e.question, *e.choices)) for e in examples[:200]]
            args.model = str(random_model.write(Path(folder) / "model", texts, 4096, TEXT, VISION, (3136, 1 << 20)))
        loader = loading.make_loader(Processor(args.model), config.data, augment=False)
        prompts = pipeline.Prompts(examples, loader)
        result = walk(prompts, args, config)
    if args.step_seconds and args.compile_seconds:
        compiling = result["programs"] * args.compile_seconds
        result["compile_share"] = compiling / (compiling + result["steps"] * args.step_seconds)
    print(dump_json({**result, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    sys.exit(main())
