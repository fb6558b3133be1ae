"""`vau data join`: every published row finds its video in the folders as they were unpacked, and keeps file, split and
protocol."""

import csv
import json
from pathlib import Path

import pytest

from tests import records, tables, video_files
from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.data import pipeline
from vau_jax.data.video import clips
from vau_jax.data_prep import check, join
from vau_jax.datasets import vau_bench, video_table
from vau_jax.eval import gallery
from vau_jax.launch import stand_ins
from vau_jax.train import loop

RELEASED = Path(__file__).parent / "data" / "vau_bench"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Path]]]:
    """Annotations of one row in 60, and their videos as MSAD, UCF-Crime and ECVA unpack."""
    folder = tmp_path_factory.mktemp("downloads")
    rows = stand_ins.write_annotations(RELEASED, folder / "annotations", 60)
    folders = stand_ins.write_videos(rows, folder, longest=4.0, small=True)
    return folder / "annotations", {source: [one] for source, one in folders.items()}


@pytest.fixture(scope="module")
def joined(downloads: tuple[Path, dict[str, list[Path]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("joined")
    join.join([downloads[0]], downloads[1], out, workers=2)
    return out


def data_config(joined: Path, file: str, **changed: object) -> object:
    c = base.get_config().data
    c.csv, c.videos = str(joined / file), str(joined)
    for name, value in changed.items():
        c[name] = value
    return c


@pytest.mark.parametrize("file", ["train.csv", "val.csv", "test_msad.csv", "test_ucf_crime.csv", "test_ecva.csv"])
@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_every_row_with_a_file_becomes_examples(joined: Path, file: str, protocol: str) -> None:
    """Those without one are the ones that join.json lists as missing."""
    missing = {name for names in json.loads((joined / "join.json").read_text())["missing"].values() for name in names}
    examples, audit = pipeline.load_examples(data_config(joined, file, protocol=protocol))
    absent = {entry.video for entry in audit.entries if entry.reason.startswith("no such video")}
    rows, _ = vau_bench.load(joined / file, protocol=protocol)
    assert absent <= missing and {e.video for e in examples} | absent == {r.video for r in rows if r.tasks}
    assert all(path.is_file() for example in examples for path in example.media)


def test_the_published_files_are_copied_byte_for_byte(downloads: tuple[Path, dict], joined: Path) -> None:
    for path in downloads[0].glob("*.csv"):
        assert (joined / path.name).read_bytes() == path.read_bytes()


def test_the_stand_ins_train_file_has_the_published_composition() -> None:
    assert sum(stand_ins.COMPOSITION.values()) == 2939


def test_the_table_says_what_the_files_are(joined: Path) -> None:
    """Seconds, rate and upright size of each, as a probe reads them; portrait, two rates and sizes are there."""
    known = [video for video in video_table.load(joined).values() if video.seconds]
    for video in known[::7]:
        probe = clips.probe(joined / video.file)
        assert (video.seconds, video.fps, video.width, video.height) == (
            probe.duration, probe.fps, probe.width, probe.height
        )  # fmt: skip
    assert {round(video.fps) for video in known} == {25, 30}
    assert len({(video.width, video.height) for video in known}) > 2 and any(v.height > v.width for v in known)


def test_batches_expect_the_lengths_of_the_table(joined: Path) -> None:
    examples, _ = pipeline.load_examples(data_config(joined, "train.csv", tasks=("classification",)))
    by_key = video_table.load(joined)
    rows = {row.video: row for row in vau_bench.load(joined / "train.csv")[0]}
    for example in examples:
        video = by_key[vau_bench.key_of(rows[example.video])]
        assert example.meta["duration"] == video.seconds and example.meta["width"] == video.width


def test_data_sources_is_a_filter(joined: Path) -> None:
    examples, audit = pipeline.load_examples(data_config(joined, "train.csv", sources=("msad", "ecva")))
    assert {example.meta["source"] for example in examples} == {"msad", "ecva"}
    assert any("another data set" in entry.reason for entry in audit.entries)
    with pytest.raises(InputError, match=r"data\.sources has 'MSAD': expected some of msad, ucf, ecva"):
        pipeline.load_examples(data_config(joined, "train.csv", sources=("MSAD",)))


def test_a_larger_share_contains_a_smaller_one(joined: Path) -> None:
    few, more, every = (
        {e.id for e in pipeline.load_examples(data_config(joined, "train.csv", share=share))[0]}
        for share in (0.25, 0.5, 1.0)
    )
    assert few < more < every and 0.1 * len(every) < len(few) < 0.4 * len(every)


def test_epochs_count_the_examples(joined: Path) -> None:
    c = base.get_config()
    c.epochs, c.batch_size = 1.5, 4
    c.data = data_config(joined, "train.csv", tasks=("classification",))
    count = len(pipeline.load_examples(c.data)[0])
    assert loop.steps_of_epochs(c) == -(-3 * count // 8)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """Two rows, one of whose videos has two files; the other's ends before its interval."""
    rows = [tables.BASE | {"Video Name": f"msad_{name}.mp4"} for name in ("Fire_3", "Arson_1")]
    tables.write(tmp_path / "annotations" / "train.csv", rows)
    for place in ("a/Fire_3.mp4", "b/deep/FIRE_3.mp4", "b/Arson_1.mp4", "b/other.mp4"):
        (tmp_path / "MSAD" / place).parent.mkdir(parents=True, exist_ok=True)
        video_files.write(tmp_path / "MSAD" / place, 20)
    return tmp_path / "annotations", tmp_path / "MSAD"


def test_what_is_doubtful_is_listed(small: tuple[Path, Path], tmp_path: Path) -> None:
    found = join.join([small[0]], {"msad": [small[1]]}, tmp_path / "out", 1)
    assert list(found.ambiguous) == ["msad_Fire_3.mp4"] and len(found.ambiguous["msad_Fire_3.mp4"]) == 2
    assert set(found.beyond_end) == {"msad_Fire_3.mp4", "msad_Arson_1.mp4"}
    assert found.unused == {"msad": 2} and found.missing == {"msad": []}
    assert "such as msad_Fire_3.mp4" in found.told()


def test_what_is_missing_says_where_to_get_it(small: tuple[Path, Path], tmp_path: Path) -> None:
    (small[1] / "b" / "Arson_1.mp4").unlink()
    told = join.join([small[0]], {"msad": [small[1]]}, tmp_path / "out", 1).told()
    assert "missing of MSAD: msad_Arson_1.mp4" in told and "https://msad-dataset.github.io" in told


def test_a_repeated_join_reads_new_files_alone(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[Path]] = []

    def probe_all(paths: list[Path], workers: int) -> object:
        read.append([path.name for path in paths])
        return probing(paths, workers)

    probing = join.probe_all
    monkeypatch.setattr(join, "probe_all", probe_all)
    join.join([small[0]], {"msad": [small[1]]}, tmp_path / "out", 1)
    first = (tmp_path / "out" / "vau_videos.csv").read_text()
    join.join([small[0]], {"msad": [small[1]]}, tmp_path / "out", 1)
    assert len(read) == 1 and (tmp_path / "out" / "vau_videos.csv").read_text() == first
    video_files.write(small[1] / "b" / "Arson_1.mp4", 50)
    join.join([small[0]], {"msad": [small[1]]}, tmp_path / "out", 1)
    assert read[1:] == [["Arson_1.mp4"]]


def test_a_run_notices_another_table(joined: Path) -> None:
    c = data_config(joined, "train.csv")
    before = pipeline.input_hashes(c)
    text = (joined / "vau_videos.csv").read_text()
    try:
        (joined / "vau_videos.csv").write_text(text + "\n")
        after = pipeline.input_hashes(c)
    finally:
        (joined / "vau_videos.csv").write_text(text)
    assert {name for name in before if before[name] != after[name]} == {"data.videos"}


@pytest.mark.parametrize(
    ("column", "value"), [("seconds", "nan"), ("seconds", "-1"), ("file", "../a.mp4"), ("file", "/a"), ("bytes", "")]
)
def test_a_table_of_something_else_is_refused(tmp_path: Path, column: str, value: str) -> None:
    row = dict(zip(video_table.COLUMNS, ["msad", "a", "msad/a.mp4", 10, 1.0, 25, 64, 48], strict=True)) | {
        column: value
    }
    with (tmp_path / "vau_videos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, video_table.COLUMNS)
        writer.writeheader()
        writer.writerow(row)
    with pytest.raises(InputError, match=r"vau_videos\.csv row 1 is not of `vau data join`"):
        video_table.load(tmp_path)


def test_a_users_mistakes_are_one_line(small: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CSV file"):
        join.join([small[1]], {}, tmp_path / "out", 1)
    with pytest.raises(InputError, match=r"video folder .*nowhere does not exist \(--videos msad="):
        join.join([small[0]], {"msad": [tmp_path / "nowhere"]}, tmp_path / "out", 1)
    with pytest.raises(InputError, match="expected SOURCE=DIR"):
        join.folders_of(["shanghai=DIR"])


def test_check_and_the_report_find_the_videos_of_a_joined_folder(joined: Path) -> None:
    rows, audit = vau_bench.load(joined / "test_msad.csv")
    rows = vau_bench.with_files(rows, joined)
    found = check.problems(rows, audit, joined, probe=False)
    missing = json.loads((joined / "join.json").read_text())["missing"]["msad"]
    assert {p.video for p in found if p.text == check.ABSENT} == {row.video for row in rows} & set(missing)
    row = next(row for row in rows if row.file)
    evaluation = {"settings": {"data": {"videos": str(joined)}}}
    shown = records.record("classification", "x", video=row.video)
    assert gallery.video_of(evaluation, shown).is_file()
