"""Decoded and resized frames in ArrayRecord shards, so that training reads them instead of video files.

A folder holds frames-00000.arrayrecord, whose records are clips, beside frames-00000.json, which lists them. The list
is written when its shard is whole on disk; a shard without one is what a killed call left. A record is found by what
the video file holds and how it is to be sampled, never by its path, so that a changed video or another setting does
not find it, and a cache may be copied with its videos.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vau_jax import files
from vau_jax.data import video
from vau_jax.data.decode_worker import decode_clip, encode_clip
from vau_jax.data.decoders import VideoError
from vau_jax.data.video import Clip, Sampling, VideoOptions
from vau_jax.files import InputError

SHARD_BYTES = 2**28  # about the size of a shard, and the most that a killed call loses
EDGE = 2**16  # bytes at both ends of a video file that tell it from others
Decode = Callable[[Path, VideoOptions, int, int], Clip]


def key_of(path: str | os.PathLike, sampling: Sampling) -> str:
    """Of a video's size, its first and last 64 KiB (where containers keep their tables), and how it is sampled.

    Raises VideoError for a file that is not there.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(EDGE)
            file.seek(max(0, size - EDGE))
            tail = file.read(EDGE)
    except OSError as error:
        raise VideoError(f"no such file: {path}", "missing") from error
    return hashlib.sha256(f"{size}|{sampling}|".encode() + head + tail).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """One line of a shard's list: a clip, or why there is none."""

    key: str
    video: str  # path it was made from, for people and to tell a stale record from one of another data set
    sampling: str
    failure: str = ""
    reason: str = ""


class FrameCache:
    """Reads a cache folder; what it does not have, or has damaged, is decoded from the video."""

    def __init__(self, folder: str | os.PathLike | None, decode: Decode = video.read) -> None:
        self.folder = Path(folder) if folder else None
        self.decode = decode
        self.places: dict[str, tuple[Path, int, Entry]] = {}
        self.readers: dict[Path, ArrayRecordReader] = {}
        self.lock = threading.Lock()
        if self.folder and not self.folder.is_dir():
            raise InputError(f"frame cache {folder} does not exist: fill it with data_prep/cache_frames.py first")
        for shard, entries in shards(self.folder) if self.folder else ():
            self.places |= {entry.key: (shard, number, entry) for number, entry in enumerate(entries)}

    def read(self, path: str | os.PathLike, sampling: Sampling) -> tuple[Clip, bool]:
        """The clip, and whether it came from the cache. Raises VideoError."""
        if self.folder is not None and (place := self.places.get(key_of(path, sampling))):
            shard, number, entry = place
            if entry.failure:
                raise VideoError(entry.failure, entry.reason)
            clip = self._record(shard, number)
            if clip is not None:
                return clip, True
        return self.decode(Path(path), sampling.options, sampling.factor, sampling.multiple), False

    def _record(self, shard: Path, number: int) -> Clip | None:
        """A record, or None where it is damaged: ArrayRecord keeps a hash of each."""
        try:
            with self.lock:
                if shard not in self.readers:
                    self.readers[shard] = ArrayRecordReader(str(shard))
                reader = self.readers[shard]
            record = reader.read([number])[0]
            header, frames = record.split(b"\n", 1)
            return decode_clip(json.loads(header), frames)
        except (RuntimeError, ValueError, IndexError):  # what ArrayRecord raises for damaged files
            return None

    def is_whole(self, key: str) -> bool:
        """Whether there is a record under this key that can be read, or a known failure."""
        if key not in self.places:
            return False
        shard, number, entry = self.places[key]
        return bool(entry.failure) or self._record(shard, number) is not None


def shards(folder: Path) -> Iterator[tuple[Path, list[Entry]]]:
    """The finished shards of a folder with their lists."""
    for listing in sorted(folder.glob("frames-*.json")):
        yield listing.with_suffix(".arrayrecord"), [Entry(**entry) for entry in files.read_json(listing)]


@dataclass
class _Shard:
    """A shard being written."""

    path: Path
    entries: list[Entry]
    size: int = 0

    def __post_init__(self) -> None:
        self.part = self.path.with_suffix(".part")
        self.writer = ArrayRecordWriter(str(self.part), "group_size:1,uncompressed")

    def add(self, entry: Entry, clip: Clip | None) -> None:
        frames = b"" if clip is None else clip.frames.tobytes()
        header = b"" if clip is None else json.dumps(encode_clip(clip)).encode()
        self.writer.write(header + b"\n" + frames)
        self.entries.append(entry)
        self.size += len(frames)

    def finish(self) -> None:
        """The records first, then the list that makes them count."""
        self.writer.close()
        files.sync(self.part)
        os.replace(self.part, self.path)
        files.write_text(self.path.with_suffix(".json"), _listing(self.entries))


def _listing(entries: Iterable[Entry]) -> str:
    return "[\n" + ",\n".join(json.dumps(vars(entry)) for entry in entries) + "\n]\n"


def build(
    folder: str | os.PathLike,
    videos: list[Path],
    sampling: Sampling,
    decode: Decode,
    workers: int,
    show: Callable[[int, str], None],
) -> Counter[str]:
    """Brings a cache folder up to date for `videos`; a killed call goes on after its last whole shard.

    Records are verified; stale ones (of a video that changed) and damaged ones are made anew. `show(done, note)` tells
    how far it is. Returns how many were "kept", "written", "failed" (a broken video, listed with its reason), and, of
    what was there, "stale" and "damaged".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("frames-*.part"):
        part.unlink()
    keys = {path: _key_or_none(path, sampling) for path in videos}
    counts = _drop_bad(folder, keys, sampling)
    cache = FrameCache(folder)
    todo = [path for path, key in keys.items() if key is None or key not in cache.places]
    counts["kept"] = len(keys) - len(todo)
    counts["failed"] = sum(bool(cache.places[key][2].failure) for key in keys.values() if key in cache.places)
    numbers = [int(shard.stem.split("-")[1]) for shard, _ in shards(folder)]
    next_number, shard, done = max(numbers, default=-1) + 1, None, counts["kept"]
    for path, clip, error in _decoded(todo, sampling, decode, workers):
        done += 1
        counts["written" if clip else "failed"] += 1
        show(done, "" if clip else f"{path.name}: {error}")
        if keys[path] is None:  # not there: nothing to remember it by
            continue
        shard = shard or _Shard(folder / f"frames-{next_number:05d}.arrayrecord", [])
        failure = (str(error), error.reason) if error else ("", "")
        shard.add(Entry(keys[path], str(path), str(sampling), *failure), clip)
        if shard.size >= SHARD_BYTES:
            shard.finish()
            next_number, shard = next_number + 1, None
    if shard:
        shard.finish()
    return counts


def _key_or_none(path: Path, sampling: Sampling) -> str | None:
    try:
        return key_of(path, sampling)
    except VideoError:
        return None


def _drop_bad(folder: Path, keys: dict[Path, str | None], sampling: Sampling) -> Counter[str]:
    """Takes stale and damaged entries out of the lists, and away with shards that have no other."""
    counts: Counter[str] = Counter()
    wanted, names = set(keys.values()), {str(path) for path in keys}
    cache = FrameCache(folder)
    for shard, entries in list(shards(folder)):
        state = [_state(entry, cache, wanted, names, str(sampling)) for entry in entries]
        if set(state) == {"good"}:
            continue
        counts += Counter(s for s in state if s != "good")
        # An entry's place in the list is its record's number: those that are dropped leave a blank.
        kept = [e if s == "good" else Entry("", e.video, "") for e, s in zip(entries, state, strict=True)]
        if any(entry.key for entry in kept):
            files.write_text(shard.with_suffix(".json"), _listing(kept))
        else:
            shard.with_suffix(".json").unlink()
            shard.unlink(missing_ok=True)
    return counts


def _state(entry: Entry, cache: FrameCache, wanted: set[str | None], names: set[str], sampling: str) -> str:
    if not entry.key:
        return "good"  # a blank of an earlier call
    if entry.sampling == sampling and entry.video in names and entry.key not in wanted:
        return "stale"
    return "good" if cache.is_whole(entry.key) else "damaged"


def _decoded(
    videos: list[Path], sampling: Sampling, decode: Decode, workers: int
) -> Iterator[tuple[Path, Clip | None, VideoError | None]]:
    """Every video's clip or failure, in order, some decoded ahead."""

    def one(path: Path) -> tuple[Path, Clip | None, VideoError | None]:
        try:
            return path, decode(path, sampling.options, sampling.factor, sampling.multiple), None
        except VideoError as error:
            return path, None, error

    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(one, path) for path in videos[: 2 * workers]]
        for following in range(len(videos)):
            result = ahead.pop(0).result()
            if following + 2 * workers < len(videos):
                ahead.append(pool.submit(one, videos[following + 2 * workers]))
            yield result
