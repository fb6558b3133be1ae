"""Atomic writing of files, and reporting of a user's mistake as one line."""

import fcntl
import hashlib
import json
import math
import os
import reprlib
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"  # in a folder that is held: who holds it
JSON_BYTES = 2**28  # of a file that is parsed as a whole; memory holds some ten times that


class InputError(ValueError):
    """A mistake in the user's input: the message names the value, what was expected, and the way out."""


def check_range(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises InputError for a number that is not finite, or not from `least` to `most`."""
    if not (math.isfinite(value) and least <= value <= most):
        expected = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        expected = "a finite number" if least == -math.inf else expected
        raise InputError(f"{name}={value}: expected {expected}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path`, complete or not at all (temporary file, fsync, rename)."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, complete or not at all (temporary file, fsync, rename)."""
    part = Path(f"{path}.{os.getpid()}.{threading.get_ident()}.part")  # threads may write the same file at once
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Lines:
    """Lines appended to a file; other programs of the same host see each when `write` returns.

    What a mounted bucket has of an open file is lost with its host: it is uploaded when the file is closed, by `save`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path, self.saved = Path(path), time.monotonic()
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, lines: Iterable[str]) -> None:
        self.file.writelines(lines)
        self.file.flush()

    def save(self, every: float = 0.0) -> None:
        """Returns when all lines are on disk; does nothing within `every` seconds of the last call that did."""
        if time.monotonic() - self.saved < every:
            return
        self.close()
        self.file, self.saved = self.path.open("a", encoding="utf-8"), time.monotonic()

    def close(self) -> None:
        """Saves the lines and closes the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def size_text(size: float) -> str:
    """A number of bytes for people to read."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def free_space(folder: str | os.PathLike) -> float:
    """Free bytes of the file system that `folder`, which need not exist, belongs to.

    Infinite where it does not say: mounted buckets report nothing, or a petabyte.
    """
    folder = Path(folder).resolve()
    usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
    return usage.free if 0 < usage.free < 2**50 else math.inf


def check_space(what: str, folder: str | os.PathLike, likely: float, least: float, way_out: str) -> None:
    """Prints that `folder` is to hold `what`, which takes `likely` bytes, and how many are free.

    Raises InputError where not even `least` are.
    """
    free = free_space(folder)
    said = "free space is not known" if free == math.inf else f"{size_text(free)} free"
    if free < least:
        raise InputError(f"{folder} has {said}, and {what} need {size_text(least)} at least: {way_out}")
    warning = "warning: this may not fit: " if free < likely else ""
    print(f"{warning}{folder} needs about {size_text(likely)} for {what}; {said}", flush=True)


def missing_features(folder: str | os.PathLike) -> set[str]:
    """What the file system of `folder`, which exists, lacks: some of "locks" and "sync" (fsync of folders).

    Raises InputError where it cannot rename folders, which nothing can replace, and OSError where it cannot be written.
    """
    result = set()
    with tempfile.TemporaryDirectory(prefix=".probe_", dir=folder) as name:
        before, after = Path(name, "before"), Path(name, "after")
        before.mkdir()
        (before / "file").touch()
        try:
            before.rename(after)
        except OSError as error:
            raise InputError(
                f"the file system of {folder} cannot rename folders ({error.strerror}), so that a kill could "
                "leave half of a checkpoint: mount a bucket with hierarchical namespace, or choose another folder"
            ) from error
        try:
            sync(after)
        except OSError:
            result.add("sync")
        with (after / "file").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                result.add("locks")
    return result


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which replaces `path` when the block succeeds, and is removed when it fails. Raises InputError
    on a file system that cannot rename folders, before the block begins."""
    path = Path(path)
    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        missing_features(part)
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: str | os.PathLike) -> None:
    """Returns when a file that another library wrote, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Holds `folder` for this process until the block ends, or the process does.

    Raises InputError that names the process holding it. By flock: on NFS other hosts see the lock too, on others
    (gcsfuse) only those on the same host; where a file system has no locks, a warning says so.
    """
    with open(Path(folder) / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait until that ends, or choose "
                "another --workdir"
            ) from error
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error.strerror}): begin no second run there", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
        file.flush()
        yield


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file with their ends; "\\n" alone ends one, because U+2028 may stand in a JSON string."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return list(file)


def read_json(path: str | os.PathLike, most: int = JSON_BYTES) -> Any:
    """Parses a JSON file of at most `most` bytes.

    Raises InputError with its name for anything else than a regular file of JSON in UTF-8, for a key that occurs twice
    in an object, and for too deep nesting.
    """
    try:
        result = os.stat(path)
        if not stat.S_ISREG(result.st_mode):
            raise InputError(f"cannot read {path} as JSON: it is not a regular file")
        if result.st_size > most:
            raise InputError(f"cannot read {path} as JSON: it has {result.st_size} bytes, expected at most {most}")
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except InputError:
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: no UTF-8, no JSON, or a number of more digits than Python reads
        raise InputError(f"cannot read {path} as JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"cannot read {path} as JSON: it nests too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its keys and values. Raises ValueError for a duplicate key, whose value would be ambiguous."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice")
    return result


def dump_json(value: Any, **options: Any) -> str:
    """JSON text of plain values; a number that is not finite is null, as JSON has no such numbers."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, list | tuple) else value


def content_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's contents, or of the names and contents of a folder's files, as hex digits; read anew at each
    call. Raises InputError."""
    path = Path(path)
    try:
        if path.is_dir():
            names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
            listing = "".join(f"{name} {content_hash(path / name)}\n" for name in names)
            return hashlib.sha256(listing.encode()).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def exit_on_input_error(main: Callable[[], Any]) -> None:
    """Runs `main`; a user's mistake ends the program with one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except InputError as error:
        sys.stdout.flush()
        sys.exit(_complain(str(error)))


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def short(error: Exception) -> str:
    """A library's error as one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
