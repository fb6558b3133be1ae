"""Runs to one self-contained page: results, curves, and each example in all evaluations that have it.

    vau report DIR [DIR ...] [--out=report.html] [--examples=1000]
    vau report DIR [DIR ...] --watch [--port=0]     # the page of runs that still go on, on this machine alone
    vau report --compare A B

A DIR is searched for evaluations (metrics.json) and training runs (metrics.jsonl). The page begins with the newest
evaluation. --compare prints the differences between two evaluations of the same examples, with p-values.
"""

import argparse
import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from vau_jax.common import progress
from vau_jax.common.files import InputError, content_hash, dump_json, read_json, write_text
from vau_jax.common.metric_writer import read_metrics
from vau_jax.eval import charts, gallery, judge, metrics, records, watch
from vau_jax.eval.published import PUBLISHED
from vau_jax.rl.judge import AXES
from vau_jax.tasks import TASKS
from vau_jax.tasks.base import ReportRow
from vau_jax.tasks.record import Record

SCRIPT = (Path(__file__).parents[1] / "templates" / "report.js").read_text(encoding="utf-8")

ROWS_OF_ALL = (
    ReportRow("QA accuracy over orders of options", ("option_order", "accuracy")),
    ReportRow("Mean total reward", ("rewards", "total")),
)


def rows() -> tuple[ReportRow, ...]:
    """The rows of the table: those of the tasks, the changes by reflection, and those of all tasks together."""
    own = [row for task in TASKS.values() for row in task.report_rows]
    return (*own, *(row for task in TASKS.values() for row in task.reflection_rows), *ROWS_OF_ALL)


def evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The metrics.json of every finished evaluation under the folders, oldest first, each with its "folder"."""
    paths = sorted({p for f in folders for p in f.rglob("metrics.json")}, key=lambda p: p.stat().st_mtime_ns)
    results = [{**read_json(path), "folder": path.parent} for path in paths]
    if old := [str(result["folder"]) for result in results if "settings" not in result]:
        raise InputError(f"{', '.join(old)}: written by another version, which report does not read: evaluate again")
    return results


# --- Tables -------------------------------------------------------------------------------------------------------


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
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]" if known else "-"


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


def published(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Published numbers (percent) beside the evaluations of the same annotation files; empty without any."""
    mine = [(result, charts.source_of(result)) for result in results]
    mine = [(result, source) for result, source in mine if source]
    if not mine:
        return []
    models = list(dict.fromkeys(name for numbers in PUBLISHED.values() for name in numbers))
    lines = [["%", *(result["name"] for result, _ in mine), *models]]
    for (source, title, path), numbers in PUBLISHED.items():
        own = [lookup(result, path) if s == source else None for result, s in mine]
        if any(own):
            texts = [f"{100 * e['value']:.2f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" if e else "" for e in own]
            lines.append([title, *texts, *(f"{numbers[m]:.2f}" if m in numbers else "" for m in models)])
    return lines if len(lines) > 1 else []


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


def exclusions(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row that was left out of an evaluation, with the reason; each once."""
    entries = {(e["video"], e["what"], e["reason"]) for result in results for e in result["excluded"]}
    return [f"excluded {video} ({what}): {reason}" for video, what, reason in sorted(entries)]


# --- The page -----------------------------------------------------------------------------------------------------


def write(folders: Sequence[Path], out: Path, examples: int = 1000) -> str:
    """Writes the page to `out` and returns its table as text. Raises InputError when there is nothing to report."""
    if out.suffix != ".html":
        raise InputError(f"--out={out}: the report is one HTML page, so the name must end in .html")
    results = evaluations(folders)
    write_text(out, page(folders, results, examples))
    if not results:
        return "no evaluation yet"
    lines = table(results)
    return markdown([[escape(text) for text in lines[0]], *lines[1:]])


def page(
    folders: Sequence[Path],
    results: Sequence[dict[str, Any]],
    examples: int = 1000,
    known: gallery.Strips | None = None,
    stamp: str = "",
) -> str:
    """The page of `results`, and of the runs in the folders, as HTML. With a `stamp` it is loaded again when the server
    that it came from has another; `known`: see `gallery.strips`. Raises InputError when there is nothing to report."""
    absent = [str(folder) for folder in folders if not folder.is_dir()]
    runs = sorted({p.parent for folder in folders for p in folder.rglob("metrics.jsonl")})
    if absent or not (results or runs):
        raise InputError(f"nothing to report: {', '.join(absent) or ', '.join(map(str, folders))} has no run")
    names = _names([result["folder"] for result in results], [result["name"] for result in results])
    results = [{**result, "name": name} for result, name in zip(results, names, strict=True)]
    evaluated = [(result, records.load(result["folder"])) for result in results if not result["blind"]]
    cards, total, strips = _cards(evaluated, examples, known)
    run_names = _names(runs)
    steps = {name: read_metrics(run) for name, run in zip(run_names, runs, strict=True)}
    drawn = [*charts.curves(steps), *charts.results(evaluated[::-1])]
    library = get_plotlyjs() if drawn else ""
    return gallery.render(
        "report.html.jinja",
        policy=policy(library, SCRIPT, live=bool(stamp)),
        script=SCRIPT,
        stamp=stamp,
        newest=newest(results),
        results=results[::-1],
        runs=[_run(name, run, steps[name]) for name, run in zip(run_names, runs, strict=True)],
        table=table(results) if results else [],
        published=published(results),
        judged=judged(results),
        groups=groups(results),
        exclusions=exclusions(results),
        charts=drawn,
        cards=cards,
        total=total,
        strips=strips,
        filters=_filters(cards),
        plotly=library,
    )


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
        change = f"{now['value'] - old['value']:+.2f}" if old else ""
        numbers.append({"title": row.title, "value": cell(now), "change": change})
    return {**last, "numbers": numbers, "before": before["name"] if before else ""}


def policy(*scripts: str, live: bool = False) -> str:
    """The page's content security policy: it runs these scripts and no others, and fetches nothing, or if it is `live`
    from its own server alone. Plotly writes styles, which can then show only pictures that the page has."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts if script]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )


def _cards(
    evaluated: Sequence[tuple[dict[str, Any], list[Record]]], most: int, known: gallery.Strips | None
) -> tuple[list[gallery.Card], int, dict[str, gallery.Strip]]:
    """A card for each example of the evaluations, `most` at most, how many there are, and strips by style class."""
    examples: defaultdict[tuple[str, int], list[tuple[dict[str, Any], Record]]] = defaultdict(list)
    for result, found in evaluated[::-1]:  # the newest first
        for record in found:
            examples[record.example, record.rotation].append((result, record))
    chosen = gallery.choose(list(examples.values()), most)
    classes: dict[Path, str] = {}
    for (result, record), *_ in chosen:
        if folder := gallery.videos_of(result):
            classes.setdefault(folder / record.video, f"strip{len(classes)}")
    pictures = gallery.strips(list(classes), known)
    strips = {name: picture for name, picture in zip(classes.values(), pictures, strict=True) if picture}
    cards = []
    for found in chosen:
        result, record = found[0]
        name = classes.get((gallery.videos_of(result) or Path()) / record.video, "")
        cards.append(gallery.card([(r["name"], one) for r, one in found], name if name in strips else ""))
    return cards, len(examples), strips


def _filters(cards: Sequence[gallery.Card]) -> dict[str, list[str]]:
    """The filters of the gallery, and the values that occur."""

    def distinct(values: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(values))

    return {
        "task": distinct(card.task for card in cards),
        "class": sorted(distinct(card.label for card in cards)),
        "outcome": sorted(distinct(state for card in cards for state in card.states)),
    }


def _names(folders: Sequence[Path], own: Sequence[str] = ()) -> list[str]:
    """Names that are all different: those of their own, or the shortest endings of the folders' paths that are."""
    if own and len(set(own)) == len(own):
        return list(own)
    for count in range(1, max((len(folder.parts) for folder in folders), default=0) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _run(name: str, run: Path, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """A training run's entry on the page."""
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    about = read_json(run / "about.json") if (run / "about.json").is_file() else {}
    seconds = [step["seconds/step"] for step in steps if "seconds/step" in step]
    return {
        "name": name,
        "stage": config.get("stage", ""),
        "model": config.get("init_from") or config.get("model", ""),
        "steps": steps[-1]["step"] if steps else 0,
        "step_seconds": f"{np.median(seconds):.2f}" if seconds else "",
        "about": about,
        "config": dump_json(config, indent=1),
    }


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


def _live_page(folders: Sequence[Path], examples: int, strips: gallery.Strips, stamp: str) -> str:
    return page(folders, evaluations(folders), examples, strips, stamp)


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    if args.compare:
        print(compare(*args.compare))
    elif not args.folders:
        raise InputError("give folders of runs, or --compare A B")
    elif args.watch:
        strips: gallery.Strips = {}
        shown = partial(_live_page, args.folders, args.examples, strips)
        watch.follow(watch.Pages(args.folders, shown), args.port)
    else:
        print(write(args.folders, args.out, args.examples))
        print(progress.summary("", {"report": args.out}))
