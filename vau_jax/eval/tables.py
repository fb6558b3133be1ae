"""The tables of a report, as rows of text: the results, and what stands beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vau_jax.common.files import InputError, content_hash, read_json
from vau_jax.eval import judge, metrics, records
from vau_jax.rl.judge import AXES
from vau_jax.tasks import TASKS
from vau_jax.tasks.base import ReportRow

ROWS_OF_ALL = (
    ReportRow("QA accuracy over orders of options", ("option_order", "accuracy")),
    ReportRow("Mean total reward", ("rewards", "total")),
)


def rows() -> tuple[ReportRow, ...]:
    """The rows of the table: those of the tasks, the changes by reflection, and those of all tasks together."""
    own = [row for task in TASKS.values() for row in task.report_rows]
    return (*own, *(row for task in TASKS.values() for row in task.reflection_rows), *ROWS_OF_ALL)


def evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The metrics.json of every finished evaluation under the folders, oldest first, each with its "folder". Copying a
    folder may change the times of its files, so the time within counts first."""
    paths = sorted({path for folder in folders for path in folder.rglob("metrics.json")})
    results = [{**read_json(path), "folder": path.parent} for path in paths]
    if old := [str(result["folder"]) for result in results if "settings" not in result]:
        raise InputError(f"{', '.join(old)}: written by another version, which report does not read: evaluate again")
    return sorted(results, key=_age)


def _age(result: dict[str, Any]) -> tuple[str, int]:
    return result["about"]["time"], (result["folder"] / "metrics.json").stat().st_mtime_ns


def table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A title row, then one row per number: a column per evaluation, and the score of a constant guess."""
    lines = [["", *(result["name"] for result in results), "constant guess", "n"]]
    for row in rows():
        estimates = [lookup(result, row.path) for result in results]
        if any(estimates):
            constants = [lookup(result, row.baseline) for result in results] if row.baseline else []
            constant = next(filter(None, constants), None)
            lines.append([row.title, *map(cell, estimates), cell(constant) if constant else "", sizes(estimates)])
    failed = [str(result["failed"]) for result in results]
    return [*lines, ["Videos that failed (examples)", *failed, "", ""]]


def lookup(result: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """The estimate at a path of metrics.json, None where there is none."""
    value: Any = result
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if value and value["value"] is not None else None


def cell(estimate: dict[str, Any] | None) -> str:
    """`0.81 [0.76, 0.86]`."""
    known = estimate and estimate["value"] is not None
    return f"{estimate['value']:z.2f} [{estimate['low']:z.2f}, {estimate['high']:z.2f}]" if known else "-"


def sizes(estimates: Sequence[dict[str, Any] | None]) -> str:
    """The number of examples: `240`, or `240, 239` where they differ."""
    return ", ".join(dict.fromkeys(str(e["n"]) for e in estimates if e))


def escape(text: str) -> str:
    """Text from files as a cell of a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else c for c in text.replace("\n", " "))


def markdown(lines: list[list[str]]) -> str:
    """Rows of text as a Markdown table, the first one its header; cells must be escaped already."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


def newest(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The newest evaluation that sees the videos: its name, checkpoint, time and numbers, each with its change from the
    one before of the same annotations; empty without any."""
    seen = [result for result in results if not result["blind"]]
    if not seen:
        return {}
    last = seen[-1]
    csv = last["settings"]["data"]["csv"]
    before = next((result for result in seen[-2::-1] if result["settings"]["data"]["csv"] == csv), None)
    numbers = []
    for row in rows():
        if not (now := lookup(last, row.path)):
            continue
        old = lookup(before, row.path) if before else None
        change = f"{now['value'] - old['value']:+z.2f}" if old else ""
        value, interval = cell(now).split(" ", 1)
        numbers.append({"title": row.title, "value": value, "interval": interval, "change": change})
    return {**last, "numbers": numbers, "before": before["name"] if before else ""}


def groups(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """(title, table) of each task's scores by class and by source, where there is more than one; for grounding the
    temporal IoU, in which a normal video counts 1 when no anomaly is reported."""
    values = []
    for kind, title in (("by_class", "class"), ("by_source", "source")):
        for task in TASKS:
            names = sorted({name for result in results for name in result[kind].get(task, {})})
            lines = [["", *(result["name"] for result in results), "n"]]
            for name in names:
                cells = [result[kind].get(task, {}).get(name) for result in results]
                lines.append([name, *map(cell, cells), sizes(cells)])
            if len(names) > 1:
                values.append((f"{task}, by {title}", lines))
    return values


def judged(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Marks of descriptions (VAU-Eval): a column an evaluation and judge; empty without any."""
    result = [
        (r, path, read_json(path)) for r in results for path in sorted((r["folder"] / judge.FOLDER).glob("*.json"))
    ]
    if not result:
        return []
    lines = [["", *(f"{r['name']}, {path.stem} ({marks['model']}){_stale(r, marks)}" for r, path, marks in result)]]
    lines += [[axis, *(cell(marks["axes"][axis]) for *_, marks in result)] for axis in AXES]
    lines.append(["total, of 50", *(cell(marks["total"]) for *_, marks in result)])
    return [*lines, ["not marked", *(str(len(marks["unmarked"])) for *_, marks in result)]]


def _stale(result: dict[str, Any], marks: dict[str, Any]) -> str:
    """A note where the evaluation was repeated after it was judged."""
    path = result["folder"] / "predictions.jsonl"
    return ", of earlier answers" if marks.get("predictions") and marks["predictions"] != content_hash(path) else ""


def provenance(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How each evaluation was made: a row each; empty without any."""
    if not results:
        return []
    titles = ("evaluation", "checkpoint", "annotations", "protocol", "style", "commit", "devices", "time")
    lines = [[*titles, "total reward"]]
    for result in results:
        about, settings = result["about"], result["settings"]
        total = ", ".join(f"{weight} {name}" for name, weight in settings.get("rewards", {}).items() if weight)
        style, trained = settings["data"].get("style", ""), result.get("model", {}).get("style")
        asked = f"{style}, trained in {trained}" if trained not in (None, style) else style
        known = [result["protocol"], asked, about["commit"] or "", about["devices"], about["time"]]
        lines.append([result["name"], result["checkpoint"], settings["data"]["csv"], *known, total])
    return lines


def exclusions(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row that was left out of an evaluation, with the reason; each once."""
    entries = {(e["video"], e["what"], e["reason"]) for result in results for e in result["excluded"]}
    return [f"excluded {video} ({what}): {reason}" for video, what, reason in sorted(entries)]


# --- Two evaluations ----------------------------------------------------------------------------------------------


def compare(a: Path, b: Path) -> str:
    """A Markdown table of the differences, b - a, in the score of each task, over the examples that both have; a
    video that failed has the score 0."""
    both = [{record.example: record for record in records.load(folder)} for folder in (a, b)]
    if not all(both):
        raise InputError(f"{a if not both[0] else b} has no predictions.jsonl: give two folders of evaluations")
    lines = [["score", "A", "B", "B - A", "95%", "p", "n"]]
    for task in [name for name, task in TASKS.items() if task.verifiable]:
        names = [n for n, r in both[0].items() if r.task == task and n in both[1]]
        first, second = (np.asarray([result[n].scores[0] for n in names]) for result in both)
        if names:
            d = metrics.paired(first, second)
            spread = f"[{d['low']:+.3f}, {d['high']:+.3f}]"
            means = [f"{x.mean():.3f}" for x in (first, second)]
            lines.append([task, *means, f"{d['difference']:+.3f}", spread, f"{d['p']:.4f}", str(d["n"])])
    if len(lines) == 1:
        raise InputError(f"{a} and {b} have no example in common")
    alone = [len(result) - sum(n in other for n in result) for result, other in (both, both[::-1])]
    failed = [sum(bool(result[n].failure) for n in result if n in other) for result, other in (both, both[::-1])]
    notes = [f"Only in A: {alone[0]} examples, only in B: {alone[1]}."]
    notes += [f"Videos that failed, whose score is 0: {failed[0]} in A, {failed[1]} in B."] * any(failed)
    return "\n".join([markdown(lines), "", *notes])
