"""The charts of a report: training curves, and the tasks' charts of evaluations."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def curves(runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Training curves, all runs in one chart of each kind."""
    charts = []
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
            charts.append(chart(title, data, xaxis={"title": {"text": "step"}}))
    return charts


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
