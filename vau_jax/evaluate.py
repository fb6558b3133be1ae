"""Decodes a split and scores it.

    python -m vau_jax.evaluate --config=configs/eval.py --workdir=DIR --config.checkpoint=RUN_OR_MODEL

Writes predictions.jsonl, one object an example, and metrics.json. A killed call goes on after the examples that are
done. A video that cannot be read is a wrong answer, counted under "failed".
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax import cli, parsing, processes, rewards, sampling, scores, sharding
from vau_jax.about import about
from vau_jax.data import pipeline, prompts
from vau_jax.data.pipeline import Example, HostBatch, Loaded
from vau_jax.files import InputError, read_json, read_lines, write_text
from vau_jax.metric_writer import Progress
from vau_jax.vlm import VideoLM, decode_text


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Evaluates config.checkpoint on config.data and returns what it wrote to metrics.json.

    Raises InputError where another evaluation, or a run, is in `workdir`.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with processes.alone_in(workdir):
        return _run(config, workdir)


def _run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    fingerprint = _fingerprint(config)
    done = workdir / "metrics.json"
    if done.exists() and read_json(done).get("fingerprint") == fingerprint:
        print(f"{config.name}: evaluated already ({workdir})", flush=True)
        return read_json(done)
    check(config)
    examples, audit = pipeline.load_examples(config.data)
    examples = [replace(e, rotation=r) for r in range(config.rotations) for e in examples if e.task == "qa" or not r]
    predictions = predict(config, workdir, examples, fingerprint)
    result = {
        "fingerprint": fingerprint,
        "name": config.name,
        "checkpoint": str(config.checkpoint),
        "blind": config.blind,
        "about": about(),
        "settings": json.loads(config.to_json_best_effort()),
        "protocol": config.data.protocol,
        "excluded": [vars(entry) for entry in audit.entries if entry.action == "excluded"],
        "examples": len(predictions),
        "failed": sum(record["failure"] is not None for record in predictions),
        **scores.score(predictions, config.data.style in prompts.WITH_DRAFT, config.data.protocol),
    }
    write_text(done, json.dumps(result, indent=1))
    write_text(workdir / "config.json", config.to_json_best_effort(indent=1))
    return result


def check(config: ConfigDict) -> None:
    """Raises InputError for settings that no evaluation can have."""
    if config.samples < 1 or not 1 <= config.rotations <= 4:
        raise InputError(f"samples={config.samples}, rotations={config.rotations}: expected at least 1, and 1 to 4")
    if jax.process_count() > 1:
        raise InputError("an evaluation is one process's, on its host's devices: leave out --distributed (ALONE=1)")
    if config.samples > 1 and config.temperature == 0:
        raise InputError(f"samples={config.samples} at temperature=0 would all be alike: set temperature above 0")
    sampling.check(max_new_tokens=config.data.max_completion_tokens, temperature=config.temperature or 1.0)


def _fingerprint(config: ConfigDict) -> str:
    """Changes when anything that decides the predictions does, the checkpoint's identity included."""
    path = Path(config.checkpoint)
    newest = max((p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()), default=0) if path.is_dir() else 0
    return hashlib.sha256(f"{config.to_json_best_effort(sort_keys=True)}|{newest}".encode()).hexdigest()


def predict(config: ConfigDict, workdir: Path, examples: list[Example], fingerprint: str) -> list[scores.Record]:
    """One record an example, from predictions.jsonl where it is there, else from the model."""
    path = workdir / "predictions.jsonl"
    records = _finished(path, fingerprint)
    todo = [example for example in examples if example.name not in records]
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divisible(config.batch_size, mesh)
    vlm = VideoLM.load(config.checkpoint, config.dtype, mesh) if todo else None
    progress = Progress(config.name, len(examples), start=len(records))
    with path.open("a", encoding="utf-8") as file:
        for host in _batches(todo, vlm, config) if vlm else ():
            for record in _answer(host, vlm, config):
                records[record["example"]] = record
                file.write(json.dumps({"fingerprint": fingerprint, **record}) + "\n")
            file.flush()
            progress.show(len(records))
    return [records[example.name] for example in examples]


def _finished(path: Path, fingerprint: str) -> dict[str, scores.Record]:
    """The whole records of an earlier call with the same settings; the file keeps only those."""
    lines = read_lines(path) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["fingerprint"] == fingerprint]
    write_text(path, "".join(kept))
    return {record["example"]: record for record in map(json.loads, kept)}


def _batches(examples: list[Example], vlm: VideoLM, config: ConfigDict) -> Iterator[HostBatch]:
    """Padded batches, the last one without the examples that fill it up."""
    batches = pipeline.eval_batches(
        examples, vlm.processor, config.data, config.batch_size, seed=config.seed, blind=config.blind
    )
    for number, host in enumerate(batches):
        yield replace(host, examples=host.examples[: len(examples) - number * config.batch_size])


def _answer(host: HostBatch, vlm: VideoLM, config: ConfigDict) -> Iterator[scores.Record]:
    """Decodes a batch, greedily at temperature 0."""
    out = sampling.sample(
        vlm.variables,
        jax.device_put(host.batch, sharding.examples(vlm.model.mesh)),
        jax.random.key(config.seed),
        config.temperature or 1.0,
        model=vlm.model,
        num_generations=config.samples,
        max_new_tokens=config.data.max_completion_tokens,
        end_tokens=vlm.processor.end_tokens,
        greedy=config.temperature == 0,
    )
    texts = decode_text(vlm.processor, np.asarray(out.tokens), np.asarray(out.mask))
    for item, completions in zip(host.examples, texts, strict=False):
        yield record(item, completions, config.data.style)


def record(item: Loaded, completions: list[str], style: str) -> scores.Record:
    """What predictions.jsonl says of an example."""
    row, task, reflection = item.example.row, item.example.task, style in prompts.WITH_DRAFT
    found: scores.Record = {
        "example": item.example.name,
        "video": row.video,
        "source": row.source,
        "task": task,
        "rotation": item.example.rotation,
        "question": prompts.question(row, task, "direct", "short"),
        "prompt_hash": hashlib.sha256(item.prompt.encode()).hexdigest()[:16],
        "target": prompts.target(row, task),
        "answer": row.answer,
        "anomaly_class": row.anomaly_class,
        "interval": row.interval,
        "duration": None if item.failure else round(row.duration or item.seconds, 3),
        "key_object": row.key_object,
        "reference": prompts.facts(row) if task == "description" else "",
        "completions": completions,
        "failure": item.failure,
    }
    lenient = parsing.parse(completions, task, "lenient", reflection)
    strict = parsing.parse(completions, task, "strict", reflection)
    target = scores.truth([found] * len(completions))
    found["predictions"] = scores.said(lenient.final, task)
    found["form"] = strict.form.tolist()
    if task in parsing.VERIFIABLE:
        found["scores"] = np.asarray(rewards.task_score(lenient.final, target)).round(4).tolist()
    if reflection and task in parsing.VERIFIABLE:
        found["drafts"] = scores.said(lenient.draft, task)
        found["draft_scores"] = np.asarray(rewards.task_score(lenient.draft, target)).round(4).tolist()
    return found


if __name__ == "__main__":
    cli.main(run)
