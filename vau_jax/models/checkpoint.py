"""Checkpoints of a run: state, data iterator and step by orbax; and finding the model in a folder."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy

from vau_jax.common import checksums, processes
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, dump_json, read_json, short, write_text
from vau_jax.models import lora
from vau_jax.models.lora import LoRA
from vau_jax.types import Params, State

MODEL_FOLDER = "model"  # config, tokenizer and processor files of the run's model, without weights
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter.json"
INPUTS = "inputs.json"  # what a run reads, with hashes
NEEDED = "needed_by"  # in the workdir: a note of each run that began with one of its checkpoints
DAMAGED = "damaged"  # in the workdir: checkpoints that are not as they were written
FORMAT = 2  # of checkpoints; in 1, which had no number, a motion prompt's numbers were not part of the tower
STATE = "state/"  # how the names of a checkpoint's large files begin


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, the one of the best score, and those that other runs began with.

    A step is either there whole or not at all; one that was damaged since is put away, with a warning.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2) -> None:
        self.workdir = Path(workdir).resolve()
        self.folder = self.workdir / CHECKPOINTS
        self.removed = self.folder / "removed"
        self._empty()
        self._quarantine_damaged()
        best = BestN(get_metric_fn=_score, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,  # without it no metrics are kept
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best, _Needed(self.workdir)]),
            create=True,
            enable_async_checkpointing=False,
            todelete_subdir=self.removed.name,  # whole, so that a kill leaves no half of it among the others
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: State, data: dict[str, Any], score: float) -> None:
        """Writes state and the data iterator's state, and returns when they are on disk; higher scores are better."""
        numbered = ocp.args.JsonSave({**data, "format": FORMAT})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=numbered)
        self.manager.save(step, args=args, metrics={"score": score if np.isfinite(score) else None})
        self.manager.wait_until_finished()
        processes.barrier("saved")  # the first process has given the folder its name
        checksums.write(self.folder / str(step))
        self._empty()

    def _quarantine_damaged(self) -> None:
        """Moves steps that are not as they were written out of the way; all of the newest is read for that (where it is
        damaged, of the one before), and of the others the small files, which are needed to know the best."""
        damaged, newest = {}, None
        for step in reversed(processes.broadcast_from_first(lambda: steps(self.workdir))):
            skip = None if newest is None else STATE
            if problem := checksums.damage(self.folder / str(step), skip, together=True):
                damaged[step] = problem
            elif newest is None:
                newest = step
        if damaged and newest is None:
            told = ", ".join(f"step {step} ({problem})" for step, problem in damaged.items())
            raise InputError(
                f"no checkpoint of {self.workdir} is whole: {told}; restore a copy, or start again in another --workdir"
            )
        if damaged and processes.is_first():
            for step, problem in damaged.items():
                self._quarantine(step)
                print(
                    f"warning: the checkpoint of step {step} is damaged ({problem}): it is now in "
                    f"{self.workdir / DAMAGED / str(step)}, and the run resumes from step {newest}",
                    flush=True,
                )
        processes.barrier("damaged checkpoints are put away")
        if newest and processes.is_first() and not (self.folder / str(newest) / checksums.NOTE).exists():
            print(f"warning: the checkpoint of step {newest} has no checksums to be checked by", flush=True)

    def _quarantine(self, step: int) -> None:
        target = self.workdir / DAMAGED / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(target)

    def _empty(self) -> None:
        if processes.is_first():
            shutil.rmtree(self.removed, ignore_errors=True)

    def best(self) -> int | None:
        """The step of the best score."""
        scores = {step: _score(self.manager.metrics(step)) for step in self.manager.all_steps()}
        return max(scores, key=scores.get) if scores else None

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a step back onto the shapes and shardings of `like`. Raises InputError, also for a format that cannot
        be resumed."""
        path = self.folder / str(step)
        with _reading(path):
            data = self.manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
        _check_format(data.pop("format", 1), like, path)
        with _reading(path):
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
        return state, data

    def close(self) -> None:
        self.manager.close()


def _check_format(number: int, like: State, path: Path) -> None:
    """Raises InputError for a checkpoint that a run with the state `like` cannot resume from."""
    if number > FORMAT:
        raise InputError(f"checkpoint {path} has format {number}, of a later version: this one reads up to {FORMAT}")
    if number == 1 and "motion_prompt" in like.params.get("visual", {}):
        raise InputError(
            f"checkpoint {path} has format 1, in which a run with a motion prompt cannot be resumed: begin another run "
            f"from it with config.init_from={path}"
        )


def _score(metrics: dict[str, float | None]) -> float:
    """What `save` was told; null stands for a score that was no finite number."""
    return -np.inf if metrics["score"] is None else metrics["score"]


class BestMetric:
    """By what the best checkpoint is known: the mean of a metric over the steps since the last that was due."""

    def __init__(self, config: ConfigDict) -> None:
        auto = "reward" if config.stage == "rft" else "-loss"
        self.name = auto if config.checkpoint.best == "auto" else config.checkpoint.best
        self.values: list[float | None] = []  # None: no finite number

    def add(self, metrics: dict[str, Any]) -> None:
        metric = self.name.removeprefix("-")
        if metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise InputError(f"checkpoint.best={self.name!r} is no metric: expected one of {known}")
        value = float(metrics[metric]) * (-1 if self.name.startswith("-") else 1)
        self.values.append(value if np.isfinite(value) else None)

    def take(self) -> float:
        """The mean so far, which begins anew; -inf where it is not a number."""
        values, self.values = self.values, []
        return -np.inf if None in values else float(np.mean(values))


def restore_params(step_folder: str | os.PathLike) -> Params:
    """The parameters of one checkpoint, as host arrays. Raises InputError where it is not as it was written.

    No other step takes its place: what is told of a step would be another's.
    """
    reader = ocp.PyTreeCheckpointer()
    step_folder = Path(step_folder).resolve()
    if problem := checksums.damage(step_folder):
        raise InputError(f"the checkpoint {step_folder} is damaged ({problem}): {_way_out(step_folder)}")
    with _reading(step_folder):
        return _params(reader, step_folder / "state")


@contextmanager
def _reading(step_folder: Path) -> Iterator[None]:
    """Turns what orbax raises into an InputError that says what else there is."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"cannot read the checkpoint {step_folder} ({short(error)})"
        raise InputError(f"{told}: {_way_out(step_folder)}") from error


def _way_out(step_folder: Path) -> str:
    """What to do about a checkpoint that cannot be read: which other step of the run is whole."""
    folder = step_folder.parent
    for step in reversed(steps(folder.parent)):
        other = folder / str(step)
        if other != step_folder and (other / checksums.NOTE).exists() and not checksums.damage(other):
            return f"step {step} is whole, give {other}, or move the damaged one away and train on from there"
    return "no other step of the run is whole; put a copy back"


def _params(reader: ocp.PyTreeCheckpointer, folder: Path) -> Params:
    described = reader.metadata(folder).item_metadata
    if described is None:
        raise ValueError(f"{folder} does not say what it holds")
    tree = described.tree
    template = {"params": jax.tree.map(lambda leaf: 0, tree["params"], is_leaf=lambda x: hasattr(x, "shape"))}
    args = ocp.args.PyTreeRestore(
        item=template,
        partial_restore=True,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template),
    )
    return reader.restore(folder, args=args)["params"]


def steps(workdir: str | os.PathLike) -> list[int]:
    """The finished checkpoints of a workdir, in order."""
    folder = Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    numbered = [p for p in folder.iterdir() if p.name.isdigit()]
    return sorted(int(p.name) for p in numbered if ocp.utils.is_checkpoint_finalized(p))


class Source(NamedTuple):
    """What a run begins with: no folder that may hold something else tomorrow, but these files with these contents."""

    path: str  # absolute: a model folder, or workdir/checkpoints/STEP
    files: dict[str, str]  # SHA-256 of each, under its name in the model folder or the workdir
    beside: str = ""  # the path as seen from the run that begins with it: both may move together


class Adapter(NamedTuple):
    """What a run with LoRA trains: its checkpoints hold the adapters alone."""

    base: Source  # of the other parameters
    lora: LoRA


class Found(NamedTuple):
    folder: Path  # config, tokenizer and processor files
    step_folder: Path | None  # the checkpoint that holds the weights; None: the folder's safetensors do
    adapter: Adapter | None = None


def source(path: str | os.PathLike, user: str | os.PathLike) -> Source:
    """What `path` (see `find_model`) holds now that `user`, a run, begins with it. Reads all of a model folder's
    weights. Raises InputError."""
    result = find_model(path)
    here = (result.step_folder or result.folder).resolve()
    return Source(str(here), _contents(result), os.path.relpath(here, Path(user).resolve()))


def read_source(fields: Fields) -> Source:
    """The source that `_asdict` wrote. Raises InputError."""
    files = fields.object("files", {})
    return Source(fields.text("path"), {name: files.text(name) for name in files.raw}, fields.text("beside", ""))


def contents(path: str | os.PathLike) -> dict[str, str]:
    """The SHA-256 of every file that the model at `path` is loaded from; those of what its adapters are put on too."""
    result = find_model(path)
    base = result.adapter.base.files if result.adapter else {}
    return _contents(result) | {f"base/{name}": x for name, x in base.items()}


def _contents(found: Found) -> dict[str, str]:
    names = [file.name for file in _model_files(found.folder)]
    if found.step_folder is None:
        weights = sorted(file.name for file in found.folder.glob("*.safetensors"))
        return checksums.of_files(found.folder, [*names, *weights])
    model = checksums.of_files(found.folder, names)
    state = checksums.of_files(found.step_folder, below=STATE)
    step = f"{CHECKPOINTS}/{found.step_folder.name}"
    return {f"{MODEL_FOLDER}/{name}": x for name, x in model.items()} | {f"{step}/{n}": x for n, x in state.items()}


def find_source(source: Source, user: str | os.PathLike) -> str:
    """Where the source of `user`, a run, is now. Raises InputError unless it is as it was when that began.

    Of several processes that load together the first alone reads the files for that.
    """
    path = Path(source.path)
    if source.beside and not path.is_dir():
        path = (Path(user) / source.beside).resolve()
    if not path.is_dir():
        notes = [str(Path(user) / name) for name in (INPUTS, ADAPTER) if (Path(user) / name).exists()]
        raise InputError(
            f"{user} began with {source.path}, which does not exist: put it back, or name its new place in "
            f"{' and '.join(notes)}"
        )
    if not processes.is_first():
        return str(path)
    now = _contents(find_model(path))
    changed = [name for name, content in source.files.items() if now.get(name) != content]
    if changed:
        root = path.parent.parent if _is_step(path) else path
        raise InputError(
            f"{root / changed[0]} has changed since {user} began with it: put it back as it was, or train anew in "
            "another --workdir"
        )
    return str(path)


def write_adapter(workdir: str | os.PathLike, adapter: Adapter) -> None:
    """Notes in a run's workdir that its checkpoints hold adapters, and for what."""
    note = {"base": adapter.base._asdict(), "lora": vars(adapter.lora)}
    write_text(Path(workdir) / ADAPTER, dump_json(note, indent=1))


def _adapter(workdir: Path) -> Adapter | None:
    if not (workdir / ADAPTER).is_file():
        return None
    fields = Fields(read_json(workdir / ADAPTER), str(workdir / ADAPTER))
    old = isinstance(fields.raw.get("base"), str)  # of a run that noted the path alone
    base = Source(fields.text("base"), {}) if old else read_source(fields.object("base"))
    return Adapter(base, lora.read(fields.object("lora")))


def need(source: Source, workdir: str | os.PathLike) -> None:
    """Asks the run whose checkpoint `source` is to keep it."""
    path = Path(source.path)
    if not _is_step(path):
        return
    user = str(Path(workdir).resolve())
    note = path.parent.parent / NEEDED / f"{hashlib.sha256(user.encode()).hexdigest()[:16]}.json"
    try:
        note.parent.mkdir(exist_ok=True)
        write_text(note, dump_json({"step": int(path.name), "by": user}))
    except OSError as error:
        print(f"warning: {path} cannot be marked as needed ({short(error)}): keep it", flush=True)


class _Needed(PreservationPolicy):
    """Keeps the steps of a workdir that other runs began with, also where such a run is no longer where it was: it may
    have another name by now, and is lost without its beginning."""

    def __init__(self, workdir: Path) -> None:
        self.folder = workdir / NEEDED
        for path, step, by in self._notes():
            if not os.path.isdir(by) and processes.is_first():
                print(f"step {step} of {workdir} is kept for {by}, which is not there: delete {path} if it is gone")

    def _notes(self) -> list[tuple[Path, int, str]]:
        paths = sorted(self.folder.glob("*.json"))
        notes = [(path, Fields(read_json(path), str(path))) for path in paths]
        return [(path, note.integer("step", 0, 2**62), note.text("by")) for path, note in notes]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        needed = {step for _, step, _ in self._notes()}
        return [checkpoint.step in needed for checkpoint in checkpoints]


def find_model(path: str | os.PathLike) -> Found:
    """Where a model's files are.

    `path` is a Hugging Face folder, the workdir of a run (its last checkpoint), or workdir/checkpoints/STEP.
    """
    path = Path(path)
    if not os.path.isdir(path):  # pathlib's raises for names that no file system takes
        raise InputError(f"model folder {path} does not exist: give a Hugging Face folder or the workdir of a run")
    if _is_step(path):
        return Found(path.parent.parent / MODEL_FOLDER, path, _adapter(path.parent.parent))
    if (path / MODEL_FOLDER).is_dir():
        result = steps(path)
        if not result:
            raise InputError(f"{path} is a run without a finished checkpoint: train it first, or give a model folder")
        return Found(path / MODEL_FOLDER, path / CHECKPOINTS / str(result[-1]), _adapter(path))
    return Found(path, None)


def _is_step(path: Path) -> bool:
    return path.parent.name == CHECKPOINTS and path.name.isdigit()


def _model_files(folder: Path) -> list[Path]:
    """A model folder's config, tokenizer and processor files; what an evaluation wrote there is none."""
    known, others = (".json", ".jinja", ".txt"), (".index.json", "metrics.json")
    return sorted(f for f in folder.iterdir() if f.suffix in known and not f.name.endswith(others))


def copy_model_files(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Copies a model folder's config, tokenizer and processor files to workdir/model, so that the run stands alone."""
    target = Path(workdir) / MODEL_FOLDER
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in _model_files(Path(source)):
        shutil.copy2(file, part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def iterator_state(raw: Any) -> dict[str, Any]:
    """A grain iterator's state as plain JSON values."""
    return json.loads(dump_json(raw))
