"""Marks for the descriptions of an evaluation, by a judge model; see `vau_jax.rl.judge` for the marks.

    vau judge --workdir=EVALUATION --config.url=... --config.model=...

Writes EVALUATION/judged/NAME.json; with other judges' files beside it, also how they agree.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from vau_jax.common import processes, progress
from vau_jax.common.chat import Chat
from vau_jax.common.files import InputError, content_hash, dump_json, read_json, write_text
from vau_jax.common.progress import Progress
from vau_jax.eval.records import load
from vau_jax.rl.judge import AXES, MOST, Judge, Marks, Subject, prompt_hash, total
from vau_jax.tasks import TASKS
from vau_jax.tasks.statistics import estimate

FOLDER = "judged"


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Scores the descriptions of the evaluation in `workdir`, and returns the contents of the file it wrote.

    A description of an unreadable video has 0 on every axis; one that the judge did not score is left out of the means,
    and counted. A repeated call after a kill pays for no answer twice. Of several processes the first asks.
    """
    return processes.broadcast_from_first(lambda: _run(config, workdir))


def _run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    folder = Path(workdir) / FOLDER
    records = [record for record in load(Path(workdir)) if TASKS[record.task].judged]
    if not records:
        raise InputError(f"{workdir} has no descriptions to mark: evaluate with data.tasks=('description',) first")
    if not re.fullmatch(r"[\w.-]+", config.name):
        raise InputError(f"name={config.name!r}: expected letters, digits, dots, dashes, as it names a file")
    folder.mkdir(exist_ok=True)
    judge = Judge(Chat(config, folder / f"{config.name}.answers.jsonl"))
    read = [r for r in records if not r.failure]
    shown = Progress(config.name, len(read), "description")
    answers = judge.marks([Subject.of_record(r) for r in read], lambda done: shown.show(done, partial(_spent, judge)))
    marked: dict[str, Marks | None] = {r.example: dict.fromkeys(AXES, 0.0) for r in records if r.failure}
    marked |= {r.example: given for r, (given, _) in zip(read, answers, strict=True)}
    given = [marks for marks in marked.values() if marks]
    result = {
        "model": config.model,
        "prompt_hash": prompt_hash(),
        "predictions": content_hash(Path(workdir) / "predictions.jsonl"),  # of what was marked
        "axes": {axis: estimate(np.asarray([marks[axis] for marks in given])) for axis in AXES},
        "total": estimate(np.asarray([MOST * len(AXES) * total(marks) for marks in given])),
        "failed_videos": len(records) - len(read),
        "unmarked": {r.example: error for r, (_, error) in zip(read, answers, strict=True) if error},
        "tokens_this_call": dict(judge.chat.tokens),
        "cost_this_call": judge.chat.cost,
        "marks": marked,
    }
    write_text(folder / f"{config.name}.json", dump_json(result, indent=1))
    shown = {key: value for key, value in result.items() if key != "marks"} | {"agreement": agreement(folder)}
    print(dump_json(shown, indent=1), flush=True)
    return result


def _spent(judge: Judge) -> str:
    return f"{judge.chat.tokens.total()} tokens, cost {judge.chat.cost:.2f}"


def summary(config: ConfigDict, workdir: Path) -> str:
    """The last lines of the program; empty in all processes but the first."""
    if not processes.is_first():
        return ""
    places = {"marks": workdir / FOLDER / f"{config.name}.json"}
    return progress.summary(f"{config.name}: marked", places, [("vau", "report", workdir)])


def agreement(folder: Path) -> list[dict[str, Any]]:
    """Of every two judges in a folder: Spearman's correlation of their totals and their mean difference (second minus
    first, of 50), over the texts that both marked."""
    judges = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    totals = {
        name: {example: MOST * len(AXES) * total(marks) for example, marks in judged["marks"].items() if marks}
        for name, judged in judges.items()
    }
    pairs, names = [], list(totals)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = sorted(totals[first].keys() & totals[second].keys())
            a, b = (np.asarray([totals[name][example] for example in both]) for name in (first, second))
            varied = len(both) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
            correlation = float(spearmanr(a, b).statistic) if varied else None
            difference = float((b - a).mean()) if both else None
            pair = {"judges": [first, second], "n": len(both), "spearman": correlation, "difference": difference}
            same = judges[first]["prompt_hash"] == judges[second]["prompt_hash"]
            pairs.append(pair if same else pair | {"note": "marked under different prompts"})
    return pairs
