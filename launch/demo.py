"""The stages of the main job in sequence; `bash launch/demo.sh` sets up and calls this.

    vau demo [quick] [WORKDIR] [--watch] [--config.key=value]

DIR/data: videos and annotations, DIR/frames: decoded frames (both in config.shared where that is set), DIR/model: the
model's start, DIR/sft and DIR/rft: runs, DIR/eval: scores, DIR/report.html: the result.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from vau_jax import cli
from vau_jax.common import compiled, config_flags, progress
from vau_jax.common.files import InputError, dump_json, locked, read_json, write_text
from vau_jax.configs import eval as eval_config
from vau_jax.data_prep import cache_frames, random_model
from vau_jax.datasets import reflections, synthetic, vau_bench
from vau_jax.eval import evaluate, report
from vau_jax.tasks import TASKS, prompts
from vau_jax.train import loop


def run(config: ConfigDict, workdir: Path) -> None:
    """All stages; each skips finished work, so a second call is quick and a killed one resumes."""
    check(config)
    compiled.use(compiled.AUTO, shared(config, workdir) / "data")  # stages share it
    stages = {
        "videos": lambda: make_videos(config, workdir),
        "model": lambda: make_model(config, workdir),
        "frames": lambda: decode_videos(config, workdir),
        "evaluate init": lambda: evaluate_stage(config, workdir, "init"),
    }
    for name in config.stages:
        stages[name] = partial(loop.run, train_config(config, workdir, name), workdir / name)
        stages[f"evaluate {name}"] = partial(evaluate_stage, config, workdir, name)
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        for number, (name, stage) in enumerate(stages.items(), start=1):
            print(f"--- {number}/{len(stages)} {name}", flush=True)
            began = time.monotonic()
            stage()
            print(f"--- {name} took {time.monotonic() - began:.0f} s", flush=True)
    print(report.write([workdir], workdir / "report.html"), flush=True)


def check(config: ConfigDict) -> None:
    """Raises InputError for stages in an impossible order."""
    if tuple(config.stages) not in (("sft",), ("rft",), ("sft", "rft")):
        raise InputError(f"stages={tuple(config.stages)}: expected ('sft',), ('rft',) or ('sft', 'rft')")


def shared(config: ConfigDict, workdir: Path) -> Path:
    """The folder of videos, frames and compiled programs."""
    return Path(config.shared) if config.shared else workdir


def make_videos(config: ConfigDict, workdir: Path) -> None:
    """Renders DIR/data unless it exists with the same settings."""
    folder = shared(config, workdir) / "data"
    synthetic.make_dataset(folder, dict(config.videos), config.video_seed, shake=config.camera_shake)


def make_model(config: ConfigDict, workdir: Path) -> None:
    """Writes DIR/model unless it exists with the same settings."""
    folder, stamp = workdir / "model", workdir / "model.json"
    request = {"model": json.loads(config.model.to_json()), "seed": config.seed}
    if stamp.exists() and folder.is_dir() and read_json(stamp) == request:
        print(f"model: is there already ({folder})", flush=True)
        return
    sizes = dict(config.model.text), dict(config.model.vision)
    random_model.write(
        folder,
        demo_texts(shared(config, workdir) / "data"),
        config.model.vocab_size,
        *sizes,
        config.model.pixels,
        config.seed,
    )
    write_text(stamp, dump_json(request))


def demo_texts(data: Path) -> list[str]:
    """The training texts of the tokenizer: questions, options, answers and reasoning of the training split."""
    rows, _ = vau_bench.load(data / "train.csv")
    asked = [name for name, task in TASKS.items() if task.verifiable]
    examples = [example for row in rows for name in asked if (example := vau_bench.example_of(row, name))]
    texts = [prompts.question(example, "reflection", "short") for example in examples]
    for reflection in reflections.load(data / "train_reflection.jsonl").values():
        texts += [reflection.think, reflection.reflect, reflection.revise]
    return texts


def train_config(config: ConfigDict, workdir: Path, stage: str) -> ConfigDict:
    """The config of SFT (from DIR/model) or RFT (from DIR/sft, where there is SFT)."""
    c = config[stage].copy_and_resolve_references()
    c.seed = config.seed
    c.model = str(workdir / "model")
    c.init_from = str(workdir / "sft") if stage == "rft" and "sft" in config.stages else ""
    c.motion, c.data.style = config.motion, config.style
    data = shared(config, workdir) / "data"
    c.data.csv, c.data.videos = str(data / "train.csv"), str(data / "videos")
    c.data.reflection, c.data.cache = str(data / "train_reflection.jsonl"), str(frames(config, workdir))
    return c


def frames(config: ConfigDict, workdir: Path) -> Path:
    """The folder of decoded frames; a motion prompt takes one more of each video."""
    return shared(config, workdir) / ("frames_motion" if config.motion.enabled else "frames")


def decode_videos(config: ConfigDict, workdir: Path) -> None:
    """Fills the folder of frames, which all stages read."""
    for split in ("train", "test"):
        c = train_config(config, workdir, "rft")
        c.data.csv, c.data.reflection = str(shared(config, workdir) / "data" / f"{split}.csv"), ""
        cache_frames.run(c, frames(config, workdir))


def evaluation_config(config: ConfigDict, workdir: Path, stage: str) -> ConfigDict:
    """The config of a stage's evaluation on the held-out videos."""
    c = eval_config.get_config()
    c.data = train_config(config, workdir, "sft").data
    c.data.csv, c.data.reflection = str(shared(config, workdir) / "data" / "test.csv"), ""
    c.data.augment = False
    c.rewards = ConfigDict({name: config.rft.rewards[name] for name in c.rewards})  # so that all totals compare
    c.checkpoint = str(workdir / ("model" if stage == "init" else stage))
    c.dtype, c.batch_size, c.name = "float32", config.eval_batch_size, stage
    return c


def evaluate_stage(config: ConfigDict, workdir: Path, stage: str) -> None:
    """Scores a stage's model on the held-out videos and, except for the initial model, on grey frames."""
    for blind in (False, True) if stage != "init" else (False,):
        c = evaluation_config(config, workdir, stage)
        c.blind = blind
        c.name = f"{stage} blind" if blind else stage
        evaluate.run(c, workdir / "eval" / c.name.replace(" ", "_"))


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """The program: see its options in `vau_jax.cli`."""
    from vau_jax.launch import watch_demo  # noqa: PLC0415 - which reads this module in turn

    words, mode = list(args.words), ""
    if words[:1] == ["quick"]:
        mode = words.pop(0)
    if len(words) > 1:
        raise InputError(f"{' '.join(words)}: expected `vau demo [quick] [WORKDIR]`")
    folder = words[0] if words else "runs/demo-quick" if mode else "runs/demo"
    if mode:
        rest = ["--config=demo:quick", *rest]
    config, workdir = config_flags.parse(["vau demo", *rest], "demo", folder)
    with watch_demo.watching(rest, workdir) if args.watch else nullcontext():
        run(config, workdir)
    example = shared(config, workdir) / "data" / "videos" / "test_00000.mp4"
    last = workdir / config.stages[-1]
    asked = ("vau", "ask", f"--model={last}", f"--video={example}", "--task=ground", "--verbose")
    places = {"report": workdir / "report.html", "model": last, "videos": example.parent}
    print(progress.summary("the demo is done", places, [asked, ("vau", "app", f"--model={last}")]))


if __name__ == "__main__":
    cli.main("demo")
