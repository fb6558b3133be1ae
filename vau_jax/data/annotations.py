"""VAU-Bench annotation files, read into typed rows; every change and every exclusion is listed in an audit.

The published files hold three kinds of dirt that change scores: ECVA writes times as MMSS digits (104.0 is 1 min 4 s),
three different codes stand for "no interval", and some rows have no text at all. `load` resolves each by a named rule.

    rows, audit = load("test_ecva.csv", source="ecva")
    print(audit.table())
"""

import ast
import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vau_jax.files import InputError

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

LABELS = (
    "Abuse",
    "Agriculture",
    "Arrest",
    "Arson",
    "Assault",
    "Explosion",
    "Fighting",
    "Fire",
    "Food Safety",
    "Medical Abnormality",
    "Natural Hazard",
    "Normal",
    "Object_falling",
    "People_falling",
    "Robbery",
    "Shooting",
    "Stealing",
    "Traffic_accident",
    "Vandalism",
    "Water_incident",
)

SECTIONS = (
    "Specific Anomaly Type",
    "Location",
    "Key Evidence",
    "Detailed Explanation",
    "Cause and Effect",
    "Conclusion",
)

MISSING = "-1"
Source = Literal["msad", "ucf", "ecva"]
Interval = None | Literal["normal"] | tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One video's annotation. A field that the file does not usably give is None or empty, never guessed."""

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

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks this row can serve: "qa", "grounding", "classification"."""
        usable = {
            "qa": self.answer is not None and bool(self.options),
            "grounding": self.interval is not None,
            "classification": self.anomaly_class is not None,
        }
        return tuple(task for task, yes in usable.items() if yes)


@dataclass(frozen=True)
class AuditEntry:
    line: int  # number of the row in the file, 1 for the first after the header
    video: str
    action: Literal["changed", "excluded", "flagged"]
    what: str  # the tasks or field concerned
    reason: str


@dataclass
class Audit:
    """What `load` changed, excluded or found doubtful, row by row."""

    path: str
    protocol: str
    rows: int = 0
    entries: list[AuditEntry] = field(default_factory=list)

    def counts(self) -> Counter[tuple[str, str]]:
        """(action, reason) -> number of rows; reasons are cut at the first colon, where the value begins."""
        return Counter((entry.action, entry.reason.split(":")[0]) for entry in self.entries)

    def table(self) -> str:
        """The counts as lines of text, the most frequent first."""
        lines = [f"{self.path}: {self.rows} rows, protocol {self.protocol}"]
        lines += [f"  {n:5d}  {action:9s} {reason}" for (action, reason), n in self.counts().most_common()]
        return "\n".join(lines)


def load(
    path: str | os.PathLike,
    source: Literal["msad", "ucf", "ecva", "auto"] = "auto",
    protocol: Literal["clean", "paper"] = "clean",
) -> tuple[list[Row], Audit]:
    """Reads a CSV or JSONL file of VAU-Bench's schema.

    `source` names the rules for times; "auto" takes the prefix of the video's name (`ecva_`, `ucf_`, `msad_`), then its
    form (digits only: ECVA; `_x264`: UCF-Crime; else MSAD's plain seconds). `protocol="clean"` mends what is wrong;
    `"paper"` keeps ECVA's misread times and drops its rows without an interval, as the published denominators did.

    Raises InputError for a missing or unreadable file, a missing column, or a file without rows.
    """
    for name, value, known in (("source", source, ("msad", "ucf", "ecva", "auto")), ("protocol", protocol, PROTOCOLS)):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown: expected one of {', '.join(known)}")
    records = _read_records(Path(path))
    audit = Audit(str(path), protocol, rows=len(records))
    rows = []
    for line, record in enumerate(records, start=1):
        video = record["Video Name"].strip()
        if not video:
            audit.entries.append(AuditEntry(line, "", "excluded", "row", "no video name"))
            continue
        reader = _RowReader(record, line, detect_source(video) if source == "auto" else source, protocol, audit)
        row = reader.read()
        if row is not None:
            rows.append(row)
    return rows, audit


PROTOCOLS = ("clean", "paper")


def detect_source(video: str) -> Source:
    """The data set a video belongs to, from its file name."""
    for source in ("ecva", "ucf", "msad"):
        if video.startswith(source + "_"):
            return source
    stem = Path(video).stem
    return "ecva" if stem.isdigit() else "ucf" if stem.endswith("_x264") else "msad"


def _read_records(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"annotation file {path} does not exist: give a CSV or JSONL file with --config.data.csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if path.suffix == ".jsonl":
        records = [_json_record(path, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        columns = set().union(*records) if records else set(COLUMNS)
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        records, columns = list(reader), set(reader.fieldnames or ())
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise InputError(
            f"{path} lacks the column(s) {', '.join(missing)}: VAU-Bench's columns are {', '.join(COLUMNS)}"
        )
    if not records:
        raise InputError(f"{path} has no rows: at least one annotated video is needed")
    return [{column: str(record.get(column) or "") for column in COLUMNS} for record in records]


def _json_record(path: Path, line: int, text: str) -> dict[str, str]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {line} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} line {line}: expected an object with VAU-Bench's columns, found {text[:60]}")
    return {key: "" if value is None else str(value) for key, value in record.items()}


@dataclass
class _RowReader:
    """Reads one record by the rules of its source, and notes in the audit what it had to do."""

    record: dict[str, str]
    line: int
    source: Source
    protocol: str
    audit: Audit

    def note(self, action: Literal["changed", "excluded", "flagged"], what: str, reason: str) -> None:
        self.audit.entries.append(AuditEntry(self.line, self.record["Video Name"], action, what, reason))

    def text(self, column: str) -> str:
        value = self.record[column].strip()
        return "" if value == MISSING else value

    def read(self) -> Row | None:
        label = self.label()
        interval = self.interval(label)
        if interval is None and self.source == "ecva" and self.protocol == "paper":
            self.note("excluded", "row", "paper protocol drops ECVA rows without an interval")
            return None
        options, answer = self.options_and_answer()
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
        )

    def label(self) -> str | None:
        value = self.text("Anomaly Class")
        by_name = {label.casefold(): label for label in LABELS}
        label = by_name.get(value.casefold())
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
            start, end = self.from_mmss(start), self.from_mmss(end)
        if start < 0 or end <= start:
            self.note("excluded", "grounding", f"interval is empty, reversed or negative: {raw}")
            return None
        return start, end

    def from_mmss(self, value: float) -> float:
        """104.0 -> 64.0 seconds. Two last digits above 59 cannot be MMSS: those stay as they are, flagged."""
        minutes, seconds = divmod(value, 100)
        if seconds >= 60:
            self.note("flagged", "grounding", f"time is no MMSS number, kept as seconds: {value}")
            return value
        if minutes:
            self.note("changed", "grounding", f"time read as MMSS: {value} is {60 * minutes + seconds} s")
        return 60 * minutes + seconds


def parse_reasoning(text: str) -> dict[str, str]:
    """The sections of a Reasoning cell, which is a Python dict literal or one line of `### Section` markdown.

    A section that is absent is absent from the result; a repeated one is joined; text under no known title is dropped.
    """
    if text.startswith("{"):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if isinstance(value, dict):
            return {title: _flatten(value[title]) for title in SECTIONS if title in value}
    titles = "|".join(re.escape(title) for title in SECTIONS)
    parts = re.split(rf"#{{2,4}}\s*\**({titles})\**\s*:?", text, flags=re.IGNORECASE)
    found: dict[str, list[str]] = {}
    canonical = {title.casefold(): title for title in SECTIONS}
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(canonical[title.casefold()], []).append(body.strip())
    return {title: " ".join(found[title]) for title in SECTIONS if title in found}


def _flatten(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_flatten(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(_flatten(item) for item in value)
    return str(value).strip()
