"""Reflection records: the reasoning that SFT with reflection learns from, as a JSONL beside a dataset."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vau_jax.common.files import InputError
from vau_jax.datasets import tables
from vau_jax.datasets.audit import Audit
from vau_jax.tasks import TASKS
from vau_jax.tasks.example import Example, Reflection


def load(path: str | os.PathLike) -> dict[str, Reflection]:
    """Reads a JSONL of reflection records by the id of their example, or, of a record that has no "example", by
    `video/task`. Raises InputError naming the bad line."""
    path, records = Path(path), {}
    for number, raw in tables.json_lines(path, tables.read(path, "reflection file (config.data.reflection)")):
        try:
            video, task = raw.pop("video"), raw.pop("task")
            name = raw.pop("example", f"{video}/{task}")
            if not all(isinstance(text, str) for text in (video, task, name)):
                raise ValueError("video, task and example must be texts")
            record = _checked(Reflection(**raw), task)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} line {number} is not a reflection record: {str(error)[:200]!r}") from error
        if name in records:
            raise InputError(f"{path} line {number} is a second record of {name}: each example has one")
        records[name] = record
    return records


def _checked(record: Reflection, task: str) -> Reflection:
    """A record from JSON. Raises ValueError where a field has another type or the draft is invalid."""
    if not all(isinstance(text, str) for text in (record.think, record.reflect, record.revise)):
        raise ValueError("think, reflect and revise must be texts")
    if not isinstance(record.draft_is_right, bool):
        raise ValueError("draft_is_right must be true or false")
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown: expected one of {', '.join(TASKS)}")
    if not isinstance(record.draft, dict) or not TASKS[task].check_draft(record.draft):
        raise ValueError(f"draft {record.draft} is none of {task}: {TASKS[task].draft_format}")
    return record


def attach(examples: Sequence[Example], records: dict[str, Reflection], audit: Audit) -> list[Example]:
    """The examples with their reflection records; those that need one and have none are left out, and noted.

    Raises InputError for a draft that cannot be an answer to its example, such as E of four options.
    """
    count = Counter((example.video, example.task) for example in examples)
    attached = []
    for example in examples:
        record, shared = records.get(example.id), records.get(f"{example.video}/{example.task}")
        if record is None and count[example.video, example.task] == 1:
            record = shared
        if record is None and TASKS[example.task].verifiable:
            several = 'its reflection record names a video with several questions: add "example"'
            audit.exclude(example, several if shared else "no reflection record")
            continue
        _check_draft(record, example)
        attached.append(replace(example, reflection=record))
    return attached


def _check_draft(record: Reflection | None, example: Example) -> None:
    task = TASKS[example.task]
    if record and example.choices and not task.value(task.draft_text(record.draft, example), example.choices):
        raise InputError(
            f"the reflection record of {example.id} has the draft {record.draft}, which is none of the answers: "
            f"{', '.join(example.choices)}"
        )
