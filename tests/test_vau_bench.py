"""data_prep.vau_bench and the TFDS builder, on the published annotation files and real videos."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import video_files
from vau_jax import cli
from vau_jax.common.files import InputError
from vau_jax.data_prep import vau_bench as module
from vau_jax.datasets.vau_bench import Row, load, plain_name

ROOT = Path(__file__).parents[1]


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vau_jax.data_prep.vau_bench", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some videos of each source in the folders that their downloads have."""
    root = tmp_path_factory.mktemp("downloads")
    names = {
        "msad": ["MSAD_anomaly/Assault/Assault_2.mp4", "MSAD_normal/MSAD_normal_testing_1.mp4"],
        "ucf": ["Anomaly-Videos-Part-1/Abuse/Abuse028_x264.mp4", "Testing_Normal/Normal_Videos_874_x264.avi"],
        "ecva": ["videos/14.MP4", "videos/1103.mkv", "videos/99999.mp4"],
    }
    for source, paths in names.items():
        for name in paths:
            path = root / source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            video_files.write(path.with_suffix(".mp4"), count=60, rotation=90 if "Abuse" in name else 0)
            path.with_suffix(".mp4").rename(path)
    (root / "ecva" / "videos" / "1103.mkv").write_bytes(b"broken")
    return {source: root / source for source in names}


@pytest.fixture(scope="module")
def imported(vau_bench: Path, videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported")
    tests = [vau_bench / f"test_{name}.csv" for name in ("msad", "ucf_crime", "ecva")]
    folders = [f"{source}={folder}" for source, folder in videos.items()]
    done = run("import", "--out", out, "--val", vau_bench / "val.csv", "--test", *tests, "--videos", *folders)
    assert done.returncode == 0, done.stderr
    return out


def by_video(imported: Path, split: str = "test") -> dict[str, Row]:
    return {row.video: row for row in load(imported / f"{split}.jsonl")[0]}


def found(imported: Path) -> dict[str, Any]:
    return json.loads((imported / "import.json").read_text())


def test_audit_prints_counts_and_leaks(vau_bench: Path) -> None:
    done = run("audit", vau_bench / "val.csv", vau_bench / "test_ecva.csv")
    assert done.returncode == 0, done.stderr
    assert "173  changed   times read as MMSS" in done.stdout
    assert "share 2: ecva_1953.mp4, ecva_1955.mp4" in done.stdout


def test_audit_of_rows_names_each(vau_bench: Path) -> None:
    done = run("audit", vau_bench / "test_msad.csv", "--rows")
    assert "Shooting_10.mp4  changed qa: correct option holds more than its letter" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "/dev/null/folder"], "cannot write to the folder /dev/null/folder"),
        (["--out", "x", "--seed", "-1"], "argument --seed: -1: expected at least 0"),
        (["--out", "x", "--workers", "0"], "argument --workers: 0: expected at least 1"),
    ],
    ids=["out", "seed", "workers"],
)
def test_impossible_flags_are_named(
    flags: list[str], words: str, vau_bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vau_bench", "import", "--test", str(vau_bench / "test_msad.csv"), *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main("data")
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_video_whose_name_no_table_can_hold_is_named(vau_bench: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "videos") + b"/caf\xe9.mp4")).touch()
    tests, folders = {"test": [str(vau_bench / "test_msad.csv")]}, {"msad": tmp_path / "videos"}
    with pytest.raises(InputError, match=r"caf\\udce9\.mp4' is not UTF-8"):
        module.import_splits(tmp_path / "out", tests, folders, seed=0, workers=1)


def test_rows_are_joined_with_their_videos_by_name(imported: Path) -> None:
    rows = by_video(imported)
    row = rows["msad/MSAD_anomaly/Assault/Assault_2.mp4"]
    assert (row.duration, row.fps, row.width, row.height) == (pytest.approx(3.0), pytest.approx(20.0), 160, 120)
    assert rows["ecva/videos/14.MP4"].duration and rows["ucf/Testing_Normal/Normal_Videos_874_x264.avi"].duration


def test_the_size_of_a_rotated_video_is_upright(imported: Path) -> None:
    row = by_video(imported)["ucf/Anomaly-Videos-Part-1/Abuse/Abuse028_x264.mp4"]
    assert (row.width, row.height) == (120, 160)


def test_missing_unreadable_and_surplus_videos_are_listed(imported: Path, videos: dict[str, Path]) -> None:
    report = found(imported)
    assert report["surplus"] == ["ecva/videos/99999.mp4"]
    assert list(report["unreadable"]) == [str(videos["ecva"] / "videos" / "1103.mkv")]
    assert len(report["missing"]) == 732 + 968 - 6


def test_rows_without_a_video_stay(imported: Path) -> None:
    assert len(load(imported / "test.jsonl")[0]) == 968
    assert by_video(imported)["ecva/videos/1103.mkv"].duration is None


def test_leaked_videos_are_left_out_of_val(imported: Path) -> None:
    assert found(imported)["leaks"]["val"] == ["ecva_1953.mp4", "ecva_1955.mp4"]
    assert len(by_video(imported, "val")) == 732


def test_intervals_beyond_the_end_are_flagged(imported: Path) -> None:
    """ECVA's 14.mp4 has its anomaly at 4 to 35 s; the stand-in lasts 3."""
    assert found(imported)["beyond_end"]["ecva/videos/14.MP4"] == "[4.0, 35.0] of 3.0 s"


def test_imported_times_are_not_corrected_twice(imported: Path, vau_bench: Path) -> None:
    before = {plain_name(row.video): row for row in load(vau_bench / "test_ecva.csv")[0]}
    after = [row for row in by_video(imported).values() if row.source == "ecva"]
    assert len(after) == 438
    assert all(row.interval == before[plain_name(row.video)].interval for row in after)


def test_options_are_shuffled_with_their_letters(imported: Path, vau_bench: Path) -> None:
    before = {plain_name(row.video): row for row in load(vau_bench / "test_msad.csv")[0]}
    after = [row for row in by_video(imported).values() if row.source == "msad"]
    for row in after:
        old = before[plain_name(row.video)]
        assert row.options["ABCD".index(row.answer)] == old.options["ABCD".index(old.answer)]
    letters = [row.answer for row in after]
    assert max(letters.count(letter) for letter in "ABCD") < 0.35 * len(letters)  # A alone was 68%


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(vau_bench: Path, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        module.import_splits(tmp_path / name, {"test": [str(vau_bench / "test_msad.csv")]}, {}, seed, workers=1)
        texts.append((tmp_path / name / "test.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_checksums_are_of_the_files(imported: Path) -> None:
    lines = (imported / "SHA256SUMS").read_text().splitlines()
    assert lines
    for line in lines:
        checksum, name = line.split()
        assert hashlib.sha256((imported / name).read_bytes()).hexdigest() == checksum


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("import", "--out", "x"), "nothing to import"),
        (("import", "--out", "x", "--test", "none.csv"), "none.csv does not exist"),
        (("import", "--out", "x", "--videos", "youtube=x"), "expected SOURCE=DIR"),
        (("audit", "none.csv"), "none.csv does not exist"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], message: str) -> None:
    done = run(*args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_spoilt_imported_row_is_named(imported: Path, tmp_path: Path) -> None:
    lines = (imported / "test.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(lines[1])
    path = tmp_path / "test.jsonl"
    for change in ({"answer": "E"}, {"interval": [5.0, 2.0]}, {"color": 1}, {"options": None}):
        path.write_text(lines[0] + json.dumps({**record, **change}) + "\n")
        with pytest.raises(ValueError, match="line 2"):
            load(path)


def test_the_tfds_builder_takes_several_questions_about_a_video(imported: Path, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    import vau_jax.data_prep.vau_bench_tfds  # noqa: F401 - registers the builder

    first = json.loads((imported / "test.jsonl").read_text().splitlines()[0])
    rows = [first, {**first, "question": "Who comes last?"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder = tfds.builder("vau_bench/all", imported=tmp_path, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    found = tfds.data_source("vau_bench/all", split="test", data_dir=tmp_path / "tfds")
    assert sorted(row["question"].decode() for row in found) == sorted(row["question"] for row in rows)


@pytest.mark.parametrize("config", ["all", "ucf"])
def test_the_tfds_builder_gives_every_row(imported: Path, tmp_path: Path, config: str) -> None:
    import tensorflow_datasets as tfds

    import vau_jax.data_prep.vau_bench_tfds  # noqa: F401 - registers the builder

    builder = tfds.builder(f"vau_bench/{config}", imported=imported, data_dir=tmp_path)
    builder.download_and_prepare()
    source = tfds.data_source(f"vau_bench/{config}", split="test", data_dir=tmp_path)
    rows = {row.video: row for row in by_video(imported).values() if config in ("all", row.source)}
    assert len(source) == len(rows) == (968 if config == "all" else 290)
    for example in source:
        row = rows[example["video"].decode()]
        assert [option.decode() for option in example["options"]] == list(row.options)
        assert example["reasoning"]["Conclusion"].decode() == row.reasoning.get("Conclusion", "")
        assert example["interval_kind"].decode() == (
            "seconds" if isinstance(row.interval, tuple) else row.interval or "unknown"
        )
        assert example["interval"].tolist() == pytest.approx(
            row.interval if isinstance(row.interval, tuple) else (0.0, 0.0)
        )
