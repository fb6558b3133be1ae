"""Temporal grounding: whether a video shows an anomaly, and when, in seconds from its start."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vau_jax.common.files import InputError
from vau_jax.tasks import charts, statistics
from vau_jax.tasks.base import ReportRow, Shown, Task, stripped
from vau_jax.tasks.charts import Chart
from vau_jax.tasks.columns import Column, Columns, Values
from vau_jax.tasks.example import Annotation, Example, Interval
from vau_jax.tasks.grammar import STATES
from vau_jax.tasks.intervals import MAX_INTERVALS, format_interval, temporal_iou
from vau_jax.tasks.record import Record, seen

THRESHOLDS = (0.3, 0.5, 0.7)  # of temporal IoU, for recall
LARGEST = float(np.finfo(np.float32).max)  # seconds: a number beyond it cannot be read
UNKNOWN, NONE = -1, 0  # interval counts: unknown, and no anomaly


class Grounding(Task):
    """`Anomaly` with its interval in <glue>, or `Normal` with [-1, -1].

    An answer and an interval that contradict each other (`Anomaly` with [-1, -1], `Normal` with an interval) count as
    no answer: otherwise a completion could name both and be rewarded for either.
    """

    name = "grounding"
    columns: ClassVar = {
        "anomaly": Column((), np.int32, -1),  # 0 normal, 1 anomaly; agrees with `interval_count`
        "interval_count": Column((), np.int32, UNKNOWN),  # UNKNOWN, NONE, or how many intervals there are
        "intervals": Column((MAX_INTERVALS, 2), np.float32, np.zeros((MAX_INTERVALS, 2), np.float32)),  # seconds
        "swapped": Column((), bool, False),  # the text has an interval with its end first
    }
    extra_tags = ("glue",)
    timed = True
    right_from = THRESHOLDS[1]
    exact_from = 0.95  # times are written to a tenth of a second

    question = "Does this surveillance video show something abnormal, and when?"
    short_question = "When is the anomaly?"
    answer_instruction = (
        "The answer is Anomaly or Normal; add the time of the anomaly in seconds as <glue>[start, end]</glue>, or "
        "<glue>[-1.0, -1.0]</glue> when there is none."
    )

    command = "ground"
    title = "When is the anomaly?"
    report_rows = (
        ReportRow(
            "Grounding mIoU", ("tasks", "grounding", "mIoU"), ("baselines", "grounding", "best_constant_interval")
        ),
        *(ReportRow(f"R@{t}", ("tasks", "grounding", f"R@{t}")) for t in THRESHOLDS),
        ReportRow("False alarms (normal videos)", ("tasks", "grounding", "false_alarms")),
    )
    reflection_rows = (ReportRow("Gain by reflection, temporal IoU", ("reflection", "grounding", "gain")),)

    # --- Truth ---

    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        """{"intervals": [[start, end], ...]}, empty for a normal video."""
        known = annotation.intervals
        return None if known is None else {"intervals": [list(interval) for interval in known]}

    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        """Raises InputError for an interval outside the range of float32, which could not be scored, and for more than
        MAX_INTERVALS."""
        if (count := len(truth["intervals"])) > MAX_INTERVALS:
            raise InputError(f"a video has {count} anomalous intervals: expected at most {MAX_INTERVALS}")
        for start, end in truth["intervals"]:
            if not 0 <= start <= end <= LARGEST:
                raise InputError(f"interval {(start, end)}: expected 0 <= start <= end in seconds, finite in float32")
        return _values([tuple(interval) for interval in truth["intervals"]])

    def identity(self, annotation: Annotation) -> Any:
        """In the format of VAU-Bench's rows: "normal", or one interval."""
        intervals = annotation.intervals
        return "normal" if not intervals else intervals[0] if len(intervals) == 1 else intervals

    # --- Text ---

    def answer(self, example: Example) -> str:
        return "Anomaly" if example.truth["intervals"] else "Normal"

    def closing(self, example: Example) -> str:
        return f"<glue>{format_interval(_only(example))}</glue>"

    def target(self, example: Example) -> str:
        interval = _only(example)
        return f"Anomaly {format_interval(interval)}" if interval else "Normal"

    def hint(self, example: Example) -> str:
        """Includes the rough time."""
        evidence, interval = super().hint(example), _only(example)
        return f"{evidence} It begins near {interval[0]:.0f} s." if interval else evidence

    # --- Drafts: {"interval": [start, end], or null for no anomaly} ---

    draft_format = 'expected {"interval": [start, end]} in seconds, or null'

    def check_draft(self, draft: Mapping[str, Any]) -> bool:
        match draft:
            case {"interval": None | [int() | float(), int() | float()]}:
                return len(draft) == 1
        return False

    def draft_text(self, draft: Mapping[str, Any], example: Example) -> str:
        return f"Anomaly {format_interval(draft['interval'])}" if draft["interval"] else "Normal"

    def draft_prose(self, draft: Mapping[str, Any], example: Example) -> str:
        interval = draft["interval"]
        return "{:.1f} to {:.1f} s".format(*interval) if interval else "that nothing is abnormal"

    def draft_of(self, answers: Columns, index: int, example: Example) -> dict[str, Any] | None:
        count = int(answers.interval_count[index])
        if count == UNKNOWN:
            return None
        interval = tuple(round(float(t), 3) for t in answers.intervals[index, 0]) if count else None
        return {"interval": interval}

    def true_draft(self, example: Example) -> dict[str, Any]:
        return {"interval": _only(example)}

    def wrong_draft(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """An interval that overlaps the true one too little, or "no anomaly" for an abnormal video."""
        interval = _only(example)
        if interval is None:
            start = round(float(rng.uniform(0, 10)), 1)
            return {"interval": (start, round(start + float(rng.uniform(2, 8)), 1))}
        start, end = interval
        length = end - start
        if rng.random() < 0.3:
            return {"interval": None}
        moved = start - 0.8 * length if start > 0.8 * length and rng.random() < 0.5 else start + 0.8 * length
        return {"interval": (round(moved, 1), round(moved + length, 1))}

    # --- Reading ---

    def value(self, text: str, choices: Sequence[str]) -> Values:
        anomaly = {"normal": 0, "anomaly": 1}.get(stripped(text).casefold())
        return {} if anomaly is None else {"anomaly": anomaly}

    def loose_value(self, text: str, choices: Sequence[str]) -> Values:
        """`normal`, or `anomaly` or a synonym, where the text states exactly one of them, negations considered."""
        if exact := self.value(text, choices):
            return exact
        plain = _DENIED.sub(lambda m: " anomaly " if m[1] == "normal" else " normal ", text.casefold())
        words = set(re.findall(r"[a-z]+", plain))
        normal, anomaly = bool(words & {"normal"}), bool(words & {"anomaly", "abnormal", "anomalous"})
        return {"anomaly": int(anomaly)} if normal != anomaly else {}

    def strict(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values] | None:
        name, *pair = sections.get("draft", "").split(maxsplit=1) or [""]
        drafted = "[-1, -1]" if not pair and self.value(name, choices) == {"anomaly": 0} else "".join(pair)
        final, draft = self._timed(sections["answer"], sections["glue"]), self._timed(name, drafted)
        return (final, draft) if final and (draft or "draft" not in sections) else None

    def _timed(self, name: str, pair: str) -> Values:
        """`Anomaly` with an interval, or `Normal` with [-1, -1]; anything else is no answer."""
        intervals = _pair(pair)
        values = {} if intervals is None else _values(intervals)
        return values if values and self.value(name, ()) == {"anomaly": values["anomaly"]} else {}

    def lenient(self, sections: Mapping[str, str], choices: Sequence[str]) -> tuple[Values, Values]:
        outside = sections.get("rest", "")
        final, draft = sections.get("answer", outside), sections.get("draft", "")
        if "glue" in sections:
            time = sections["glue"]
        else:  # with `Normal` and no <glue>, times in the text are those of other events
            time = "" if self.loose_value(final, choices) == {"anomaly": 0} else outside
        return self._loosely_timed(final, time), self._loosely_timed(draft, draft)

    def _loosely_timed(self, text: str, time: str) -> Values:
        """An answer and its interval. A missing one is derived from the other, except the interval of an anomaly."""
        named = self.loose_value(text, ())
        intervals, swapped = _loose_intervals(time)
        if intervals is None:
            return named | {"interval_count": NONE} if named == {"anomaly": 0} else named
        values = _values(intervals) | ({"swapped": True} if swapped else {})
        return {} if named and named["anomaly"] != values["anomaly"] else values

    def conclusion(self, choices: Sequence[str]) -> re.Pattern[str] | None:
        return _STATED

    # --- Rewards ---

    @property
    def rewards(self) -> Mapping[str, Callable[[Columns, Columns], jax.Array]]:
        return {"tiou": self.score}

    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        """Whether the presence of an anomaly is right, whatever the time."""
        return answers.anomaly == jnp.where(target.interval_count == NONE, 0, 1)

    def score(self, answers: Columns, target: Columns) -> jax.Array:
        """Temporal IoU in [0, 1]; 1 when both are "no anomaly", 0 when one is; 0 when either is unknown."""
        iou = temporal_iou(answers.intervals, target.intervals)
        both_normal = (answers.interval_count == NONE) & (target.interval_count == NONE)
        both_known = (answers.interval_count > 0) & (target.interval_count > 0)
        return jnp.where(both_known, iou, both_normal).astype(jnp.float32)

    # --- Metrics ---

    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        """Mean IoU and recall over abnormal rows with a known interval; false alarms over normal videos; and the mean
        error of start and end in seconds where both intervals exist.

        A normal video is a false alarm unless the answer is "no anomaly": an unreadable answer is a false alarm too.
        With protocol "paper" videos that failed are left out of IoU and recall; an unreadable answer counts 0.
        """
        count, answered = np.asarray(target.interval_count), np.asarray(final.interval_count)
        intervals, truth = np.asarray(final.intervals, np.float64), np.asarray(target.intervals, np.float64)
        iou = np.where(answered > 0, temporal_iou(intervals, truth), 0.0)
        iou = iou[(count > 0) & (np.ones(len(count), bool) if protocol == "clean" else seen(records))]
        both = (count > 0) & (answered > 0)
        errors = np.abs(_hull(intervals[both], answered[both]) - _hull(truth[both], count[both]))
        return {
            "mIoU": statistics.estimate(iou),
            **{f"R@{t}": statistics.estimate(iou >= t) for t in THRESHOLDS},
            "false_alarms": statistics.estimate((answered != NONE)[count == NONE]),
            "start_error": statistics.estimate(errors[:, 0]),
            "end_error": statistics.estimate(errors[:, 1]),
            "unparsed": int((answered == UNKNOWN).sum()),
        }

    def baselines(self, target: Columns, records: Sequence[Record]) -> dict[str, Any]:
        known = np.asarray(target.interval_count) > 0
        return {"best_constant_interval": best_constant_interval(np.asarray(target.intervals)[known])}

    def agreement(self, answers: Columns) -> np.ndarray:
        count, intervals = np.asarray(answers.interval_count), np.asarray(answers.intervals)
        iou = temporal_iou(intervals[:, :, None], intervals[:, None])
        agree = np.where((count > 0)[:, :, None] & (count > 0)[:, None], iou, 0.0)
        return agree + ((count == NONE)[:, :, None] & (count == NONE)[:, None])

    def overall(self, records: Sequence[Record]) -> dict[str, Any]:
        """Grounding as scores of time instants. Videos with unknown interval or length are left out and counted. As in
        `metrics`, a normal video is a false alarm over its full length unless the answer is "no anomaly".
        """
        first = [record for record in records if not record.rotation]
        usable = [record for record in first if record.duration]
        if not usable:
            return {}
        scores = [
            statistics.frame_scores([_answered(values, record) for values in record.answers], record.duration)
            for record in usable
        ]
        labels = [statistics.frame_scores([record.truth["intervals"]], record.duration) for record in usable]
        left_out = len(first) - len(usable)
        return {"frames": {**statistics.frame_level(scores, labels), "left_out": left_out}}

    # --- Display ---

    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        if values["interval_count"] > 0:
            spans = ", ".join(f"[{s:.1f}, {e:.1f}]" for s, e in values["intervals"][: values["interval_count"]])
            return f"Anomaly {spans}"
        return {0: "Normal", 1: "Anomaly"}.get(values["anomaly"])

    def display(self, values: Mapping[str, Any], completion: str, choices: Sequence[str]) -> Shown | None:
        if values["interval_count"] > 0:
            start, end = values["intervals"][0]
            return Shown(f"Anomaly\n{start:.1f} s to {end:.1f} s", (start, end))
        return Shown("Normal") if values["interval_count"] == NONE else None

    def is_right(self, record: Record) -> bool:
        """For a normal video only "no anomaly" is right."""
        return record.scores[0] >= (self.right_from if record.truth["intervals"] else 1.0)

    def charts(self, result: Mapping[str, Any], records: Sequence[Record]) -> list[Chart]:
        """Predicted starts and ends against the true ones; points on the diagonal are exact."""
        both = [
            (record.truth["intervals"][0], record.answers[0]["intervals"][0])
            for record in records
            if record.truth["intervals"] and record.answers[0]["interval_count"] > 0
        ]
        if not both:
            return []
        data: list[dict[str, Any]] = [
            {
                "x": [true[i] for true, _ in both],
                "y": [round(predicted[i], 2) for _, predicted in both],
                "mode": "markers",
                "name": name,
                "marker": {"opacity": 0.6, "symbol": symbol},
            }
            for i, name, symbol in ((0, "start", "circle"), (1, "end", "diamond"))
        ]
        most = max(max(point["x"] + point["y"]) for point in data)
        data.append({"x": [0, most], "y": [0, most], "mode": "lines", "name": "equal", "line": {"dash": "dot"}})
        axes = {"xaxis": {"title": {"text": "true, seconds"}}, "yaxis": {"title": {"text": "predicted, seconds"}}}
        return [charts.chart(f"Times: {result['name']}", data, **axes)]

    def bars(self, record: Record) -> list[tuple[str, str]]:
        draft = [("draft", record.draft_predictions[0] or "")] if record.draft_predictions else []
        return [("true", record.target), ("predicted", record.predictions[0] or ""), *draft]


def best_constant_interval(intervals: np.ndarray, step: float = 0.5) -> dict[str, Any]:
    """Mean IoU with the sets [N, K, 2] of the one interval ("answer", seconds) that scores best on these rows when
    given for every video.
    """
    if not len(intervals):
        return {**statistics.estimate(np.zeros(0)), "answer": None}
    truth = np.asarray(intervals, np.float64)
    grid = np.arange(0.0, float(intervals.max()) + step, step)
    best, best_iou = (0.0, 0.0), np.zeros(len(intervals))
    for start in grid:
        ends = grid[grid > start]
        candidates = np.stack([np.full_like(ends, start), ends], -1)  # [E, 2]
        iou = temporal_iou(candidates[:, None, None], truth[None])  # [E, N]
        if len(ends) and iou.mean(1).max() > best_iou.mean():
            winner = int(np.argmax(iou.mean(1)))
            best, best_iou = (float(start), float(ends[winner])), iou[winner]
    return {**statistics.estimate(best_iou), "answer": list(best)}


# --- Values -------------------------------------------------------------------------------------------------------

_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_PAIR = re.compile(rf"\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]\s*")
_STATED = re.compile(rf"{STATES}[\s*]{{0,4}}((?i:normal|anomaly))\b")


def _values(intervals: Sequence[Interval]) -> Values:
    """An answer with these intervals; without any: that there is no anomaly."""
    filled = [*intervals, *[(0.0, 0.0)] * (MAX_INTERVALS - len(intervals))]
    return {"anomaly": int(bool(intervals)), "interval_count": len(intervals), "intervals": filled}


def _only(example: Example) -> Interval | None:
    """The interval that completions are written with; None without anomaly."""
    intervals = example.truth["intervals"]
    return tuple(intervals[0]) if intervals else None


def _hull(intervals: np.ndarray, count: np.ndarray) -> np.ndarray:
    """First start and last end [N, 2] of sets [N, K, 2] of which `count` [N], at least one, are there."""
    used = np.arange(MAX_INTERVALS) < count[:, None]
    starts = np.where(used, intervals[..., 0], np.inf).min(-1)
    ends = np.where(used, intervals[..., 1], -np.inf).max(-1)
    return np.stack([starts, ends], -1)


def _answered(values: Values, record: Record) -> list[Interval]:
    """The intervals in which an answer finds an anomaly; the whole video for an answer about a normal one that does
    not say that there is none."""
    if values.get("interval_count", UNKNOWN) > 0:
        return values["intervals"][: values["interval_count"]]
    quiet = values.get("interval_count") == NONE and values.get("anomaly") != 1
    return [] if quiet or record.truth["intervals"] else [(0.0, record.duration)]


def _pair(text: str) -> list[Interval] | None:
    """`[s, e]`: [-1, -1] is no anomaly; reversed, empty, negative or endless bounds are None."""
    match = _PAIR.fullmatch(text)
    if match is None:
        return None
    start, end = float(match[1]), float(match[2])
    if (start, end) == (-1.0, -1.0):
        return []
    return [(start, end)] if 0 <= start < end <= LARGEST else None


# --- Lenient reading: every pattern takes time in proportion to the text ------------------------------------------

# Possessive quantifiers (`*+`, `++`) and no number that begins inside another: time linear in the text's length.
_CLOCK = r"(?:(\d++):)?(?:(\d++):)?(\d++(?:\.\d++)?+)"
_SPAN = re.compile(
    rf"(?<!\d){_CLOCK}\s*+(?:(?:seconds?|sec|s)\s*+)?(?:,|-|–|to|until|till|and)\s*+{_CLOCK}(?!\d|:\d)",
    re.IGNORECASE,
)
_NO_ANOMALY = re.compile(r"\[\s*+-1(?:\.0*+)?\s*+,\s*+-1(?:\.0*+)?\s*+\]")
_DENIED = re.compile(  # `no anomaly`, `nothing abnormal`, `not normal`: negates the next word
    r"\b(?:no|not|nothing|without)\s{1,3}(?:(?:an?|any|signs?|evidence|of)\s{1,3}){0,4}"
    r"(normal|anomal(?:y|ies|ous)|abnormal(?:ity|ities)?)\b"
)


def _loose_intervals(text: str) -> tuple[list[Interval] | None, bool]:
    """The first time span in a text, [] for "no anomaly", None without; and whether it was reversed, which is turned
    round. `1:05` and `01:02:03.5` are clock times."""
    if _NO_ANOMALY.search(text):
        return [], False
    match = _SPAN.search(text)
    if match is None:
        return None, False
    start, end = _seconds(*match.groups()[:3]), _seconds(*match.groups()[3:])
    if start == end or not max(start, end) <= LARGEST:
        return None, False
    return [(min(start, end), max(start, end))], start > end


def _seconds(first: str | None, second: str | None, last: str) -> float:
    """h:m:s, m:s (the regex fills `first` first) or s."""
    total = 0.0
    for part in (first, second):
        total = total * 60 + float(part) if part is not None else total
    return total * 60 + float(last)


TASK = Grounding()
