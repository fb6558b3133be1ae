"""Runs the trials of a sweep and tabulates them.

    vau sweep --config=SWEEP --workdir=DIR [--backend=local|gke|xpk|slurm] [--submit] [--jobs=N] [--dry-run]

Each trial has a folder in DIR, named by the fields that distinguish it, with its output in log.txt. Finished trials are
skipped, killed ones resume where their program can. DIR/sweep.md is the table, means over seeds; DIR/sweep.html a plot
with a point for each trial. With another backend than local DIR/jobs.sh is written, which submits a job for each trial
that is not finished; call the sweep again for the table. --submit runs that script at once and writes nothing here, as
DIR may be a folder that only the jobs see.
"""

import argparse
import hashlib
import html
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from plotly.colors import qualitative
from plotly.subplots import make_subplots

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # called by its path, sys.path has this file's folder instead of the repository
    sys.path.insert(0, str(ROOT))

from vau_jax import cli  # noqa: E402
from vau_jax.common import progress  # noqa: E402
from vau_jax.common.config_help import CONFIGS  # noqa: E402
from vau_jax.common.files import InputError, dump_json, locked, read_json, write_text  # noqa: E402
from vau_jax.common.progress import Progress  # noqa: E402
from vau_jax.eval.tables import escape, lookup, markdown, rows  # noqa: E402
from vau_jax.train.loop import PREEMPTED  # noqa: E402


@dataclass(frozen=True)
class Trial:
    """One call of the sweep's program."""

    name: str
    group: str  # the name without the seed
    folder: Path
    command: list[str]

    @property
    def finished(self) -> bool:
        done, end = self.folder / "done.json", self.folder / "best.json"
        if done.exists():
            return read_json(done) == self.command[1:]
        return end.exists() and not (self.folder / PREEMPTED).exists()  # a submitted training that came to its end

    def run(self) -> bool:
        """Calls the program unless it is finished; whether it ended well."""
        if self.finished:
            print(f"{self.name}: is finished", flush=True)
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        print(f"{self.name}: begins", flush=True)
        with (self.folder / "log.txt").open("a") as log:
            code = subprocess.run(  # noqa: S603  what the sweep file names
                self.command, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            last = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            print(f"{self.name}: FAILED with code {code}: {''.join(last)} ({self.folder / 'log.txt'})", flush=True)
            return False
        if any(self.folder.rglob(PREEMPTED)):
            print(f"{self.name}: was preempted; rerun the sweep to resume it", flush=True)
            return False
        write_text(self.folder / "done.json", dump_json(self.command[1:]))
        print(f"{self.name}: took {time.monotonic() - began:.0f} s", flush=True)
        return True


COLOURS = qualitative.D3
NAME_BYTES = 200  # of a folder's name, of which file systems take 255
BACKENDS = {  # what submits the job of a trial's program, with its arguments
    "gke": "NAME={name} bash launch/xpk.sh manifest {program} | kubectl apply --filename=-",
    "xpk": "NAME={name} bash launch/xpk.sh create {program}",
    "slurm": "sbatch --job-name={name} launch/slurm.sbatch {program}",
}


def jobs(trials: Sequence[Trial], backend: str) -> str:
    """A script that submits the trials that are not finished. Raises InputError outside a checkout."""
    if not (ROOT / "launch" / "xpk.sh").is_file():
        raise InputError(f"--backend={backend} needs a checkout of the repository, whose launchers submit the jobs")
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"cd {shlex.quote(str(ROOT))}"]
    for trial in trials:
        if not trial.finished:
            short = re.sub(r"^[^a-z]+", "", re.sub(r"[^a-z0-9]+", "-", trial.name.lower()))[:28].strip("-")
            name = f"{short or 'trial'}-{_hash(trial.name)}"  # unique, and a name that launch/xpk.sh takes
            program = shlex.join(trial.command[trial.command.index("-m") + 1 :])
            lines.append(BACKENDS[backend].format(name=name, program=program))
    return "\n".join(lines) + "\n"


def load(name: str) -> ModuleType:
    """The module of a sweep, by its path or its name, such as seeds. Raises InputError for a file that is no sweep."""
    path = Path(name)
    if not path.is_file():
        path = CONFIGS / "sweeps" / f"{path.stem}.py"
    if not path.is_file():
        known = ", ".join(f"configs/sweeps/{p.name}" for p in sorted((CONFIGS / "sweeps").glob("[a-z]*.py")))
        raise InputError(f"--config={name} does not exist: expected a sweep such as {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with _mistakes_of(path):
        spec.loader.exec_module(module)
    lacking = [name for name in ("PROGRAM", "CONFIG", "get_hyper") if not hasattr(module, name)]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}: see configs/sweeps/__init__.py")
    return module


@contextmanager
def _mistakes_of(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever a sweep's own code raises into one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"cannot read {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def trials(sweep: ModuleType, workdir: Path) -> list[Trial]:
    """The sweep's trials. Raises InputError when it has none, or two that are the same."""
    with _mistakes_of(sweep.__file__):
        settings = sweep.get_hyper()
    if not isinstance(settings, list) or not settings or not all(isinstance(trial, dict) for trial in settings):
        raise InputError(f"get_hyper of the sweep returns {settings!r:.100}: expected a list of {{field: value}}")
    values = defaultdict(set)
    for trial in settings:
        for field in {field for other in settings for field in other}:
            values[field].add(repr(trial.get(field)))
    results = []
    for trial in settings:
        varied = {field: value for field, value in trial.items() if len(values[field]) > 1 and field != "shared"}
        name = _name(varied)
        options = [f"--config.{field}={_text(value, workdir)}" for field, value in trial.items()]
        command = [sys.executable, "-m", sweep.PROGRAM, f"--config={sweep.CONFIG}", f"--workdir={workdir / name}"]
        group = _name({field: value for field, value in varied.items() if field != "seed"})
        results.append(Trial(name, group, workdir / name, command + options))
    if len({trial.name for trial in results}) < len(results):
        raise InputError("two trials of the sweep have the same settings")
    return results


def _name(settings: dict[str, Any]) -> str:
    joined = ",".join(f"{field.removesuffix('.enabled')}={_short(value)}" for field, value in settings.items())
    name = re.sub(r"[^\w.,=+-]+", "-", joined) or "only"
    return name if len(name.encode()) <= NAME_BYTES else f"{name[: NAME_BYTES // 5]}...{_hash(joined)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _text(value: Any, workdir: Path) -> str:
    return str(value).replace("{sweep}", str(workdir))


def table(folders: Sequence[tuple[str, Path]]) -> str:
    """Of (group, folder) pairs: a row for every group and evaluation, mean ± standard deviation (ddof 1) over its
    folders of each number of `tables.rows`, and how many folders there are."""
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    every = rows()
    for group, folder in folders:
        for path in sorted(folder.glob("eval/*/metrics.json"), key=lambda p: p.stat().st_mtime_ns):
            result = read_json(path)
            groups[group, result["name"]].append(result)
    cells = {
        key: [[e["value"] for r in results if (e := lookup(r, one.path))] for one in every]
        for key, results in groups.items()
    }
    shown = [i for i in range(len(every)) if any(row[i] for row in cells.values())]
    lines = [["trials", "evaluation", "n", *(every[i].title for i in shown)]]
    for (group, name), row in cells.items():
        n = str(len(groups[group, name]))
        lines.append([escape(group), escape(name), n, *(_cell(row[i]) for i in shown)])
    return markdown(lines)


def plot(folders: Sequence[tuple[str, Path]]) -> str:
    """A page with a chart of each number of `tables.rows`: a point a trial, its group along the axis, a colour for each
    evaluation."""
    points: defaultdict[tuple[str, str], tuple[list[str], list[float], list[str]]] = defaultdict(lambda: ([], [], []))
    for group, folder in folders:
        for path in sorted(folder.glob("eval/*/metrics.json")):
            result = read_json(path)
            for one in rows():
                if estimate := lookup(result, one.path):
                    x, y, names = points[one.title, result["name"]]
                    x.append(group)
                    y.append(estimate["value"])
                    names.append(folder.name)
    titles = [one.title for one in rows() if any(one.title == shown for shown, _ in points)]
    figure = make_subplots(rows=max(1, len(titles)), cols=1, subplot_titles=titles)
    evaluations = list(dict.fromkeys(name for _, name in points))
    for (title, name), (x, y, names) in points.items():
        figure.add_scatter(
            x=x,
            y=y,
            text=names,
            name=html.escape(name),
            mode="markers",
            marker={"color": COLOURS[evaluations.index(name) % len(COLOURS)]},
            legendgroup=name,
            showlegend=title == next(shown for shown, other in points if other == name),
            row=titles.index(title) + 1,
            col=1,
        )
    figure.update_layout(height=120 + 280 * len(titles))
    return figure.to_html(include_plotlyjs=True)


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}" if values else "-"


def run(config: str, workdir: Path, backend: str, at_once: int, dry_run: bool, submit: bool = False) -> int:
    """Runs what is not finished, so many at a time, or writes or submits the jobs that will, and the table and plot of
    what is. The exit code: 1 when a trial failed."""
    result = trials(load(config), workdir)
    if submit and backend == "local":
        raise InputError(f"--submit is for trials elsewhere: expected --backend={'|'.join(BACKENDS)} with it")
    if dry_run:
        local = "\n".join(shlex.join(trial.command) for trial in result)
        print(local if backend == "local" else jobs(result, backend), flush=True)
        return 0
    if submit:
        return subprocess.run(["bash", "-c", jobs(result, backend)], check=False).returncode  # noqa: S603, S607
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        return _run(result, workdir, backend, at_once)


def _run(trials: list[Trial], workdir: Path, backend: str, at_once: int) -> int:
    well = []
    if backend == "local":
        shown = Progress("sweep", len(trials), "trial")
        with ThreadPoolExecutor(at_once) as pool:
            for succeeded in pool.map(Trial.run, trials):
                well.append(succeeded)
                shown.show(len(well), f"failed {well.count(False)}")
    else:
        write_text(workdir / "jobs.sh", jobs(trials, backend))
        print(
            f"{sum(not t.finished for t in trials)} jobs to submit: bash {shlex.quote(str(workdir / 'jobs.sh'))}",
            flush=True,
        )
    folders = [(trial.group, trial.folder) for trial in trials]
    text = table(folders)
    write_text(workdir / "sweep.md", text + "\n")
    write_text(workdir / "sweep.html", plot(folders))
    print(text, flush=True)
    print(progress.summary("", {"table": workdir / "sweep.md", "plot": workdir / "sweep.html"}), flush=True)
    return 0 if all(well) else 1


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    sys.exit(run(args.config, args.workdir, args.backend, args.jobs, args.dry_run, args.submit))


if __name__ == "__main__":
    cli.main("sweep")
