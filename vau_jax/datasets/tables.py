"""Tables of text from external files: CSV by its exact rules, JSONL by lines.

With one stray quote a CSV reader silently merges all rows up to the next quote into one cell. So quotes must match,
every row must have as many cells as the header, and no cell may contain something that looks like a row. A row that
breaks a rule is left out and reported by number and reason; reading continues at the next line of the file.
"""

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vau_jax.common.files import InputError

MAX_BYTES = 2**28  # of a table
MAX_CELL = 131_072  # characters; csv's own limit
MAX_FAULTS = 1000  # rows; more, and the file is something else
VIDEO = re.compile(r"\s*[^\s\"][^\"]{0,250}\.(?:mp4|avi|mkv|webm|mov|m4v|ts|flv|wmv|mpg|mpeg)\s*", re.IGNORECASE)


Groups = Sequence[Sequence[str]]  # of columns that belong together


class Fault(NamedTuple):
    """A row that cannot be read."""

    number: int  # of the row, 1 for the first after the header
    start: str  # its first characters, for people
    reason: str  # up to its first colon the same for all faults of a kind


def read(path: Path, what: str) -> str:
    """The text of a table; `what` it is, for people. Raises InputError for a file that is missing, unreadable, too
    large or no UTF-8."""
    if not os.path.isfile(path):  # False too where no file can have such a name
        raise InputError(f"{what} {path} does not exist")
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise InputError(f"{what} {path} has more than {MAX_BYTES} bytes: is it a table of text?")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from error


def csv_rows(
    path: Path, text: str, columns: Sequence[str], name: str, optional: Groups = ()
) -> tuple[list[tuple[int, dict[str, str]]], list[Fault]]:
    """Rows with their numbers, each with `columns`, and the faults. `name` is the column of the videos' names; a group
    of `optional` columns may be absent as a whole.

    Raises InputError where the header cannot be read or lacks a column.
    """
    lines = list(io.StringIO(text))  # ended by \n alone: U+2028 and others stand inside of cells
    head = csv.reader(lines, strict=True)
    try:
        header = next(head, [])
    except csv.Error as error:
        raise InputError(f"{path}: the header cannot be read as CSV ({error})") from error
    check_columns(path, header, columns, optional)
    if twice := [column for column in columns if header.count(column) > 1]:
        raise InputError(f"{path} has the column {twice[0]} twice: one of them must go")
    rows, faults = [], []
    for number, (line, result) in enumerate(_records(lines, head.line_num, len(header), header.index(name)), start=1):
        if isinstance(result, str):
            faults.append(Fault(number, lines[line][:60].strip(), f"{result}: line {line + 1} of the file"))
            if len(faults) > MAX_FAULTS:
                raise InputError(f"{path}: more than {MAX_FAULTS} rows cannot be read, the first {_told(faults[0])}")
        else:
            cells = dict(zip(header, result, strict=True))
            rows.append((number, {column: cells[column] for column in columns if column in cells}))
    return rows, faults


def _records(lines: list[str], first: int, width: int, name: int) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, its cells or what is wrong with it) of every record from the line `first` on."""
    while first < len(lines):
        reader = csv.reader((lines[n] for n in range(first, len(lines))), strict=True)
        begin = first
        try:
            for cells in reader:
                fault = _fault(cells, width, name)
                if cells:
                    yield begin, fault or cells
                end = first + reader.line_num
                begin = begin + 1 if fault else end
                if begin < end:  # the other lines may be rows
                    break
        except csv.Error as error:
            yield begin, _matching(str(error))
            begin += 1
        first = begin


def _fault(cells: list[str], width: int, name: int) -> str:
    """What is wrong with a record; empty: nothing."""
    if cells and len(cells) != width:
        return f"a row has {'fewer' if len(cells) < width else 'more'} cells than the header"
    swallowed = (line for cell in cells for line in cell.split("\n")[1:])
    if any(_like_a_row(line, width, name) for line in swallowed):
        return "a quote without its other half takes the next rows for one cell"
    return ""


def _like_a_row(line: str, width: int, name: int) -> bool:
    parts = line.split(",", name + 1)
    if len(parts) > name + 1 and VIDEO.fullmatch(parts[name].strip('"')):
        return True
    return line.count(",") >= width - 1 and len(next(csv.reader([line]), [])) == width


def _matching(error: str) -> str:
    if "limit" in error:
        return f"a cell has more than {MAX_CELL} characters, or a quote without its other half opens it"
    return "quotes do not match"


def _told(fault: Fault) -> str:
    return f"row {fault.number} ({fault.start!r}): {fault.reason}"


def json_lines(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the numbers of their lines, which end at "\\n" alone. Raises InputError for a
    line that is none, and for values that JSON does not have: NaN, Infinity, half of a surrogate pair."""
    return [(n, _json_record(path, n, line)) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _json_record(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} line {number} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} line {number}: expected an object, found {text[:60]!r}")
    return record


def text_rows(
    path: Path, records: list[tuple[int, dict[str, Any]]], columns: Sequence[str], optional: Groups = ()
) -> tuple[list[tuple[int, dict[str, str]]], list[Fault]]:
    """Objects of JSONL as rows of text, None as an empty one; columns as in `csv_rows`."""
    there = {column for _, record in records for column in record}
    check_columns(path, there, columns, optional)
    columns = [column for column in columns if column in there]
    rows, faults = [], []
    for number, record in records:
        cells = {c: "" if record.get(c) is None else str(record[c]) for c in columns}
        if any(len(cell) > MAX_CELL for cell in cells.values()):
            faults.append(Fault(number, "", f"a cell has more than {MAX_CELL} characters"))
        else:
            rows.append((number, cells))
    return rows, faults


def check_columns(path: Path, there: Collection[str], columns: Sequence[str], optional: Groups) -> None:
    """Raises InputError where a table lacks one of the columns, beyond optional groups that it lacks as a whole. A name
    that is nearly that of an absent column is a mistake, not another column."""
    absent = {column for group in optional if not any(c in there for c in group) for column in group}
    missing = [column for column in columns if column not in there and column not in absent]
    others = {column.casefold(): column for column in there if column not in columns}
    near = {}
    for column in (c for c in columns if c not in there):
        for match in difflib.get_close_matches(column.casefold(), others, n=1, cutoff=0.8):
            near[column] = others[match]
    if missing or near:
        named = [f"{c} (found {near[c]!r})" if c in near else c for c in columns if c in missing or c in near]
        raise lacking(path, named, columns)


def lacking(path: Path, missing: Sequence[str], columns: Sequence[str]) -> InputError:
    """The error of a table without all its columns."""
    return InputError(f"{path} lacks the column(s) {', '.join(missing)}: VAU-Bench's columns are {', '.join(columns)}")
