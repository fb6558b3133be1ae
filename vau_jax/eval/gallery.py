"""Prediction records as cards of a report, an example in all evaluations each: a strip of frames, bars on a time line,
the models' texts in sections."""

import base64
import io
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vau_jax.common.progress import Progress
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.datasets import vau_bench
from vau_jax.tasks import TASKS
from vau_jax.tasks.grammar import TAG
from vau_jax.tasks.record import Record

FRAMES = 6  # of a strip
HEIGHT = 64  # of a strip, in pixels
GAP = 2  # between its frames
SECONDS = 30.0  # to decode one
INTERVAL = re.compile(r"\[(-?[\d.]+), (-?[\d.]+)\]")  # as tasks write it
CHANGES = ("fixed", "broken", "improved", "worsened", "fixed since the first", "broken since the first")


@dataclass(frozen=True)
class Bar:
    """The intervals of an answer on the time line of a video."""

    kind: str  # true, predicted or draft: its colour
    name: str
    spans: list[tuple[float, float]]  # left end and width of each part, in percent of the video's length
    text: str


@dataclass(frozen=True)
class Answer:
    """What one evaluation has of an example; of several samples the first."""

    evaluation: str
    states: tuple[str, ...]  # right or wrong, and what else is to be said
    score: float
    prediction: str
    draft: str
    sections: list[tuple[str, str]]
    failure: str
    change: str  # from the evaluation before; empty for the first


@dataclass(frozen=True)
class Card:
    """One example in all evaluations that have it."""

    example: str
    task: str
    label: str  # the true class
    states: tuple[str, ...]  # of the newest answer
    changes: tuple[str, ...]  # of CHANGES: from the answer before, and, of three or more answers, from the first
    score: float  # of the newest answer
    gain: float  # from the first answer to the newest
    scored: bool  # whether scores between 0 and 1 occur, and are shown
    duration: float
    question: str
    target: str
    strip: str  # name of the style class with its frames; empty: none
    bars: list[Bar]
    answers: list[Answer]  # the newest first


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


def card(named: Sequence[tuple[str, Record]], strip: str = "") -> Card:
    """A card of (evaluation, record) pairs of the same example, the newest first."""
    found = [record for _, record in named]
    pairs = zip(named, [*found[1:], None], strict=True)
    answers = [_answer(evaluation, record, before) for (evaluation, record), before in pairs]
    newest = found[0]
    return Card(
        example=newest.example,
        task=newest.task,
        label=newest.anomaly_class or "unknown",
        states=answers[0].states,
        changes=_changes(found),
        score=answers[0].score,
        gain=answers[0].score - answers[-1].score,
        scored=TASKS[newest.task].timed,
        duration=newest.duration or 0.0,
        question=newest.question,
        target=newest.target,
        strip=strip,
        bars=_bars(named),
        answers=answers,
    )


def _answer(evaluation: str, record: Record, before: Record | None) -> Answer:
    none = "" if record.failure or not TASKS[record.task].verifiable else "no readable answer"
    return Answer(
        evaluation=evaluation,
        states=_states(record),
        score=_score(record),
        prediction=record.predictions[0] or none,
        draft=(record.draft_predictions[0] or "") if record.draft_predictions else "",
        sections=sections(record.completions[0]),
        failure=record.failure or "",
        change=_change(before, record) if before else "",
    )


def _score(record: Record) -> float:
    return record.scores[0] if record.scores else 0.0


def _right(record: Record) -> bool:
    task = TASKS[record.task]
    return task.verifiable and not record.failure and task.is_right(record)


def _changes(found: Sequence[Record]) -> tuple[str, ...]:
    """Of the records of an example, the newest first: those of CHANGES that hold."""
    right, scores = [_right(record) for record in found], [_score(record) for record in found]
    changes = []
    if len(found) > 1 and right[0] != right[1]:
        changes.append("fixed" if right[0] else "broken")
    elif len(found) > 1 and scores[0] != scores[1]:
        changes.append("improved" if scores[0] > scores[1] else "worsened")
    if len(found) > 2 and right[0] != right[-1]:
        changes.append("fixed since the first" if right[0] else "broken since the first")
    return tuple(changes)


def _change(before: Record, after: Record) -> str:
    """What changed from one evaluation to the next: `wrong → right, tIoU 0.31 → 0.78`."""
    parts = []
    if _right(before) != _right(after):
        parts.append("wrong → right" if _right(after) else "right → wrong")
    if TASKS[after.task].timed and _score(before) != _score(after):
        parts.append(f"tIoU {_score(before):.2f} → {_score(after):.2f}")
    if not parts and (before.predictions[0] or after.predictions[0]):
        parts.append("same answer" if before.predictions[0] == after.predictions[0] else "another answer")
    return ", ".join(parts)


def _bars(named: Sequence[tuple[str, Record]]) -> list[Bar]:
    """The true intervals, those of each evaluation, and the draft of the newest."""
    bars = []
    for number, (evaluation, record) in enumerate(named):
        if record.duration:
            for kind, text in TASKS[record.task].bars(record):
                if number == 0 or kind == "predicted":
                    name = evaluation if kind == "predicted" and len(named) > 1 else kind
                    bars.append(bar(kind, text, record.duration, name))
    order = ("true", "predicted", "draft")
    return sorted(bars, key=lambda one: order.index(one.kind))


def _states(record: Record) -> tuple[str, ...]:
    task = TASKS[record.task]
    if record.failure:
        return "wrong", "failed"
    if not task.verifiable:
        return ("described",)
    states = ["right" if _right(record) else "wrong"]
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


def bar(kind: str, text: str, duration: float, name: str = "") -> Bar:
    """`Anomaly [2.0, 6.0], [7.0, 8.0]` as a bar of two spans; other text has none. Its name is its kind if not
    given."""
    intervals = [[min(max(0.0, float(t)), duration) for t in found.groups()] for found in INTERVAL.finditer(text)]
    spans = [(round(100 * start / duration, 2), round(100 * (end - start) / duration, 2)) for start, end in intervals]
    times = ", ".join(f"{start:.1f} to {end:.1f} s" for start, end in intervals)
    return Bar(kind, name or kind, spans, times or text or "no interval")


# --- Frames -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """Frames side by side as base64 WebP."""

    data: str
    width: int
    height: int = HEIGHT


Strips = dict[tuple[Path, int], Strip | None]  # by video file and the time of its last change


def strips(paths: Sequence[Path], known: Strips | None = None, workers: int = 2) -> list[Strip | None]:
    """A strip of each video; None where it cannot be read. Those in `known` are taken from there, new ones added."""
    known = {} if known is None else known
    keys = [(path, path.stat().st_mtime_ns if path.exists() else 0) for path in paths]
    pool = DecoderPool(workers, SECONDS)

    def strip(key: tuple[Path, int]) -> Strip | None:
        try:
            options = VideoOptions(nframes=FRAMES, min_pixels=32 * 32, max_pixels=128 * 128)
            return _strip(pool.read(key[0], options, 2, 1).frames)
        except VideoError:
            return None

    todo = [key for key in dict.fromkeys(keys) if key not in known]
    shown = Progress("frames of the page", len(todo), "video", file=sys.stderr)  # the output is a table
    with ThreadPoolExecutor(workers) as threads:
        for number, (key, made) in enumerate(zip(todo, threads.map(strip, todo), strict=True), start=1):
            known[key] = made
            shown.show(number)
    pool.close()
    return [known[key] for key in keys]


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


def video_of(evaluation: dict[str, Any], record: Record) -> Path | None:
    """The file of a record's video, where the evaluation's folder of videos still exists."""
    folder = Path(evaluation["settings"]["data"]["videos"]) if "settings" in evaluation else None
    return vau_bench.find_video(folder, record.source, record.video) if folder and folder.is_dir() else None
