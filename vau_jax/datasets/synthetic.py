"""Renders small surveillance-like clips with known anomalies, so that the whole system runs without a download.

Every clip is a scene: a static textured background (a *layout*), people and vehicles that move about, camera jitter,
distractors, and at most one anomaly, visible only inside its interval, with its own motion and colour.
Annotations use VAU-Bench's 13 CSV columns, so that real data takes the same path. Beside each CSV lies a JSONL of
reflection records (initial reasoning, draft, reflection, revision), composed from the scene's facts; see
`vau_jax.tasks.example.Reflection`. Layouts of the test split never appear in training.

    make_dataset("runs/demo/data", {"train": 3000, "val": 60, "test": 240}, seed=0)
"""

import csv
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vau_jax.common.files import dump_json, write_text
from vau_jax.common.progress import Progress
from vau_jax.datasets.vau_bench import COLUMNS

FPS_CHOICES = (10, 12, 15, 20, 25, 30)
SIZES = ((96, 64), (64, 96))  # (width, height): landscape and portrait
LAYOUTS = {"train": range(0, 600), "val": range(600, 660), "test": range(660, 900)}
NORMAL_SHARE = 0.2
WRONG_DRAFT_SHARE = 0.4


@dataclass(frozen=True)
class Kind:
    """The words for one class: in one word, the visible event, the main object, the consequence."""

    word: str
    cue: str
    key_object: str
    effect: str


KINDS = {
    "Normal": Kind("calm", "ordinary movement", "none", "Nobody is in danger."),
    "Fire": Kind("fire", "orange flames", "flames", "People nearby are in danger."),
    "Explosion": Kind("blast", "white flash", "blast", "Things close to it are destroyed."),
    "Traffic_accident": Kind("crash", "yellow lights blinking", "vehicles", "The road is blocked."),
    "Water_incident": Kind("flood", "blue water rising", "water", "The ground is under water."),
    "Object_falling": Kind("boxes", "purple boxes dropping", "boxes", "Anyone below may be hit."),
    "People_falling": Kind("fall", "pink person lying", "person in pink", "The person may be hurt."),
    "Fighting": Kind("fight", "red people striking", "people in red", "Both may be hurt."),
    "Vandalism": Kind("paint", "green paint spraying", "green paint", "The wall is spoiled."),
}
ANOMALIES = tuple(label for label in KINDS if label != "Normal")
PLACES = ("street", "yard", "hall", "station")


@dataclass(frozen=True)
class Scene:
    """The facts of one clip; everything drawn and everything said about it follows from these."""

    name: str
    seed: int
    layout: int
    label: str
    width: int
    height: int
    fps: int
    duration: float  # seconds
    interval: tuple[float, float] | None  # seconds, None for Normal

    @property
    def place(self) -> str:
        return PLACES[self.layout % len(PLACES)]


def draw_scene(name: str, seed: int, layouts: range, label: str) -> Scene:
    """Draws the facts of a clip at random: layout, size, frame rate, duration (4 to 12 s) and the event's interval."""
    rng = np.random.default_rng([seed, 1])
    width, height = SIZES[rng.integers(len(SIZES))]
    duration = float(rng.integers(4, 13))
    interval = None
    if label != "Normal":
        length = float(rng.integers(2, min(6, int(duration))))
        start = float(rng.integers(0, int(duration - length) + 1))
        interval = (start, start + length)
    fps = int(rng.choice(FPS_CHOICES))
    return Scene(name, seed, int(rng.choice(layouts)), label, width, height, fps, duration, interval)


# --- Drawing ------------------------------------------------------------------------------------------------------


def _box(image: np.ndarray, x: float, y: float, w: float, h: float, color: tuple[int, int, int]) -> None:
    """Fills the rectangle with top left corner (x, y), clipped to the image."""
    top, left = max(0, round(y)), max(0, round(x))
    image[top : max(top, round(y + h)), left : max(left, round(x + w))] = color


def _disc(
    image: np.ndarray, x: float, y: float, radius: float, color: tuple[int, int, int], alpha: float = 1.0
) -> None:
    top, left = max(0, int(y - radius)), max(0, int(x - radius))
    patch = image[top : max(top, int(y + radius) + 2), left : max(left, int(x + radius) + 2)]
    rows, cols = np.ogrid[top : top + patch.shape[0], left : left + patch.shape[1]]
    inside = (rows - y) ** 2 + (cols - x) ** 2 <= radius**2
    patch[inside] = patch[inside] * (1 - alpha) + np.multiply(color, alpha)


def _person(
    image: np.ndarray, x: float, ground: float, color: tuple[int, int, int], lying: bool = False, size: float = 1.0
) -> None:
    """A standing person is 5 wide and 15 high, times `size`, with the feet at (x, ground); a lying one 20 wide."""
    skin = (205, 165, 135)
    if lying:
        _box(image, x - 9 * size, ground - 6 * size, 16 * size, 6 * size, color)
        _disc(image, x + 9 * size, ground - 3 * size, 2.5 * size, skin)
    else:
        _box(image, x - 2.5 * size, ground - 11 * size, 5 * size, 11 * size, color)
        _disc(image, x, ground - 13 * size, 2.2 * size, skin)


def _vehicle(image: np.ndarray, x: float, ground: float, color: tuple[int, int, int], size: float = 1.0) -> None:
    """20 long and 12 high, times `size`, with its rear at x."""
    _box(image, x, ground - 8 * size, 20 * size, 7 * size, color)
    _box(image, x + 4 * size, ground - 12 * size, 11 * size, 4 * size, (60, 70, 80))
    for wheel in (4, 15):
        _disc(image, x + wheel * size, ground - size, 2 * size, (20, 20, 20))


DULL = ((70, 75, 85), (95, 85, 75), (110, 110, 105), (60, 80, 70), (120, 105, 95))


def background(layout: int, width: int, height: int) -> np.ndarray:
    """The static part of a layout: walls, ground, windows, a sign and texture, as float32 [H + 8, W + 8, 3]."""
    rng = np.random.default_rng([layout, 2])
    h, w = height + 8, width + 8
    wall, ground = rng.integers(70, 170, 3), rng.integers(60, 130, 3)
    wall, ground = 0.5 * wall + 0.5 * wall.mean(), 0.5 * ground + 0.5 * ground.mean()  # walls are greyish
    image = np.empty((h, w, 3), np.float32)
    horizon = int(h * rng.uniform(0.4, 0.6))
    image[:horizon], image[horizon:] = wall, ground
    for _ in range(rng.integers(2, 7)):
        shade = tuple(int(c) for c in rng.integers(50, 180) + rng.integers(-15, 16, 3))
        _box(image, rng.uniform(0, w), rng.uniform(0, horizon - 6), rng.uniform(5, 20), rng.uniform(5, 16), shade)
    for _ in range(rng.integers(1, 4)):  # markings on the ground
        _box(image, rng.uniform(-5, w), rng.uniform(horizon, h), rng.uniform(8, 40), 1.5, (170, 168, 160))
    sign = ((190, 120, 50), (70, 100, 160), (80, 140, 80), (170, 80, 90))[rng.integers(4)]  # a static distractor
    _box(image, rng.uniform(2, w - 8), rng.uniform(0, horizon - 6), 5, 4, sign)
    coarse = rng.normal(0, 8, (h // 4 + 1, w // 4 + 1, 1)).repeat(4, 0).repeat(4, 1)[:h, :w]
    return image + coarse.astype(np.float32) + rng.normal(0, 4, (h, w, 1)).astype(np.float32)


class Painter:
    """Renders the frames of one scene. All random choices are made once, so a frame depends on its time alone."""

    def __init__(self, scene: Scene, shake: bool = True) -> None:
        rng = np.random.default_rng([scene.seed, 3])
        self.scene, self.rng = scene, rng
        self.base = background(scene.layout, scene.width, scene.height)
        self.ground = scene.height * rng.uniform(0.72, 0.92)
        self.noise = rng.normal(0, rng.uniform(2, 7), (6, scene.height, scene.width, 1)).astype(np.float32)
        self.light = rng.uniform(0.85, 1.15)
        self.shake = rng.uniform(0, 1.5) * shake
        self.walkers = [
            (rng.uniform(0, scene.width), rng.uniform(-9, 9), rng.uniform(0.66, 0.98) * scene.height, DULL[i])
            for i in rng.integers(0, len(DULL), rng.integers(1, 4))
        ]
        self.cars = [
            (rng.uniform(-20, scene.width), rng.choice([-1, 1]) * rng.uniform(12, 30), self.ground + 2, DULL[i])
            for i in rng.integers(0, len(DULL), rng.integers(0, 2))
        ]
        self.lamp = (
            (rng.uniform(0, scene.width), rng.uniform(0, 20), rng.uniform(0.5, 2)) if rng.random() < 0.3 else None
        )
        self.spot = rng.uniform(0.3, 0.7) * scene.width  # where the anomaly happens
        self.scale = rng.uniform(1.1, 1.5)  # of the anomaly

    def frame(self, t: float) -> np.ndarray:
        """uint8 [H, W, 3] at `t` seconds."""
        scene, rng = self.scene, self.rng
        dy, dx = np.clip(rng.normal(4, self.shake, 2).round().astype(int), 0, 8)
        image = self.base[dy : dy + scene.height, dx : dx + scene.width].copy()
        for x, speed, ground, color in self.walkers:
            _person(image, (x + speed * t) % (scene.width + 10) - 5, ground, color)
        for x, speed, ground, color in self.cars:
            _vehicle(image, (x + speed * t) % (scene.width + 40) - 20, ground, color)
        if self.lamp and (t * self.lamp[2]) % 1 < 0.5:
            _disc(image, self.lamp[0], self.lamp[1], 1.5, (235, 230, 200))
        if scene.interval and scene.interval[0] <= t < scene.interval[1]:
            image = EVENTS[scene.label](self, image, t - scene.interval[0], scene.interval[1] - scene.interval[0])
        image = image * self.light + self.noise[rng.integers(len(self.noise))]
        return np.clip(image, 0, 255).astype(np.uint8)


# Every event is f(painter, image, seconds since its start, its length in seconds) -> image.


def _fire(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    size = p.scale * (7 + 4 * min(1.0, t / 1.0))
    for i in range(4):
        _disc(image, p.spot + p.rng.normal(0, 4), p.ground - size * (1.2 + 0.5 * i), 5, (50, 48, 46), 0.6)
    for color, share in (((225, 70, 15), 1.0), ((250, 150, 20), 0.7), ((255, 225, 90), 0.35)):
        _disc(
            image,
            p.spot + p.rng.normal(0, 1.5),
            p.ground - size * share,
            size * share * p.rng.uniform(0.85, 1.1),
            color,
        )
    return image


def _explosion(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    if t < 0.6:
        image = image + (230 - image) * (0.7 * (1 - t / 0.6))
    radius = p.scale * (8 + 10 * min(1.0, t / 0.8))
    _disc(image, p.spot, p.ground - 12, radius, (185, 185, 180), 0.85)
    _disc(image, p.spot, p.ground - 12, max(2.0, radius * (1 - t / length)), (255, 250, 215))
    return image


def _traffic_accident(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    gap = 14 * max(0.0, 1 - t / 0.5)
    shake = p.rng.normal(0, 1.0, 2) if t > 0.5 else (0, 0)
    _vehicle(image, p.spot - 20 * p.scale - gap + shake[0], p.ground + 2, (235, 235, 235), p.scale)
    _vehicle(image, p.spot + gap + shake[1], p.ground + 1, (40, 40, 50), p.scale)
    if int(t * 4) % 2 == 0:
        for dx in (-19, 0, 17):
            _disc(image, p.spot + dx * p.scale, p.ground - 7, 4 * p.scale, (255, 225, 0))
    return image


def _water(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    height, width = image.shape[:2]
    rise = 0.22 + 0.2 * np.sin(np.pi * min(1.0, t / length))
    surface = height * (1 - rise * p.scale) + 1.5 * np.sin(np.arange(width) / 5 + 6 * t)
    wet = np.arange(height)[:, None] > surface[None]
    image[wet] = 0.25 * image[wet] + 0.75 * np.array([30, 100, 225])
    return image


def _object_falling(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    for i in range(3):
        progress = (t * 1.1 + i / 3) % 1
        y = -8 + (p.ground + 4) * progress**1.3
        _box(image, p.spot + 14 * (i - 1) - 5, y, 10 * p.scale, 10 * p.scale, (150, 40, 200))
    return image


def _people_falling(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    _person(image, p.spot, p.ground, (255, 100, 190), lying=t > 0.3, size=1.5 * p.scale)
    return image


def _fighting(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    size = 1.2 * p.scale
    lunge = 2.5 * np.sin(14 * t)
    for side in (-1, 1):
        x = p.spot + side * (4.5 * size + lunge * side)
        _person(image, x, p.ground, (215, 30, 30), size=size)
        _box(image, min(x, x - side * 6 * size), p.ground - 10 * size, 6 * size, 2 * size, (215, 30, 30))
    return image


def _vandalism(p: Painter, image: np.ndarray, t: float, length: float) -> np.ndarray:
    _person(image, p.spot - 10, p.ground, (40, 40, 45))
    size = p.scale * (8 + 5 * min(1.0, t))
    for _ in range(5):
        _disc(image, p.spot + 4 + p.rng.normal(0, 3), p.ground - 14 + p.rng.normal(0, 3), size * 0.6, (40, 225, 60))
    return image


EVENTS = {
    "Fire": _fire,
    "Explosion": _explosion,
    "Traffic_accident": _traffic_accident,
    "Water_incident": _water,
    "Object_falling": _object_falling,
    "People_falling": _people_falling,
    "Fighting": _fighting,
    "Vandalism": _vandalism,
}


def frames(scene: Scene, shake: bool = True) -> Iterator[np.ndarray]:
    """Yields every frame of the scene in order, uint8 [H, W, 3]; without `shake` by a camera that is still."""
    painter = Painter(scene, shake)
    for index in range(round(scene.duration * scene.fps)):
        yield painter.frame(index / scene.fps)


def encode(path: str | os.PathLike, images: Iterator[np.ndarray], fps: int | Fraction, codec: str = "libx264") -> None:
    """Writes frames as a video file, complete or not at all."""
    part = Path(f"{path}.part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "26"} if codec == "libx264" else {}
        stream.pix_fmt = "yuv420p"
        for image in images:
            if not stream.codec_context.is_open:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(part, path)


# --- Words --------------------------------------------------------------------------------------------------------


def annotation(scene: Scene) -> dict[str, object]:
    """The scene's row in VAU-Bench's columns.

    The four options are drawn so that the text alone gives no hint: `Normal` stands among the wrong options
    of an anomalous clip just often enough that it is right in one of four of its appearances.
    """
    rng = np.random.default_rng([scene.seed, 4])
    others = [label for label in ANOMALIES if label != scene.label]
    wrong = list(rng.permutation(others)[:3])
    if scene.label != "Normal" and rng.random() < 3 * NORMAL_SHARE / (1 - NORMAL_SHARE):
        wrong[0] = "Normal"
    options = rng.permutation([scene.label, *wrong])
    kind = KINDS[scene.label]
    sections = {
        "Specific Anomaly Type": scene.label,
        "Location": scene.place,
        "Key Evidence": kind.cue,
        "Detailed Explanation": f"The {scene.place} shows {kind.cue}.",
        "Cause and Effect": kind.effect,
        "Conclusion": f"In the {scene.place}: {kind.word}.",
    }
    start, end = scene.interval or (0.0, 0.0)
    values = [
        f"{scene.name}.mp4",
        "What happens?",
        *(KINDS[option].word for option in options),
        "ABCD"[list(options).index(scene.label)],
        kind.key_object,
        f"A camera watches a {scene.place}. It shows {kind.cue}. {kind.effect}",
        " ".join(f"### {title}: {text}" for title, text in sections.items()),
        scene.label,
        start,
        end,
    ]
    return dict(zip(COLUMNS, values, strict=True))


def reflections(scene: Scene, row: dict[str, object]) -> list[dict[str, object]]:
    """One reflection record for each task of DRAFTS, in the fields of `Reflection`; some drafts are wrong."""
    rng = np.random.default_rng([scene.seed, 5])
    kind = KINDS[scene.label]
    records = []
    for task, (draft_of, ending) in DRAFTS.items():
        wrong = rng.random() < WRONG_DRAFT_SHARE
        draft = draft_of(scene, row, wrong, rng)
        records.append(
            {
                "video": row["Video Name"],
                "task": task,
                "think": timeline(scene),
                "draft": draft,
                "draft_is_right": not wrong,
                "reflect": f"{'Wrong' if wrong else 'Right'}, {kind.cue}.",
                "revise": f"So {kind.word}.{ending}",
            }
        )
    return records


def timeline(scene: Scene) -> str:
    """The initial reasoning: what each second of the clip shows, in a word: `0 calm 1 fire 2 fire 3 calm`."""
    start, end = scene.interval or (0, 0)
    return " ".join(
        f"{second} {KINDS[scene.label if start <= second < end else 'Normal'].word}"
        for second in range(int(scene.duration))
    )


def _letter(scene: Scene, row: dict[str, object], wrong: bool, rng: np.random.Generator) -> dict[str, object]:
    """The right option, or another."""
    right = str(row["Correct Option"])
    return {"choice": str(rng.choice([c for c in "ABCD" if c != right])) if wrong else right}


def _label(scene: Scene, row: dict[str, object], wrong: bool, rng: np.random.Generator) -> dict[str, object]:
    """The scene's class, or another."""
    return {"label": str(rng.choice([k for k in KINDS if k != scene.label])) if wrong else scene.label}


def _interval(scene: Scene, row: dict[str, object], wrong: bool, rng: np.random.Generator) -> dict[str, object]:
    """The scene's interval, or another, or none."""
    if not wrong:
        return {"interval": scene.interval}
    if scene.interval and rng.random() < 0.3:
        return {"interval": None}
    length = float(rng.integers(2, min(6, int(scene.duration))))
    start = float(rng.integers(0, int(scene.duration - length) + 1))
    return {"interval": (start, start + length)}


# By task: its draft answer, and what ends the revised reasoning.
DRAFTS = {"qa": (_letter, " {check}"), "grounding": (_interval, ""), "classification": (_label, "")}


# --- A whole data set ---------------------------------------------------------------------------------------------


def split_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """The scenes of a split: every class equally often, except for Normal's larger share."""
    rng = np.random.default_rng([seed, *split.encode()])
    normal = round(NORMAL_SHARE * count)
    labels = ["Normal"] * normal + [ANOMALIES[i % len(ANOMALIES)] for i in range(count - normal)]
    return [
        draw_scene(f"{split}_{index:05d}", int(rng.integers(2**31)), LAYOUTS[split], str(label))
        for index, label in enumerate(rng.permutation(labels))
    ]


def write_example(path: Path, label: str = "Fire", seed: int = 8) -> None:
    """Renders one clip of a class, with the camera still; by default a fire of 2 s in a clip of 5 s."""
    scene = draw_scene(path.stem, seed, LAYOUTS["test"], label)
    encode(path, frames(scene, shake=False), scene.fps)


def _render(task: tuple[Scene, Path, bool]) -> None:
    scene, path, shake = task
    if not path.exists():
        encode(path, frames(scene, shake), scene.fps)


def _write_annotations(folder: Path, split: str, scenes: list[Scene]) -> None:
    rows = [annotation(scene) for scene in scenes]
    part = folder / f"{split}.csv.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, folder / f"{split}.csv")
    records = [record for scene, row in zip(scenes, rows, strict=True) for record in reflections(scene, row)]
    write_text(folder / f"{split}_reflection.jsonl", "".join(dump_json(record) + "\n" for record in records))


def make_dataset(
    folder: str | os.PathLike, counts: dict[str, int], seed: int = 0, workers: int | None = None, shake: bool = True
) -> Path:
    """Renders `counts` clips a split into `folder`/videos and writes `folder`/{split}.csv and {split}_reflection.jsonl.

    Clips that exist are kept, so a killed call resumes where it stopped; a finished folder made from the same arguments
    is left alone. Returns the folder.
    """
    folder = Path(folder)
    request = {
        "counts": counts,
        "seed": seed,
        "shake": shake,
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    done = folder / "done.json"
    if done.exists() and json.loads(done.read_text()) == request:
        print(f"videos: {sum(counts.values())} clips are there already ({folder})")
        return folder
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    started = folder / "request.json"
    if started.exists() and json.loads(started.read_text()) != request:
        for old in videos.glob("*.mp4"):  # rendered from another request: the names mean other scenes now
            old.unlink()
    write_text(started, dump_json(request))
    scenes = {split: split_scenes(split, count, seed) for split, count in counts.items()}
    tasks = [(scene, videos / f"{scene.name}.mp4", shake) for group in scenes.values() for scene in group]
    progress = Progress("videos", len(tasks), "video")
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for index, _ in enumerate(pool.map(_render, tasks, chunksize=16)):
            progress.show(index + 1)
    for split, group in scenes.items():
        _write_annotations(folder, split, group)
    write_text(done, dump_json(request))
    return folder
