"""Prediction records to the numbers of metrics.json; the fields of a record are in launch/README.md."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vau_jax.common.files import InputError, read_lines
from vau_jax.datasets.vau_bench import LABELS
from vau_jax.eval import metrics
from vau_jax.tasks import parsing, rewards
from vau_jax.tasks.parsing import Answers, Parsed
from vau_jax.types import Target

Record = dict[str, Any]


def score(
    records: list[Record], reflection: bool, protocol: str = "clean", weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Everything that a list of records says: by task, class and source, constant baselines, rewards and, with
    `weights`, their weighted sum as in training, and what several samples, several orders of options, and frames add,
    where they are there."""
    first = [r for r in records if not r["rotation"]]
    parsed, target = read(first, "lenient", reflection), truth(first)
    tasks = np.asarray([r["task"] for r in first])
    result: dict[str, Any] = {"tasks": {}, "baselines": {}, "reflection": {}, "by_class": {}, "by_source": {}}
    for task in parsing.TASKS:
        rows = np.flatnonzero(tasks == task)
        if not len(rows):
            continue
        mine, true = metrics.select(parsed, rows), metrics.select(target, rows)
        here = [first[i] for i in rows]
        result["tasks"][task] = _task(task, mine, true, here, protocol)
        result["baselines"][task] = metrics.baselines(true, task)
        if task not in parsing.VERIFIABLE:
            continue
        final = np.asarray(rewards.task_score(mine.final, true))
        result["by_class"][task] = _by(final, [r["anomaly_class"] or "unknown" for r in here])
        result["by_source"][task] = _by(final, [r["source"] for r in here])
        if reflection:
            words = metrics.estimate(mine.reflect_words)
            draft = np.asarray(rewards.task_score(mine.draft, true))
            result["reflection"][task] = {**metrics.reflection(draft, final), "words": words}
    strict = read(first, "strict", reflection)
    values = {name: np.asarray(f(strict, target)) for name, f in rewards.REWARDS.items()}
    result["rewards"] = {name: metrics.estimate(value) for name, value in values.items()}
    if weights is not None:
        total = sum(weights.get(name, 0.0) * value for name, value in values.items())
        result["rewards"]["total"] = metrics.estimate(total)
    return result | _samples(first, reflection) | _orders(records) | _frames(first, reflection)


def load(folder: Path) -> list[Record]:
    """The records of the evaluation in a folder, those of turned options left out; none where there is no file."""
    path = folder / "predictions.jsonl"
    lines = read_lines(path) if path.is_file() else []
    try:
        records = [record for record in map(json.loads, lines) if not record["rotation"]]
        records = [unanswered(record) if record["failure"] else record for record in records]
        count = Counter(record["example"] for record in records)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} has a line that is no record of this version: evaluate again") from error
    if repeated := [name for name, n in count.items() if n > 1]:
        raise InputError(
            f"{path} has {len(repeated)} names more than once, {repeated[0]} first: an earlier version did not tell "
            "questions about one video apart; evaluate again"
        )
    return records


NO_ANSWER = {"completions": "", "predictions": None, "scores": 0.0, "form": False, "drafts": None, "draft_scores": 0.0}


def unanswered(record: Record) -> Record:
    """The record of a video that could not be used: what the model said of the grey frames in its place is no answer,
    and every score is 0."""
    return record | {name: [value] * len(record[name]) for name, value in NO_ANSWER.items() if name in record}


def completion(record: Record, number: int = 0) -> str:
    """The text that is scored: none where the video could not be used."""
    return "" if record["failure"] else record["completions"][number]


def read(records: list[Record], rule: str, reflection: bool, number: int = 0) -> Parsed:
    """A completion of each record, parsed."""
    texts, tasks = [completion(r, number) for r in records], [r["task"] for r in records]
    return parsing.parse(texts, tasks, rule, reflection)


def truth(records: Iterable[Record]) -> Target:
    """The targets of records."""

    def interval(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return parsing.targets([(r["task"], r["answer"], r["anomaly_class"], interval(r["interval"])) for r in records])


def said(answers: Answers, task: str) -> list[str | None]:
    """The values of answers as text: `B`, `Fire`, `Normal`, `Anomaly [2.0, 6.0]`; None where there is none."""
    if task == "qa":
        return ["ABCD"[c] if c >= 0 else None for c in answers.choice]
    if task == "classification":
        return [LABELS[c] if c >= 0 else None for c in answers.label]
    if task == "grounding":
        return [
            f"Anomaly [{i[0]:.1f}, {i[1]:.1f}]"
            if kind == parsing.INTERVAL
            else {0: "Normal", 1: "Anomaly"}.get(int(anomaly))
            for kind, i, anomaly in zip(answers.kind, answers.interval, answers.anomaly, strict=True)
        ]
    return [None] * len(answers.kind)


def _by(values: np.ndarray, groups: list[str]) -> dict[str, Any]:
    """The estimate of each group's task score (temporal IoU for grounding, else accuracy)."""
    names = np.asarray(groups)
    return {name: metrics.estimate(values[names == name]) for name in sorted(set(groups))}


def _samples(first: list[Record], reflection: bool) -> dict[str, Any]:
    """By task: pass@k for powers of two, and the score of the answer that most samples agree with."""
    count = len(first[0]["completions"]) if first else 1
    if count == 1:
        return {}
    found: dict[str, Any] = {}
    for task in parsing.VERIFIABLE:
        rows = [r for r in first if r["task"] == task]
        if not rows:
            continue
        texts = [completion(r, n) for r in rows for n in range(count)]
        answers = parsing.parse(texts, task, "lenient", reflection).final
        repeated = truth([r for r in rows for _ in range(count)])
        scores = np.asarray(rewards.task_score(answers, repeated)).reshape(-1, count)
        right = scores >= (metrics.THRESHOLDS[1] if task == "grounding" else 1.0)
        sizes = [2**i for i in range(count.bit_length()) if 2**i <= count]
        chosen = metrics.vote(answers, task, count)
        found[task] = {
            "count": count,
            "mean": metrics.estimate(scores.mean(1)),
            "pass": {str(k): metrics.pass_at(right, k) for k in sizes},
            "vote": metrics.estimate(scores[np.arange(len(rows)), chosen]),
        }
    return {"samples": found}


def _orders(records: list[Record]) -> dict[str, Any]:
    """QA with the options in several orders."""
    if not any(record["rotation"] for record in records):
        return {}
    questions: dict[str, dict[int, Record]] = {}  # by name, then by rotation
    for record in records:
        if record["task"] == "qa":
            questions.setdefault(record["example"], {})[record["rotation"]] = record
    groups = list(questions.values())
    flat = [record for group in groups for record in group.values()]
    right = rewards.correctness(read(flat, "lenient", False).final, truth(flat))
    return {"option_order": metrics.option_order(np.asarray(right).reshape(len(groups), -1) > 0)}


def _frames(first: list[Record], reflection: bool) -> dict[str, Any]:
    """Grounding as scores of instants; videos whose interval or length is not known are left out, and counted.

    As in `metrics.grounding`, a normal video is a false alarm, throughout, unless the answer says that it is normal.
    """
    rows = [r for r in first if r["task"] == "grounding"]
    usable = [r for r in rows if r["interval"] is not None and r["duration"]]
    if not usable:
        return {}
    parses = [read(usable, "lenient", reflection, n).final for n in range(len(usable[0]["completions"]))]
    scores = [
        metrics.frame_scores([_interval(p, i, record) for p in parses], record["duration"])
        for i, record in enumerate(usable)
    ]
    labels = [
        metrics.frame_scores([None if r["interval"] == "normal" else tuple(r["interval"])], r["duration"])
        for r in usable
    ]
    return {"frames": {**metrics.frame_level(scores, labels), "left_out": len(rows) - len(usable)}}


def _interval(answers: Answers, i: int, record: Record) -> tuple[float, float] | None:
    """When answer i sees an anomaly."""
    if answers.kind[i] == parsing.INTERVAL:
        return tuple(answers.interval[i])
    quiet = answers.kind[i] == parsing.NORMAL and answers.anomaly[i] != 1
    return None if quiet or record["interval"] != "normal" else (0.0, record["duration"])


# --- Tasks --------------------------------------------------------------------------------------------------------


def _task(task: str, parsed: Parsed, target: Target, records: list[Record], protocol: str) -> dict[str, Any]:
    """The scores of one task."""
    if task == "qa":
        return metrics.question_answering(parsed, target)
    if task == "grounding":
        return metrics.grounding(parsed, target, protocol)
    return metrics.classification(parsed, target) if task == "classification" else describe(parsed, records)


def describe(parsed: Parsed, records: list[Record]) -> dict[str, Any]:
    """Descriptions beside the annotation by words alone; what VAU-Eval's judge marks is in judge.py.

    ROUGE-L F1 with the annotation's text, and the share of the words of its key objects and its class that occur.
    """
    texts = [parsing.TAG.sub(" ", completion(r)) for r in records]
    references = [r["reference"] for r in records]
    rouge = [_rouge().score(a, b)["rougeL"].fmeasure for a, b in zip(references, texts, strict=True)]
    objects = [_share(r["key_object"], text) for r, text in zip(records, texts, strict=True)]
    classes = [_share(r["anomaly_class"] or "", text) for r, text in zip(records, texts, strict=True)]
    return {
        "form": metrics.estimate(np.asarray(parsed.format_ok)),
        "word_overlap": {
            "rouge_l": metrics.estimate(np.asarray(rouge)),
            "key_objects": metrics.estimate(np.asarray([x for x in objects if x is not None])),
            "class": metrics.estimate(np.asarray([x for x in classes if x is not None])),
        },
    }


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - slow to import, with NLTK

    return RougeScorer(["rougeL"], use_stemmer=True)


def _share(wanted: str, text: str) -> float | None:
    """The share of the words of `wanted` (of three letters or more) that occur in the text; None without any."""
    words, there = (set(_words(t)) for t in (wanted, text))
    return len(words & there) / len(words) if words else None


def _words(text: str) -> list[str]:
    return [w for w in "".join(c if c.isalnum() else " " for c in text.lower()).split() if len(w) > 2]
