"""Checkpoints of a run (state, data iterator and step) by orbax, and resolution of a model path."""

import copy
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from vau_jax.common import checksums, processes
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, dump_json, missing_features, read_json, short, write_text
from vau_jax.models import lora
from vau_jax.models.lora import LoRA
from vau_jax.types import Params, State

# Parameters alone are restored without a file of orbax's that it then warns of; errors of a save are raised as well.
MUTED = ("Metadata file does not exist", "in background save thread", "Finalize thread")
logging.getLogger("absl").addFilter(lambda record: not any(text in record.getMessage() for text in MUTED))

MODEL_FOLDER = "model"  # config, tokenizer and processor files of the run's model, without weights
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter.json"
INPUTS = "inputs.json"  # what a run reads, with hashes
NEEDED = "needed_by"  # in the workdir: a note of each run that started from one of its checkpoints
DAMAGED = "damaged"  # in the workdir: damaged checkpoints
FORMAT = 2  # of checkpoints; in 1, which had no number, a motion prompt's numbers were not part of the tower
EVALUATED = "eval/"  # prefix of the metrics of evaluations during training
SCORE = f"{EVALUATED}score"  # the one that checkpoints are compared by
STATE = "state/"  # prefix of a checkpoint's large files
LONGEST = 24 * 3600  # seconds that a save may take: orbax would give up one of a large state to a slow disk


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, the best one, and those that other runs started from.

    A step is complete or absent; one that was damaged later is moved away, with a warning. Raises InputError where
    folders cannot be renamed. One save at a time is written in the background: its errors are raised by the next, and
    by whatever else waits for it.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2) -> None:
        self.workdir = Path(workdir).resolve()
        self.folder = self.workdir / CHECKPOINTS
        self.removed = self.folder / "removed"
        processes.together(lambda: _adapt_orbax(missing_features(self.workdir)))
        self._empty()
        self._quarantine_damaged()
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,  # without it no metrics are kept
            preservation_policy=AnyPreservationPolicy([LatestN(keep), _Best(), _Needed(self.workdir)]),
            create=True,
            async_options=ocp.options.AsyncOptions(timeout_secs=LONGEST, barrier_sync_fn=_barrier),
            todelete_subdir=self.removed.name,  # as one folder, so that a kill leaves no part of it among the others
        )
        self.manager = _Manager(self.folder, options=options)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def latest(self) -> int | None:
        self.wait()
        return self.manager.latest_step()

    def save(self, step: int, state: State, data: dict[str, Any], score: float) -> None:
        """Begins to write state and the data iterator's state, as they are now; a higher score is better.

        Waits for the save before, and until orbax has the state on the host: then the next update may have its buffers.
        (On CPUs orbax holds these themselves, and JAX gives none away that is held: that update takes others.)
        """
        self.wait()
        numbered = ocp.args.JsonSave(copy.deepcopy({**data, "format": FORMAT}))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=numbered)
        self.manager.save(step, args=args, metrics={"score": score if np.isfinite(score) else None})
        self._writing = self._background.submit(self._complete, step)

    def _complete(self, step: int) -> None:
        """In the background, where a collective of several processes would meet those of the training: they wait for
        each other by orbax alone."""
        self.manager.wait_until_finished()
        checksums.write(self.folder / str(step))
        self._empty()

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises its error."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _quarantine_damaged(self) -> None:
        """Moves damaged steps away. All files of the newest step are verified (where it is damaged, of the one before),
        and of the others the small files, which determine the best.
        """
        damaged, newest = {}, None
        for step in reversed(processes.broadcast_from_first(lambda: steps(self.workdir))):
            skip = None if newest is None else STATE
            if problem := checksums.damage(self.folder / str(step), skip, together=True):
                damaged[step] = problem
            elif newest is None:
                newest = step
        if damaged and newest is None:
            listed = ", ".join(f"step {step} ({problem})" for step, problem in damaged.items())
            raise InputError(
                f"no checkpoint of {self.workdir} is intact: {listed}; restore a copy, or begin in another --workdir"
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
        """The step of the best score; of equal ones, the first."""
        self.wait()
        scores = {step: _score(self.manager.metrics(step)) for step in sorted(self.manager.all_steps())}
        return max(scores, key=scores.get) if scores else None

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a step back onto the shapes and shardings of `like`. Raises InputError, also for a format that cannot
        be resumed."""
        self.wait()
        path = self.folder / str(step)
        with _reading(path):
            data = self.manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
        _check_format(data.pop("format", 1), like, path)
        with _reading(path):
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
        return state, data

    def close(self) -> None:
        """Waits for the last save. Raises its error."""
        self.wait()
        self._background.shutdown()
        self.manager.close()


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to `processes.Preemption`, which counts its questions: orbax would ask JAX by the step, and the
    processes then agree on a number that the other count does not reach."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier in the background. A process whose write has failed goes past it with the error: the others wait
    for its files, and end with it."""
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _adapt_orbax(missing: set[str]) -> None:
    """Has orbax do without the `files.missing_features` of a file system, for the rest of the process."""
    if not missing:
        return
    from orbax.checkpoint._src.serialization import tensorstore_utils  # noqa: PLC0415 - it has no public option

    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        if "locks" in missing:
            context["file_io_locking"] = {"mode": "lockfile"}  # each process writes files of its own anyway
        if "sync" in missing:
            context["file_io_sync"] = False  # of files too; what a power failure cut short, its checksum tells


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
    """The data given to `save`; null represents a score that was not finite."""
    return -np.inf if metrics["score"] is None else metrics["score"]


class BestMetric:
    """The score that determines the best checkpoint: the mean of a metric over the steps since the last checkpoint, or
    one of the evaluation at the checkpoint's own step."""

    def __init__(self, config: ConfigDict) -> None:
        auto = SCORE if config.eval.csv else "reward" if config.stage == "rft" else "-loss"
        self.name = auto if config.checkpoint.best == "auto" else config.checkpoint.best
        self.values: list[float | None] = []  # None: no finite number

    @property
    def by_evaluation(self) -> bool:
        """Whether evaluations during training determine it."""
        return self.name.removeprefix("-").startswith(EVALUATED)

    def add(self, metrics: dict[str, Any]) -> None:
        metric = self.name.removeprefix("-")
        if self.by_evaluation:
            self.values = []
            if metric not in metrics:
                return
        if metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise InputError(f"checkpoint.best={self.name!r} is not a metric: expected one of {known}")
        value = float(metrics[metric]) * (-1 if self.name.startswith("-") else 1)
        self.values.append(value if np.isfinite(value) else None)

    def take(self) -> float:
        """The mean so far, which is reset; -inf where there is none, or it is not finite."""
        values, self.values = self.values, []
        return -np.inf if None in values or not values else float(np.mean(values))


def restore_params(step_folder: str | os.PathLike) -> Params:
    """The parameters of one checkpoint, as host arrays. Raises InputError where it is not as it was written.

    No other step replaces it: its metrics would be reported of another.
    """
    reader = ocp.PyTreeCheckpointer()
    step_folder = Path(step_folder).resolve()
    if problem := checksums.damage(step_folder):
        raise InputError(f"the checkpoint {step_folder} is damaged ({problem}): {_way_out(step_folder)}")
    with _reading(step_folder):
        return _params(reader, step_folder / "state")


@contextmanager
def _reading(step_folder: Path) -> Iterator[None]:
    """Turns orbax's errors into an InputError that names the alternatives."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"cannot read the checkpoint {step_folder} ({short(error)})"
        raise InputError(f"{reason}: {_way_out(step_folder)}") from error


def _way_out(step_folder: Path) -> str:
    """The way out for a checkpoint that cannot be read: another step of the run that is intact."""
    folder = step_folder.parent
    for step in reversed(steps(folder.parent)):
        other = folder / str(step)
        if other != step_folder and (other / checksums.NOTE).exists() and not checksums.damage(other):
            return f"step {step} is intact: give {other}, or move the damaged one away and resume from there"
    return "no other step of the run is intact: restore a copy"


def _params(reader: ocp.PyTreeCheckpointer, folder: Path) -> Params:
    described = reader.metadata(folder).item_metadata
    if described is None:
        raise ValueError(f"{folder} does not list its contents")
    tree = described.tree
    template = {"params": jax.tree.map(lambda leaf: 0, tree["params"], is_leaf=lambda x: hasattr(x, "shape"))}
    args = ocp.args.PyTreeRestore(
        item=template,
        partial_restore=True,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template),
    )
    return reader.restore(folder, args=args)["params"]


def steps(workdir: str | os.PathLike) -> list[int]:
    """The complete checkpoints of a workdir, in order."""
    folder = Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    numbered = [p for p in folder.iterdir() if p.name.isdigit()]
    return sorted(int(p.name) for p in numbered if ocp.utils.is_checkpoint_finalized(p))


class Source(NamedTuple):
    """The files that a run starts from, with hashes of their contents."""

    path: str  # absolute: a model folder, or workdir/checkpoints/STEP
    files: dict[str, str]  # SHA-256 of each, under its name in the model folder or the workdir
    beside: str = ""  # the path relative to the run that starts from it: both may move together


class Adapter(NamedTuple):
    """The adapters trained by a run with LoRA: its checkpoints hold the adapters alone."""

    base: Source  # of the other parameters
    lora: LoRA


class ModelFiles(NamedTuple):
    """Where a model's files are."""

    folder: Path  # config, tokenizer and processor files
    step_folder: Path | None  # the checkpoint that holds the weights; None: the folder's safetensors do
    adapter: Adapter | None = None


def source(path: str | os.PathLike, user: str | os.PathLike) -> Source:
    """The current contents of `path` (see `find_model`), when `user`, a run, starts from it. Reads all of a model
    folder's weights. Raises InputError.
    """
    result = find_model(path)
    here = (result.step_folder or result.folder).resolve()
    return Source(str(here), _contents(result), os.path.relpath(here, Path(user).resolve()))


def read_source(fields: Fields) -> Source:
    """The source that `_asdict` wrote. Raises InputError."""
    files = fields.object("files", {})
    return Source(fields.text("path"), {name: files.text(name) for name in files.raw}, fields.text("beside", ""))


def contents(path: str | os.PathLike) -> dict[str, str]:
    """The SHA-256 of every file that the model at `path` is loaded from, including its adapters' base."""
    result = find_model(path)
    base = result.adapter.base.files if result.adapter else {}
    return _contents(result) | {f"base/{name}": x for name, x in base.items()}


def _contents(source_files: ModelFiles) -> dict[str, str]:
    names = [file.name for file in _model_files(source_files.folder)]
    if source_files.step_folder is None:
        weights = sorted(file.name for file in source_files.folder.glob("*.safetensors"))
        return checksums.of_files(source_files.folder, [*names, *weights])
    model = checksums.of_files(source_files.folder, names)
    state = checksums.of_files(source_files.step_folder, below=STATE)
    step = f"{CHECKPOINTS}/{source_files.step_folder.name}"
    return {f"{MODEL_FOLDER}/{name}": x for name, x in model.items()} | {f"{step}/{n}": x for n, x in state.items()}


def find_source(source: Source, user: str | os.PathLike) -> str:
    """The current path of the source of `user`, a run.

    Raises InputError unless its contents are those when the run began. Of several processes that load together the
    first alone reads the files.
    """
    path = Path(source.path)
    if source.beside and not path.is_dir():
        path = (Path(user) / source.beside).resolve()
    if not path.is_dir():
        notes = [str(Path(user) / name) for name in (INPUTS, ADAPTER) if (Path(user) / name).exists()]
        raise InputError(
            f"{user} began with {source.path}, which does not exist: restore it, or name its new path in "
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
    """Notes in a run's workdir that its checkpoints hold adapters, and of which model."""
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
    """Asks the run that owns checkpoint `source` to keep it."""
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


class _Best(PreservationPolicy):
    """Keeps the first of the best, as evaluations count it (orbax's BestN keeps the last of equals)."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        scores = [-np.inf if one.metrics is None else _score(one.metrics) for one in checkpoints]
        return [i == scores.index(max(scores)) for i in range(len(scores))]


class _Needed(PreservationPolicy):
    """Keeps the steps of a workdir that other runs started from, also when such a run was moved: it cannot be restored
    without them.
    """

    def __init__(self, workdir: Path) -> None:
        self.folder = workdir / NEEDED
        for path, step, by in self._notes():
            if not os.path.isdir(by) and processes.is_first():
                print(
                    f"step {step} of {workdir} is kept for {by}, which does not exist: delete {path} if it was removed"
                )

    def _notes(self) -> list[tuple[Path, int, str]]:
        paths = sorted(self.folder.glob("*.json"))
        notes = [(path, Fields(read_json(path), str(path))) for path in paths]
        return [(path, note.integer("step", 0, 2**62), note.text("by")) for path, note in notes]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        needed = {step for _, step, _ in self._notes()}
        return [checkpoint.step in needed for checkpoint in checkpoints]


def find_model(path: str | os.PathLike) -> ModelFiles:
    """Resolves a model path: a Hugging Face folder, the workdir of a run (its last checkpoint), or
    workdir/checkpoints/STEP.
    """
    path = Path(path)
    if not os.path.isdir(path):  # pathlib's raises for names that no file system takes
        raise InputError(f"model folder {path} does not exist: give a Hugging Face folder or the workdir of a run")
    if _is_step(path):
        return ModelFiles(path.parent.parent / MODEL_FOLDER, path, _adapter(path.parent.parent))
    if (path / MODEL_FOLDER).is_dir():
        result = steps(path)
        if not result:
            raise InputError(f"{path} is a run without a finished checkpoint: train it first, or give a model folder")
        return ModelFiles(path / MODEL_FOLDER, path / CHECKPOINTS / str(result[-1]), _adapter(path))
    return ModelFiles(path, None)


def settings(path: str | os.PathLike) -> dict[str, Any]:
    """The config of the run whose workdir or checkpoint `path` is; empty for a model folder."""
    for folder in (Path(path), Path(path).parent.parent):
        if (folder / "config.json").is_file() and (folder / MODEL_FOLDER).is_dir():
            return read_json(folder / "config.json")
    return {}


def _is_step(path: Path) -> bool:
    return path.parent.name == CHECKPOINTS and path.name.isdigit()


def _model_files(folder: Path) -> list[Path]:
    """A model folder's config, tokenizer and processor files, without the outputs of an evaluation."""
    known, others = (".json", ".jinja", ".txt"), (".index.json", "metrics.json")
    return sorted(f for f in folder.iterdir() if f.suffix in known and not f.name.endswith(others))


def copy_model_files(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Copies a model folder's config, tokenizer and processor files to workdir/model, so that the run is
    self-contained.
    """
    target = Path(workdir) / MODEL_FOLDER
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in _model_files(Path(source)):
        shutil.copyfile(file, part / file.name)  # a bucket has no modes
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def iterator_state(raw: Any) -> dict[str, Any]:
    """A grain iterator's state as plain JSON values."""
    return json.loads(dump_json(raw))
