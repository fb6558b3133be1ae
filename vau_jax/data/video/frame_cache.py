"""Decoded and resized frames in ArrayRecord shards, so that training reads them instead of video files.

A folder holds frames-00000.arrayrecord, whose records are clips, beside frames-00000.json, which lists them. The list
is written when its shard is complete on disk; a shard without one was left by a killed call.

A record's key is the content of the video file and the sampling settings, never its path: a changed video or another
setting does not match, and a cache may be copied with its videos. Sampling a file would miss a change between the
samples, and reading a hundred gigabytes at each start takes minutes: so the list keeps each file's size and ctime
(which a program that edits a file cannot set back) beside its hash, as git's index does, and a file is read again only
where these differ, such as in a copy.
"""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vau_jax.common import files
from vau_jax.common.files import InputError, dump_json
from vau_jax.data.video import clips
from vau_jax.data.video.clips import Clip, Probe, Sampling, VideoOptions
from vau_jax.data.video.decode_worker import decode_clip, encode_clip
from vau_jax.data.video.decoders import VideoError

SHARD_BYTES = 2**28  # approximate size of a shard, and the most that a killed call loses
PROBED = 32  # videos that the size of a cache is calculated from
SETTLED = 10**9  # nanoseconds since a file changed after which its modification time reveals any later change
VERSION = 2  # of the keys; to be changed where the same settings give other frames
FIELDS = (  # fields of VideoOptions that determine a record
    "fps",
    "nframes",
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "per_clip",
    "resized_height",
    "resized_width",
    "video_start",
    "video_end",
    "lead",
)
Decode = Callable[[Path, VideoOptions, int, int], Clip]


def sampling_text(sampling: Sampling) -> str:
    """The sampling settings as JSON, by names and numbers alone: the same for every version of Python and of this code,
    and for 2 and 2.0.
    """
    values = {name: getattr(sampling.options, name) for name in FIELDS}
    values |= {"factor": sampling.factor, "multiple": sampling.multiple}
    return dump_json({name: None if value is None else float(value) for name, value in values.items()})


def key_of(content: str, sampling: Sampling) -> str:
    """The key of a record: a hash of the video's content and of the sampling settings."""
    return f"{VERSION}-{hashlib.sha256(f'{content}|{sampling_text(sampling)}'.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class Entry:
    """One line of a shard's list: a clip, or why there is none."""

    key: str
    video: str  # path it was built from, for people and to distinguish a stale record from one of another dataset
    sampling: str
    failure: str = ""
    reason: str = ""
    content: str = ""  # SHA-256 of the video file
    size: int = 0  # of the video file, in bytes
    changed: int = 0  # when it was last, in nanoseconds (ctime); 0: just before it was read

    @property
    def mark(self) -> "Mark":
        return Mark(os.path.abspath(self.video), self.size, self.changed)


class Mark(NamedTuple):
    """Distinguishes a video file that was read before from a changed one."""

    path: str
    size: int
    changed: int


class FrameCache:
    """Reads a cache folder; a missing or damaged record is decoded from the video."""

    def __init__(self, folder: str | os.PathLike | None, decode: Decode = clips.read) -> None:
        self.folder = Path(folder) if folder else None
        self.decode = decode
        self.places: dict[str, tuple[Path, int, Entry]] = {}
        self.readers: dict[Path, ArrayRecordReader] = {}
        self.lock = threading.Lock()
        if self.folder and not self.folder.is_dir():
            raise InputError(f"frame cache {folder} does not exist: fill it with `vau data cache` first")
        self.contents: dict[Mark, str] = {}
        for shard, entries in shards(self.folder) if self.folder else ():
            self.places |= {entry.key: (shard, number, entry) for number, entry in enumerate(entries)}
            self.contents |= {entry.mark: entry.content for entry in entries if entry.changed}
        if self.places and not any(map(_is_current, self.places)):
            raise InputError(
                f"frame cache {folder} was filled by another version, whose records are not found: call "
                "`vau data cache` again, which makes them anew"
            )

    def content(self, path: str | os.PathLike) -> tuple[str, Mark]:
        """SHA-256 of a video file, and the stat fields that reveal later changes. Raises VideoError for one that is not
        there."""
        try:
            stat = os.stat(path)
            settled = time.time_ns() - stat.st_ctime_ns > SETTLED
            mark = Mark(os.path.abspath(path), stat.st_size, stat.st_ctime_ns if settled else 0)
            result = self.contents.get(mark) or files.content_hash(path)
        except OSError as error:
            raise VideoError(f"no such file: {path}", "missing") from error
        if settled:
            self.contents[mark] = result
        return result, mark

    def read(self, path: str | os.PathLike, sampling: Sampling) -> tuple[Clip, bool]:
        """The clip, and whether it came from the cache. Raises VideoError."""
        if self.folder is not None and (place := self.places.get(key_of(self.content(path)[0], sampling))):
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
        """Whether there is a readable record under this key, or a known failure."""
        if key not in self.places:
            return False
        shard, number, entry = self.places[key]
        return bool(entry.failure) or self._record(shard, number) is not None


def _is_current(key: str) -> bool:
    return key.startswith(f"{VERSION}-")


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
        header = b"" if clip is None else dump_json(encode_clip(clip)).encode()
        self.writer.write(header + b"\n" + frames)
        self.entries.append(entry)
        self.size += len(frames)

    def finish(self) -> None:
        """Writes the records first, then the list that makes them valid."""
        self.writer.close()
        files.sync(self.part)
        os.replace(self.part, self.path)
        files.write_text(self.path.with_suffix(".json"), _listing(self.entries))


def _listing(entries: Iterable[Entry]) -> str:
    return "[\n" + ",\n".join(dump_json(vars(entry)) for entry in entries) + "\n]\n"


def build(
    folder: str | os.PathLike,
    videos: list[Path],
    sampling: Sampling,
    decode: Decode,
    workers: int,
    show: Callable[[int, str], None],
    probe: Callable[[Path], Probe] = clips.probe,
) -> Counter[str]:
    """Brings a cache folder up to date for `videos`; a killed call resumes after its last whole shard.

    Prints first what that takes, by `probe` of some videos. Raises InputError where it is certain not to fit.

    Records are verified; stale ones (of a video that changed) and damaged ones are rebuilt. `show(done, note)` reports
    how far it is. Returns how many were "kept", "written", "failed" (a broken video, listed with its reason), and, of
    what was there, "stale" and "damaged".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("frames-*.part"):
        part.unlink()
    counts = _drop(folder, lambda entry: "" if _is_current(entry.key) else "stale")
    known = FrameCache(folder)
    contents = {path: _content_or_none(known, path) for path in videos}
    keys = {path: result and key_of(result[0], sampling) for path, result in contents.items()}
    counts += _drop_bad(known, keys, sampling)
    cache = FrameCache(folder)
    todo = [path for path, key in keys.items() if key is None or key not in cache.places]
    _check_space(folder, todo, sampling, workers, probe)
    counts["kept"] = len(keys) - len(todo)
    counts["failed"] = sum(bool(cache.places[key][2].failure) for key in keys.values() if key in cache.places)
    numbers = [int(shard.stem.split("-")[1]) for shard, _ in shards(folder)]
    next_number, shard, done = max(numbers, default=-1) + 1, None, counts["kept"]
    for path, clip, error in _decoded(todo, sampling, decode, workers):
        done += 1
        counts["written" if clip else "failed"] += 1
        show(done, f"failed {counts['failed']}" + ("" if clip else f"  {path.name}: {error}"))
        if contents[path] is None:  # not there: nothing to remember it by
            continue
        shard = shard or _Shard(folder / f"frames-{next_number:05d}.arrayrecord", [])
        failure = (str(error), error.reason) if error else ("", "")
        content, mark = contents[path]
        entry = Entry(keys[path], str(path), sampling_text(sampling), *failure, content, mark.size, mark.changed)
        shard.add(entry, clip)
        if shard.size >= SHARD_BYTES:
            shard.finish()
            next_number, shard = next_number + 1, None
    if shard:
        shard.finish()
    return counts


def _check_space(
    folder: Path, videos: list[Path], sampling: Sampling, workers: int, probe: Callable[[Path], Probe]
) -> None:
    """Prints the size of the clips of `videos`, calculated from those of PROBED, and what is free in `folder`."""

    def size(path: Path) -> int:
        try:
            return clips.clip_bytes(probe(path), sampling)
        except VideoError:
            return 0

    some = videos[:: -(-len(videos) // PROBED)] if videos else []
    if not some:
        return
    with ThreadPoolExecutor(workers) as pool:
        likely = sum(pool.map(size, some)) / len(some) * len(videos)
    certain = 0.9 if len(some) == len(videos) else 0.5  # the others may be smaller
    way_out = "choose another --workdir, or lower config.data.max_pixels, total_pixels or max_frames"
    what = f"the frames of {len(videos)} video{'s' * (len(videos) > 1)}"
    files.check_space(what, folder, likely, certain * likely, way_out)


def _content_or_none(cache: FrameCache, path: Path) -> tuple[str, Mark] | None:
    try:
        return cache.content(path)
    except VideoError:
        return None


def _drop_bad(cache: FrameCache, keys: dict[Path, str | None], sampling: Sampling) -> Counter[str]:
    """Drops stale and damaged entries."""
    wanted, names, text = set(keys.values()), {str(path) for path in keys}, sampling_text(sampling)

    def fault(entry: Entry) -> str:
        if entry.sampling == text and entry.video in names and entry.key not in wanted:
            return "stale"
        return "" if cache.is_whole(entry.key) else "damaged"

    return _drop(cache.folder, fault)


def _drop(folder: Path, fault: Callable[[Entry], str]) -> Counter[str]:
    """Removes faulty entries from the lists, and shards that have no other entries; counts them by fault."""
    counts: Counter[str] = Counter()
    for shard, entries in list(shards(folder)):
        faults = [fault(entry) if entry.key else "" for entry in entries]  # blanks are from an earlier call
        if not any(faults):
            continue
        counts += Counter(name for name in faults if name)
        # An entry's index in the list is its record's number: dropped entries leave a blank.
        kept = [Entry("", e.video, "") if name else e for e, name in zip(entries, faults, strict=True)]
        if any(entry.key for entry in kept):
            files.write_text(shard.with_suffix(".json"), _listing(kept))
        else:
            shard.with_suffix(".json").unlink()
            shard.unlink(missing_ok=True)
    return counts


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
