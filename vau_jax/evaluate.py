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

from vau_jax import cli, metrics, parsing, rewards, sampling
from vau_jax.data import pipeline, prompts
from vau_jax.data.pipeline import Example, HostBatch
from vau_jax.files import read_json, write_text
from vau_jax.metric_writer import Progress
from vau_jax.types import Target
from vau_jax.vlm import VideoLM, decode_text


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Evaluates config.checkpoint on config.data and returns what it wrote to metrics.json."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(config)
    done = workdir / "metrics.json"
    if done.exists() and read_json(done).get("fingerprint") == fingerprint:
        print(f"{config.name}: evaluated already ({workdir})", flush=True)
        return read_json(done)
    examples, audit = pipeline.load_examples(config.data)
    predictions = predict(config, workdir, examples, fingerprint)
    result = {
        "fingerprint": fingerprint,
        "name": config.name,
        "checkpoint": str(config.checkpoint),
        "blind": config.blind,
        "protocol": config.data.protocol,
        "excluded": [vars(entry) for entry in audit.entries if entry.action == "excluded"],
        "failed": sum(record["failure"] is not None for record in predictions),
        **score(predictions, config.data.style in prompts.WITH_DRAFT),
    }
    write_text(done, json.dumps(result, indent=1))
    write_text(workdir / "config.json", config.to_json_best_effort(indent=1))
    return result


def _fingerprint(config: ConfigDict) -> str:
    """Changes when anything that decides the predictions does, the checkpoint's identity included."""
    path = Path(config.checkpoint)
    newest = max((p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()), default=0) if path.is_dir() else 0
    return hashlib.sha256(f"{config.to_json_best_effort(sort_keys=True)}|{newest}".encode()).hexdigest()


def predict(config: ConfigDict, workdir: Path, examples: list[Example], fingerprint: str) -> list[dict[str, Any]]:
    """One record an example, from predictions.jsonl where it is there, else from the model."""
    path = workdir / "predictions.jsonl"
    records = _finished(path, fingerprint)
    todo = [example for example in examples if example.name not in records]
    vlm = VideoLM.load(config.checkpoint, config.dtype) if todo else None
    progress = Progress(config.name, len(examples), start=len(records))
    with path.open("a", encoding="utf-8") as file:
        for host in _batches(todo, vlm, config) if vlm else ():
            for record in _answer(host, vlm, config):
                records[record["example"]] = record
                file.write(json.dumps({"fingerprint": fingerprint, **record}) + "\n")
            file.flush()
            progress.show(len(records))
    return [records[example.name] for example in examples]


def _finished(path: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """The whole records of an earlier call with the same settings; the file keeps only those."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
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


def _answer(host: HostBatch, vlm: VideoLM, config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Decodes a batch, greedily at temperature 0."""
    out = sampling.sample(
        vlm.variables,
        host.batch,
        jax.random.key(config.seed),
        config.temperature or 1.0,
        model=vlm.model,
        num_generations=1,
        max_new_tokens=config.data.max_completion_tokens,
        end_tokens=vlm.processor.end_tokens,
        greedy=config.temperature == 0,
    )
    texts = decode_text(vlm.processor, np.asarray(out.tokens), np.asarray(out.mask))
    for item, text in zip(host.examples, texts, strict=False):
        row = item.example.row
        yield {
            "example": item.example.name,
            "video": row.video,
            "task": item.example.task,
            "prompt_hash": hashlib.sha256(item.prompt.encode()).hexdigest()[:16],
            "answer": row.answer,
            "anomaly_class": row.anomaly_class,
            "interval": row.interval,
            "completion": text[0],
            "failure": item.failure,
        }


def truth(records: list[dict[str, Any]]) -> Target:
    """The targets of prediction records."""

    def interval(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return parsing.targets([(r["task"], r["answer"], r["anomaly_class"], interval(r["interval"])) for r in records])


def score(records: list[dict[str, Any]], reflection: bool) -> dict[str, Any]:
    """Metrics by task, constant baselines, and the training rewards' means."""
    texts = ["" if r["failure"] else r["completion"] for r in records]
    tasks, target = [r["task"] for r in records], truth(records)
    lenient = parsing.parse(texts, tasks, "lenient", reflection)
    strict = parsing.parse(texts, tasks, "strict", reflection)
    result: dict[str, Any] = {"tasks": {}, "baselines": {}, "reflection": {}}
    for task in parsing.TASKS:
        rows = np.flatnonzero(np.asarray(tasks) == task)
        if not len(rows):
            continue
        mine, true = metrics.select(lenient, rows), metrics.select(target, rows)
        result["tasks"][task] = metrics.TASK_METRICS[task](mine, true)
        result["baselines"][task] = metrics.baselines(true, task)
        if reflection and task in parsing.VERIFIABLE:
            draft, final = (np.asarray(rewards.task_score(a, true)) for a in (mine.draft, mine.final))
            words = metrics.estimate(lenient.reflect_words[rows])
            result["reflection"][task] = {**metrics.reflection(draft, final), "words": words}
    values = {name: np.asarray(f(strict, target)) for name, f in rewards.REWARDS.items()}
    result["rewards"] = {name: metrics.estimate(value) for name, value in values.items()}
    result["rewards"]["total"] = metrics.estimate(sum(values.values()))
    return result


if __name__ == "__main__":
    cli.main(run)
