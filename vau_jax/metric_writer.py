"""What a run tells while it goes: metrics to metrics.jsonl and TensorBoard, progress lines to the terminal."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from vau_jax.files import write_text


class Progress:
    """Prints how far a stage is and how long it still takes, a line every few seconds and one at the end."""

    def __init__(self, stage: str, total: int, every: float = 5.0, start: int = 0) -> None:
        self.stage, self.total, self.every = stage, total, every
        self.start, self.began, self.last = start, time.monotonic(), 0.0

    def show(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done < self.total and now - self.last < self.every:
            return
        self.last = now
        elapsed = now - self.began
        left = elapsed * (self.total - done) / max(1, done - self.start)
        clock = f"{_clock(elapsed)} gone, {_clock(left)} left" if done < self.total else f"took {_clock(elapsed)}"
        print(f"{self.stage}: {done}/{self.total}  {clock}  {note}".rstrip(), flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class MetricWriter:
    """Appends to workdir: metrics.jsonl (an object a step) with the same scalars for TensorBoard, and samples.jsonl.

    A run that resumes at `start_step` first drops what was written of later steps, which it is going to write again.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int) -> None:
        self.metrics = _append_after(Path(workdir) / "metrics.jsonl", start_step)
        self.samples = _append_after(Path(workdir) / "samples.jsonl", start_step)
        self.board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, scalars: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Scalars are turned to float; those that are not finite are null in JSON. Samples are for people to read."""
        values = {name: float(np.asarray(value)) for name, value in scalars.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps({"step": step, **plain}) + "\n")
        self.samples.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
        for file in (self.metrics, self.samples):
            file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the run's files."""
        for file in (self.metrics, self.samples, self.board):
            file.close()


def _append_after(path: Path, step: int) -> TextIO:
    """Opens a JSONL file for appending, without the lines of steps after `step`."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file but for a last one that a kill cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | None]]:
    """The objects of workdir/metrics.jsonl in order of steps."""
    return [json.loads(line) for line in _whole_lines(Path(workdir) / "metrics.jsonl")]
