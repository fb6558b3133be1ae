"""Speed from video file to patch arrays: ours, beside qwen-vl-utils with decord and transformers' video processor.

    python benchmarks/video_pipeline.py [--sizes 320x240 1280x720] [--seconds 30 300] [--rounds=3] [--clips=DIR]
    python benchmarks/video_pipeline.py --memory=10000       resident memory over so many clips, instead

Renders H.264 clips (25 frames a second, x264's defaults: a still textured ground, four moving objects, sensor noise),
kept in --clips. Each reader runs in its own process, pinned to one core; they take turns, and medians are
reported. All sample as VAU-R1 trains: 2 frames a second, 3584 visual tokens a video. Ours gives uint8 patches, which
are normalised on the device; the reference float32 ones. "cached" is ours from the frame cache. --workers 1 2 (the
default) measures one process, and then two that read at once, a core each.

The last line is one JSON object: frames_per_s and videos_per_s (ours, all clips, the first of --workers), and by clip
the seconds of every reader and how many times faster ours is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vau_jax.common.files import dump_json
from vau_jax.data.processor import encode_visual
from vau_jax.data.video import clips, frame_cache
from vau_jax.data.video.clips import Clip, Sampling, VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.models.config import VisionConfig

FPS = 25
OPTIONS = VideoOptions.from_item(clips.BUDGETS["vau_r1"])
SAMPLING = Sampling(OPTIONS, factor=28, multiple=2)
VISION = VisionConfig(  # only the patches' sizes matter here: Qwen2-VL's and Qwen2.5-VL's
    depth=1,
    hidden_size=64,
    intermediate_size=128,
    num_heads=1,
    out_hidden_size=64,
    in_channels=3,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    activation="silu",
)
READERS = ("ours", "reference", "cached")


# --- Clips --------------------------------------------------------------------------------------------------------


def scene(count: int, width: int, height: int) -> Iterator[np.ndarray]:
    """Frames of a fixed camera, uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)

    def texture(h: int, w: int, cell: int) -> np.ndarray:
        small = rng.integers(0, 256, (h // cell + 2, w // cell + 2, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)).astype(np.int16)

    ground = texture(height, width, 6) // 2 + texture(height, width, 40) // 2
    objects = [texture(height // 5, width // 8, 3) for _ in range(4)]
    noise = rng.normal(0, 1.5, (height + 64, width + 64, 1)).round().astype(np.int16)
    for number in range(count):
        frame = ground.copy()
        for k, thing in enumerate(objects):
            x = int((number * (1 + k) * 0.4 + k * width / 5) % (width - thing.shape[1]))
            y = k * height // 5
            frame[y : y + thing.shape[0], x : x + thing.shape[1]] = thing
        dy, dx = rng.integers(0, 64, 2)
        yield np.clip(frame + noise[dy : dy + height, dx : dx + width], 0, 255).astype(np.uint8)


def render(folder: Path, width: int, height: int, seconds: int) -> Path:
    path = folder / f"{width}x{height}_{seconds}s.mp4"
    if path.exists():
        return path
    print(f"rendering {path}", flush=True)
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in scene(seconds * FPS, width, height):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    part.rename(path)
    return path


# --- Readers, each in its own process ---------------------------------------------------------------------------


def our_reader(cache: Path | None) -> Callable[[Path], int]:
    """A file to patches through a decoding process, or from the cache; returns the number of frames."""
    frames = frame_cache.FrameCache(cache, DecoderPool(1).read)

    def read(path: Path) -> int:
        clip, cached = frames.read(path, SAMPLING)
        assert cached == (cache is not None)
        encode_visual(clip.frames, VISION, clip.seconds_per_frame, clip.times)
        return len(clip.frames)

    return read


def reference_reader() -> Callable[[Path], int]:
    """The same by qwen-vl-utils and transformers, as VAU-R1's training calls them."""
    os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
    import torch
    import torchvision_operators  # noqa: F401 - beside this file, and before anything of transformers
    from qwen_vl_utils import process_vision_info
    from transformers import Qwen2VLVideoProcessor

    torch.set_num_threads(1)
    processor = Qwen2VLVideoProcessor()

    def read(path: Path) -> int:
        item = {"type": "video", "video": str(path), "fps": 2.0, **clips.BUDGETS["vau_r1"]}
        _, videos, _ = process_vision_info([{"role": "user", "content": [item]}], return_video_kwargs=True)
        processor(videos=videos, do_resize=False, do_sample_frames=False, return_tensors="pt")
        return len(videos[0])

    return read


def child(reader: str, core: int, cache: Path, paths: list[Path]) -> None:
    """Reads every clip once to warm up the file cache, then once timed; prints [[seconds, frames], ...]."""
    os.sched_setaffinity(0, {core})
    read = reference_reader() if reader == "reference" else our_reader(cache if reader == "cached" else None)
    read(paths[0])
    results = []
    for path in paths:
        began = time.perf_counter()
        frames = read(path)
        results.append((time.perf_counter() - began, frames))
    print(dump_json(results))


def start(reader: str, core: int, cache: Path, paths: list[Path]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, f"--child={reader}", f"--core={core}", f"--clips={cache}", *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603


def seconds_of(reader: str, workers: int, cache: Path, paths: list[Path]) -> list[tuple[float, int]]:
    """Seconds a clip (mean over workers, which read all clips at once) and its frames."""
    processes = [start(reader, core, cache, paths) for core in range(workers)]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), f"{reader} failed"
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return [(statistics.mean(s for s, _ in same), same[0][1]) for same in zip(*results, strict=True)]


# --- Measurements -------------------------------------------------------------------------------------------------


def compare(paths: list[Path], workers: int, rounds: int, cache: Path, readers: tuple[str, ...]) -> dict[str, object]:
    """Medians of `rounds` turns, by clip."""
    taken: dict[str, list[list[tuple[float, int]]]] = {reader: [] for reader in readers}
    for _ in range(rounds):
        for reader in readers:
            taken[reader].append(seconds_of(reader, workers, cache, paths))
    clips = {}
    for number, path in enumerate(paths):
        median = {r: statistics.median(turn[number][0] for turn in taken[r]) for r in readers}
        clips[path.stem] = {
            "frames": {reader: taken[reader][0][number][1] for reader in readers},
            "seconds": {reader: round(s, 4) for reader, s in median.items()},
        }
        if "reference" in median:
            clips[path.stem]["times_faster"] = round(median["reference"] / median["ours"], 2)
            clips[path.stem]["times_faster_cached"] = round(median["reference"] / median["cached"], 1)
        print(f"{workers} worker(s)  {path.stem}  {dump_json(clips[path.stem])}", flush=True)
    total = sum(clip["seconds"]["ours"] for clip in clips.values()) / workers
    frames = sum(clip["frames"]["ours"] for clip in clips.values())
    return {"frames_per_s": round(frames / total, 1), "videos_per_s": round(len(clips) / total, 3), "clips": clips}


def memory(path: Path, count: int) -> list[dict[str, float]]:
    """Resident MB of this process and of the decoding one after every tenth of `count` reads of a clip."""
    pool, result = DecoderPool(1), []
    for number in range(1, count + 1):
        clip: Clip = pool.read(path, OPTIONS, SAMPLING.factor, SAMPLING.multiple)
        encode_visual(clip.frames, VISION, clip.seconds_per_frame, clip.times)
        if number % max(1, count // 10) == 0:
            worker = pool.idle.get()
            sizes = {"clips": number, "here": resident("self"), "decoder": resident(str(worker.process.pid))}
            pool.idle.put(worker)
            result.append(sizes)
            print(dump_json(sizes), flush=True)
    return result


def resident(process: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["320x240", "1280x720"])
    parser.add_argument("--seconds", nargs="+", type=int, default=[30, 300])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline", default="qwen-vl-utils", choices=["qwen-vl-utils", "none"])
    parser.add_argument("--clips", type=Path, help="folder that keeps the clips; else they are removed")
    parser.add_argument("--memory", type=int, default=0, help="clips to read for the memory test")
    parser.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.core, args.clips, args.paths)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.clips or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.memory:
            print(dump_json({"memory_mb": memory(render(folder, 320, 240, 3), args.memory)}))
            return
        sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
        paths = [render(folder, *size, seconds) for size in sizes for seconds in args.seconds]
        cache = Path(temporary) / "frames"
        readers = READERS if args.baseline != "none" else ("ours", "cached")
        frame_cache.build(cache, paths, SAMPLING, clips.read, workers=1, show=lambda done, note: None)
        results = {workers: compare(paths, workers, args.rounds, cache, readers) for workers in args.workers}
    print(dump_json({**results[args.workers[0]], "by_workers": results}))


if __name__ == "__main__":
    main()
