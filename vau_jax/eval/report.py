"""Runs to one self-contained page: results, curves, and each example in all evaluations that have it.

    vau report DIR [DIR ...] [--out=report.html] [--examples=1000]
    vau report DIR [DIR ...] --watch [--port=0] [--every=10]  # the page of runs that still go on, on this machine alone
    vau report --compare A B

A DIR is searched for evaluations (metrics.json) and training runs (metrics.jsonl). The page begins with the newest
evaluation, and so do its tables; the printed table is chronological. --compare prints the differences between two
evaluations of the same examples, with p-values.
"""

import argparse
import base64
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from vau_jax.common import processes, progress
from vau_jax.common.files import InputError, dump_json, read_json, write_text
from vau_jax.common.metric_writer import read_metrics
from vau_jax.eval import charts, comparison, gallery, records, tables, watch
from vau_jax.tasks.record import Record

SCRIPT = (Path(__file__).parents[1] / "templates" / "report.js").read_text(encoding="utf-8")


def write(folders: Sequence[Path], out: Path, examples: int = 1000) -> str:
    """Writes the page to `out` and returns its table as text, the oldest evaluation first. Raises InputError when there
    is nothing to report."""
    if out.suffix != ".html":
        raise InputError(f"--out={out}: the report is one HTML page, so the name must end in .html")
    results = tables.evaluations(folders)
    write_text(out, page(folders, results, examples))
    if not results:
        return "no evaluation yet"
    lines = tables.table(results)
    return tables.markdown([[tables.escape(text) for text in lines[0]], *lines[1:]])


def page(
    folders: Sequence[Path],
    results: Sequence[dict[str, Any]],
    examples: int = 1000,
    known: gallery.Strips | None = None,
    stamp: str = "",
) -> str:
    """The page of `results`, oldest first, and of the runs in the folders, as HTML. With a `stamp` it is loaded again
    when the server that it came from has another; `known`: see `gallery.strips`. Raises InputError for a folder that is
    not there, and, without a stamp, when there is nothing to report."""
    absent = [str(folder) for folder in folders if not folder.is_dir()]
    runs = sorted({p.parent for folder in folders for p in folder.rglob("metrics.jsonl")})
    if absent or not (results or runs or stamp):
        raise InputError(f"nothing to report: {', '.join(absent) or ', '.join(map(str, folders))} has no run")
    names = _names([result["folder"] for result in results], [result["name"] for result in results])
    results = [{**result, "name": name} for result, name in zip(results, names, strict=True)]
    latest = results[::-1]
    evaluated = [(result, records.load(result["folder"])) for result in latest if not result["blind"]]
    cards, total, strips = _cards(evaluated, examples, known)
    run_names = _names(runs)
    steps = {name: read_metrics(run) for name, run in zip(run_names, runs, strict=True)}
    drawn = [*charts.curves(steps), *charts.results(evaluated)]
    library = get_plotlyjs() if drawn else ""
    return gallery.render(
        "report.html.jinja",
        policy=policy(library, SCRIPT, live=bool(stamp)),
        script=SCRIPT,
        stamp=stamp,
        newest=tables.newest(results),
        results=results,
        runs=[_run(name, run, steps[name]) for name, run in zip(run_names, runs, strict=True)],
        table=tables.table(latest) if results else [],
        published=comparison.tables(latest),
        judged=tables.judged(latest),
        groups=tables.groups(latest),
        exclusions=tables.exclusions(results),
        provenance=tables.provenance(latest),
        charts=drawn,
        smoothing=charts.WINDOWS // 2,
        matrices=charts.matrices(evaluated),
        shades={theme: charts.shades(theme) for theme in charts.SCALES},
        cards=cards,
        total=total,
        strips=strips,
        filters=_filters(cards),
        plotly=library,
    )


def policy(*scripts: str, live: bool = False) -> str:
    """The page's content security policy: it runs these scripts and no others, and fetches nothing, or if it is `live`
    from its own server alone. Plotly writes styles, which can then show only pictures that the page has."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts if script]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    server = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src {server}; "
        "base-uri 'none'; form-action 'none'"
    )


def _cards(
    evaluated: Sequence[tuple[dict[str, Any], list[Record]]], most: int, known: gallery.Strips | None
) -> tuple[list[gallery.Card], int, dict[str, gallery.Strip]]:
    """A card for each example of the evaluations (newest first), `most` at most, how many there are, and strips by
    style class. One example: the same id, asked in the same words, with the same truth."""
    examples: defaultdict[tuple[Any, ...], list[tuple[dict[str, Any], Record]]] = defaultdict(list)
    for result, found in evaluated:
        for record in found:
            key = (record.task, record.example, record.rotation, record.question, record.target)
            examples[key].append((result, record))
    chosen = gallery.choose(list(examples.values()), most)
    classes: dict[Path, str] = {}
    for (result, record), *_ in chosen:
        if path := gallery.video_of(result, record):
            classes.setdefault(path, f"strip{len(classes)}")
    pictures = gallery.strips(list(classes), known)
    strips = {name: picture for name, picture in zip(classes.values(), pictures, strict=True) if picture}
    cards = []
    for found in chosen:
        result, record = found[0]
        name = classes.get(gallery.video_of(result, record), "")
        cards.append(gallery.card([(r["name"], one) for r, one in found], name if name in strips else ""))
    return cards, len(examples), strips


def _filters(cards: Sequence[gallery.Card]) -> dict[str, list[str]]:
    """The filters of the gallery, and the values that occur."""
    changes = {change for card in cards for change in card.changes}
    return {
        "task": list(dict.fromkeys(card.task for card in cards)),
        "class": sorted({card.label for card in cards}),
        "outcome": sorted({state for card in cards for state in card.states}),
        "change": [change for change in gallery.CHANGES if change in changes],
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


def _live_page(folders: Sequence[Path], examples: int, strips: gallery.Strips, stamp: str) -> str:
    return page(folders, tables.evaluations(folders), examples, strips, stamp)


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    if args.distributed:
        processes.start()
    processes.broadcast_from_first(lambda: _run_program(args))


def _run_program(args: argparse.Namespace) -> None:
    if args.compare:
        print(tables.compare(*args.compare))
    elif not args.folders:
        raise InputError("give folders of runs, or --compare A B")
    elif args.watch:
        strips: gallery.Strips = {}
        shown = partial(_live_page, args.folders, args.examples, strips)
        watch.follow(watch.Pages(args.folders, shown), args.port, args.every)
    else:
        print(write(args.folders, args.out, args.examples))
        print(progress.summary("", {"report": args.out}))
