"""Prediction records as cards of a report: a strip of frames, bars on a time line, the model's text in sections."""

import base64
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.tasks import TASKS
from vau_jax.tasks.grammar import TAG
from vau_jax.tasks.record import Record

FRAMES = 6  # of a strip
HEIGHT = 64  # of a strip, in pixels
GAP = 2  # between its frames
SECONDS = 30.0  # to decode one


@dataclass(frozen=True)
class Bar:
    """An interval on the time line of a video."""

    name: str
    left: float  # percent of the video's length
    width: float
    text: str


@dataclass(frozen=True)
class Card:
    """One example of one evaluation."""

    evaluation: str
    example: str
    task: str
    label: str  # the true class
    states: tuple[str, ...]  # right or wrong, and what else a filter may ask for
    score: float
    duration: float
    question: str
    target: str
    prediction: str
    draft: str
    sections: list[tuple[str, str]]
    failure: str
    strip: str  # name of the style class with its frames; empty: none
    bars: list[Bar] = field(default_factory=list)


def render(template: str, **values: Any) -> str:
    """HTML from a file of templates/; every value is escaped. Raises ValueError for a number that is not finite."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("vau_jax"), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template(template).render(**values)


def choose(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spaced from first to last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


def card(evaluation: str, record: Record, strip: str) -> Card:
    """A record of predictions.jsonl as a card; of several samples the first."""
    task = TASKS[record.task]
    none = "" if record.failure or not task.verifiable else "no readable answer"
    return Card(
        evaluation=evaluation,
        example=record.example,
        task=record.task,
        label=record.anomaly_class or "unknown",
        states=_states(record),
        score=record.scores[0] if record.scores else 0.0,
        duration=record.duration or 0.0,
        question=record.question,
        target=record.target,
        prediction=record.predictions[0] or none,
        draft=(record.draft_predictions[0] or "") if record.draft_predictions else "",
        sections=sections(record.completions[0]),
        failure=record.failure or "",
        strip=strip,
        bars=[bar(name, text, record.duration) for name, text in task.bars(record)] if record.duration else [],
    )


def _states(record: Record) -> tuple[str, ...]:
    task = TASKS[record.task]
    if record.failure:
        return "wrong", "failed"
    if not task.verifiable:
        return ("described",)
    states = ["right" if task.is_right(record) else "wrong"]
    if record.draft_scores:
        gain = record.scores[0] - record.draft_scores[0]
        states += ["corrected"] * (gain > 0) + ["broken"] * (gain < 0)
    return tuple(states + ["unreadable"] * (record.predictions[0] is None))


def sections(text: str) -> list[tuple[str, str]]:
    """(tag, content) in the order of the text; the full text as one where there are no tags."""
    parts, at = [], 0
    tags = list(TAG.finditer(text))
    for opened, closed in pairwise(tags):
        if not opened.group(1) and closed.group(1) and opened.group(2) == closed.group(2):
            if rest := text[at : opened.start()].strip():
                parts.append(("outside", rest))
            parts.append((opened.group(2), text[opened.end() : closed.start()].strip()))
            at = closed.end()
    if rest := text[at:].strip():
        parts.append(("outside" if parts else "text", rest))
    return parts


def bar(name: str, text: str, duration: float) -> Bar:
    """`Anomaly [2.0, 6.0]` as a bar; anything else has no width."""
    interval = re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", text)
    if not interval:
        return Bar(name, 0.0, 0.0, text or "no interval")
    start, end = (min(max(0.0, float(t)), duration) for t in interval.groups())
    left, width = 100 * start / duration, 100 * (end - start) / duration
    return Bar(name, round(left, 2), round(width, 2), f"{start:.1f} to {end:.1f} s")


# --- Frames -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """Frames side by side as base64 WebP."""

    data: str
    width: int
    height: int = HEIGHT


def strips(paths: Sequence[Path], workers: int = 2) -> list[Strip | None]:
    """A strip of each video; None where it cannot be read."""
    pool = DecoderPool(workers, SECONDS)

    def strip(path: Path) -> Strip | None:
        try:
            options = VideoOptions(nframes=FRAMES, min_pixels=32 * 32, max_pixels=128 * 128)
            return _strip(pool.read(path, options, 2, 1).frames)
        except VideoError:
            return None

    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(strip, paths))


def _strip(frames: np.ndarray) -> Strip:
    """Frames uint8 [F, H, W, 3], HEIGHT pixels high."""
    width = max(1, round(frames.shape[2] * HEIGHT / frames.shape[1]))
    strip = Image.new("RGB", (len(frames) * (width + GAP) - GAP, HEIGHT), "white")
    for number, frame in enumerate(frames):
        small = Image.fromarray(frame).resize((width, HEIGHT), Image.Resampling.BILINEAR)
        strip.paste(small, (number * (width + GAP), 0))
    buffer = io.BytesIO()
    strip.save(buffer, format="WEBP", quality=45)
    return Strip(base64.b64encode(buffer.getvalue()).decode(), strip.width)


def videos_of(evaluation: dict[str, Any]) -> Path | None:
    """The folder of an evaluation's videos, where it still exists."""
    folder = Path(evaluation["settings"]["data"]["videos"]) if "settings" in evaluation else None
    return folder if folder and folder.is_dir() else None
