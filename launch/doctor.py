"""What works on this machine: packages, devices, decoders, memory, disk, a chat endpoint, and a job from end to end.

    vau doctor [--workdir=DIR] [--url=http://localhost:8000/v1 --model=NAME] [--quick]

Each line says ok, warning, error or skipped, and what to do. The self-test renders clips, makes a small model and takes
it through SFT, RFT, evaluation and report, in a temporary folder, in about a minute. The exit code is 1 after an error.
"""

import argparse
import io
import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from fractions import Fraction
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import av
import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax import cli
from vau_jax.common import progress
from vau_jax.common.chat import Chat
from vau_jax.common.chips import GIB
from vau_jax.common.files import InputError, missing_features, short, write_bytes
from vau_jax.configs import base
from vau_jax.configs import demo as demo_config
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.launch import demo

PACKAGES = ("vau_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "av", "numpy")
OPTIONAL = {"decord": "a second video decoder", "gradio": "vau app", "libtpu": "TPUs, vau compile-check"}
TESTED = ((0, 10), (0, 12))  # versions of jax: from, and below
ENCODERS = {  # of each codec, with the options that keep it silent
    "H.264": ("libx264", {}),
    "HEVC": ("libx265", {"x265-params": "log-level=none"}),
    "VP9": ("libvpx-vp9", {}),
    "AV1": ("libsvtav1", {}),
    "MPEG-4": ("mpeg4", {}),
}
os.environ.setdefault("SVT_LOG", "1")  # of libsvtav1: errors alone
PLATFORMS = {  # devices of the system: what JAX calls them, and what it needs to use them
    "/dev/nvidia[0-9]*": ("gpu", "cuda12"),
    "/dev/accel*": ("tpu", "tpu"),
}
LEAST_MEMORY, LEAST_DISK = 4 * GIB, 10 * GIB  # of the demo, with room
PROBE_BYTES = 2**26  # written to the disk


class Finding(NamedTuple):
    """The result of one check."""

    state: str  # ok, warning, error, skipped
    text: str
    remedy: str = ""


def packages() -> Finding:
    """Versions of what is installed."""
    known = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    text = f"Python {platform.python_version()}, " + ", ".join(f"{name} {v}" for name, v in known.items() if v)
    if missing_features := [name for name in PACKAGES if not known[name]]:
        return Finding("error", text, f"{', '.join(missing_features)} missing: install vau_jax again")
    absent = [f"{name} ({use})" for name, use in OPTIONAL.items() if not known[name]]
    text += f"; not installed: {', '.join(absent)}" if absent else ""
    if not TESTED[0] <= tuple(map(int, jax.__version__.split(".")[:2])) < TESTED[1]:
        return Finding("warning", text, f"jax {jax.__version__} is not tested: 0.10 and 0.11 are")
    return Finding("ok", text)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def devices() -> Finding:
    """What JAX computes on."""
    found = jax.devices()
    stats = found[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / GIB:.1f} GiB each" if "bytes_limit" in stats else ""
    text = f"{len(found)} x {found[0].device_kind} ({found[0].platform}){memory}"
    for pattern, (name, extra) in PLATFORMS.items():
        if (there := glob(pattern)) and found[0].platform != name:
            remedy = f"{there[0]} exists, but JAX does not use it: pip install 'jax[{extra}]', unset JAX_PLATFORMS"
            return Finding("error", text, remedy)
    cores = len(os.sched_getaffinity(0))
    return Finding("ok", f"{text}, {cores} CPU cores")


def decoders() -> Finding:
    """Which codecs can be read: a clip of each is written and decoded, in a process of its own as in training."""
    read, faults = [], []
    with tempfile.TemporaryDirectory(prefix="vau_doctor_") as folder:
        pool = DecoderPool(1)
        for name, (encoder, options) in ENCODERS.items():
            if encoder not in av.codecs_available:
                continue
            try:
                _encode(path := Path(folder) / f"{encoder}.mkv", encoder, options)
                clip = pool.read(path, VideoOptions(nframes=4), 2, 2)
                (read if len(clip.frames) == 4 else faults).append(name)
            except (VideoError, av.FFmpegError) as error:
                faults.append(f"{name} ({short(error)})")
        pool.close()
    text = f"PyAV {version('av')} reads {', '.join(read) or 'nothing'}"
    if faults:
        return Finding("error", text, f"cannot read {', '.join(faults)}: install av again")
    return Finding("ok", text)


def _encode(path: Path, encoder: str, options: dict[str, str]) -> None:
    """Writes 16 frames that grow brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=Fraction(8), options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(16):
            picture = np.full((96, 128, 3), 16 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def memory() -> Finding:
    """Memory of this machine, or of this container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    total = min(sizes["MemTotal"], int(allowed) if allowed.isdigit() else sizes["MemTotal"])
    text = f"{min(sizes['MemAvailable'], total) / GIB:.1f} of {total / GIB:.1f} GiB free"
    if min(sizes["MemAvailable"], total) < LEAST_MEMORY:
        return Finding("warning", text, f"the demo needs {LEAST_MEMORY / GIB:.0f} GiB")
    return Finding("ok", text)


def disk(folder: Path) -> Finding:
    """Free space in the folder of runs, its speed, and whether it has locks and can rename folders."""
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".vau_doctor_", dir=place) as inside:
            missing = missing_features(inside)
            began = time.monotonic()
            write_bytes(Path(inside) / "probe", os.urandom(2**20) * (PROBE_BYTES // 2**20))
            seconds = time.monotonic() - began
    except InputError as error:
        return Finding("error", str(error))
    except OSError as error:
        return Finding("error", f"{place} cannot be written to: {short(error)}", "choose another with --workdir")
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.0f} GiB free in {place}, written at {PROBE_BYTES / seconds / 2**20:.0f} MiB/s"
    if "locks" in missing:
        return Finding("warning", f"{text}, no locks", "two runs in one folder would not notice each other there")
    if free < LEAST_DISK:
        return Finding("warning", text, f"checkpoints of published sizes need more than {LEAST_DISK / GIB:.0f} GiB")
    return Finding("ok", text)


def endpoint(url: str, model: str) -> Finding:
    """One completion of a chat endpoint."""
    if not url:
        return Finding("skipped", "none named; --url and --model try one (judge, reflection teacher)")
    config = ConfigDict(base.endpoint())
    config.url, config.model, config.retries, config.json_mode, config.max_tokens = url, model, 0, False, 16
    config.seconds = 30.0
    began = time.monotonic()
    try:
        reply = Chat(config, None).ask([{"role": "user", "content": "Say ok."}])
    except InputError as error:
        return Finding("error", str(error))
    if reply.error:
        return Finding("error", f"{url}: {reply.error}", "is the server running, and is the model's name right?")
    return Finding("ok", f"{url}: {model} answered in {time.monotonic() - began:.1f} s")


def self_test() -> Finding:
    """The demo with a few clips and steps."""
    config = demo_config.get_config("quick")
    with config.unlocked():
        config.videos.train, config.videos.test = 8, 4
        config.sft.steps, config.sft.batch_size = 2, 4
        config.rft.steps, config.rft.batch_size, config.rft.rollout.num_generations = 1, 2, 2
        config.eval_batch_size = 4
    began, said = time.monotonic(), io.StringIO()
    with tempfile.TemporaryDirectory(prefix="vau_doctor_") as folder:
        try:
            with redirect_stdout(said):
                demo.run(config, Path(folder))
        except Exception:
            done = [line for line in said.getvalue().splitlines() if line.startswith("--- ")]
            last = done[-1].strip("- ") if done else "the start"
            return Finding("error", f"failed in {last}", traceback.format_exc().strip())
    stages = "render, decode, SFT, RFT, evaluation, report"
    return Finding("ok", f"{stages}: {time.monotonic() - began:.0f} s")


def checks(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The checks in order, by name."""
    yield "packages", packages
    yield "devices", devices
    yield "decoders", decoders
    yield "memory", memory
    yield "disk", lambda: disk(args.workdir)
    yield "endpoint", lambda: endpoint(args.url, args.model)
    if not args.quick:
        yield "self-test", self_test


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    errors = 0
    for name, check in checks(args):
        finding = check()
        errors += finding.state == "error"
        print(f"{finding.state:8} {name:10} {finding.text}", flush=True)
        if finding.remedy:
            print(f"{'':19} {finding.remedy}", flush=True)
    if errors:
        raise SystemExit(1)
    print(progress.summary("all works", {}, [("vau", "demo", "quick")]))


if __name__ == "__main__":
    cli.main("doctor")
