"""`vau data check`: every mistake of a newcomer's table is named with its row and the way to mend it."""

import csv
import shlex
from pathlib import Path

import pytest

from tests import video_files
from tests.runs import small
from vau_jax import cli
from vau_jax.common.files import InputError
from vau_jax.common.metric_writer import read_metrics
from vau_jax.data_prep import check
from vau_jax.datasets import vau_bench
from vau_jax.train import loop

GOOD = {"Video Name": "a.mp4", "Start Time": "0.5", "End Time": "1.5", "Anomaly Class": "Fire"}
ASKED = {"Question": "What burns?", "Option 1": "x", "Option 2": "y", "Option 3": "z", "Option 4": "w"}


def written(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of 2 s and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "b.mp4"):
        video_files.write(folder / name, count=40, fps=20)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def checked(path: Path, videos: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    """The exit code, and the lines."""
    code = 0
    try:
        cli.call(["data", "check", str(path), str(videos), *options])
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out.splitlines()


MISTAKES = {  # changes of a good row -> what is said, and the way out
    "class": ({"Anomaly Class": "Fires"}, "unknown anomaly class: 'Fires'", "did you mean Fire?"),
    "end before start": ({"End Time": "0.2"}, "interval is empty, reversed", "the end must be after the start"),
    "no number": ({"Start Time": "0:30"}, "times are not numbers", "write seconds such as 12.5"),
    "beyond the end": ({"End Time": "90"}, "reaches beyond the end of the video, 2.0 s", "seconds from the start"),
    "name": ({"Video Name": "A.mp4"}, "no such video", "did you mean a.mp4?"),
    "no like name": ({"Video Name": "warehouse.mkv"}, "no such video", "no such file in"),
    "not a video": ({"Video Name": "broken.mp4"}, "the video cannot be read", "ffmpeg -i OLD"),
    "outside": ({"Video Name": "../a.mp4"}, "leads out of the folder", "relative to the folder of videos"),
    "letter": (ASKED | {"Correct Option": "E"}, "correct option is not a letter A to D: 'E'", "write A, B, C or D"),
    "option": (ASKED | {"Option 3": "", "Correct Option": "A"}, "an option is empty", "write four options"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_row_and_the_way_to_mend_it(
    name: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said, remedy = MISTAKES[name]
    good = {**GOOD, "Video Name": "b.mp4"} | (ASKED | {"Correct Option": "B"} if "Correct Option" in change else {})
    code, lines = checked(written(tmp_path, good, {**good, "Video Name": "a.mp4", **change}), videos, capsys)
    assert code == 1 and lines[-1].startswith("1 errors, 0 warnings"), lines
    (at,) = [number for number, line in enumerate(lines) if said in line]
    assert lines[at].startswith("row 2, ") and ": error: " in lines[at] and remedy in lines[at + 1]


def test_rows_of_a_video_that_contradict_each_other_are_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = checked(written(tmp_path, GOOD, {**GOOD, "End Time": "1.0"}), videos, capsys)
    assert code == 1 and any("another interval than in row 1: [0.5, 1.0], there [0.5, 1.5]" in line for line in lines)


def test_a_row_that_is_no_csv_is_named(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, GOOD)
    path.write_text(path.read_text() + "b.mp4,1,2,Fire, and smoke\n")
    code, lines = checked(path, videos, capsys)
    assert code == 1 and any("row 2" in line and "more cells than the header" in line for line in lines)
    assert any("put cells with commas into quotes" in line for line in lines)


def test_names_of_digits_are_said_to_be_read_as_minutes_and_seconds(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.mp4").write_bytes((videos / "a.mp4").read_bytes())
    path = written(tmp_path, {**GOOD, "Video Name": "1.mp4", "Start Time": "100", "End Time": "130"})
    code, lines = checked(path, tmp_path, capsys, "--no-probe")
    assert code == 0 and "no errors, 1 warnings" in lines
    assert any("times read as MMSS: (100.0, 130.0) is (60.0, 90.0) s" in line for line in lines)
    code, lines = checked(path, tmp_path, capsys, "--no-probe", "--source=msad")
    assert code == 0 and "--config.data.time_rules=msad" in lines[-1] and "nothing to mend" in lines


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("Video Name,Start time,End time", "lacks the column(s) Start Time (found 'Start time'), End Time"),
        ("Video Name,Start Time", "lacks the column(s) End Time"),
        ("Video,Start Time,End Time", "lacks the column(s) Video Name"),
        ("Video Name,Notes", "lacks the column(s) Question"),
    ],
)
def test_a_misspelt_or_missing_column_is_named(header: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(f"{header}\n{'x,' * header.count(',')}x\n")
    with pytest.raises(InputError) as caught:
        cli.call(["data", "check", str(tmp_path / "mine.csv"), str(tmp_path)])
    assert words in str(caught.value)


def test_the_published_protocol_needs_all_columns(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    rows, audit = vau_bench.load(path)
    assert rows[0].tasks == ("grounding", "classification")
    assert sorted(e.reason for e in audit.entries) == [
        f"the table has no columns for {what}" for what in ("description", "key object", "qa", "reasoning")
    ]
    with pytest.raises(InputError, match="lacks the column"):
        vau_bench.load(path, protocol="paper")


def test_the_template_passes_with_its_videos_and_is_never_written_over(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.csv"
    cli.call(["data", "check", f"--template={path}"])
    assert "Start Time      of the anomaly, in seconds" in capsys.readouterr().out
    for row in check.TEMPLATE:
        (tmp_path / row["Video Name"]).write_bytes((videos / "a.mp4").read_bytes())
    code, lines = checked(path, tmp_path, capsys, "--no-probe")
    assert code == 0 and "2 rows; usable for: qa 2, grounding 2, classification 2" in lines
    with pytest.raises(InputError, match="exists already"):
        cli.call(["data", "check", f"--template={path}"])


def test_a_model_is_trained_on_ten_clips_with_times_and_classes_alone(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The least that a table needs, SFT in the answer format without reasoning, from `vau data check` to the losses."""
    kinds = ("Fire", "Normal", "Fighting", "Normal", "Robbery")
    rows = []
    for number in range(10):
        kind = kinds[number % 5]
        video_files.write(
            tmp_path / f"clip_{number}.mp4", count=40, fps=20, size=(160, 120) if number % 2 else (96, 128)
        )
        times = ("0", "0") if kind == "Normal" else ("0.5", "1.5")
        rows.append(
            {"Video Name": f"clip_{number}.mp4", "Start Time": times[0], "End Time": times[1], "Anomaly Class": kind}
        )
    path = written(tmp_path, *rows)
    code, lines = checked(path, tmp_path, capsys)
    assert code == 0 and "10 rows; usable for: grounding 10, classification 10" in lines
    following = shlex.split(lines[-1].removeprefix("next: "))
    assert following[1] == "train" and following[-1] == "--config.data.style=direct"
    assert '--config.data.tasks=("grounding","classification",)' in following
    config = small("vau_r1_sft", model_folder, tmp_path)
    config.data.csv, config.data.videos, config.data.tasks = str(path), str(tmp_path), ("grounding", "classification")
    config.data.style, config.steps, config.data.max_completion_tokens = "direct", 2, 64
    loop.run(config, tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == config.steps
