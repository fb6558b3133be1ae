"""Decodes a split and scores it.

    vau evaluate --workdir=DIR --config.checkpoint=RUN_OR_MODEL

Writes predictions.jsonl, one object an example, and metrics.json. A killed call resumes after the examples that are
done. A video that cannot be read is a wrong answer, counted under "failed".

Of several processes each has a model on its own host's devices and decodes its share: whole videos, with all their
questions. The first joins the shares, and the files are those of one process.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vau_jax.common import compiled, heartbeat, processes, progress, sharding
from vau_jax.common.about import about
from vau_jax.common.files import InputError, Lines, check_range, dump_json, read_json, read_lines, write_text
from vau_jax.common.heartbeat import monitored
from vau_jax.common.progress import Progress
from vau_jax.data import pipeline
from vau_jax.datasets.audit import Audit
from vau_jax.eval import answers, scores
from vau_jax.eval.records import of_line, to_line
from vau_jax.models import checkpoint
from vau_jax.models.config import published_name
from vau_jax.rl import sampling
from vau_jax.tasks import TASKS, rewards
from vau_jax.tasks.example import Example
from vau_jax.tasks.record import Record
from vau_jax.vlm import VideoLM

Key = tuple[str, int]  # of an example: its id, and its rotation
PREDICTIONS = "predictions.jsonl"


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Evaluates config.checkpoint on config.data and returns the contents of metrics.json.

    Raises InputError where another evaluation, or a run, is in `workdir`.
    """
    workdir, config = Path(workdir), as_trained(config)
    check(config)
    if config.checkpoint:
        compiled.use(config.compilation_cache, workdir)
    examples, audit = pipeline.load_examples(config.data)
    rotated = [e for e in examples if TASKS[e.task].shuffles]
    examples += [replace(e, rotation=r) for r in range(1, config.rotations) for e in rotated]
    files = {path for example in examples for path in example.media}
    fingerprint = processes.broadcast_from_first(lambda: _fingerprint(config, files))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {workdir}: {error.strerror}: choose another --workdir") from error
    with processes.exclusive(workdir):
        known = processes.broadcast_from_first(lambda: _known(config, workdir, fingerprint))
        if known:
            return known
        model = _model(config)
        if processes.is_first() and model.get("style", config.data.style) != config.data.style:
            print(f"{config.name}: asks in style {config.data.style} a run trained in {model['style']}", flush=True)
        with monitored(workdir, "the same command goes on with what is answered") as beat:
            processes.together(lambda: decode(config, workdir, examples, fingerprint, beat))
        result = processes.broadcast_from_first(lambda: _finish(config, workdir, examples, audit, fingerprint, model))
        if not _is_model(workdir):  # a run's folder keeps the run's
            heartbeat.remove(workdir)
        return result


def _known(config: ConfigDict, workdir: Path, fingerprint: str) -> dict[str, Any]:
    """The result of an earlier call with the same settings; empty without."""
    done = workdir / "metrics.json"
    known = read_json(done) if done.exists() else {}
    if isinstance(known, dict) and known.get("fingerprint") == fingerprint:
        print(f"{config.name}: evaluated already ({workdir})", flush=True)
        return known
    return {}


def _finish(
    config: ConfigDict,
    workdir: Path,
    examples: list[Example],
    audit: Audit,
    fingerprint: str,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Joins the shares to predictions.jsonl, in the order of the examples, and scores them."""
    predictions = _joined(workdir, examples, fingerprint)
    result = {
        "fingerprint": fingerprint,
        "name": config.name,
        "checkpoint": str(config.checkpoint),
        "blind": config.blind,
        "model": model,
        "about": about(),
        "settings": json.loads(config.to_json_best_effort()),
        "protocol": config.data.protocol,
        "excluded": [vars(entry) for entry in audit.entries if entry.action == "excluded"],
        "examples": len(predictions),
        "failed": sum(record.failure is not None for record in predictions),
        **scores.score(predictions, config.data.protocol, config.rewards),
    }
    if not _is_model(workdir):  # whose config.json says something else; the settings are in metrics.json too
        write_text(workdir / "config.json", config.to_json_best_effort(indent=1))
    write_text(workdir / "metrics.json", dump_json(result, indent=1))
    return result


def summary(config: ConfigDict, workdir: Path) -> str:
    """The last lines of the program; empty in all processes but the first."""
    if not processes.is_first():
        return ""
    places = {"scores": workdir / "metrics.json", "answers": workdir / "predictions.jsonl"}
    return progress.summary(f"{config.name}: evaluated", places, [("vau", "report", workdir)])


ASKED = {"style": "think", "wording": "full", "templates": ""}  # fields of data, and what a model folder gets


def as_trained(config: ConfigDict) -> ConfigDict:
    """The config with the style, wording and templates that its run was trained with, where it gives none."""
    config = ConfigDict(config.to_dict())
    trained = checkpoint.settings(config.checkpoint).get("data", {}) if config.checkpoint else {}
    for name, plain in ASKED.items():
        config.data[name] = config.data[name] or trained.get(name, plain)
    return config


def _model(config: ConfigDict) -> dict[str, Any]:
    """What is known of the model that is evaluated: the published checkpoint with its sizes, if any, and how a run was
    trained."""
    if config.endpoint.url:
        return {"size": config.endpoint.model}
    size = published_name(read_json(checkpoint.find_model(config.checkpoint).folder / "config.json"))
    run = checkpoint.settings(config.checkpoint)
    if not run:
        return {"size": size}
    trained = {"stage": run.get("stage"), "begins": run.get("init_from"), "lora": run.get("lora", {}).get("rank", 0)}
    data = run.get("data", {})
    return {"size": size, **trained, **{name: data.get(name) for name in (*ASKED, "tasks", "sources")}}


def check(config: ConfigDict) -> None:
    """Raises InputError for invalid settings of an evaluation."""
    pipeline.check(config.data)
    check_range("seed", config.seed, 0, 2**31 - 1)
    check_range("batch_size", config.batch_size, 1)
    if config.samples < 1 or not 1 <= config.rotations <= 4:
        raise InputError(f"samples={config.samples}, rotations={config.rotations}: expected at least 1, and 1 to 4")
    if config.samples > 1 and config.temperature == 0:
        raise InputError(f"samples={config.samples} at temperature=0 would all be alike: set temperature above 0")
    sampling.check(
        max_new_tokens=config.data.max_completion_tokens,
        temperature=config.temperature or 1.0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )
    if config.description_turns not in (1, 2):
        raise InputError(f"description_turns={config.description_turns}: expected 1, or 2 as VAU-Eval is published")
    if config.description_turns == 2 and config.samples > 1:
        raise InputError(f"samples={config.samples} with description_turns=2: expected 1")
    if bool(config.checkpoint) == bool(config.endpoint.url):
        raise InputError(
            f"checkpoint={config.checkpoint!r}, endpoint.url={config.endpoint.url!r}: expected one of them, a run or "
            "model folder, or the address of a chat endpoint"
        )
    if config.endpoint.url and config.samples > 1:
        raise InputError(f"samples={config.samples} with an endpoint: expected 1")
    check_range("endpoint.frames", config.endpoint.frames, 1)
    if unknown := [name for name, weight in config.rewards.items() if weight and name not in rewards.REWARDS]:
        raise InputError(
            f"rewards.{unknown[0]}={config.rewards[unknown[0]]} cannot be part of an evaluation's total: expected some "
            f"of {', '.join(rewards.REWARDS)}"
        )


def _fingerprint(config: ConfigDict, videos: Iterable[Path]) -> str:
    """A hash of everything that determines the predictions: settings, weights, annotations, prompts, videos.

    Text files are hashed by content, videos (possibly hundreds of gigabytes) by size and time.
    """
    files = [(path.name, stat.st_size, stat.st_mtime_ns) for path in videos for stat in [path.stat()]]
    settings = json.loads(config.to_json_best_effort())
    settings.pop("compilation_cache", None)  # determines how long it takes
    known = [
        settings,
        pipeline.input_hashes(config.data),
        sorted(files),
        checkpoint.contents(config.checkpoint) if config.checkpoint else {},
    ]
    return hashlib.sha256(dump_json(known, sort_keys=True).encode()).hexdigest()


def _is_model(folder: Path) -> bool:
    """Whether a folder is a run, or has a model's weights."""
    return (folder / checkpoint.MODEL_FOLDER).is_dir() or any(folder.glob("*.safetensors"))


def decode(
    config: ConfigDict, workdir: Path, examples: list[Example], fingerprint: str, beat: Callable[[int], None]
) -> None:
    """Decodes this process's share of the examples, as far as it is not done, and appends it to its file; `beat` is
    told how many are."""
    path = processes.own_lines(workdir / PREDICTIONS)
    records = _finished(path, fingerprint)
    own = pipeline.share(examples, jax.process_index(), jax.process_count())
    todo = [example for example in own if _key(example) not in records]
    done = len(own) - len(todo)
    shown = Progress(config.name, len(own), "example", start=done)
    with closing(Lines(path)) as file:
        for record in _answers(todo, config, workdir) if todo else ():
            if _key(record) in records:  # the last example fills up the last batch
                continue
            records[_key(record)] = record
            file.write([to_line(record, fingerprint)])
            file.save(every=60)
            done += 1
            beat(done)
            if processes.is_first():
                shown.show(done, partial(headline, records.values()))


def _joined(workdir: Path, examples: Sequence[Example], fingerprint: str) -> list[Record]:
    """The records of all processes in the order of the examples, which become the only file."""
    path = workdir / PREDICTIONS
    parts = processes.other_lines(path)
    records = {_key(record): record for part in (path, *parts) for record in _finished(part, fingerprint).values()}
    ordered = [records[_key(example)] for example in examples]
    write_text(path, "".join(to_line(record, fingerprint) for record in ordered))
    for part in parts:
        part.unlink()
    return ordered


def _answers(examples: list[Example], config: ConfigDict, workdir: Path) -> Iterator[Record]:
    if config.endpoint.url:
        return answers.by_endpoint(examples, config, workdir)
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    sharding.check_divisible(config.batch_size, mesh)
    return answers.by_model(examples, VideoLM.load(config.checkpoint, config.dtype, mesh), config)


def headline(records: Collection[Record]) -> str:
    """The numbers that a progress line shows: the mean score of each task so far, and how many videos failed."""
    scores = defaultdict(list)
    for record in records:
        if record.scores:
            scores[record.task].append(record.scores[0])
    means = [f"{task} {sum(values) / len(values):.2f}" for task, values in scores.items()]
    return "  ".join([*means, f"failed {sum(record.failure is not None for record in records)}"])


def _key(one: Record | Example) -> Key:
    return one.id if isinstance(one, Example) else one.example, one.rotation


def _finished(path: Path, fingerprint: str) -> dict[Key, Record]:
    """The complete records of an earlier call with the same settings; the file keeps only those."""
    lines = read_lines(path) if path.exists() else []
    kept = {line: record for line in lines if (record := of_line(line, fingerprint))}
    write_text(path, "".join(kept))
    return {_key(record): record for record in kept.values()}
