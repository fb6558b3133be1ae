"""VAU-Bench's annotation files: what is irregular in them, and their join with the videos you have.

    vau data audit FILE... [--source=auto] [--protocol=clean] [--rows]
    vau data import --out=DIR [--train FILE...] [--val FILE...] [--test FILE...] \
        [--videos msad=DIR ucf=DIR ecva=DIR] [--seed=0]

`audit` prints what is changed, left out or doubtful, and videos that two files share. `import` writes DIR/train.jsonl,
val.jsonl and test.jsonl of corrected rows, options shuffled, each with its video's path, duration, frames a second and
size; DIR/import.json with all findings; DIR/SHA256SUMS. Train and val rows whose video is in a later split are
left out. A row without a usable video stays, so that it is counted; training and evaluation list it.
"""

import argparse
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vau_jax import cli
from vau_jax.common import files
from vau_jax.common.files import InputError, dump_json
from vau_jax.common.progress import Progress
from vau_jax.data.video.clips import Probe
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.data.video.listing import videos_below
from vau_jax.datasets import array_record, vau_bench
from vau_jax.datasets.vau_bench import Row

SPLITS = ("train", "val", "test")
TOLERANCE = 1.0  # seconds that an interval may reach beyond the end of its video before it is flagged


# --- audit --------------------------------------------------------------------------------------------------------


def audit(paths: Sequence[str], source: str, protocol: str, each_row: bool) -> str:
    """The table of every file, its denominators, and the videos that two of them share."""
    lines, loaded = [], {}
    for path in paths:
        rows, result = vau_bench.load(path, source, protocol)
        loaded[path] = rows
        counts = ", ".join(f"{task} {n}" for task, n in vau_bench.denominators(rows).items())
        lines += [result.table(), f"  scored by: {counts}"]
        if each_row:
            lines += [f"    line {e.line}  {e.video}  {e.action} {e.what}: {e.reason}" for e in result.entries]
    for number, first in enumerate(paths):
        for second in paths[number + 1 :]:
            if shared := vau_bench.shared_videos(loaded[first], loaded[second]):
                lines.append(f"{first} and {second} share {len(shared)}: {', '.join(row.video for row in shared)}")
    return "\n".join(lines)


# --- import -------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """The findings of an import, as import.json stores them."""

    audits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by annotation file
    leaks: dict[str, list[str]] = field(default_factory=dict)  # by split: videos left out of it
    without_folder: dict[str, int] = field(default_factory=dict)  # rows by source, where no folder was given for it
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # video: why
    ambiguous: dict[str, list[str]] = field(default_factory=dict)  # video: files that may be it
    surplus: list[str] = field(default_factory=list)  # files that no row names
    beyond_end: dict[str, str] = field(default_factory=dict)  # video: interval and duration
    rows: dict[str, int] = field(default_factory=dict)  # by split

    def table(self) -> str:
        lines = [f"{split}: {n} rows" for split, n in self.rows.items()]
        lines += [
            f"{split}: {len(names)} left out, also in a later split" for split, names in self.leaks.items() if names
        ]
        lines += [f"{source}: no folder of videos given, {n} rows" for source, n in self.without_folder.items()]
        kinds = {
            "missing": "videos are missing",
            "unreadable": "videos cannot be read",
            "ambiguous": "videos may be one of several files",
            "surplus": "files belong to no row",
            "beyond_end": "intervals reach beyond the end of their video",
        }
        for name, words in kinds.items():
            result = getattr(self, name)
            lines.append(f"{len(result):5d}  {words}")
            lines += [f"         {line}" for line in _some(result)]
        return "\n".join(lines)


def _some(findings: list[str] | dict[str, Any], most: int = 5) -> list[str]:
    lines = [f"{key}: {value}" for key, value in findings.items()] if isinstance(findings, dict) else findings
    return lines[:most] + ([f"... all in import.json ({len(lines)})"] if len(lines) > most else [])


def import_splits(
    out: Path,
    annotation_files: dict[str, list[str]],
    folders: dict[str, Path],
    seed: int,
    workers: int,
    records: bool = False,
) -> Findings:
    """Writes the splits; `annotation_files` by split, `folders` of videos by source; `records`: as ArrayRecord too."""
    result = Findings()
    splits = {split: _load(paths, result) for split, paths in annotation_files.items() if paths}
    if not splits:
        raise InputError("nothing to import: give annotation files with --train, --val or --test")
    splits = _without_leaks(splits, result)
    splits = {split: [_shuffled(row, seed) for row in rows] for split, rows in splits.items()}
    if folders:
        splits = _joined(splits, folders, workers, result)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the folder {out}: {error.strerror} (--out)") from error
    texts = {}
    for split, rows in splits.items():
        texts[f"{split}.jsonl"] = "".join(dump_json(vau_bench.to_json(row)) + "\n" for row in rows)
        result.rows[split] = len(rows)
    texts["import.json"] = dump_json(asdict(result), indent=1)
    for name, text in texts.items():
        files.write_text(out / name, text)
    sums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in texts.items()]
    files.write_text(out / "SHA256SUMS", "".join(sums))
    if records:
        for split, rows in splits.items():
            array_record.write(out / f"{split}.array_record", rows)
    return result


def _load(paths: list[str], findings: Findings) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        some, noted = vau_bench.load(path)
        findings.audits[path] = [vars(entry) for entry in noted.entries]
        rows += some
    return rows


def _without_leaks(splits: dict[str, list[Row]], findings: Findings) -> dict[str, list[Row]]:
    """Every split without the videos of a later one: test videos stay in the test split."""
    order = [split for split in SPLITS if split in splits]
    clean = {}
    for number, split in enumerate(order):
        later = [row for other in order[number + 1 :] for row in splits[other]]
        leaked = {row.video for row in vau_bench.shared_videos(splits[split], later)}
        findings.leaks[split] = sorted(leaked)
        clean[split] = [row for row in splits[split] if row.video not in leaked]
    return clean


def _shuffled(row: Row, seed: int) -> Row:
    """Options in an order that depends on the seed and the video alone."""
    rng = np.random.default_rng([seed, *hashlib.sha256(vau_bench.plain_name(row.video).encode()).digest()])
    return vau_bench.shuffle_options(row, rng.permutation(4))


def _joined(
    splits: dict[str, list[Row]], folders: dict[str, Path], workers: int, findings: Findings
) -> dict[str, list[Row]]:
    """Rows with the paths of their videos, relative to their common folder, and the properties of the files."""
    root = common_folder(list(folders.values()))
    listed = {source: by_plain_name(folder) for source, folder in folders.items()}
    every = [row for rows in splits.values() for row in rows]
    findings.without_folder = dict(Counter(row.source for row in every if row.source not in folders))
    paths = {
        (row.source, row.video): _find(row, listed[row.source], findings) for row in every if row.source in folders
    }
    named = {path for path in paths.values() if path}
    surplus = [path for by_name in listed.values() for same in by_name.values() for path in same if path not in named]
    findings.surplus = sorted(str(path.relative_to(root)) for path in surplus)
    probes, unreadable = probe_all(sorted(named), workers)
    findings.unreadable = {str(path): str(error) for path, error in unreadable.items()}
    return {
        split: [_with_video(row, paths.get((row.source, row.video)), probes, root, findings) for row in rows]
        for split, rows in splits.items()
    }


def common_folder(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds all of `folders`."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def by_plain_name(folder: Path) -> dict[str, list[Path]]:
    """Video files in a folder and those below it, by their plain name in lower case."""
    by_name: dict[str, list[Path]] = {}
    for path in videos_below(folder):
        by_name.setdefault(vau_bench.plain_name(path.name).lower(), []).append(path)
    return by_name


def _find(row: Row, by_name: dict[str, list[Path]], findings: Findings) -> Path | None:
    """The file of a row: MSAD's `Fire_3.mp4`, UCF-Crime's `Arson/Arson011_x264.mp4`, ECVA's `17.mp4`, whatever their
    folder, ending and case, with or without the prefix of the source."""
    same = by_name.get(vau_bench.plain_name(row.video).lower(), [])
    if not same:
        findings.missing.append(row.video)
        return None
    if len(same) > 1:
        findings.ambiguous[row.video] = [str(path) for path in same]
    return same[0]


def probe_all(paths: Sequence[Path], workers: int) -> tuple[dict[Path, Probe], dict[Path, VideoError]]:
    """The probe of each file, and why there is none of those that cannot be read."""
    probes: dict[Path, Probe] = {}
    unreadable: dict[Path, VideoError] = {}
    pool, shown = DecoderPool(workers), Progress("videos", len(paths), "video")

    def one(path: Path) -> Probe | VideoError:
        try:
            return pool.probe(path)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(workers) as threads:
        for number, (path, result) in enumerate(zip(paths, threads.map(one, paths), strict=True), start=1):
            if isinstance(result, Probe):
                probes[path] = result
            else:
                unreadable[path] = result
            shown.show(number, f"unreadable {len(unreadable)}")
    pool.close()
    return probes, unreadable


def _with_video(row: Row, path: Path | None, probes: dict[Path, Probe], root: Path, findings: Findings) -> Row:
    if path is None:
        return row
    video = str(path.relative_to(root))
    if path not in probes:
        return replace(row, video=video)
    probe = probes[path]
    if isinstance(row.interval, tuple) and row.interval[1] > probe.duration + TOLERANCE:
        findings.beyond_end[video] = f"{list(row.interval)} of {probe.duration:.1f} s"
    return replace(row, video=video, **asdict(probe))


# --- command line -------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """The programs: see their options in `vau_jax.cli`."""
    if args.command == "data audit":
        print(audit(args.files, args.source, args.protocol, args.rows))
        return
    folders = {source: own[-1] for source, own in folders_of(args.videos).items()}
    given = {split: getattr(args, split) for split in SPLITS}
    workers = args.workers or os.cpu_count()
    result = import_splits(args.out, given, folders, args.seed, workers, args.array_record)
    print(result.table())
    if folders:
        print(f"use with --config.data.videos={common_folder(list(folders.values()))}")


def folders_of(given: Sequence[str]) -> dict[str, list[Path]]:
    """`SOURCE=DIR` by source, a source as often as it has folders. Raises InputError."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for item in given:
        source, separator, folder = item.partition("=")
        if not separator or source not in vau_bench.SOURCES:
            raise InputError(f"--videos {item}: expected SOURCE=DIR with SOURCE one of {', '.join(vau_bench.SOURCES)}")
        folders[source].append(Path(folder))
    return dict(folders)


if __name__ == "__main__":
    cli.main("data")
