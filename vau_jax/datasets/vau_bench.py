"""VAU-Bench annotation files, read into typed rows; every change and every exclusion is listed in an audit.

The published files hold three kinds of dirt that change scores: ECVA writes times as MMSS digits (104.0 is 1 min 4 s),
three different codes stand for "no interval", and some rows have no text at all. `load` resolves each by a named rule.

    rows, audit = load("test_ecva.csv", source="ecva")
    print(audit.table())

It also reads the JSONL that `vau data import` writes: rows that are corrected already.
"""

import ast
import hashlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from ml_collections import ConfigDict

from vau_jax.common.files import InputError, dump_json
from vau_jax.datasets import tables, video_table
from vau_jax.datasets.audit import Action, Audit, AuditEntry
from vau_jax.tasks import TASKS
from vau_jax.tasks.classification import LABELS
from vau_jax.tasks.description import SECTIONS
from vau_jax.tasks.example import Annotation, Example

COLUMNS = (
    "Video Name",
    "Question",
    "Option 1",
    "Option 2",
    "Option 3",
    "Option 4",
    "Correct Option",
    "Key Object",
    "Description",
    "Reasoning",
    "Anomaly Class",
    "Start Time",
    "End Time",
)
OPTION_COLUMNS = COLUMNS[2:6]
OPTIONAL = {  # what a table of your own may lack: the columns of a field
    "qa": ("Question", *OPTION_COLUMNS, "Correct Option"),
    "grounding": ("Start Time", "End Time"),
    "classification": ("Anomaly Class",),
    "key object": ("Key Object",),
    "description": ("Description",),
    "reasoning": ("Reasoning",),
}

MISSING = "-1"
MAX_SECONDS = 2**20  # of a video: 12 days
MAX_LITERAL = 2**14  # characters of a Python literal; Python takes up to a second for longer ones
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
PROTOCOLS = ("clean", "paper")
SOURCES = ("msad", "ucf", "ecva")
Source = Literal["msad", "ucf", "ecva"]
UCF_CLASSES = {  # beginnings of UCF-Crime's file names -> labels, where they are not the same
    "Normal_Videos": "Normal",
    "RoadAccidents": "Traffic_accident",
    "Burglary": "Stealing",
    "Shoplifting": "Stealing",
}
NO_ANOMALY = re.compile(r"\bno (?:signs? of |evidence of )?(?:an |any )?(?:anomal|unusual|abnormal)", re.IGNORECASE)
Interval = None | Literal["normal"] | tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One video's annotation. A field without a usable value in the file is None or empty, never guessed."""

    video: str  # file name as in the CSV
    source: Source
    question: str
    options: tuple[str, ...]  # four option texts, or () where the row has none
    answer: str | None  # "A".."D"
    anomaly_class: str | None  # one of LABELS
    interval: Interval  # None unknown, "normal" no anomaly, or (start, end) in seconds
    key_object: str
    description: str
    reasoning: dict[str, str]  # section title -> text; the titles present among SECTIONS
    duration: float | None = None  # of the video file, in seconds, where `vau data join` or `import` has read it
    fps: float | None = None  # its frames a second, likewise
    width: int | None = None  # upright, in pixels
    height: int | None = None
    file: str = ""  # in the folder of videos; empty: named as the video
    line: int = 0  # of the file it was read from, 1 for the first row

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that this row can serve."""
        known = annotation_of(self)
        return tuple(name for name, task in TASKS.items() if task.truth(known) is not None)


def load(
    path: str | os.PathLike,
    source: Literal["msad", "ucf", "ecva", "auto"] = "auto",
    protocol: Literal["clean", "paper"] = "clean",
) -> tuple[list[Row], Audit]:
    """Reads a CSV or JSONL file of VAU-Bench's schema, or a JSONL of rows that `vau data import` wrote.

    `source` names the rules for times; "auto" takes the prefix of the video's name (`ecva_`, `ucf_`, `msad_`), then its
    form (digits only: ECVA; `_x264`: UCF-Crime; else MSAD's plain seconds). `protocol="clean"` corrects what is wrong;
    `"paper"` reproduces the published denominators: it keeps ECVA's misread times, drops its rows without an interval,
    and gives UCF-Crime's rows without text the class that their file name says.

    A table may lack the columns of a whole field (OPTIONAL), but not of all, and none with `"paper"`.
    A row that breaks the rules of CSV is left out, and so is one whose video would lie outside of the folder of videos.
    Raises InputError for a missing or unreadable file, a missing column, a line that is no JSON, or no rows.
    """
    for name, value, known in (("source", source, (*SOURCES, "auto")), ("protocol", protocol, PROTOCOLS)):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown: expected one of {', '.join(known)}")
    path = Path(path)
    text = tables.read(path, "annotation file")
    optional = list(OPTIONAL.values()) if protocol == "clean" else []
    if path.suffix == ".jsonl":
        records = tables.json_lines(path, text)
        if records and "video" in records[0][1]:
            return imported(path, records, protocol)
        result, faults = tables.text_rows(path, records, COLUMNS, optional)
    else:
        result, faults = tables.csv_rows(path, text, COLUMNS, "Video Name", optional)
    if result and not {"qa", "grounding", "classification", "description"} - set(_absent(result[0][1])):
        raise tables.lacking(path, COLUMNS[1:], COLUMNS)
    if not result:
        first = f", the first is row {faults[0].number}: {faults[0].reason}" if faults else ""
        raise InputError(f"{path} has no rows that can be read: at least one annotated video is needed{first}")
    audit = Audit(str(path), protocol, len(result) + len(faults))
    audit.entries = [AuditEntry(fault.number, fault.start, "excluded", "row", fault.reason) for fault in faults]
    for what in _absent(result[0][1]):
        audit.note(0, "", "flagged", what, f"the table has no columns for {what}")
    return _rows(result, source, protocol, audit), audit


def imported(path: Path, records: Sequence[tuple[int, dict[str, Any]]], protocol: str) -> tuple[list[Row], Audit]:
    """Rows that `to_json` wrote, by number. Raises InputError for others, and for protocol "paper"."""
    if protocol == "paper":
        raise InputError(f"{path} holds imported, corrected rows: protocol=paper needs the CSV as published")
    audit = Audit(str(path), protocol, len(records))
    rows = [_imported_row(path, line, record) for line, record in records]
    return [row for row in rows if _stays_inside(row.video, row.line, audit)], audit


def _absent(record: dict[str, str]) -> list[str]:
    """The fields of OPTIONAL that a record's table has no columns for."""
    return [what for what, columns in OPTIONAL.items() if columns[0] not in record]


def _rows(records: Sequence[tuple[int, dict[str, str]]], source: str, protocol: str, audit: Audit) -> list[Row]:
    """The rows of text as typed ones, by the rules of their sources."""
    rows, seen = [], set()
    for line, record in records:
        video = record["Video Name"].strip()
        if not _stays_inside(video, line, audit):
            continue
        reader = _RowReader(record, line, detect_source(video) if source == "auto" else source, protocol, audit)
        if video in seen:
            reader.note("flagged", "row", "a row before has this video too")
        seen.add(video)
        row = reader.read()
        if row is not None:
            rows.append(row)
    return rows


def _stays_inside(video: str, line: int, audit: Audit) -> bool:
    """Whether a video's name is that of a file in the folder of videos or below; one that is not is noted."""
    parts = PurePath(video).parts
    if not parts:
        reason = "no video name"
    elif CONTROL.search(video):
        reason = "the video's name has control characters"
    elif PurePath(video).is_absolute() or ".." in parts:
        reason = f"the video's name leads out of the folder of videos: {video}"
    else:
        return True
    audit.note(line, CONTROL.sub("?", video), "excluded", "row", reason)
    return False


# --- Rows to examples ---------------------------------------------------------------------------------------------


def read(config: ConfigDict) -> tuple[list[Example], Audit]:
    """The examples of a config.data whose `csv` has VAU-Bench's schema: one for each task that a row can serve.

    Rows that differ in their question alone share the other tasks, which are asked once.
    """
    rows, audit = load(config.csv, config.time_rules, config.protocol)
    folder = Path(config.videos)
    return examples_of(with_files(rows, folder), config.tasks, folder, audit), audit


def with_files(rows: Iterable[Row], folder: Path) -> list[Row]:
    """The rows with what the table of a folder that `vau data join` wrote says of their videos."""
    table = video_table.load(folder)
    found = ((row, table.get(key_of(row))) for row in rows)
    return [
        replace(row, file=v.file, duration=v.seconds, fps=v.fps, width=v.width, height=v.height) if v else row
        for row, v in found
    ]


def key_of(row: Row) -> video_table.Key:
    """A row's place in the table of a joined folder."""
    return row.source, plain_name(row.video).lower()


def path_of(row: Row, folder: Path) -> Path:
    """The file of a row's video in a folder of videos."""
    return folder / (row.file or row.video)


def find_video(folder: Path, source: str, video: str) -> Path:
    """The file of a video by the names that records have, in a folder of videos or one that `vau data join` wrote."""
    found = video_table.load(folder).get((source, plain_name(video).lower()))
    return folder / (found.file if found else video)


def examples_of(rows: Iterable[Row], tasks: Sequence[str], folder: Path, audit: Audit) -> list[Example]:
    """The examples of rows whose videos are in `folder`, each id once."""
    examples: dict[str, Example] = {}
    for row in rows:
        for example in filter(None, (example_of(row, task, folder) for task in tasks)):
            if example.id in examples:
                audit.exclude(example, "asked by an earlier row, with the same answer")
            examples.setdefault(example.id, example)
    return list(examples.values())


def example_of(row: Row, name: str, folder: Path = Path()) -> Example | None:
    """A row as an example of a task; None where the row lacks the task's answer.

    The id is `video/task/digest`, with a digest of question and truth that is independent of the order of the options:
    questions about the same video have different ids, and a row keeps its id at any position and in other files.
    """
    task, known = TASKS[name], annotation_of(row)
    truth = task.truth(known)
    if truth is None:
        return None
    digest = hashlib.sha256(dump_json(task.identity(known)).encode()).hexdigest()[:10]
    choices = task.choices(known)
    return Example(
        f"{row.video}/{name}/{digest}",
        name,
        (path_of(row, folder),),
        row.question,
        choices,
        truth,
        meta_of(row),
    )


def annotation_of(row: Row) -> Annotation:
    """A row in the format that tasks read."""
    interval = row.interval
    return Annotation(
        question=row.question,
        options=row.options,
        answer=None if row.answer is None else "ABCD".index(row.answer),
        label=row.anomaly_class,
        labels=LABELS,
        intervals=None if interval is None else () if interval == "normal" else (interval,),
        description=row.description,
        reasoning=row.reasoning,
        key_object=row.key_object,
    )


def meta_of(row: Row) -> dict[str, Any]:
    """`Example.meta` of a row: everything except question and answer; the options, for other tasks too."""
    asked = ("question", "answer", "interval", "file")
    return {name: value for name, value in vars(row).items() if name not in asked} | {"options": list(row.options)}


def denominators(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows each published score is a mean of; grounding's is of abnormal videos with an interval."""
    return {
        "qa": sum(row.answer is not None and bool(row.options) for row in rows),
        "grounding": sum(isinstance(row.interval, tuple) for row in rows),
        "classification": sum(row.anomaly_class is not None for row in rows),
    }


def plain_name(video: str) -> str:
    """A video's name without folder, the prefix of its source and the ending: the same in every file of VAU-Bench."""
    stem = Path(video).stem
    for source in SOURCES:
        stem = stem.removeprefix(source + "_")
    return stem


def shared_videos(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Rows of `first` whose video is also in `second`: a leak, where one is for training or choosing."""
    others = {(row.source, plain_name(row.video)) for row in second}
    return [row for row in first if (row.source, plain_name(row.video)) in others]


def shuffle_options(row: Row, order: Sequence[int]) -> Row:
    """The row with option order[i] at position i, the answer's letter following its text."""
    if not row.options:
        return row
    answer = None if row.answer is None else "ABCD"[list(order).index("ABCD".index(row.answer))]
    return replace(row, options=tuple(row.options[i] for i in order), answer=answer)


def to_json(row: Row) -> dict[str, Any]:
    """A row as JSON values; `load` reads a JSONL of them. An interval is [start, end], "normal" or null."""
    record = {key: value for key, value in vars(row).items() if key not in ("line", "file")}
    return {**record, "options": list(row.options), "reasoning": dict(row.reasoning)}


def _imported_row(path: Path, line: int, record: dict[str, Any]) -> Row:
    """The row that `to_json` wrote."""
    try:
        interval = record["interval"]
        if isinstance(interval, list):
            start, end = (_seconds(value) for value in interval)
            interval = (start, end)
        options = record["options"]
        row = Row(**{**record, "options": (*options,), "interval": interval, "line": line})
        if not isinstance(options, list) or not _possible(row):
            raise ValueError("a field has an impossible value")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = CONTROL.sub("?", str(error))[:200]
        raise InputError(f"{path} line {line} is not an imported row ({what}): run `vau data import`") from error
    return row


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"interval: expected seconds from 0 to {MAX_SECONDS}, found {str(value)[:40]}")
    return float(value)


def _possible(row: Row) -> bool:
    """Whether every field of a row from JSON has its type and a valid value."""
    texts = [row.video, row.question, *row.options, row.key_object, row.description]
    texts += [*row.reasoning.keys(), *row.reasoning.values()]
    numbers = [n for n in (row.duration, row.fps, row.width, row.height) if n is not None]
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(n, int | float) and 0 < n < 1e9 for n in numbers)
        and row.source in SOURCES
        and row.answer in (None, *"ABCD")
        and len(row.options) in (0, 4)
        and row.anomaly_class in (None, *LABELS)
        and (
            row.interval in (None, "normal") or (isinstance(row.interval, tuple) and row.interval[0] < row.interval[1])
        )
    )


def detect_source(video: str) -> Source:
    """The data set a video belongs to, from its file name."""
    for source in SOURCES:
        if video.startswith(source + "_"):
            return source
    stem = Path(video).stem
    return "ecva" if stem.isdigit() else "ucf" if stem.endswith("_x264") else "msad"


@dataclass
class _RowReader:
    """Reads one record by the rules of its source, and notes corrections in the audit."""

    record: dict[str, str]
    line: int
    source: Source
    protocol: str
    audit: Audit

    def note(self, action: Action, what: str, reason: str) -> None:
        if what not in _absent(self.record):  # that is noted once
            self.audit.note(self.line, self.record["Video Name"], action, what, reason)

    def text(self, column: str) -> str:
        value = self.record.get(column, "").strip()
        return "" if value == MISSING else value

    def read(self) -> Row | None:
        label = self.label()
        interval = self.interval(label)
        if interval is None and self.source == "ecva" and self.protocol == "paper":
            self.note("excluded", "row", "paper protocol drops ECVA rows without an interval")
            return None
        options, answer = self.options_and_answer()
        self.check_words(label, options, answer)
        return Row(
            video=self.record["Video Name"].strip(),
            source=self.source,
            question=self.text("Question"),
            options=options,
            answer=answer,
            anomaly_class=label,
            interval=interval,
            key_object=self.text("Key Object"),
            description=self.text("Description"),
            reasoning=parse_reasoning(self.text("Reasoning")),
            line=self.line,
        )

    def check_words(self, label: str | None, options: Sequence[str], answer: str | None) -> None:
        """Flags what is doubtful in the texts; nothing is changed."""
        keyed = options["ABCD".index(answer)] if answer else ""
        if label not in (None, "Normal") and NO_ANOMALY.search(keyed):
            self.note("flagged", "qa", f"the keyed answer denies the anomaly: the class is {label}")
        if not self.record.get("Key Object", "").strip():
            self.note("flagged", "key object", "no key object")
        text = self.text("Reasoning")
        if not text:
            return
        titles = Counter(title for title, _ in _sections(text))
        if lacking := [title for title in SECTIONS if title not in titles]:
            self.note("flagged", "reasoning", f"sections are lacking: {', '.join(lacking)}")
        if repeated := [title for title, count in titles.items() if count > 1]:
            self.note("changed", "reasoning", f"repeated sections are joined: {', '.join(repeated)}")

    def label(self) -> str | None:
        value = self.text("Anomaly Class")
        by_name = {label.casefold(): label for label in LABELS}
        label = by_name.get(value.casefold())
        if label is None and not value and self.source == "ucf" and self.protocol == "paper":
            label = ucf_class(self.record["Video Name"])
            if label:
                self.note("changed", "classification", f"class taken from the file name: {label}")
        if label is None:
            self.note("excluded", "classification", f"unknown anomaly class: {value!r}")
        return label

    def options_and_answer(self) -> tuple[tuple[str, ...], str | None]:
        options = tuple(self.text(column) for column in OPTION_COLUMNS)
        value = self.text("Correct Option")
        if not self.text("Question") or not any(options):
            self.note("excluded", "qa", "no question text")
            return (), None
        if not all(options):
            self.note("excluded", "qa", "an option is empty")
            return (), None
        match = re.fullmatch(r"([A-D])(?:[.):]\s*(.*))?", value, re.DOTALL)
        if match is None:
            self.note("excluded", "qa", f"correct option is not a letter A to D: {value!r}")
            return options, None
        letter, text = match.groups()
        if text is not None:
            self.note("changed", "qa", "correct option holds more than its letter")
            if text.strip().rstrip(".") != options["ABCD".index(letter)].strip().rstrip("."):
                self.note("flagged", "qa", f"text after the correct letter is not that option: {text!r}")
        return options, letter

    def interval(self, label: str | None) -> Interval:
        if "Start Time" not in self.record:
            return None
        raw = self.record["Start Time"].strip(), self.record["End Time"].strip()
        try:
            start, end = (float(value) for value in raw)
            if not (math.isfinite(start) and math.isfinite(end)):
                raise ValueError
        except ValueError:
            self.note("excluded", "grounding", f"times are not numbers: {raw}")
            return None
        if label == "Normal" and (start, end) not in ((0.0, 0.0), (-1.0, -1.0)):
            self.note("flagged", "grounding", f"a normal video has an interval: {raw}")
            return "normal" if self.protocol == "clean" else (start, end)
        if label == "Normal" or (label is None and (start, end) == (0.0, 0.0)):
            return "normal"
        if (start, end) == (-1.0, -1.0):
            self.note("excluded", "grounding", "abnormal, interval not known (-1/-1)")
            return None
        if self.source == "ecva" and self.protocol == "clean":
            start, end = self.from_mmss(start, end)
        if start < 0 or end <= start:
            self.note("excluded", "grounding", f"interval is empty, reversed or negative: {raw}")
            return None
        if end > MAX_SECONDS:
            self.note("excluded", "grounding", f"interval lies beyond the end of any video: {raw}")
            return None
        return start, end

    def from_mmss(self, *times: float) -> tuple[float, ...]:
        """104.0 -> 64.0 seconds. Two last digits above 59 are not MMSS: such a row's times stay, flagged."""
        if any(time % 100 >= 60 for time in times):
            self.note("flagged", "grounding", f"times are no MMSS numbers, kept as seconds: {times}")
            return times
        seconds = tuple(60 * (time // 100) + time % 100 for time in times)
        if seconds != times:
            self.note("changed", "grounding", f"times read as MMSS: {times} is {seconds} s")
        return seconds


def ucf_class(video: str) -> str | None:
    """The label in the name of a UCF-Crime video: `Shoplifting037_x264.mp4` is Stealing."""
    name = plain_name(video)
    for beginning, label in {**UCF_CLASSES, **{label: label for label in LABELS}}.items():
        if re.match(rf"{re.escape(beginning)}_?\d", name):
            return label
    return None


def parse_reasoning(text: str) -> dict[str, str]:
    """The sections of a Reasoning cell, which is a Python dict literal or one line of `### Section` markdown.

    A section that is absent is absent from the result; a repeated one is joined; text under no known title is dropped.
    """
    result: dict[str, list[str]] = {}
    for title, body in _sections(text):
        if body not in result.setdefault(title, []):
            result[title].append(body)
    return {title: " ".join(result[title]) for title in SECTIONS if title in result}


def _sections(text: str) -> list[tuple[str, str]]:
    """(title, body) of every section in order, repeated ones too."""
    if text.startswith("{") and isinstance(parts := _literal(text), dict):
        return [(title, parts[title]) for title in SECTIONS if title in parts]
    titles = "|".join(re.escape(title) for title in SECTIONS)
    parts = re.split(rf"#{{2,4}}\s*\**({titles})\**\s*:?", text, flags=re.IGNORECASE)
    canonical = {title.casefold(): title for title in SECTIONS}
    return [
        (canonical[t.casefold()], _without_brackets(b.strip())) for t, b in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _without_brackets(text: str) -> str:
    """The text, or the parts of one that is a Python list: `['a man', 'a door']` is `a man; a door`."""
    parts = _literal(text) if text.startswith("[") else None
    return parts if isinstance(parts, str) else text


def _literal(text: str) -> dict[Any, str] | str | None:
    """A Python literal flattened to text, a dict by its keys; None where the text is none. Nothing is run."""
    if len(text) > MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes
            value = ast.literal_eval(text)
        return {key: _flatten(item) for key, item in value.items()} if isinstance(value, dict) else _flatten(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # of depth, keys, and huge numbers
        return None


def _flatten(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_flatten(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(_flatten(item) for item in value)
    return str(value).strip()
