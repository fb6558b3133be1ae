"""The table `vau_videos.csv` of a folder that `vau data join` wrote: where each annotated video is, and its length,
rate and size. Every process of a run reads the same table, so that all of them expect the same lengths of prompts.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vau_jax.common.files import InputError
from vau_jax.datasets import tables

TABLE = "vau_videos.csv"
COLUMNS = ("source", "video", "file", "bytes", "seconds", "fps", "width", "height")
PROBED = COLUMNS[3:]


class Video(NamedTuple):
    """A file of the table; what was read of it is None where it could not be read."""

    file: str  # relative to the folder of the table
    bytes: int
    seconds: float | None
    fps: float | None
    width: int | None  # upright, in pixels
    height: int | None


Key = tuple[str, str]  # source, and the plain name of a video in lower case


def load(folder: Path) -> dict[Key, Video]:
    """The table of a folder of videos; empty for a folder without one. Raises InputError for another file of that
    name."""
    path = folder / TABLE
    return dict(_load(path, path.stat().st_mtime_ns)) if path.exists() else {}


@lru_cache(maxsize=4)
def _load(path: Path, changed: int) -> dict[Key, Video]:
    rows, faults = tables.csv_rows(path, tables.read(path, "table of videos"), COLUMNS, "video")
    if faults:
        raise InputError(f"{path} row {faults[0].number}: {faults[0].reason}: run `vau data join` again")
    return {(row["source"], row["video"]): _video(path, number, row) for number, row in rows}


def _video(path: Path, number: int, row: dict[str, str]) -> Video:
    try:
        size, *values = (float(row[name]) if row[name] else None for name in PROBED)
        if not all(value is None or (math.isfinite(value) and value > 0) for value in values) or size is None:
            raise ValueError
        parts = Path(row["file"]).parts
        if not parts or Path(row["file"]).is_absolute() or ".." in parts:
            raise ValueError
    except ValueError as error:
        raise InputError(f"{path} row {number} is not of `vau data join`: {row}: run it again") from error
    seconds, fps, width, height = values
    whole = (None if value is None else int(value) for value in (width, height))
    return Video(row["file"], int(size), seconds, fps, *whole)
