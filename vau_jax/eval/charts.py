"""The charts of a report: training curves, and the tasks' charts of evaluations."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vau_jax.tasks import TASKS
from vau_jax.tasks.charts import Chart, chart, label
from vau_jax.tasks.record import Record

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
    """The VAU-Bench test file of an evaluation; None for other files, and for blind evaluations."""
    csv = result.get("settings", {}).get("data", {}).get("csv", "")
    return None if result["blind"] else SOURCES.get(Path(csv).stem)


COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6e6e6e",
)  # Okabe and Ito: told apart by all
WINDOWS = 30  # a curve is smoothed over a 30th of its length


def curves(runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Training curves, all runs in one chart of each kind: the moving mean, with the values themselves behind it."""
    charts = []
    for title, names in CURVES.items():
        lines = [(run, name, _points(steps, name)) for run, steps in runs.items() for name in names]
        lines = [(run, name, points) for run, name, points in lines if points[0]]
        data = []
        for number, (run, name, (x, y)) in enumerate(lines):
            shown = label(run if len(names) == 1 else f"{run}: {name.split('/')[-1]}")
            data += _curve(shown, x, y, COLOURS[number % len(COLOURS)])
        if data:
            charts.append(chart(title, data, xaxis={"title": {"text": "step"}}))
    return charts


def _curve(name: str, x: list[int], y: list[float | None], colour: str) -> list[dict[str, Any]]:
    """A line and, where smoothing changes it, the values behind it."""
    line = {"x": x, "mode": "lines", "name": name, "legendgroup": name, "line": {"color": colour}}
    smooth = moving_mean(y, round(len(y) / WINDOWS))
    if smooth == y:
        return [line | {"y": y}]
    return [line | {"y": y, "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}, line | {"y": smooth}]


def moving_mean(values: Sequence[float | None], half: int) -> list[float | None]:
    """The mean of the values at most `half` places away; values that are missing stay so, and count nowhere."""
    there = np.asarray([value is not None for value in values], np.float64)
    sums = np.cumsum([0.0, *(value or 0.0 for value in values)])
    counts = np.cumsum([0.0, *there])
    places = np.arange(len(values))
    low, high = np.maximum(0, places - half), np.minimum(len(values), places + half + 1)
    means = (sums[high] - sums[low]) / np.maximum(1.0, counts[high] - counts[low])
    if half == 0:
        return list(values)
    return [float(f"{mean:.6g}") if known else None for mean, known in zip(means, there, strict=True)]


def _points(steps: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    """Steps and values; None, a gap in the curve, for a value that is no finite number."""
    there = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
    return [x for x, _ in there], [y if math.isfinite(y) else None for _, y in there]


def results(evaluations: Sequence[tuple[dict[str, Any], list[Record]]]) -> list[Chart]:
    """The charts of each task of each evaluation, whose records are given with it."""
    return [
        drawn
        for result, records in evaluations
        for name, task in reversed(TASKS.items())
        for drawn in task.charts(result, [record for record in records if record.task == name])
    ]
