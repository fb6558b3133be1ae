"""The charts of a report as Plotly figures: plain dicts, which the page draws.

Plotly reads HTML in any text, links among it: so all text that comes from files goes through `label`.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vau_jax.eval import scores
from vau_jax.eval.scores import Record
from vau_jax.tasks import parsing

Chart = dict[str, Any]  # title, note, data, layout

CURVES = {
    "Reward": ("reward",),
    "Rewards, by kind": ("rewards/format", "rewards/accuracy", "rewards/tiou", "rewards/reflection", "rewards/judge"),
    "Loss": ("loss",),
    "KL to the reference": ("kl",),
    "Entropy": ("entropy",),
    "Sampler beside trainer, log-probability": ("sampler_logp_gap/max",),
    "Length of completions, tokens": ("length/mean",),
    "Reflection": ("reflection/corrected", "reflection/broken"),
    "Seconds a step": ("seconds/step",),
}
SOURCES = {"test_msad": "MSAD", "test_ucf_crime": "UCF-Crime", "test_ecva": "ECVA"}


def source_of(result: dict[str, Any]) -> str | None:
    """Which of VAU-Bench's test files an evaluation is of; None for others, and for blind ones."""
    csv = result.get("settings", {}).get("data", {}).get("csv", "")
    return None if result["blind"] else SOURCES.get(Path(csv).stem)


def curves(runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Training curves, all runs in one chart of each kind."""
    found = []
    for title, names in CURVES.items():
        lines = [(run, name, _points(steps, name)) for run, steps in runs.items() for name in names]
        lines = [(run, name, points) for run, name, points in lines if points[0]]
        data = [
            {
                "x": x,
                "y": y,
                "mode": "lines",
                "name": label(run if len(names) == 1 else f"{run}: {name.split('/')[-1]}"),
            }
            for run, name, (x, y) in lines
        ]
        if data:
            found.append(_chart(title, data, xaxis={"title": {"text": "step"}}))
    return found


def _points(steps: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    """Steps and values; None, a gap in the curve, for a value that is no finite number."""
    there = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
    return [x for x, _ in there], [y if math.isfinite(y) else None for _, y in there]


def results(evaluations: Sequence[tuple[dict[str, Any], list[Record]]]) -> list[Chart]:
    """Of each evaluation, with its records: confusion, and true beside predicted times."""
    found = []
    for result, records in evaluations:
        found += [chart for chart in (_confusion(result), _times(result["name"], records)) if chart]
    return found


def _confusion(result: dict[str, Any]) -> Chart | None:
    confusion = result["tasks"].get("classification", {}).get("confusion")
    if not confusion or not confusion["labels"]:
        return None
    shares = [[c / max(1, sum(row)) for c in row] for row in confusion["counts"]]
    names = [label(name) for name in confusion["labels"]]
    heat = {
        "type": "heatmap",
        "z": shares,
        "x": [*names, "unreadable"],
        "y": names,
        "text": [[int(c) or "" for c in row] for row in confusion["counts"]],
        "texttemplate": "%{text}",
        "colorscale": "Blues",
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": "true %{y}, said %{x}: %{text}<extra></extra>",
        "colorbar": {"title": {"text": "share"}},
    }
    axis = {"type": "category", "automargin": True}  # else names like dates or numbers become such
    layout = {"yaxis": {**axis, "autorange": "reversed", "title": {"text": "true"}}}
    layout["xaxis"] = {**axis, "title": {"text": "said"}}
    return _chart(f"Classes: {result['name']}", [heat], **layout)


def _times(name: str, records: list[Record]) -> Chart | None:
    """Starts and ends that were found, beside the true ones; on the line they are equal."""
    rows = [r for r in records if r["task"] == "grounding"]
    answers = scores.read(rows, "lenient", any("drafts" in r for r in rows)).final
    both = [
        (r["interval"], interval)
        for r, kind, interval in zip(rows, answers.kind, answers.interval.tolist(), strict=True)
        if kind == parsing.INTERVAL and isinstance(r["interval"], list)
    ]
    if not both:
        return None
    data: list[dict[str, Any]] = [
        {
            "x": [true[i] for true, _ in both],
            "y": [round(found[i], 2) for _, found in both],
            "mode": "markers",
            "name": name,
            "marker": {"opacity": 0.6, "symbol": symbol},
        }
        for i, name, symbol in ((0, "start", "circle"), (1, "end", "diamond"))
    ]
    most = max(max(point["x"] + point["y"]) for point in data)
    data.append({"x": [0, most], "y": [0, most], "mode": "lines", "name": "equal", "line": {"dash": "dot"}})
    return _chart(
        f"Times: {name}",
        data,
        xaxis={"title": {"text": "true, seconds"}},
        yaxis={"title": {"text": "found, seconds"}},
    )


def label(text: Any) -> str:
    """Text from a file as Plotly shows it letter for letter: no tags, entities, links or formulas."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def _chart(title: str, data: list[dict[str, Any]], **layout: Any) -> Chart:
    return {"title": title, "data": data, "layout": layout}
