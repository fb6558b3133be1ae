"""Decoders of video files: which frames a file has, and the pictures of chosen ones. Two libraries, the same pictures.

PyAV comes first: it is given the pictures that are neither requested nor referenced, and skips what is between
the frames that are wanted and the next key frame, so that far-apart frames come faster; it reads AV1, transport
streams and damaged packets. decord 0.6.0 gives the same pictures where it reads a file from its beginning; after a
seek it gives others where pictures lead their key frame (open groups, MPEG-4 with B frames), so it is asked last, for
what PyAV cannot.
"""

import io
import os
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from vau_jax.common.files import short
from vau_jax.datasets.vau_bench import MAX_SECONDS

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # errors are reported by the caller
except ImportError:  # no wheel for this processor (arm64)
    decord = None

MAX_FRAME_PIXELS = 2**26  # 8192 x 8192
MAX_FRAMES = 2**22  # 38 hours at 30 a second
PASSING_OVER = ("h264", "hevc", "mpeg4")  # codecs whose decoder skips exactly the pictures it is asked to skip
DECORD_FRAMES = 8  # that decord holds at once
DECORD_BYTES = 2**28  # of packets that are repacked for decord
DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp9")  # old decoders get as little of untrusted files as possible
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ivf,ogg,h264,hevc,av1,m4v,gif"  # FFmpeg's names
AV_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "enable_drefs": "0"}


class VideoError(Exception):
    """This video cannot be used; the message gives the cause, `reason` is one word for counting. It costs one video,
    never the run.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class Picture(NamedTuple):
    """A decoded frame."""

    number: int  # of the frame, in order of display
    image: np.ndarray  # uint8 [H, W, 3], upright
    corrupt: bool  # the decoder may have concealed damage in it


@dataclass(frozen=True)
class Index:
    """The frames of a file, N in display order, as listed by its packets."""

    starts: np.ndarray  # float64 [N], seconds
    end: float  # seconds, when the last one ends
    stamps: np.ndarray  # int64 [N], `starts` in the stream's own unit
    packet_stamps: np.ndarray  # int64 [M], of the packets in the file's order
    is_key: np.ndarray  # bool [M]: decoding can begin here
    damage: str  # faults of the list itself; empty: none

    def packets_for(self, numbers: Iterable[int]) -> np.ndarray:
        """bool [M]: the packets that these frames need, from the key frame before each up to its own."""
        firsts = np.union1d([0], np.flatnonzero(self.is_key))
        group = np.searchsorted(firsts, np.arange(len(self.is_key)), side="right") - 1
        needed = np.zeros(len(self.is_key), bool)
        for packet in np.flatnonzero(np.isin(self.packet_stamps, self.stamps[list(numbers)])):
            g = group[packet]
            # Pictures that follow a key frame in the file and precede it in time refer to the group before.
            leading = g > 0 and self.packet_stamps[packet] < self.packet_stamps[firsts[g]]
            needed[firsts[g - leading] : packet + 1] = True
        return needed


class _File(io.FileIO):
    """A file as FFmpeg reads one. An invalid seek gets an error code, where PyAV would print an exception and treat the
    file as unreadable.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError):
            return -1


@contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream, sizes checked before anything is decoded."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(_File(path))
            container = opened.enter_context(av.open(file, options=AV_OPTIONS, metadata_errors="ignore"))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{path}: no decoder for its codec")
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise VideoError(f"{path} declares frames of {context.width}x{context.height} pixels", "too large")
        context.thread_count = 1  # parallelism is across workers
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        yield container, stream


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, errors: list[str] | None = None
) -> Iterator[av.Packet]:
    """The stream's packets in the file's order, up to where the file breaks off, which is noted in `errors`."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.FFmpegError as error:
        if errors is not None:
            errors.append(f"the file breaks off: {short(error)}")


def scan(path: str | os.PathLike) -> Index:
    """Reads the list of frames without decoding them. Raises VideoError for a file that has none."""
    stamps, durations, keys, shown, errors = [], [], [], [], []
    with _open(Path(path)) as (container, stream):
        promised, unit = stream.frames, float(stream.time_base or 1)
        step = 1 / float(stream.average_rate or 25)
        for packet in _packets(container, stream, errors):
            stamps.append(packet.pts)
            durations.append(packet.duration or 0)
            keys.append(packet.is_keyframe)
            shown.append(not packet.is_discard)  # by an edit list; other frames may still refer to it
            if len(stamps) > MAX_FRAMES:
                raise VideoError(f"{path} has more than {MAX_FRAMES} frames", "too large")
    if None in stamps:
        stamps = _decoded_stamps(Path(path))
        durations, keys, shown = ([value] * len(stamps) for value in (0, False, True))
    if not any(shown):
        raise VideoError(f"{path} has no frame that can be decoded")
    if promised > len(stamps):
        errors.append(f"{len(stamps)} of {promised} frames are there")
    in_file = np.asarray(stamps, np.int64)
    stamps, first = np.unique(in_file[shown], return_index=True)
    starts = stamps * unit
    if len(starts) > 1:
        step = (starts[-1] - starts[0]) / (len(starts) - 1)
    end = starts[-1] + (np.asarray(durations)[shown][first[-1]] * unit or step)
    if not 0 < end - starts[0] < MAX_SECONDS:
        raise VideoError(f"{path} claims to last {end - starts[0]:.3g} s", "too large")
    return Index(starts, float(end), stamps, in_file, np.asarray(keys, bool), "; ".join(errors))


def _decoded_stamps(path: Path) -> list[int]:
    """Time stamps from decoding, for files whose packets have none."""
    with _open(path) as (container, stream):
        frames = _decoded(_Decoder(stream), _packets(container, stream))
        return [frame.pts for frame in frames if frame.pts is not None]


class _Decoder:
    """A stream's decoder, which continues after damaged packets and records that later pictures may be affected."""

    def __init__(self, stream: av.VideoStream) -> None:
        self.context = stream.codec_context
        self.passes_over = self.context.name in PASSING_OVER
        self.hurt = False  # since the last key frame a packet was damaged

    def send(self, packet: av.Packet, wanted: bool = True) -> list[av.VideoFrame]:
        """The frames that come out; that of an unwanted packet may be skipped if no other frame refers to it."""
        self.context.skip_frame = "DEFAULT" if wanted or not self.passes_over else "NONREF"
        self.hurt = packet.is_corrupt or (self.hurt and not packet.is_keyframe)
        return self._frames(packet)

    def drain(self) -> list[av.VideoFrame]:
        """The frames still held; afterwards decoding can restart at a key frame."""
        frames = self._frames(None)
        self.context.flush_buffers()
        return frames

    def _frames(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self.context.decode(packet)
        except av.FFmpegError:
            self.hurt = True
            return []

    def picture(self, frame: av.VideoFrame, number: int) -> Picture:
        image = frame.to_ndarray(format="rgb24")
        if frame.rotation:
            image = np.ascontiguousarray(np.rot90(image, frame.rotation // 90))
        return Picture(number, image, self.hurt or frame.is_corrupt)


def _decoded(decoder: _Decoder, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        yield from decoder.send(packet)
    yield from decoder.drain()


def with_skipping(path: Path, index: Index, numbers: frozenset[int]) -> Iterator[Picture]:
    """The frames `numbers` by PyAV, without decoding frames that they do not need."""
    needed = index.packets_for(numbers)
    wanted = {int(index.stamps[n]): n for n in numbers}
    with _open(path) as (container, stream):
        decoder = _Decoder(stream)
        for frame in _needed(decoder, zip(needed, _packets(container, stream), strict=False), wanted):
            if frame.pts in wanted:
                yield decoder.picture(frame, wanted[frame.pts])


def _needed(
    decoder: _Decoder, packets: Iterable[tuple[bool, av.Packet]], wanted: Container[int]
) -> Iterator[av.VideoFrame]:
    busy = False
    for needs, packet in packets:
        if needs:
            yield from decoder.send(packet, packet.pts in wanted)
        elif busy:
            yield from decoder.drain()
        busy = needs
    yield from decoder.drain()


def from_beginning(path: Path, index: Index, numbers: frozenset[int]) -> Iterator[Picture]:
    """The frames `numbers` by PyAV, decoding everything in order."""
    wanted = {int(index.stamps[n]): n for n in numbers}
    with _open(path) as (container, stream):
        decoder = _Decoder(stream)
        for frame in _decoded(decoder, _packets(container, stream)):
            if frame.pts in wanted:
                yield decoder.picture(frame, wanted[frame.pts])


def by_decord(path: Path, index: Index, numbers: frozenset[int]) -> Iterator[Picture]:
    """The frames `numbers` by decord. Raises RuntimeError where decord is missing, not used for such a video, or counts
    the frames differently.
    """
    if decord is None:
        raise RuntimeError("decord is not installed")
    reader = decord.VideoReader(_repacked(path), num_threads=1)
    if len(reader) != len(index.stamps):
        raise RuntimeError(f"decord finds {len(reader)} frames, PyAV {len(index.stamps)}")
    order = sorted(numbers)
    for first in range(0, len(order), DECORD_FRAMES):
        some = order[first : first + DECORD_FRAMES]
        # decord does not say which of its pictures a damaged file spoilt: what PyAV could not decode stays flagged.
        yield from (Picture(n, image, True) for n, image in zip(some, reader.get_batch(some).asnumpy(), strict=True))


def _repacked(path: Path) -> io.BytesIO:
    """The video's packets as an MP4 file of our own, in memory: nothing in it can name another file."""
    packed = io.BytesIO()
    with _open(path) as (source, stream), av.open(packed, "w", format="mp4") as target:
        if stream.codec_context.name not in DECORD_CODECS:
            raise RuntimeError(f"decord is not asked for {stream.codec_context.name}")
        copy = target.add_stream_from_template(stream)
        for packet in _packets(source, stream):
            packet.stream = copy
            target.mux(packet)
            if packed.tell() > DECORD_BYTES:
                raise RuntimeError(f"decord is not asked for more than {DECORD_BYTES} bytes")
    packed.seek(0)
    return packed


def pictures(path: Path, index: Index, numbers: frozenset[int]) -> Iterator[Iterator[Picture]]:
    """Decoders for the frames `numbers`, the fastest first; frames that one lacks may come from the next."""
    ways = (with_skipping, from_beginning, by_decord) if index.is_key.any() else (from_beginning, by_decord)
    return (way(path, index, numbers) for way in ways)
