"""The papers' experiments in full, on stand-ins for the files that a user downloads, by the commands that those take.

    vau rehearse [DIR] [--scale=20]

At scale 20 one row in 20 of VAU-Bench: a join, frames, the four chains of CHAINS in full (training for an epoch,
evaluation of every kind on every test file, marks of a judge), all other rows of the tables for one step, of which two
with the published frames and pixels, and the table. The model is small and random, and the judge and the teacher are a
local endpoint that answers all alike: this shows that the way works, not what comes out. DIR/downloads: the stand-ins,
DIR/joined: `vau data join`, DIR/reproduced: `vau reproduce`. A second call skips what is done.
"""

import argparse
import time
from pathlib import Path

from vau_jax import cli
from vau_jax.common import compiled
from vau_jax.common.files import InputError, locked
from vau_jax.data_prep import random_model
from vau_jax.launch import reproduce, stand_ins
from vau_jax.tasks import TASKS, grammar

ANNOTATIONS = Path(__file__).parent.parent / "tests" / "data" / "vau_bench"
CHAINS = "base,rft_qa,rft_tag,rft_cls,rft_qa_after_sft"
AS_PUBLISHED = "sft_cls,rft_qa_tag_cls"  # rows whose one step has the published frames and pixels
ONE_STEP = ("--steps=1", "--train-only")
NOT_AHEAD = "--config.compile_ahead=False"  # of a few steps, most programs would never be used
SMALL = (  # in place of 3,584 tokens a video and 1,024 a completion, which two cores would take days for
    "--config.dtype=float32",
    "--config.remat=False",
    "--config.data.max_completion_tokens=32",
    "--config.data.max_frames=8",
    "--config.data.min_pixels=784",
    "--config.data.max_pixels=3136",
    "--config.data.total_pixels=12544",
    "--config.data.wording=short",
    "--config.data.bucket=(192,64,4,16,8,16)",
    "--config.data.shapes=2",
    NOT_AHEAD,
)
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": (1,)}


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    annotations = args.annotations or ANNOTATIONS
    if not annotations.is_dir():
        raise InputError(f"{annotations} does not exist: give the folder of VAU-Bench's files with --annotations=DIR")
    out, began = args.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    compiled.use(compiled.AUTO, out / "reproduced")
    with locked(out), stand_ins.endpoint() as url:
        rows = stand_ins.write_annotations(annotations, out / "annotations", args.scale)
        folders = stand_ins.write_videos(rows, out / "downloads", args.longest, args.small)
        model = write_model(out / "model", out / "annotations")
        words = [f"{source}={folder}" for source, folder in folders.items()]
        call(
            "data", "join", "--annotations", str(out / "annotations"), "--videos", *words, "--out", str(out / "joined")
        )
        given = [f"--data={out / 'joined'}", f"--model={model}", f"--out={out / 'reproduced'}"]
        given += [f"--judge={url}", "--judge-model=stand-in", f"--teacher={url}", "--teacher-model=stand-in"]
        if args.rows:
            rehearse([*given, f"--rows={args.rows}", *ONE_STEP])
        else:
            rehearse([*given, f"--rows={CHAINS}"])
            rehearse([*given, f"--rows={AS_PUBLISHED}", *ONE_STEP, "--no-cache"], (*SMALL[:3], NOT_AHEAD))
            rest = [row for row in reproduce.ROWS if row not in f"{CHAINS},{AS_PUBLISHED}".split(",")]
            rehearse([*given, f"--rows={','.join(rest)}", *ONE_STEP])
    print(f"rehearsed in {time.monotonic() - began:.0f} s; the table: {out / 'reproduced' / 'table.md'}")


def rehearse(words: list[str], given: tuple[str, ...] = SMALL) -> None:
    """`vau reproduce`, its commands one after the other in this process."""
    args = cli.parser_of("reproduce").parse_args(words)
    reproduce.run(args, given, lambda command: call(*command))


def call(*words: str) -> None:
    """A command as it would be typed, with the seconds that it took."""
    began = time.monotonic()
    cli.call(words)
    print(f"--- took {time.monotonic() - began:.1f} s", flush=True)


def write_model(folder: Path, annotations: Path) -> Path:
    """A small random Qwen2.5-VL whose tokenizer knows the annotations' words, unless it is there."""
    if not folder.is_dir():
        texts = [path.read_text(encoding="utf-8") for path in sorted(annotations.glob("*.csv"))]
        texts += [text for task in TASKS.values() for text in (task.question, task.answer_instruction)]
        texts += [f"<{tag}>" for tag in grammar.REFLECTION_ORDER]
        random_model.write(folder, texts, 1024, TEXT | {"num_key_value_heads": 2}, VISION, (784, 3136))
    return folder


if __name__ == "__main__":
    cli.main("rehearse")
