"""The log of a run: metrics.jsonl, TensorBoard and Weights & Biases, its progress line, and a heartbeat of every
process.
"""

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import compiled, processes
from vau_jax.common.files import InputError, Lines, dump_json, read_lines, write_text
from vau_jax.common.heartbeat import Heartbeat
from vau_jax.common.progress import Progress


class MetricWriter:
    """Appends to workdir: metrics.jsonl (an object a step) with the same scalars for TensorBoard, and samples.jsonl.

    A run that resumes at `start_step` first drops the lines of later steps, which it will write again. With a `project`
    the scalars go to Weights & Biases too (WANDB_API_KEY; WANDB_MODE=offline keeps them in workdir).
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int, project: str = "") -> None:
        self.metrics = _append_after(Path(workdir) / "metrics.jsonl", start_step)
        self.samples = _append_after(Path(workdir) / "samples.jsonl", start_step)
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - slow to import where PyTorch is installed

        self.board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)
        self.wandb = _wandb(Path(workdir), project) if project else None

    def write(self, step: int, scalars: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Scalars are turned to float; those that are not finite are null in JSON. Samples are for people to read."""
        values = {name: float(np.asarray(value)) for name, value in scalars.items()}
        self.metrics.write([dump_json({"step": step, **values}) + "\n"])
        self.samples.write(dump_json({"step": step, **sample}) + "\n" for sample in samples)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def save(self) -> None:
        """Returns when metrics.jsonl and samples.jsonl are on disk; TensorBoard's file is when it is closed."""
        for file in (self.metrics, self.samples):
            file.save()

    def close(self) -> None:
        """Closes the run's files."""
        for file in (self.metrics, self.samples, self.board):
            file.close()
        if self.wandb:
            self.wandb.finish()


def _wandb(workdir: Path, project: str) -> Any:
    """A run of Weights & Biases named after the workdir and identified by its path; it is resumed with the run."""
    try:
        import wandb  # noqa: PLC0415 - only where it is asked for
    except ImportError as error:
        raise InputError(f"config.wandb={project!r} needs the package: pip install wandb") from error
    number = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=workdir.name, id=number, dir=workdir, resume="allow")


def memory() -> dict[str, float]:
    """Peak memory so far, in GiB: of this process on the host, and of its first device where the device reports it."""
    result = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        result["memory/device_gib"] = stats["peak_bytes_in_use"] / 2**30
    return result


class RunLog:
    """The log of a run's steps. All but the heartbeat is written by the first process alone."""

    def __init__(self, config: ConfigDict, workdir: Path, done: int) -> None:
        self.config, self.workdir = config, workdir
        self.programs, self.tracing = compiled.programs(), False
        self.held_up = 0.0  # seconds that the run was held up by saves since the last line
        self.heartbeat = Heartbeat(workdir)
        first = processes.is_first()
        self.writer = MetricWriter(workdir, done, config.wandb) if first else None
        self.progress = Progress(config.stage, config.steps, "step", start=done) if first else None

    def begin(self, step: int) -> None:
        first, last = self.config.profile_steps
        if first and first <= step <= max(first, last) and not self.tracing:  # a run may resume within these
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.tracing = True
        self.programs.take()

    def end(
        self, step: int, metrics: dict[str, Any], samples: list[dict[str, Any]], note: str, always: bool = False
    ) -> None:
        """Logs a step: every config.log_every-th, the last, and with `always` this one."""
        if step == max(self.config.profile_steps):
            self._end_trace()
        self.heartbeat.beat(step, metrics["seconds/step"])
        if self.writer and (always or step % self.config.log_every == 0 or step == self.config.steps):
            own = {"seconds/checkpoint": self.held_up, **memory(), **self.programs.take()}
            self.writer.write(step, metrics | own, samples)
            self.held_up = 0.0
        if self.progress:
            self.progress.show(step, note)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the save of a checkpoint, which a run resumes after: the lines of its steps are on disk before it. The
        next line has the seconds that it took."""
        began = time.monotonic()
        if self.writer:
            self.writer.save()
        yield
        self.held_up += time.monotonic() - began

    def _end_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def close(self) -> None:
        self._end_trace()  # of a run that ends, or is asked to, before the last step of the trace
        if self.writer:
            self.writer.close()


def _append_after(path: Path, step: int) -> Lines:
    """Opens a JSONL file for appending, without the lines of steps after `step`."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
    return Lines(path)


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a file: a last one that a kill cut short is left out."""
    if not path.exists():
        return []
    return [line for line in read_lines(path) if line.endswith("\n")]


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | None]]:
    """The objects of workdir/metrics.jsonl in order of steps."""
    return [json.loads(line) for line in _whole_lines(Path(workdir) / "metrics.jsonl")]
