"""Joins VAU-Bench's annotation files with the videos, in the folders as they were unpacked.

    vau data join --annotations ANNOTATIONS --videos msad=MSAD ucf=UCF_Crimes ecva=ECVA --out=data/vau_bench

ANNOTATIONS are CSV files, or folders of them. Nothing is copied or renamed but the CSV files themselves: OUT holds

    train.csv, val.csv, ...   the annotations, byte for byte, for config.data.csv
    msad, ucf, ecva           links to the folders of videos
    vau_videos.csv            of each video its file, seconds, frames a second, width and height
    join.json                 everything that is missing, unreadable, ambiguous, or in two splits

and is the config.data.videos of training and evaluation, with every file, split and protocol as published. A video is
found by its plain name: without the prefix of the tables (`ucf_`), whatever its folder, ending and case. What is
missing is listed by data set, with where to get it. A repeated call reads only the videos that are new.
"""

import argparse
import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from vau_jax import cli
from vau_jax.common import files, progress
from vau_jax.common.files import InputError, dump_json
from vau_jax.data_prep.vau_bench import TOLERANCE, by_plain_name, folders_of, probe_all
from vau_jax.datasets import vau_bench, video_table
from vau_jax.datasets.vau_bench import Row
from vau_jax.datasets.video_table import Key, Video


class Origin(NamedTuple):
    """Where a data set's videos come from. Sizes and terms are from memory of the projects' pages, not checked here:
    read the terms before you download."""

    name: str
    page: str
    what: str


ORIGINS = {
    "msad": Origin(
        "MSAD", "https://msad-dataset.github.io", "720 videos by scene and class; on request, for research (unchecked)"
    ),
    "ucf": Origin(
        "UCF-Crime",
        "https://www.crcv.ucf.edu/projects/real-world",
        "1,900 videos, 128 hours, about 100 GB in archives by class (Anomaly-Videos-Part-1.zip, "
        "Training-Normal-Videos-Part-1.zip, Testing_Normal_Videos.zip and so on); for research (unchecked)",
    ),
    "ecva": Origin(
        "ECVA", "https://github.com/Dulpy/ECVA", "2,240 numbered videos, 88 hours; also on ModelScope (unchecked)"
    ),
}
WEIGHTS = "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir models/qwen2.5-vl-3b"


@dataclass
class Joined:
    """What a join found, as join.json holds it."""

    rows: dict[str, dict[str, int]] = field(default_factory=dict)  # by annotation file: rows by source
    videos: dict[str, int] = field(default_factory=dict)  # by source: different videos that were found
    missing: dict[str, list[str]] = field(default_factory=dict)  # by source: videos without a file
    unreadable: dict[str, str] = field(default_factory=dict)  # file: why
    ambiguous: dict[str, list[str]] = field(default_factory=dict)  # video: its files, the first of which is used
    beyond_end: dict[str, str] = field(default_factory=dict)  # video: an interval, and its length
    shared: dict[str, list[str]] = field(default_factory=dict)  # "a and b": videos that both files have
    unused: dict[str, int] = field(default_factory=dict)  # by source: files that no row names

    def told(self) -> str:
        """The findings for people."""
        lines = [f"{name}: {', '.join(f'{s} {n}' for s, n in by.items())}" for name, by in self.rows.items()]
        for source, n in self.videos.items():
            lost = len(self.missing.get(source, ()))
            lines.append(
                f"{ORIGINS[source].name}: {n} videos found, {lost} missing, {self.unused[source]} files unused"
            )
        kinds = {
            "unreadable": "cannot be read",
            "ambiguous": "have several files",
            "beyond_end": "end before their interval",
        }
        for name, words in kinds.items():
            if found := getattr(self, name):
                first = next(iter(found.items()))
                lines.append(f"{len(found)} videos {words}, such as {first[0]} ({first[1]})")
        lines += [f"{both} share {len(names)} videos: {', '.join(names[:5])}" for both, names in self.shared.items()]
        return "\n".join([*lines, *self._to_get()])

    def _to_get(self) -> list[str]:
        lines = []
        for source, names in self.missing.items():
            if names:
                origin = ORIGINS[source]
                lines.append(f"missing of {origin.name}: {', '.join(names[:5])}{' ...' * (len(names) > 5)}")
                lines.append(f"    {origin.page}: {origin.what}")
        return lines


def join(annotations: Sequence[Path], folders: dict[str, list[Path]], out: Path, workers: int) -> Joined:
    """Writes `out`; `folders` of videos by source. Raises InputError where there is nothing to join."""
    tables = annotation_files(annotations)
    rows = {path.name: vau_bench.load(path)[0] for path in tables}
    result = Joined(rows={name: dict(Counter(row.source for row in own)) for name, own in rows.items()})
    result.shared = _shared(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        links = {source: _link(out, source, own) for source, own in folders.items()}
        for path in tables:
            if path.resolve() != (out / path.name).resolve():
                files.write_bytes(out / path.name, path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot write to the folder {out}: {error.strerror} (--out)") from error
    every = [row for own in rows.values() for row in own]
    found = _found(every, links, out, result)
    videos = _probed(found, out, workers, result)
    _check_intervals(every, videos, result)
    files.write_text(out / video_table.TABLE, _table(videos))
    files.write_text(out / "join.json", dump_json(asdict(result), indent=1))
    return result


def annotation_files(given: Sequence[Path]) -> list[Path]:
    """The CSV files among `given` and in its folders. Raises InputError without any, and where two have one name."""
    paths = [path for one in given for path in (sorted(one.glob("*.csv")) if one.is_dir() else [one])]
    paths = [path for path in paths if path.name != video_table.TABLE]
    if not paths:
        raise InputError(
            f"--annotations {' '.join(map(str, given))}: no CSV file; expected VAU-Bench's, or their folder"
        )
    if twice := [name for name, n in Counter(path.name for path in paths).items() if n > 1]:
        raise InputError(f"two annotation files are named {twice[0]}: give one of them another name")
    return paths


def _shared(rows: dict[str, list[Row]]) -> dict[str, list[str]]:
    names = list(rows)
    pairs = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    both = {f"{a} and {b}": sorted({row.video for row in vau_bench.shared_videos(rows[a], rows[b])}) for a, b in pairs}
    return {pair: videos for pair, videos in both.items() if videos}


def _link(out: Path, source: str, folders: list[Path]) -> list[Path]:
    """Links in `out` to the folders of a source's videos."""
    links = []
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise InputError(f"video folder {folder} does not exist (--videos {source}={folder})")
        link = out / (source if number == 0 else f"{source}_{number + 1}")
        if link.is_symlink():
            link.unlink()
        if link.resolve() != folder.resolve():
            link.symlink_to(folder.resolve(), target_is_directory=True)
        links.append(link)
    return links


def _found(rows: Iterable[Row], links: dict[str, list[Path]], out: Path, result: Joined) -> dict[Key, Path]:
    """The file of each video, relative to `out`."""
    listed = {source: _listed(own, out) for source, own in links.items()}
    wanted: dict[Key, Row] = {}
    for row in rows:
        wanted.setdefault(vau_bench.key_of(row), row)
    found, missing = {}, defaultdict(list)
    for (source, name), row in wanted.items():
        same = listed.get(source, {}).get(name, [])
        if not same:
            missing[source].append(row.video)
            continue
        if len(same) > 1:
            result.ambiguous[row.video] = [str(path) for path in same]
        found[source, name] = same[0]
    sources = [source for source in vau_bench.SOURCES if any(key[0] == source for key in wanted)]
    result.videos = {source: sum(key[0] == source for key in found) for source in sources}
    result.missing = {source: sorted(missing[source]) for source in sources}
    used = set(found.values())
    result.unused = {
        source: sum(path not in used for same in listed.get(source, {}).values() for path in same) for source in sources
    }
    return found


def _listed(links: Sequence[Path], out: Path) -> dict[str, list[Path]]:
    """Files below some links, relative to `out`, by their plain name in lower case."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for link in links:
        whole = link.resolve()
        for name, paths in by_plain_name(link).items():
            by_name[name] += [link.relative_to(out) / path.relative_to(whole) for path in paths]
    return by_name


def _probed(found: dict[Key, Path], out: Path, workers: int, result: Joined) -> dict[Key, Video]:
    """The rows of the table; a file that an earlier table knows, with its size, is not read again."""
    earlier = {(video.file, video.bytes): video for video in video_table.load(out).values() if video.seconds}
    sizes = {path: (out / path).stat().st_size for path in found.values()}
    new = sorted({path for path in found.values() if (str(path), sizes[path]) not in earlier})
    probes, unreadable = probe_all([out / path for path in new], workers) if new else ({}, {})
    result.unreadable = {str(path.relative_to(out)): str(error) for path, error in unreadable.items()}
    videos = {}
    for key, path in sorted(found.items()):
        known, probe = earlier.get((str(path), sizes[path])), probes.get(out / path)
        read = (probe.duration, probe.fps, probe.width, probe.height) if probe else (None,) * 4
        videos[key] = known or Video(str(path), sizes[path], *read)
    return videos


def _check_intervals(rows: Iterable[Row], videos: dict[Key, Video], result: Joined) -> None:
    for row in rows:
        video = videos.get(vau_bench.key_of(row))
        if isinstance(row.interval, tuple) and video and video.seconds and row.interval[1] > video.seconds + TOLERANCE:
            result.beyond_end[row.video] = f"{list(row.interval)} of {video.seconds:.1f} s"


def _table(videos: dict[Key, Video]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(video_table.COLUMNS)
    writer.writerows([*key, *("" if value is None else value for value in video)] for key, video in videos.items())
    return text.getvalue()


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    result = join(args.annotations, folders_of(args.videos), args.out, args.workers or os.cpu_count())
    print(result.told())
    print(f"weights, where you have none: {WEIGHTS}")
    places = {"everything": args.out, "findings": args.out / "join.json"}
    train = ("vau", "train", "--config=reproduce/vau_r1:rft_qa", "--workdir=runs/rft_qa", "--config.model=MODEL")
    train += (f"--config.data.csv={args.out / 'train.csv'}", f"--config.data.videos={args.out}")
    print(progress.summary("joined", places, [train]))


if __name__ == "__main__":
    cli.main("data join")
