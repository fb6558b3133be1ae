"""Decoders: every way to get frames gives the frames asked for, and the same pictures. All files are real."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests import video_files
from vau_jax.data.video import decoders
from vau_jax.data.video.decoders import VideoError

COUNT = 60
SPARSE = frozenset(range(3, COUNT, 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module", params=video_files.CODECS)
def path(request: pytest.FixtureRequest, folder: Path) -> Path:
    return video_files.write_as(folder, request.param, count=COUNT)


def pictures(way: str, path: Path, numbers: frozenset[int]) -> dict[int, np.ndarray]:
    found = getattr(decoders, way)(path, decoders.scan(path), numbers)
    return {picture.number: picture.image for picture in found}


def test_the_list_of_frames_has_every_frame_at_its_time(path: Path) -> None:
    index = decoders.scan(path)
    np.testing.assert_allclose(index.starts - index.starts[0], np.arange(COUNT) / 20, atol=1e-3)
    assert index.end - index.starts[0] == pytest.approx(COUNT / 20, abs=2e-3)
    assert index.damage == ""


@pytest.mark.parametrize("numbers", [SPARSE, frozenset({0}), frozenset({COUNT - 1}), frozenset(range(COUNT))], ids=len)
def test_skipping_gives_the_frames_that_decoding_everything_gives(path: Path, numbers: frozenset[int]) -> None:
    skipped, straight = (pictures(way, path, numbers) for way in ("with_skipping", "from_beginning"))
    assert set(skipped) == set(straight) == numbers
    assert all(np.array_equal(skipped[n], straight[n]) for n in numbers)
    assert [video_files.number(image) for _, image in sorted(straight.items())] == sorted(numbers)


@pytest.mark.parametrize("name", sorted(video_files.CODECS.keys() - {"av1.mp4", "stream.ts"}))
def test_decord_gives_the_same_pictures(folder: Path, name: str) -> None:
    """All frames in order: after a seek decord 0.6.0 itself gives others in open groups and MPEG-4 with B frames."""
    pytest.importorskip("decord")
    path, numbers = video_files.write_as(folder, name, count=COUNT), frozenset(range(COUNT))
    ours, theirs = (pictures(way, path, numbers) for way in ("with_skipping", "by_decord"))
    assert all(np.array_equal(ours[n], theirs[n]) for n in numbers)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_come_out_upright_from_both(folder: Path, rotation: int) -> None:
    path = video_files.write(folder / f"rotated{rotation}.mp4", count=8, rotation=rotation)
    upright = [np.rot90(image, rotation // 90) for image in video_files.images(8, 160, 120)]
    ours = pictures("with_skipping", path, frozenset(range(8)))
    assert all(np.abs(ours[n].astype(int) - upright[n]).mean() < 8 for n in range(8))
    if decoders.decord:
        theirs = pictures("by_decord", path, frozenset(range(8)))
        assert all(np.array_equal(ours[n], theirs[n]) for n in range(8))


@pytest.mark.parametrize(
    ("name", "codec", "size"), [("odd.webm", "libvpx-vp9", (161, 121)), ("odd.avi", "mpeg4", (159, 119))]
)
def test_odd_sizes_keep_their_last_row_and_column(folder: Path, name: str, codec: str, size: tuple[int, int]) -> None:
    path = video_files.write(folder / name, count=8, size=size, codec=codec)
    ours = pictures("with_skipping", path, frozenset(range(8)))
    for n, image in enumerate(video_files.images(8, *size)):
        assert ours[n].shape == image.shape
        grey, truth = ours[n].mean(-1), image.mean(-1)  # colour is kept for every second pixel only
        assert np.abs(grey - truth)[:, -1].mean() < 12 and np.abs(grey - truth)[-1].mean() < 12
        assert video_files.number(ours[n]) == n


def test_one_frame(folder: Path) -> None:
    path = video_files.write(folder / "one.mp4", count=1)
    assert decoders.scan(path).end - decoders.scan(path).starts[0] == pytest.approx(1 / 20, abs=1e-3)
    assert set(pictures("with_skipping", path, frozenset({0}))) == {0}


def test_variable_frame_rates_keep_their_time_stamps(folder: Path) -> None:
    times = [Fraction(i, 20) for i in range(20)] + [1 + Fraction(i, 2) for i in range(10)]
    path = video_files.write(folder / "variable.mp4", count=30, times=times)
    np.testing.assert_allclose(decoders.scan(path).starts, [float(t) for t in times], atol=2e-3)
    assert [video_files.number(i) for i in pictures("with_skipping", path, frozenset({0, 21, 29})).values()] == [
        0,
        21,
        29,
    ]


def test_an_edit_list_hides_frames_that_others_refer_to(folder: Path) -> None:
    """The same packets, half a second earlier: a player begins at frame 10, which refers to those before."""
    import av

    plain, path = video_files.write(folder / "plain.mp4", count=40), folder / "edited.mp4"
    with av.open(str(plain)) as source, av.open(str(path), "w", options={"use_editlist": "1"}) as target:
        target.flags = target.flags & ~0x200000
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    index = decoders.scan(path)
    assert len(index.starts) == 30
    for way in ("with_skipping", "from_beginning"):
        found = pictures(way, path, frozenset({0, 7, 29}))
        assert [video_files.number(image) for _, image in sorted(found.items())] == [10, 17, 39]


def test_only_the_groups_that_are_needed_are_decoded(folder: Path) -> None:
    index = decoders.scan(video_files.write_as(folder, "short_gop.mp4", count=COUNT))
    assert index.packets_for([0]).sum() == 1
    assert index.packets_for([20]).sum() <= 8
    assert index.packets_for(range(COUNT)).all()


def test_a_play_list_leads_nowhere(folder: Path) -> None:
    """FFmpeg would open what a file of this kind names; only containers of video are read."""
    video_files.write(folder / "secret.mp4", count=4)
    path = folder / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError, match="cannot open"):
        decoders.scan(path)


def test_a_file_without_video_is_named(folder: Path) -> None:
    import av

    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        decoders.scan(path)


def test_a_size_that_is_too_large_is_refused_before_decoding(folder: Path) -> None:
    """The header of an AVI file claims 16,000 x 16,000 pixels."""
    data = bytearray(video_files.write(folder / "raw.avi", count=4, codec="rawvideo").read_bytes())
    at = data.index(b"strf") + 8
    data[at + 4 : at + 12] = np.array([16000, 16000], "<i4").tobytes()
    path = folder / "huge.avi"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="16000x16000") as caught:
        decoders.scan(path)
    assert caught.value.reason == "too large"
