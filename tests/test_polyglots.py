"""Files that name other files of this machine: nothing of those is ever shown or told."""

import io
import re
from pathlib import Path

import av
import numpy as np
import pytest

from tests import video_files
from vau_jax.data.video import clips, decoders
from vau_jax.data.video.clips import Clip, VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError

OPTIONS = VideoOptions(nframes=4, min_pixels=28 * 28, max_pixels=112 * 112)
COUNT = 30
PACKET = 188  # bytes of a packet of a transport stream
RED = (250, 10, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with files that nobody asked to see, all red: an MPEG-2 stream of key frames, and an MP4."""
    folder = tmp_path_factory.mktemp("polyglots")
    red = [np.broadcast_to(np.array(RED, np.uint8), (48, 64, 3)).copy()] * COUNT
    for name, codec, options in (("secret.ts", "mpeg2video", {"g": "1"}), ("secret.mp4", "libx264", {})):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=10, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for image in red:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    for ending in ("ts", "mp4", "mkv"):
        video_files.write(folder / f"host.{ending}", count=COUNT, size=(64, 48), options={"bf": "0"})
    return folder


def hls(target: str) -> bytes:
    """A play list that ends where a packet of a transport stream may begin."""
    text = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n".encode()
    return text + b"\n" * (-len(text) % PACKET)


def undecodable(stream: bytes) -> bytes:
    """An H.264 stream with all that announces its pictures, and none of the pictures: every slice is of type 10, which
    there is not."""
    return re.sub(rb"(\x00\x00\x01[\x65\x61\x41\x21\x01])[^\x00]", rb"\1" + b"\x8b", stream, flags=re.DOTALL)


def files(folder: Path) -> dict[str, bytes]:
    """Every way we know to make one file name another, by what it is."""
    host = {ending: (folder / f"host.{ending}").read_bytes() for ending in ("ts", "mp4", "mkv")}
    secret, found = (folder / "secret.mp4").read_bytes(), {}
    for target in ("secret.ts", "secret.mp4"):
        for place in (str(folder / target), target, f"file:{folder / target}"):
            found[f"hls {place}"] = hls(place)
            found[f"concat {place}"] = f"ffconcat version 1.0\nfile '{place}'\n".encode()
            found[f"hls before noise in ts {place}"] = hls(place) + undecodable(host["ts"])
            for ending, data in host.items():
                found[f"hls before {ending} {place}"] = hls(place) + data
                found[f"concat before {ending} {place}"] = f"ffconcat version 1.0\nfile '{place}'\n#".encode() + data
        found[f"reference movie {target}"] = reference_movie(secret, str(folder / target))
    absolute = folder / "secret.mp4"
    found["dash"] = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        f"<BaseURL>{absolute}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    ).encode()
    found["sdp"] = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    found["images"] = b"secret%02d.ts"
    found["matroska link"] = linked_matroska(host["mkv"], str(absolute))
    return found


def reference_movie(data: bytes, place: str) -> bytes:
    """The tables of an MP4 file alone, with an alias record that says which file holds the pictures themselves."""
    own = b"\0\0\0\x0curl \0\0\0\x01"
    media, tables = data.index(b"mdat") - 4, data.index(b"moov") - 4
    assert data.count(own) == 1 and media < tables
    path = place.encode() + b"\0" * (len(place) % 2)
    record = bytes(150) + (2).to_bytes(2, "big") + len(path).to_bytes(2, "big") + path + b"\xff\xff\0\0"
    entry = b"alis\0\0\0\0" + record
    longer = len(entry) + 4 - len(own)
    new = bytearray(data[:media] + data[tables:].replace(own, (len(entry) + 4).to_bytes(4, "big") + entry))
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = new.index(name) - 4
        new[at : at + 4] = (int.from_bytes(new[at : at + 4], "big") + longer).to_bytes(4, "big")
    return bytes(new)


def linked_matroska(data: bytes, place: str) -> bytes:
    """A Matroska file with a second segment that says which file it goes on in (NextFilename)."""
    name = b"\x3e\x83\xbb" + (0x4000 | len(place)).to_bytes(2, "big") + place.encode()
    info = b"\x15\x49\xa9\x66" + (0x4000 | len(name)).to_bytes(2, "big") + name
    return data + b"\x18\x53\x80\x67" + (0x4000 | len(info)).to_bytes(2, "big") + info


def red(clip: Clip) -> bool:
    return bool((np.abs(clip.frames.astype(int) - RED).max(-1) < 40).mean() > 0.5)


def test_no_frame_of_another_file_is_shown_and_no_error_tells_of_one(folder: Path) -> None:
    pool, shown = DecoderPool(1), 0
    for number, (kind, data) in enumerate(files(folder).items()):
        path = folder / f"upload{number}.mp4"
        path.write_bytes(data)
        try:
            clip = pool.read(path, OPTIONS, 28, 2)
        except VideoError as error:
            told = str(error).replace(str(path), "")
            assert "secret" not in told and str(folder) not in told and f"{COUNT} frames" not in told, (kind, told)
        else:
            assert not red(clip), kind
            shown += 1
    pool.close()
    assert shown >= 6  # a player shows the transport stream behind a play list too


@pytest.mark.skipif(decoders.decord is None, reason="decord is not installed")
@pytest.mark.parametrize("in_memory", [False, True], ids=["path", "memory"])
def test_decord_itself_follows_a_play_list_so_it_must_not_see_the_file(folder: Path, in_memory: bool) -> None:
    """What the other test would show if a file went to decord as it is."""
    path = folder / "trap.mp4"
    path.write_bytes(hls(str(folder / "secret.ts")) + undecodable((folder / "host.ts").read_bytes()))
    source = io.BytesIO(path.read_bytes()) if in_memory else str(path)
    assert np.abs(decoders.decord.VideoReader(source, num_threads=1)[0].asnumpy().astype(int) - RED).max() < 40


@pytest.mark.skipif(decoders.decord is None, reason="decord is not installed")
def test_where_pyav_fails_decord_sees_the_packets_alone(folder: Path) -> None:
    """As many frames in the host as in the file that it names: only what decord is given keeps the other secret."""
    path = folder / "trap_of_equal_length.mp4"
    path.write_bytes(hls(str(folder / "secret.ts")) + undecodable((folder / "host.ts").read_bytes()))
    index = decoders.scan(path)
    assert len(index.stamps) == COUNT
    try:
        found = [picture.image for picture in decoders.by_decord(path, index, frozenset(range(4)))]
    except Exception as error:  # decord's own
        assert "frames" not in str(error)
        found = []
    assert not any(np.abs(image.astype(int) - RED).max() < 40 for image in found)


def test_a_movie_that_refers_to_another_file_shows_nothing(folder: Path) -> None:
    """Told to follow references, FFmpeg shows the other file: it is a real one."""
    path = folder / "reference.mp4"
    path.write_bytes(reference_movie((folder / "secret.mp4").read_bytes(), str(folder / "secret.mp4")))
    with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        followed = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(followed.astype(int) - RED).max() < 40
    with pytest.raises(VideoError):
        clips.read(path, OPTIONS, 28, 2)
