"""Broken annotation files: each is refused in one line with exit code 2, or its bad rows are left out and listed."""

import csv
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.records import example
from tests.tables import BASE
from vau_jax import cli
from vau_jax.common.files import InputError
from vau_jax.datasets import reflections, vau_bench
from vau_jax.datasets.audit import Audit
from vau_jax.datasets.vau_bench import COLUMNS
from vau_jax.tasks.example import Reflection

ROWS = 200
SECONDS = 20.0  # far more than any of them takes


def table(**changes: str) -> str:
    """A CSV of ROWS rows; `changes` to the sixth."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for number in range(ROWS):
        row = {**BASE, "Video Name": f"Assault_{number}.mp4"}
        writer.writerow(row | ({k.replace("_", " "): v for k, v in changes.items()} if number == 5 else {}))
    return text.getvalue()


def sixth(change: str, new: str) -> str:
    """A CSV in whose sixth row the text `change` is put otherwise, by hand."""
    lines = table().split("\n")
    assert change in lines[6]
    lines[6] = lines[6].replace(change, new, 1)
    return "\n".join(lines)


def every_second_row(change: str, new: str) -> str:
    lines = table().split("\n")
    return "\n".join(line.replace(change, new, 1) if number % 2 else line for number, line in enumerate(lines))


def imported(**changes: object) -> str:
    """A JSONL of two imported rows, `changes` to the second."""
    row = vau_bench.Row(
        "a.mp4", "msad", "What?", ("a", "b", "c", "d"), "A", "Fire", (1.0, 2.0), "flames", "", {"Location": "yard"}
    )
    good = vau_bench.to_json(row)
    return json.dumps(good) + "\n" + json.dumps(good | changes) + "\n"


def replaced(old: str, new: str) -> str:
    """`imported` with a text in its second row put otherwise, by hand."""
    first, second, _ = imported().split("\n")
    assert old in second
    return f"{first}\n{second.replace(old, new)}\n"


HUGE = "9" * 5000
DEEP = "[" * 100_000

LOST = {  # files that are read: how many rows are left out, and a reason
    "a quote that opens a cell": (sixth("Two men", '"Two men'), 1, "quotes do not match"),
    "a quote that opens a cell, late": (table() + 'x.mp4,"What' + ",b" * 11 + "\n", 1, "quotes do not match"),
    "a quote that opens a name": (sixth("Assault_5", '"Assault_5'), 1, "quotes do not match"),
    "quotes that open and close rows apart": (
        sixth("Two men", '"Two men').replace("Assault_9.mp4,What is seen?", 'Assault_9.mp4,What is seen?"', 1),
        1,
        "a row has more cells",
    ),
    "quotes in two rows that match": (
        sixth("What is seen?", '"What is seen?').replace("Assault_6.mp4,What is seen?", 'Assault_6.mp4,What"', 1),
        1,
        "a quote without its other half",
    ),
    "rows inside of a cell": (sixth("Two men fight.", '"Two\nAssault_77.mp4,men\nfight"'), 3, "a quote without"),
    "a quote inside of a quoted cell": (sixth("Two men", '"Two "men" fight"'), 1, "quotes do not match"),
    "too few cells": (sixth(",4.0,35.0", ""), 1, "a row has fewer cells"),
    "too many cells": (sixth(",4.0,35.0", ",4.0,35.0,7"), 1, "a row has more cells"),
    "a row cut short at the end": (table()[:-200], 1, "a row has fewer cells"),
    "a cell of 200,000 characters": (table(Description="x" * 200_000), 1, "a cell has more than"),
    "a quote in each second row": (every_second_row("Two men", '"Two men'), ROWS // 2, "quotes do not match"),
    "a name above": (table(Video_Name="../secret.mp4"), 1, "leads out"),
    "a name above, inside": (table(Video_Name="a/../../secret.mp4"), 1, "leads out"),
    "a name from the root": (table(Video_Name="/etc/passwd"), 1, "leads out"),
    "no name": (table(Video_Name=" "), 1, "no video name"),
    "a name with a line end": (table(Video_Name="a\nb.mp4"), 1, "control characters"),
    "a name with a NUL": (table(Video_Name="a\0b.mp4"), 1, "control characters"),
    "a name with an escape": (table(Video_Name="\x1b[2Jb.mp4"), 1, "control characters"),
    "imported: a name above": (imported(video="../secret.mp4"), 1, "leads out"),
    "imported: a name from the root": (imported(video="/etc/passwd"), 1, "leads out"),
}

DOUBTED = {  # files whose every row is read, what is bad in the sixth kept from a task or from sight
    "a list as key": (table(Reasoning="{['a']: 'b'}"), "sections are lacking"),
    "a dict as key": (table(Reasoning="{{}: 'b'}"), "sections are lacking"),
    "a deep literal": (table(Reasoning="{" + DEEP), "sections are lacking"),
    "a deep literal in a section": (table(Reasoning="### Location: " + "[" * 5000), "sections are lacking"),
    "a huge number in a literal": (table(Reasoning=f"{{'Location': {HUGE}}}"), "sections are lacking"),
    "a huge hexadecimal number": (table(Reasoning=f"{{'Location': 0x{HUGE}}}"), "sections are lacking"),
    "a long sum": (table(Reasoning="{" + "1+" * 60_000 + "1}"), "sections are lacking"),
    "an infinite time": (table(End_Time="inf"), "times are not numbers"),
    "no number as time": (table(End_Time="nan"), "times are not numbers"),
    "a time of 5,000 digits": (table(End_Time=HUGE), "times are not numbers"),
    "a time of 300 digits": (table(End_Time="9" * 300), "interval lies beyond the end of any video"),
    "a time of a year": (table(End_Time="3e7"), "interval lies beyond the end of any video"),
    "an answer of 100,000 letters": (table(Correct_Option="A" * 100_000), "correct option is not a letter"),
    "a class that is a row": (table(Anomaly_Class="a,b,c"), "unknown anomaly class"),
}

REFUSED = {  # by what their one line says
    "a quote in each row": (table().replace("Two men", '"Two men'), "no rows that can be read.*quotes do not match"),
    "a quote in the header": (
        table().replace("Video Name", '"Video Name', 1),
        "lacks the column|cannot be read as CSV",
    ),
    "a column twice": (table().replace("Key Object", "Question", 1) + "\n", "lacks the column|twice"),
    "semicolons": (table().replace(",", ";"), "lacks the column"),
    "UTF-16": (table().encode("utf-16"), "not UTF-8"),
    "bytes": (bytes(range(256)) * 50, "not UTF-8"),
    "no CSV of a million lines": ("\n".join([table().split("\n")[0], *['x,"'] * 1_000_000]), "more than 1000 rows"),
    "no row that can be read": (table().split("\n")[0] + "\nx\ny\n", "no rows that can be read.*fewer cells"),
    "imported: endless interval": (replaced("[1.0, 2.0]", "[1, Infinity]"), "line 2 is not JSON"),
    "imported: no number": (replaced("[1.0, 2.0]", "[NaN, 2]"), "line 2 is not JSON"),
    "imported: 1e999": (replaced("[1.0, 2.0]", "[1, 1e999]"), "line 2 is not JSON"),
    "imported: interval of a year": (imported(interval=[1.0, 3e7]), "expected seconds"),
    "imported: huge interval": (replaced("[1.0, 2.0]", "[1, 1" + "0" * 400 + "]"), "expected seconds"),
    "imported: huge number": (replaced("[1.0, 2.0]", f"[1, {HUGE}]"), "line 2 is not JSON"),
    "imported: true as time": (imported(interval=[True, 3.0]), "expected seconds"),
    "imported: three times": (imported(interval=[1.0, 2.0, 3.0]), "is not an imported row"),
    "imported: deep": (replaced("[1.0, 2.0]", DEEP), "line 2 is not JSON"),
    "imported: half of a pair": (replaced("a.mp4", "\\ud800.mp4"), "line 2 is not JSON"),
    "imported: a list as name": (imported(video=["a"]), "impossible value"),
    "imported: a number as question": (imported(question=3), "impossible value"),
    "imported: text as options": (imported(options="abcd"), "impossible value"),
    "imported: a list as reasoning": (imported(reasoning=["a"]), "is not an imported row"),
    "imported: text as duration": (imported(duration="long"), "impossible value"),
    "imported: a dict as class": (imported(anomaly_class={}), "impossible value"),
    "imported: another field": (imported(**{"a\nb": 1}), "is not an imported row"),
    "imported: no object": (imported() + "[1]\n", "line 3: expected an object"),
    "imported: cut short": (imported()[:-20], "line 2 is not JSON"),
}


def audit(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """The exit code of the command, and its seconds."""
    monkeypatch.setattr(sys, "argv", ["vau_bench", "audit", str(path), "--rows"])
    begin, code = time.monotonic(), 0
    try:
        cli.main("data")
    except SystemExit as ended:
        code = ended.code
    return code, time.monotonic() - begin


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / ("t.jsonl" if name.startswith("imported") else "t.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", LOST)
def test_a_bad_row_is_left_out_and_listed_and_no_other_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, lost, reason = LOST[name]
    path = write(tmp_path, name, content)
    code, seconds = audit(path, monkeypatch)
    rows, found = vau_bench.load(path)
    excluded = [e for e in found.entries if (e.action, e.what) == ("excluded", "row")]
    assert code == 0 and seconds < SECONDS
    assert len(excluded) == found.rows - len(rows) >= 1
    assert len(excluded) == lost
    assert any(reason in e.reason for e in excluded)
    assert capsys.readouterr().out.count("excluded row: ") == len(excluded)
    assert path.suffix == ".jsonl" or len(rows) >= ROWS - lost


@pytest.mark.parametrize("name", DOUBTED)
def test_a_bad_cell_costs_its_task_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, reason = DOUBTED[name]
    path = write(tmp_path, name, content)
    code, seconds = audit(path, monkeypatch)
    rows, found = vau_bench.load(path)
    assert code == 0 and seconds < SECONDS
    assert len(rows) == ROWS
    assert [e.line for e in found.entries if e.reason.startswith(reason)] == [6]


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_none_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = REFUSED[name]
    path = write(tmp_path, name, content)
    code, seconds = audit(path, monkeypatch)
    error = capsys.readouterr().err
    assert code == 2 and seconds < SECONDS
    assert error.count("\n") == 1 and len(error) < 1000
    with pytest.raises(InputError, match=words):
        vau_bench.load(path)


@pytest.mark.parametrize("name", ["x" * 300 + ".csv", "folder", "none.csv"])
def test_a_path_that_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        vau_bench.load(tmp_path / name)


def test_a_file_too_large_for_a_table_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.touch()
    os.truncate(path, 100 * 2**30)  # without taking any room
    with pytest.raises(InputError, match="more than"):
        vau_bench.load(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_only_a_line_feed_ends_a_line_of_json(separator: str, tmp_path: Path) -> None:
    path = write(tmp_path, "imported", replaced("flames", f"red{separator}hot"))
    assert vau_bench.load(path)[0][1].key_object == f"red{separator}hot"


@pytest.mark.parametrize("separator", ["\u2028", "\n", "\r\n"], ids=ascii)
def test_a_cell_may_hold_several_lines(separator: str, tmp_path: Path) -> None:
    path = write(tmp_path, "csv", table(Description=f"Two men, one door,{separator}a fight, and a fall."))
    rows, audit = vau_bench.load(path)
    assert len(rows) == ROWS and not audit.entries
    assert rows[5].description == f"Two men, one door,{separator[-1]}a fight, and a fall."


def test_a_video_folder_may_have_folders(tmp_path: Path) -> None:
    path = write(tmp_path, "csv", table(Video_Name="Arson/..Arson 011 é.mp4"))
    assert vau_bench.load(path)[0][5].video == "Arson/..Arson 011 é.mp4"


@pytest.mark.parametrize(
    "change",
    [
        {"think": 3},
        {"draft": []},
        {"draft": {"choice": "AB"}},
        {"draft": {"label": "Dancing"}},
        {"draft": {"interval": [1.0]}},
        {"draft": {"interval": "long"}},
        {"draft_is_right": "no"},
        {"video": ["a"]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_reflection_record_of_other_types_is_named(change: dict[str, object], tmp_path: Path) -> None:
    good = {"video": "a.mp4", "task": "qa", "think": "", "draft": {"choice": "A"}, "draft_is_right": True}
    good |= {"reflect": "one\u2028line", "revise": ""}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(good, ensure_ascii=False) + "\n")
    assert len(reflections.load(path)) == 1
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(InputError, match="line 2 is not a reflection record"):
        reflections.load(path)


@pytest.mark.parametrize(("task", "draft"), [("qa", {"choice": "E"}), ("classification", {"label": "Dancing"})])
def test_a_draft_that_is_none_of_the_choices_is_named(task: str, draft: dict[str, str]) -> None:
    record = Reflection("t", draft, False, "r", "v")
    asked = example(task)
    with pytest.raises(InputError, match=rf"record of a\.mp4/{task}.* has the draft .*none of the answers"):
        reflections.attach([asked], {asked.id: record}, Audit("", "clean"))
