"""Real video files for tests, in many codecs; every frame tells its number."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {  # file name -> codec, options
    "h264.mp4": ("libx264", {}),
    "h264_no_b.mp4": ("libx264", {"bf": "0"}),
    "open_gop.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=24:min-keyint=24"}),
    "long_gop.mp4": ("libx264", {"x264-params": "keyint=1000:scenecut=0"}),
    "short_gop.mp4": ("libx264", {"g": "8"}),
    "h265.mp4": ("libx265", {"x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
    "stream.ts": ("libx264", {}),
}


def images(count: int, width: int, height: int) -> list[np.ndarray]:
    """uint8 [H, W, 3]: a fixed texture, a moving square, and eight bars that spell the frame's number in binary."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 200, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    ground = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    found = []
    for number in range(count):
        image = ground.copy()
        x, y = number * 3 % (width - 16), height // 2
        image[y : y + 16, x : x + 16] = (220, 40, 40)
        for bit in range(8):
            left, right = bit * width // 8, (bit + 1) * width // 8
            image[: height // 4, left:right] = 235 if number >> bit & 1 else 20
        found.append(image)
    return found


def number(image: np.ndarray) -> int:
    """Which frame a decoded picture is."""
    height, width = image.shape[:2]
    bars = [image[: height // 5, bit * width // 8 + 2 : (bit + 1) * width // 8 - 2].mean() for bit in range(8)]
    return sum((bar > 128) << bit for bit, bar in enumerate(bars))


def write(
    path: Path,
    count: int = 60,
    size: tuple[int, int] = (160, 120),
    fps: int = 20,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    times: Sequence[Fraction] | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """A clip of `images`; `times` are the frames' time stamps where they are not even."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(images(count, *size)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = int(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_as(folder: Path, name: str, **kwargs: object) -> Path:
    """A clip in one of CODECS, written by a thread of its own: SVT-AV1 gives the calling thread real-time priority if
    it may, and everything that is started from there would keep others from running."""
    codec, options = CODECS[name]
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(write, folder / name, codec=codec, options=options, **kwargs).result()


def fast_start(path: Path, count: int) -> Path:
    """An H.264 clip whose table of frames stands before them, as downloads have it, with a key frame in ten."""
    plain = write(path.with_suffix(".plain.mp4"), count=count, options={"g": "10"})
    with av.open(str(plain)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


def damage(path: Path, at: float, size: int) -> Path:
    """Zeroes `size` bytes of a file, from the share `at` of its length on."""
    data = bytearray(path.read_bytes())
    first = int(at * len(data))
    data[first : first + size] = bytes(size)
    path.write_bytes(data)
    return path
