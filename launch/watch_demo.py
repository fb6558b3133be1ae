"""The page of `vau demo --watch`: while the demo trains, each checkpoint is asked about a few test clips, and the page
shows their frames with the true interval and those predicted so far, above the curves.

It is a process of its own, on the CPU: training keeps the accelerator, and never waits for it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from vau_jax.common import compiled, config_flags
from vau_jax.common.files import InputError
from vau_jax.eval import evaluate, gallery, report, tables, watch
from vau_jax.launch import demo
from vau_jax.models import checkpoint

CLIPS = 12  # asked of each checkpoint
EVERY = 2.0  # seconds between looks for a new checkpoint


@contextmanager
def watching(arguments: list[str], workdir: Path) -> Iterator[None]:
    """Serves the page of a demo until the block ends; `arguments` are those of its config."""
    command = [sys.executable, "-m", "vau_jax.launch.watch_demo", f"--folder={workdir}", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})  # noqa: S603 - this very program
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def pending(workdir: Path, stages: Sequence[str], asked: Path) -> list[tuple[str, int]]:
    """(stage, step) of the last checkpoint of each stage, unless its answers are in `asked` already."""
    last = [(stage, steps[-1]) for stage in stages if (steps := checkpoint.steps(workdir / stage))]
    return [(stage, step) for stage, step in last if not (asked / f"{stage}-{step}").exists()]


def ask(config: ConfigDict, workdir: Path, stage: str, step: int, asked: Path) -> None:
    """Evaluates a checkpoint on the first test clips."""
    c = demo.evaluation_config(config, workdir, stage)
    c.name, c.checkpoint = f"{stage}, step {step}", str(workdir / stage / "checkpoints" / str(step))
    c.data.tasks, c.data.max_examples, c.batch_size = ("grounding",), CLIPS, CLIPS
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        evaluate.run(c, asked / f"{stage}-{step}")


def page(folders: Sequence[Path], strips: gallery.Strips, stamp: str) -> str:
    """The report of the checkpoints asked so far and of the runs' curves."""
    there = [folder for folder in folders if folder.is_dir()]
    return report.page(there, tables.evaluations(there[:1]), CLIPS, strips, stamp)


def main() -> None:
    """Serves the page, and asks each new checkpoint, until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    args, rest = parser.parse_known_args()
    config, _ = config_flags.read(["vau demo", *rest], "demo")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo is asked, and ends this
    compiled.use(compiled.AUTO, demo.shared(config, args.folder) / "data")
    with tempfile.TemporaryDirectory(prefix="vau_watch_") as asked:
        folders = [Path(asked), *(args.folder / stage for stage in config.stages)]
        pages = watch.Pages(folders, partial(page, folders, {}))
        pages.refresh()
        with watch.serving(pages, 0) as address:
            print(f"watch: open {address}", flush=True)
            while not ended.wait(EVERY):
                with suppress(InputError, FileNotFoundError):  # a checkpoint that was replaced meanwhile
                    pages.refresh()
                    for stage, step in pending(args.folder, config.stages, Path(asked)):
                        ask(config, args.folder, stage, step, Path(asked))


if __name__ == "__main__":
    main()
