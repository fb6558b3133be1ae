"""Integrity of a checkpoint: the SHA-256 of each of its files, stored beside them once it is complete.

Storage that flips a byte, or loses a file, gives no error: tensorstore reads the remaining data.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from vau_jax.common import processes
from vau_jax.common.files import InputError, content_hash, dump_json, read_json, write_text

NOTE = "checksums.json"  # of the first process; the others' have their numbers
OWN = re.compile(r"(?:.*/)?ocdbt\.process_(\d+)/")  # the files that one of several processes has written
THREADS = 8  # hashing releases the GIL: a second for 1 to 2 GB on one core, and as many cores at once


def write(folder: Path) -> None:
    """Stores the hashes of the files of `folder` that this process has written, and of the first also of those that
    belong to none. All processes call this, and wait for none: they may do so in the background.
    """
    number = jax.process_index()
    names = [name for name in _by_size(folder) if _writer(name) == number]
    note = folder / NOTE if number == 0 else (folder / NOTE).with_stem(f"checksums.{number:05d}")
    write_text(note, dump_json(_hashes(folder, names)))


def _writer(name: str) -> int:
    """The process that has written a file."""
    own = OWN.match(name)
    return int(own[1]) if own else 0


def noted(folder: Path) -> dict[str, str] | None:
    """The files' names and hashes as stored by `write`; None without. Raises InputError."""
    notes = _notes(folder)
    result: dict[str, str] = {}
    for note in notes:
        hashes = read_json(note)
        if not isinstance(hashes, dict):
            raise InputError(f"{note} is not a list of checksums")
        result |= hashes
    return result if notes else None


def _notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("checksums*.json"))


def damage(folder: Path, skip: str | None = None, together: bool = False) -> str:
    """The first fault of the files of `folder`, except those whose names begin with `skip`; empty where they are
    unchanged, or no hashes were stored.

    With `together` all processes call this, each reads some of the files, and all get the same result.
    """
    try:
        known, problems = noted(folder) or {}, []
    except InputError as error:
        known, problems = {}, [str(error)]
    names = [name for name in known if skip is None or not name.startswith(skip)]
    if together:
        names = names[jax.process_index() :: jax.process_count()]
    for name, result in _hashes(folder, names).items():
        if result != known[name]:
            problems.append(f"{name} {'differs from what was written' if result else 'cannot be read'}")
    if together:
        problems = sorted({problem for share in processes.exchange(problems) for problem in share})
    return ", ".join(problems[:2]) + (f" and {len(problems) - 2} more" if len(problems) > 2 else "")


def of_files(folder: Path, names: Iterable[str] = (), below: str | None = None) -> dict[str, str]:
    """The SHA-256 of the files with these names, or of those whose names begin with `below`, taken from stored hashes
    where they exist. Empty where a file cannot be read.
    """
    if below is None:
        return _hashes(folder, names)
    known = noted(folder)
    if known is None:
        return _hashes(folder, [name for name in _by_size(folder) if name.startswith(below)])
    return {name: value for name, value in known.items() if name.startswith(below)}


def _by_size(folder: Path) -> list[str]:
    """The names of all files below `folder`, the largest first, so that each of several readers gets as much."""
    results = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("checksums.")]
    results.sort(key=lambda path: (-path.stat().st_size, path))
    return [path.relative_to(folder).as_posix() for path in results]


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of each file; empty where it cannot be read."""

    def one(name: str) -> str:
        try:
            return content_hash(folder / name)
        except InputError:
            return ""

    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
