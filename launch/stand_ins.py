"""Stand-ins for what a reproduction downloads: videos in the layouts of MSAD, UCF-Crime and ECVA under their real
names, a train.csv of the published composition, and a chat endpoint.

The annotations are the real ones. Videos have plausible lengths, sizes, rates and codecs, and show a moving square;
some are missing, some damaged.
"""

import contextlib
import csv
import functools
import hashlib
import json
import lzma
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np

from vau_jax.common import files
from vau_jax.common.files import InputError, dump_json
from vau_jax.common.progress import Progress
from vau_jax.datasets import vau_bench
from vau_jax.datasets.vau_bench import Row
from vau_jax.rl.judge import AXES

COMPOSITION = {"msad": 384, "ucf": 1194, "ecva": 1361}  # of train.csv, 2,939 rows
RELEASED = ("val", "test_msad", "test_ucf_crime", "test_ecva", "ucf_subset_train")
TESTS = RELEASED[1:4]
# Lengths of VAU-Bench's train and val videos, read off a published figure: upper end of a bin in seconds, videos in it
LENGTHS = (
    (10, 150),
    (20, 505),
    (30, 590),
    (40, 310),
    (50, 210),
    (60, 205),
    (70, 200),
    (80, 135),
    (90, 110),
    (100, 110),
)
LENGTHS += ((150, 410), (200, 210), (250, 100), (300, 70), (480, 310))
MISSING, DAMAGED = 40, 40  # one video in so many
SEGMENT = 2  # seconds that are encoded; a video repeats them


@dataclass(frozen=True)
class Look:
    """How a stand-in is encoded."""

    size: tuple[int, int]
    fps: int
    codec: str
    audio: bool


LOOKS = {
    "msad": (
        Look((1280, 720), 30, "libx264", True),
        Look((1280, 720), 25, "libx264", False),
        Look((1920, 1080), 30, "libx264", False),
    ),
    "ucf": (Look((320, 240), 30, "libx264", False), Look((320, 240), 30, "mpeg4", False)),
    "ecva": (
        Look((640, 360), 30, "libx264", True),
        Look((480, 854), 30, "libx264", True),
        Look((854, 480), 25, "libx265", False),
        Look((360, 640), 25, "libx264", False),
    ),
}


# --- Annotations --------------------------------------------------------------------------------------------------


def write_annotations(released: Path, out: Path, scale: int, seed: int = 0) -> list[Row]:
    """Writes train.csv, val.csv and the test files, of every `scale`-th row, to `out`; `released` holds the published
    files, also compressed as .csv.xz. Returns the rows of all. Raises InputError without them."""
    tables = {name: _read(released, name) for name in RELEASED}
    out.mkdir(parents=True, exist_ok=True)
    for name in ("val", *TESTS):
        _write(out / f"{name}.csv", tables[name][::scale])
    _write(out / "train.csv", _train(tables, scale, np.random.default_rng(seed)))
    rows = {name: vau_bench.load(out / f"{name}.csv")[0] for name in ("train", "val", *TESTS)}
    leaks = [row.video for name in TESTS for row in vau_bench.shared_videos(rows["train"], rows[name])]
    if leaks:
        raise RuntimeError(f"test videos are in the stand-in's train.csv: {leaks[:5]}")
    return [row for own in rows.values() for row in own]


def _read(released: Path, name: str) -> list[dict[str, str]]:
    plain, packed = released / f"{name}.csv", released / f"{name}.csv.xz"
    if not (plain.is_file() or packed.is_file()):
        raise InputError(f"{plain} does not exist: expected the annotation files of VAU-Bench (7xiang/VAU-Bench)")
    with plain.open(encoding="utf-8-sig") if plain.is_file() else lzma.open(packed, "rt", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file.read().splitlines(keepends=True)))


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, vau_bench.COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _train(tables: dict[str, list[dict[str, str]]], scale: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Rows in the published proportions: UCF-Crime's as released, of the others new names with fields of val rows."""
    result = tables["ucf_subset_train"][::scale]
    for source in ("msad", "ecva"):
        known = [row for row in tables["val"] if row["Video Name"].startswith(f"{source}_")]
        for number in range(COMPOSITION[source] // scale):
            row = dict(known[rng.integers(len(known))])
            name = (
                f"{10000 + number}" if source == "ecva" else f"{row['Anomaly Class'].replace(' ', '_')}_{1000 + number}"
            )
            result.append(row | {"Video Name": f"{source}_{name}.mp4"})
    return result


# --- Videos -------------------------------------------------------------------------------------------------------


def write_videos(rows: Sequence[Row], out: Path, longest: float, small: bool = False) -> dict[str, Path]:
    """Writes a video for every row under `out`, those that are there already aside; returns the folder of each source.
    No video is longer than `longest` seconds; `small`: none larger than 320 x 240, where time matters."""
    folders = {"msad": out / "MSAD", "ucf": out / "UCF_Crimes", "ecva": out / "ECVA"}
    wanted = {place(row): row for row in rows}
    shown = Progress("stand-ins", len(wanted), "video")
    for number, (inside, row) in enumerate(sorted(wanted.items()), start=1):
        path = folders[row.source] / inside
        chance = _chance(row)
        if not path.exists() and chance % MISSING:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = _video(out / "looks", row, longest, small)
            if chance // MISSING % DAMAGED == 0:
                data = data[: len(data) // 3] + bytes(len(data) // 3)
            files.write_bytes(path, data)
        shown.show(number)
    return folders


def place(row: Row) -> Path:
    """Where the archives of a row's data set unpack its video, below their folder."""
    name = Path(f"{vau_bench.plain_name(row.video)}.mp4")
    normal = row.anomaly_class in (None, "Normal")
    if row.source == "ecva":
        return "videos" / name
    if row.source == "msad":
        kind = name.stem.rpartition("_")[0] or "scenes"
        return "MSAD_normal_testing" / name if normal else Path("MSAD_anomaly") / kind / name
    label = vau_bench.ucf_class(row.video)
    if label == "Normal":
        testing = name.stem.startswith("Normal_Videos_")
        return Path("Testing_Normal_Videos_Anomaly" if testing else "Training-Normal-Videos-Part-1") / name
    return Path(name.stem.rstrip("0123456789_x").removesuffix("_x264").rstrip("0123456789")) / name


def _chance(row: Row) -> int:
    """A number that is a video's own."""
    return int.from_bytes(hashlib.sha256(vau_bench.plain_name(row.video).encode()).digest()[:6])


def seconds_of(row: Row) -> float:
    """A length after the published distribution, with room for the interval."""
    rng = np.random.default_rng(_chance(row))
    ends, counts = (np.asarray(column, float) for column in zip(*LENGTHS, strict=True))
    bin_ = rng.choice(len(ends), p=counts / counts.sum())
    start = ends[bin_ - 1] if bin_ else 2.0
    end = row.interval[1] if isinstance(row.interval, tuple) else 0.0
    return max(float(rng.uniform(start, ends[bin_])), end + 2.0)


def _video(looks: Path, row: Row, longest: float, small: bool) -> bytes:
    """An encoded segment, repeated up to the row's length."""
    own = LOOKS[row.source]
    look = own[_chance(row) // 7 % len(own)]
    if small:
        look = Look(
            tuple(int(side * 240 / max(look.size)) // 2 * 2 for side in look.size), look.fps, look.codec, look.audio
        )
    repeats = max(1, round(min(seconds_of(row), longest) / SEGMENT))
    target = looks / f"{hashlib.sha256(row.video.encode()).hexdigest()[:16]}.mp4"
    _repeat(_segment(looks, look), target, repeats)
    data = target.read_bytes()
    target.unlink()
    return data


@functools.cache
def _segment(looks: Path, look: Look) -> Path:
    """SEGMENT seconds that can follow one another: they begin with a key frame, and no frame looks ahead."""
    looks.mkdir(parents=True, exist_ok=True)
    width, height = look.size
    path = looks / f"{width}x{height}_{look.fps}_{look.codec}_{look.audio}.mp4"
    options = {"libx264": {"preset": "ultrafast", "bf": "0", "crf": "35"}, "libx265": {"preset": "ultrafast"}}
    quiet = {"x265-params": "log-level=none:bframes=0:keyint=60"} if look.codec == "libx265" else {}
    ground = np.random.default_rng(width + look.fps).integers(60, 200, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    ground = ground.repeat(16, 0).repeat(16, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        video = container.add_stream(look.codec, rate=look.fps, options=options.get(look.codec, {}) | quiet)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=16000) if look.audio else None
        for number in range(SEGMENT * look.fps):
            image = ground.copy()
            x = number * 4 % (width - 24)
            image[height // 2 : height // 2 + 24, x : x + 24] = (220, 40, 40)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, SEGMENT * 16000), np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def _repeat(segment: Path, target: Path, times: int) -> None:
    """The packets of a segment, `times` one after the other."""
    with av.open(str(segment)) as source, av.open(str(target), "w") as container:
        streams = {s.index: container.add_stream_from_template(s) for s in source.streams}
        read = [(p.stream.index, bytes(p), p.pts, p.dts, p.duration, p) for p in source.demux() if p.size]
        packets = [(*one[:4], p.time_base, p.is_keyframe) for *one, p in read]
        ends = {i: max(p + d for n, _, p, _, d, _ in read if n == i) for i in streams}
        lengths = {i: ends[i] - min(p for n, _, p, *_ in read if n == i) for i in streams}
        for number in range(times):
            for index, data, pts, dts, base, key in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = streams[index], base, key
                packet.pts, packet.dts = pts + number * lengths[index], dts + number * lengths[index]
                container.mux(packet)


# --- An endpoint --------------------------------------------------------------------------------------------------


PLAIN = "<think>It is seen.</think><answer>A</answer>"


def _reply(asked: str) -> str:
    """Marks, and two texts that differ from question to question."""
    rng = np.random.default_rng([*hashlib.sha256(asked.encode()).digest()])
    words = sorted(set(re.findall(r"[a-z]{4,}", asked)))
    reflect, revise = (" ".join(rng.choice(words, 14)) for _ in range(2))
    return dump_json({**dict.fromkeys(AXES, 5), "reflect": f"It shows {reflect}.", "revise": f"So there is {revise}."})


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """The address of a chat endpoint on this machine that answers as a judge with marks, as a teacher with words of the
    question, else with a letter."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = _reply(dump_json(asked)) if "response_format" in asked else PLAIN
            body = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
            data = dump_json(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
