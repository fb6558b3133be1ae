"""The charts of a report: training curves, and the tasks' charts and confusion matrices of evaluations."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vau_jax.tasks import TASKS
from vau_jax.tasks.charts import Chart, Matrix, chart, label
from vau_jax.tasks.record import Record

CURVES = {  # title: a number of metrics.jsonl
    "Evaluation during training": "eval/score",
    "Reward": "reward",
    "Reward for format": "rewards/format",
    "Reward for accuracy": "rewards/accuracy",
    "Reward for temporal IoU": "rewards/tiou",
    "Reward for reflection": "rewards/reflection",
    "Reward by a judge": "rewards/judge",
    "Corrected by reflection": "reflection/corrected",
    "Broken by reflection": "reflection/broken",
    "Loss": "loss",
    "KL to the reference": "kl",
    "Entropy": "entropy",
    "Sampler beside trainer, log-probability": "sampler_logp_gap/max",
    "Length of completions, tokens": "length/mean",
    "Seconds a step": "seconds/step",
}
# By Okabe and Ito: told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e6e6e")
WINDOWS = 30  # a curve is smoothed over a 30th of its values to each side
SCALES = {  # colours of the shares 0 and 1: one hue, whose lightness says it all, so that all see the same order
    "light": ("#e3eefa", "#08306b"),
    "dark": ("#1b3050", "#c6dbef"),
}
SHADES = 10  # steps between them
SOURCES = {"test_msad": "MSAD", "test_ucf_crime": "UCF-Crime", "test_ecva": "ECVA"}


def source_of(result: dict[str, Any]) -> str | None:
    """The VAU-Bench test file of an evaluation; None for other files, and for blind evaluations."""
    csv = result.get("settings", {}).get("data", {}).get("csv", "")
    return None if result["blind"] else SOURCES.get(Path(csv).stem)


def curves(runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Training curves, a chart of each kind with all runs: the moving mean, with the values themselves behind it. A run
    has one colour in all of them."""
    charts = []
    for title, name in CURVES.items():
        data = []
        for number, (run, steps) in enumerate(runs.items()):
            x, y = _points(steps, name)
            data += _curve(label(run), x, y, COLOURS[number % len(COLOURS)]) if x else []
        data.sort(key=lambda line: line.get("showlegend", True))  # no values in front of a mean
        if data:
            charts.append(chart(title, data, xaxis={"title": {"text": "step"}}))
    return charts


def _curve(name: str, x: list[int], y: list[float | None], colour: str) -> list[dict[str, Any]]:
    """A line and, where smoothing changes it, the values behind it; both under one entry of the legend."""
    line = {"x": x, "mode": "lines", "name": name, "legendgroup": name, "line": {"color": colour}}
    half = len(y) // WINDOWS
    if half == 0:
        return [line | {"y": y}]
    behind = line | {"y": y, "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    return [behind, line | {"y": moving_mean(y, half)}]


def moving_mean(values: Sequence[float | None], half: int) -> list[float | None]:
    """The centred moving mean: m[i] = the mean of values[i - half] to values[i + half], of those that there are. Near
    the ends it has fewer; missing values (None) stay missing, and count nowhere."""
    there = np.asarray([value is not None for value in values], np.float64)
    window = np.ones(2 * half + 1)
    sums, counts = (
        np.convolve(each, window)[half : half + len(values)] for each in ([value or 0.0 for value in values], there)
    )
    means = sums / np.maximum(1.0, counts)
    return [float(f"{mean:.6g}") if known else None for mean, known in zip(means, there, strict=True)]


def _points(steps: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    """Steps and values; None, a gap in the curve, for a value that is no finite number."""
    there = [(step["step"], step[name]) for step in steps if name in step]
    known = any(y is not None and math.isfinite(y) for _, y in there)
    points = [(x, y if y is not None and math.isfinite(y) else None) for x, y in there if known]
    return [x for x, _ in points], [y for _, y in points]


def results(evaluations: Sequence[tuple[dict[str, Any], list[Record]]]) -> list[Chart]:
    """The charts of each task of each evaluation, whose records are given with it."""
    return [
        drawn
        for result, records in evaluations
        for name, task in reversed(TASKS.items())
        for drawn in task.charts(result, [record for record in records if record.task == name])
    ]


def matrices(evaluations: Sequence[tuple[dict[str, Any], list[Record]]]) -> list[Matrix]:
    """The confusion matrices of each task of each evaluation."""
    return [matrix for result, _ in evaluations for task in TASKS.values() for matrix in task.matrices(result)]


def shades(theme: str) -> list[tuple[str, str]]:
    """(background, text) of a cell for shares 0, 0.1 to 1; the text is black or white, whichever is read better: its
    contrast is at least 4.5 (WCAG AA)."""
    low, high = (np.asarray([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in SCALES[theme])
    pairs = []
    for step in range(SHADES + 1):
        colour = np.rint(low + (high - low) * step / SHADES).astype(int)
        white = 1.05 / (luminance(colour) + 0.05)  # contrast; that with black is 21 / white
        pairs.append(("#" + "".join(f"{c:02x}" for c in colour), "#ffffff" if white > 21 / white else "#000000"))
    return pairs


def luminance(colour: Sequence[int] | np.ndarray) -> float:
    """Relative luminance, in [0, 1], of an sRGB colour of three numbers in [0, 255], as WCAG 2.1 defines it."""
    c = np.asarray(colour) / 255
    return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])
