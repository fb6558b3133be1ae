"""Runs to a report: one table of all evaluations, and curves of training.

    python -m vau_jax.report DIR [DIR ...] --out=report.md

A DIR is searched for evaluations (metrics.json) and training runs (metrics.jsonl). Curves are written beside the
report as PNG.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vau_jax.files import InputError, exit_on_input_error, read_json, write_text
from vau_jax.metric_writer import read_metrics

matplotlib.use("Agg")

# Row title, where the estimate stands in metrics.json, and the constant guess that stands beside it.
ROWS = (
    ("QA accuracy", ("tasks", "qa", "accuracy"), ("baselines", "qa", "majority_letter")),
    ("Grounding mIoU", ("tasks", "grounding", "mIoU"), ("baselines", "grounding", "best_constant_interval")),
    ("R@0.3", ("tasks", "grounding", "R@0.3"), None),
    ("R@0.5", ("tasks", "grounding", "R@0.5"), None),
    ("R@0.7", ("tasks", "grounding", "R@0.7"), None),
    ("False alarms (normal videos)", ("tasks", "grounding", "false_alarms"), None),
    (
        "Classification, multi-class",
        ("tasks", "classification", "multiclass"),
        ("baselines", "classification", "majority_class"),
    ),
    ("Classification, normal or not", ("tasks", "classification", "binary"), None),
    ("Corrected by reflection, QA", ("reflection", "qa", "corrected"), None),
    ("Broken by reflection, QA", ("reflection", "qa", "broken"), None),
    ("Gain by reflection, temporal IoU", ("reflection", "grounding", "gain"), None),
    ("Mean total reward", ("rewards", "total"), None),
)
CURVES = {
    "rewards": ("reward", "rewards/format", "rewards/accuracy", "rewards/tiou", "rewards/reflection"),
    "loss": ("loss",),
    "policy": ("kl", "entropy", "sampler_logp_gap/max"),
    "lengths": ("length/mean", "length/min", "length/max"),
}


def evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The metrics.json of every finished evaluation under the folders, oldest first."""
    paths = sorted({p for f in folders for p in f.rglob("metrics.json")}, key=lambda p: p.stat().st_mtime_ns)
    return [read_json(path) for path in paths]


def table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Title row, then one row a number: an evaluation a column, and what a constant guess reaches."""
    lines = [["", *(escape(result["name"]) for result in results), "constant guess", "n"]]
    for title, path, guess in ROWS:
        found = [lookup(result, path) for result in results]
        if any(found):
            constant = next((lookup(r, guess) for r in results if guess and lookup(r, guess)), None)
            n = str(next(e["n"] for e in found if e))
            lines.append([title, *map(cell, found), cell(constant) if constant else "", n])
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
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]" if estimate else "-"


def escape(text: str) -> str:
    """Text from files as it may stand in a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else c for c in text.replace("\n", " "))


def markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


def curves(run: Path, target: Path) -> list[Path]:
    """Draws the training curves of a run as PNG files target_{kind}.png; kinds without data are left out."""
    steps = read_metrics(run)
    written = []
    for kind, names in CURVES.items():
        present = [name for name in names if any(name in step for step in steps)]
        if not present:
            continue
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in present:
            points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="step", title=f"{run.name}: {kind}")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        path = target.with_name(f"{target.name}_{kind}.png")
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def write(folders: Sequence[Path], out: Path) -> str:
    """Writes the report to `out` and returns its table as text. Raises InputError when there is nothing to report."""
    if out.suffix != ".md":
        raise InputError(f"--out={out}: this report is written as Markdown, so the name must end in .md")
    absent = [str(folder) for folder in folders if not folder.is_dir()]
    results = evaluations(folders)
    runs = sorted({p.parent for folder in folders for p in folder.rglob("metrics.jsonl")})
    if absent or not (results or runs):
        raise InputError(f"nothing to report: {', '.join(absent) or ', '.join(map(str, folders))} has no run")
    protocols = sorted({result["protocol"] for result in results})
    parts = ["# Report", f"Annotation protocol: {', '.join(protocols) or 'none'}. Values with 95% bootstrap intervals."]
    text = markdown(table(results)) if results else "no evaluation yet"
    parts.append(text)
    parts += [f"- {escape(line)}" for line in exclusions(results)]
    for run in runs:
        pictures = curves(run, out.parent / f"curves_{run.name}")
        parts += [f"## Training: {escape(run.name)}", *(f"![{p.stem}]({p.name})" for p in pictures)]
    write_text(out, "\n\n".join(parts) + "\n")
    return text


def exclusions(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line a row that was left out of an evaluation, and why; each once."""
    entries = {(e["video"], e["what"], e["reason"]) for result in results for e in result["excluded"]}
    return [f"excluded {video} ({what}): {reason}" for video, what, reason in sorted(entries)]


def main() -> None:
    parser = argparse.ArgumentParser(description="runs to one report")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("report.md"))
    args = parser.parse_args()
    print(write(args.folders, args.out))


if __name__ == "__main__":
    exit_on_input_error(main)
