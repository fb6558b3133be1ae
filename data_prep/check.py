"""Says row by row what is wrong with an annotation file and its videos, and how to mend it.

    vau data check FILE VIDEOS [--source=auto] [--no-probe]
    vau data check --template=mine.csv

FILE is a CSV or JSONL of VAU-Bench's columns, of which your own table needs Video Name and those of one field alone:
when (Start Time, End Time), which kind (Anomaly Class), or a question (Question, Option 1 to 4, Correct Option).
VIDEOS is the folder of its videos. --template writes a table to begin with. The exit code is 1 after an error.
"""

import argparse
import csv
import difflib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vau_jax import cli
from vau_jax.common import files, progress
from vau_jax.common.files import InputError
from vau_jax.data.video.listing import videos_below
from vau_jax.data_prep.vau_bench import TOLERANCE, probe_all
from vau_jax.datasets import vau_bench
from vau_jax.datasets.audit import Audit
from vau_jax.datasets.vau_bench import Row
from vau_jax.tasks import TASKS
from vau_jax.tasks.classification import LABELS

TEMPLATE = (  # a clip with an anomaly and one without, each with a question
    {
        "Video Name": "warehouse_fire.mp4",
        "Start Time": "12.5",
        "End Time": "31",
        "Anomaly Class": "Fire",
        "Question": "What begins to burn?",
        "Option 1": "A pallet near the gate",
        "Option 2": "A forklift",
        "Option 3": "The roof",
        "Option 4": "Nothing burns",
        "Correct Option": "A",
        "Description": "Smoke rises from a pallet near the gate, then flames; two people run out.",
    },
    {
        "Video Name": "warehouse_evening.mp4",
        "Start Time": "0",
        "End Time": "0",
        "Anomaly Class": "Normal",
        "Question": "What does the forklift do?",
        "Option 1": "It stands still",
        "Option 2": "It carries a pallet to the gate",
        "Option 3": "It falls over",
        "Option 4": "There is no forklift",
        "Correct Option": "B",
        "Description": "A forklift carries a pallet to the gate. Nothing unusual happens.",
    },
)
EXPLAINED = f"""\
Video Name      the file's name in the folder of videos
Start Time      of the anomaly, in seconds from the start of the video; 0 and 0 where there is none
End Time        likewise
Anomaly Class   one of {", ".join(LABELS)}
Question        with Option 1 to 4, and in Correct Option the letter A to D
Description     what happens, in words of your own
A field that you do not have: leave out all its columns."""
REMEDIES = (  # beginnings of what the reader says -> what to do
    ("times are not numbers", "write seconds such as 12.5, and 0 and 0 where nothing happens"),
    ("abnormal, interval not known", "write when it begins and ends, in seconds; grounding leaves the row out"),
    ("interval is empty, reversed", "the end must be after the start; both are seconds from the start of the video"),
    ("interval lies beyond", "times are seconds, not milliseconds or frame numbers"),
    ("a normal video has an interval", "write 0 and 0, or another class than Normal"),
    ("times read as MMSS", "minutes and seconds as digits; if these are seconds: --source=msad"),
    ("no question text", "write a question and four options, or leave out the columns for questions"),
    ("an option is empty", "write four options"),
    ("correct option is not a letter", "write A, B, C or D"),
    ("text after the correct letter", "write the letter alone, or the option's own text after it"),
    ("the keyed answer denies", "the right answer says that nothing happens, the class that something does"),
    ("a row has fewer cells", 'put cells with commas into quotes: "a, b"'),
    ("a row has more cells", 'put cells with commas into quotes: "a, b"'),
    ("quotes do not match", 'a quote inside of a cell is written twice: "he said ""stop"""'),
    ("a quote without its other half", 'a quote inside of a cell is written twice: "he said ""stop"""'),
    ("no video name", "write the file's name"),
    ("the video's name", "write a path relative to the folder of videos"),
    ("a row before has this video", "two rows of a video are right only where they ask different questions"),
)
ABSENT, UNREADABLE = "no such video", "the video cannot be read"  # such a row serves no task
PASSED_OVER = ("key object", "reasoning", "description")  # what is noted about them changes nothing for these tasks


class Problem(NamedTuple):
    """Something to mend in a row, or with `line` 0 in the whole table."""

    line: int  # 1 for the first after the header
    video: str
    level: str  # error: a task leaves the row out, or the file is not there; warning: read, but doubtful
    text: str
    remedy: str


def problems(rows: Sequence[Row], audit: Audit, folder: Path, probe: bool) -> list[Problem]:
    """Everything to mend, in the order of the rows."""
    found = [*of_texts(audit), *of_intervals(rows)]
    found += missing(rows, folder)
    if probe:
        found += unreadable([row for row in rows if vau_bench.path_of(row, folder).is_file()], folder)
    return sorted(found, key=lambda problem: problem.line)


def of_texts(audit: Audit) -> Iterator[Problem]:
    """What the reader says of the rows."""
    for entry in audit.entries:
        if entry.what in PASSED_OVER or not entry.line:
            continue
        level = "error" if entry.action == "excluded" else "warning"
        if entry.reason.startswith("unknown anomaly class"):
            yield Problem(entry.line, entry.video, level, entry.reason, _nearest_label(entry.reason))
        else:
            remedy = next((text for start, text in REMEDIES if entry.reason.startswith(start)), "")
            yield Problem(entry.line, entry.video, level, f"{entry.what}: {entry.reason}", remedy)


def _nearest_label(reason: str) -> str:
    given = reason.partition(": ")[2].strip("'\"")
    close = difflib.get_close_matches(given.casefold(), [label.casefold() for label in LABELS], n=1)
    nearest = [label for label in LABELS if label.casefold() in close]
    return f"did you mean {nearest[0]}?" if nearest else f"one of {', '.join(LABELS)}"


def of_intervals(rows: Sequence[Row]) -> Iterator[Problem]:
    """Rows of one video that contradict each other."""
    first: dict[str, Row] = {}
    for row in rows:
        known = first.setdefault(row.video, row)
        if None not in (known.interval, row.interval) and known.interval != row.interval:
            text = f"another interval than in row {known.line}: {_told(row)}, there {_told(known)}"
            yield Problem(row.line, row.video, "error", text, "one video has one interval in all its rows")


def _told(row: Row) -> str:
    return str(row.interval) if row.interval == "normal" else f"{list(row.interval)}"


def missing(rows: Sequence[Row], folder: Path) -> Iterator[Problem]:
    """Rows whose video is not in the folder, with the nearest name that is."""
    by_name = defaultdict(list)
    for path in videos_below(folder):
        by_name[path.name.casefold()].append(path.relative_to(folder.resolve()))
    for row in rows:
        if vau_bench.path_of(row, folder).is_file():
            continue
        wanted = Path(row.video).name.casefold()
        near = by_name.get(wanted) or [
            name for match in difflib.get_close_matches(wanted, by_name, n=1) for name in by_name[match]
        ]
        remedy = f"did you mean {near[0]}?" if near else f"there is no such file in {folder}, nor one of a like name"
        yield Problem(row.line, row.video, "error", ABSENT, remedy)


def unreadable(rows: Sequence[Row], folder: Path, workers: int = 2) -> Iterator[Problem]:
    """Rows whose video cannot be decoded, or ends before the interval does."""
    probes, unread = probe_all(list(dict.fromkeys(vau_bench.path_of(row, folder) for row in rows)), workers)
    for row in rows:
        path = vau_bench.path_of(row, folder)
        if path in unread:
            remedy = "copy it again, or write it anew: ffmpeg -i OLD -c:v libx264 NEW.mp4"
            yield Problem(row.line, row.video, "error", f"{UNREADABLE}: {unread[path]}", remedy)
        elif isinstance(row.interval, tuple) and row.interval[1] > probes[path].duration + TOLERANCE:
            seconds = probes[path].duration
            text = f"the interval {list(row.interval)} reaches beyond the end of the video, {seconds:.1f} s"
            yield Problem(row.line, row.video, "error", text, "times are seconds from the start of the video")


def usable(rows: Sequence[Row], found: Sequence[Problem]) -> Counter[str]:
    """How many rows each task can use."""
    lost = {problem.line for problem in found if problem.text.startswith((ABSENT, UNREADABLE))}
    return Counter(task for row in rows if row.line not in lost for task in row.tasks)


def report(found: Sequence[Problem]) -> str:
    """The problems as lines of text."""
    lines = []
    for problem in found:
        lines.append(f"row {problem.line}, {problem.video}: {problem.level}: {problem.text}")
        if problem.remedy:
            lines.append(f"    {problem.remedy}")
    return "\n".join(re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "?", line) for line in lines)


def write_template(path: Path) -> None:
    """Writes a table to begin with. Raises InputError where there is a file of this name."""
    if path.exists():
        raise InputError(f"--template={path} exists already: choose another name")
    text = io.StringIO()
    writer = csv.DictWriter(text, TEMPLATE[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(TEMPLATE)
    try:
        files.write_text(path, text.getvalue())
    except OSError as error:
        raise InputError(f"cannot write --template={path}: {error.strerror}") from error


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    if args.template:
        write_template(args.template)
        print(EXPLAINED)
        following = ("vau", "data", "check", args.template, "VIDEOS")
        print(progress.summary("", {"table": args.template}, [following]))
        return
    if not (args.file and args.videos):
        raise InputError("give FILE and the folder VIDEOS, or --template=NEW.csv for a table to begin with")
    rows, audit = vau_bench.load(args.file, args.source)
    rows = vau_bench.with_files(rows, args.videos)
    found = problems(rows, audit, args.videos, not args.no_probe)
    if found:
        print(report(found), flush=True)
    counts = usable(rows, found)
    told = ", ".join(f"{task} {counts[task]}" for task in TASKS if counts[task])
    print(f"{audit.rows} rows; usable for: {told or 'nothing'}")
    errors = sum(problem.level == "error" for problem in found)
    if errors:
        print(f"{errors} errors, {len(found) - errors} warnings: mend the errors, and check again")
        raise SystemExit(1)
    names = ",".join(f'"{task}"' for task in TASKS if counts[task] and TASKS[task].verifiable)
    training = ["--config=vau_r1_sft", "--workdir=runs/sft", "--config.model=MODEL", f"--config.data.csv={args.file}"]
    training += [f"--config.data.videos={args.videos}", f"--config.data.tasks=({names},)"]
    training += ["--config.data.style=direct"] * (not any(row.reasoning or row.description for row in rows))
    training += [f"--config.data.time_rules={args.source}"] * (args.source != "auto")
    title = f"no errors, {len(found)} warnings" if found else "nothing to mend"
    print(progress.summary(title, {}, [("vau", "train", *training)]))


if __name__ == "__main__":
    cli.main("data check")
