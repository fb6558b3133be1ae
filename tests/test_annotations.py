"""Annotation files: every kind of dirt by its rule. Rows are in the form of VAU-Bench's (7xiang/VAU-Bench, MIT)."""

import csv
from pathlib import Path

import pytest

from tests.tables import BASE
from vau_jax.common.files import InputError
from vau_jax.datasets import vau_bench as annotations
from vau_jax.datasets.vau_bench import COLUMNS, Row, load


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**BASE, **row} for row in rows)
    return path


def one(tmp_path: Path, source: str = "auto", protocol: str = "clean", **row: str) -> tuple[Row, list[str]]:
    rows, audit = load(write(tmp_path / "a.csv", {k.replace("_", " "): v for k, v in row.items()}), source, protocol)
    return rows[0], [entry.reason for entry in audit.entries]


def test_a_clean_row_is_read_whole(tmp_path: Path) -> None:
    row, notes = one(tmp_path)
    assert (row.answer, row.anomaly_class, row.interval) == ("A", "Assault", (4.0, 35.0))
    assert row.tasks == ("qa", "grounding", "classification", "description")
    assert list(row.reasoning) == list(annotations.SECTIONS)
    assert (row.reasoning["Location"], row.reasoning["Conclusion"]) == ("street", "a fight")
    assert notes == []


@pytest.mark.parametrize(("raw", "seconds"), [("100.0", 60.0), ("257.0", 177.0), ("45.0", 45.0), ("170.0", 170.0)])
def test_ecva_times_are_mmss(tmp_path: Path, raw: str, seconds: float) -> None:
    row, notes = one(tmp_path, "ecva", Start_Time="3.0", End_Time=raw)
    assert row.interval == (3.0, seconds)
    assert len(notes) == (raw != "45.0")


def test_a_row_with_a_time_that_is_no_mmss_number_is_kept_in_seconds_whole(tmp_path: Path) -> None:
    row, notes = one(tmp_path, "ecva", Start_Time="560.0", End_Time="610.0")
    assert row.interval == (560.0, 610.0)
    assert [note.split(":")[0] for note in notes] == ["times are no MMSS numbers, kept as seconds"]


def test_paper_protocol_keeps_ecvas_misread_times(tmp_path: Path) -> None:
    assert one(tmp_path, "ecva", "paper", End_Time="257.0")[0].interval == (4.0, 257.0)


@pytest.mark.parametrize(
    ("label", "start", "end", "interval"),
    [
        ("Normal", "0.0", "0.0", "normal"),
        ("Normal", "-1.0", "-1.0", "normal"),
        ("Fire", "-1.0", "-1.0", None),
        ("Fire", "0.0", "0.0", None),
        ("Fire", "9.0", "4.0", None),
        ("Fire", "x", "4.0", None),
        ("Fire", "nan", "4.0", None),
        ("Fire", "0.0", "4.0", (0.0, 4.0)),
    ],
)
def test_codes_for_no_interval(tmp_path: Path, label: str, start: str, end: str, interval: object) -> None:
    row, notes = one(tmp_path, Anomaly_Class=label, Start_Time=start, End_Time=end)
    assert row.interval == interval
    assert bool(notes) == (interval is None)


def test_rows_of_minus_one_serve_grounding_only(tmp_path: Path) -> None:
    text = {name.replace(" ", "_"): "-1" for name in COLUMNS[1:11]}
    row, notes = one(tmp_path, **text)
    assert row.tasks == ("grounding",)
    assert len(notes) == 2


def test_a_lettered_answer_is_cut_to_its_letter(tmp_path: Path) -> None:
    row, notes = one(tmp_path, Correct_Option="D. nothing")
    assert row.answer == "D"
    assert notes == ["correct option holds more than its letter"]


def test_a_lettered_answer_that_names_another_option_is_flagged(tmp_path: Path) -> None:
    assert len(one(tmp_path, Correct_Option="D. a fire")[1]) == 2


def test_a_letter_out_of_range_is_excluded_and_listed(tmp_path: Path) -> None:
    row, notes = one(tmp_path, Correct_Option="E")
    assert "qa" not in row.tasks
    assert notes == ["correct option is not a letter A to D: 'E'"]


def test_an_unknown_class_is_excluded_and_listed(tmp_path: Path) -> None:
    row, notes = one(tmp_path, Anomaly_Class="Dancing")
    assert "classification" not in row.tasks
    assert notes == ["unknown anomaly class: 'Dancing'"]


def test_both_serialisations_of_reasoning_give_the_same_sections() -> None:
    literal = "{'Specific Anomaly Type': 'Fire', 'Key Evidence': ['smoke', 'heat'], 'Conclusion': \"it's a fire\"}"
    markdown = "### Specific Anomaly Type: Fire ### Key Evidence: smoke; heat ### Conclusion: it's a fire"
    assert annotations.parse_reasoning(literal) == annotations.parse_reasoning(markdown)


def test_a_list_inside_a_section_is_read_as_its_parts() -> None:
    text = """### Key Evidence: ['a man', "the door's lock"] ### Conclusion: [sic] theft"""
    assert annotations.parse_reasoning(text) == {"Key Evidence": "a man; the door's lock", "Conclusion": "[sic] theft"}


def test_reasoning_runs_no_code(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    assert annotations.parse_reasoning(f"{{'Location': open({str(target)!r}, 'w')}}") == {}
    assert not target.exists()


def test_jsonl_reads_as_csv(tmp_path: Path) -> None:
    import json

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(BASE) + "\n")
    assert load(path)[0] == load(write(tmp_path / "a.csv", {}))[0]


@pytest.mark.parametrize(
    ("video", "source"),
    [("ecva_1.mp4", "ecva"), ("17.mp4", "ecva"), ("Abuse028_x264.mp4", "ucf"), ("Fire_3.mp4", "msad")],
)
def test_source_by_name(video: str, source: str) -> None:
    assert annotations.detect_source(video) == source


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Video Name,Question\na.mp4,what?\n")
    with pytest.raises(InputError, match=r"lacks the column.*Start Time"):
        load(path)


@pytest.mark.parametrize("text", [",".join(COLUMNS) + "\n", ""])
def test_an_empty_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError):
        load(path)


def test_the_audit_counts_by_reason(tmp_path: Path) -> None:
    bad = ({"Video Name": f"{letter}.mp4", "Correct Option": letter} for letter in "EF")
    path = write(tmp_path / "a.csv", *bad, {})
    _, audit = load(path)
    assert audit.counts() == {("excluded", "correct option is not a letter A to D"): 2}
    assert "3 rows" in audit.table()


# --- The published files ------------------------------------------------------------------------------------------

DENOMINATORS = {  # qa, grounding, classification of VAU-R1's tables
    "test_msad": (240, 120, 240),
    "test_ucf_crime": (251, 124, 290),
    "test_ecva": (402, 402, 402),
}


@pytest.mark.parametrize("name", DENOMINATORS)
def test_paper_protocol_has_the_published_denominators(vau_bench: Path, name: str) -> None:
    rows, _ = load(vau_bench / f"{name}.csv", protocol="paper")
    assert tuple(annotations.denominators(rows).values()) == DENOMINATORS[name]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("val", 734), ("test_msad", 240), ("test_ucf_crime", 290), ("test_ecva", 438), ("ucf_subset_train", 1194)],
)
def test_clean_protocol_keeps_every_row(vau_bench: Path, name: str, rows: int) -> None:
    found, audit = load(vau_bench / f"{name}.csv")
    assert len(found) == audit.rows == rows


def test_clean_protocol_serves_each_task_with_what_is_usable(vau_bench: Path) -> None:
    tasks = {
        name: tuple(
            sum(task in row.tasks for row in load(vau_bench / f"{name}.csv")[0]) for task in ("qa", "grounding")
        )
        for name in DENOMINATORS
    }
    assert tasks == {"test_msad": (240, 240), "test_ucf_crime": (251, 274), "test_ecva": (438, 402)}


def test_ecva_intervals_shorten_as_mmss(vau_bench: Path) -> None:
    """175 of 402 change; their mean length was 133 s and is 88 s (two rows are Normal: theirs are set aside here)."""
    import numpy as np

    clean, misread = (
        {row.video: row.interval for row in load(vau_bench / "test_ecva.csv", protocol=p)[0] if row.interval}
        for p in ("clean", "paper")
    )
    assert len(misread) == 402
    assert sum(clean[video] != interval for video, interval in misread.items()) == 175
    lengths = [np.mean([i[1] - i[0] for i in found.values() if i != "normal"]) for found in (misread, clean)]
    assert lengths == pytest.approx([133, 88], abs=1)


def test_every_reasoning_has_its_sections_or_is_flagged(vau_bench: Path) -> None:
    for name in ("val", *DENOMINATORS):
        rows, audit = load(vau_bench / f"{name}.csv")
        flagged = {entry.line for entry in audit.entries if entry.reason.startswith("sections are lacking")}
        assert {row.line for row in rows if row.description and len(row.reasoning) < 6} == flagged


def test_keyed_answers_that_deny_a_labelled_anomaly_are_flagged(vau_bench: Path) -> None:
    _, audit = load(vau_bench / "test_msad.csv")
    lettered = {entry.line for entry in audit.entries if entry.reason.startswith("correct option holds")}
    denied = {entry.line for entry in audit.entries if entry.reason.startswith("the keyed answer denies")}
    assert (len(lettered), len(lettered & denied)) == (8, 2)


def test_the_leak_between_val_and_test_is_found(vau_bench: Path) -> None:
    val, test = (load(vau_bench / f"{name}.csv")[0] for name in ("val", "test_ecva"))
    assert sorted(row.video for row in annotations.shared_videos(val, test)) == ["ecva_1953.mp4", "ecva_1955.mp4"]


@pytest.mark.parametrize(
    ("video", "label"),
    [
        ("ucf_Shoplifting037_x264.mp4", "Stealing"),
        ("Normal_Videos_100_x264.mp4", "Normal"),
        ("Abuse1_x264.mp4", "Abuse"),
    ],
)
def test_ucf_class_by_name(video: str, label: str) -> None:
    assert annotations.ucf_class(video) == label


def test_ucf_class_by_name_agrees_with_every_labelled_row(vau_bench: Path) -> None:
    for name in ("val", "test_ucf_crime", "ucf_subset_train"):
        rows = [row for row in load(vau_bench / f"{name}.csv")[0] if row.source == "ucf" and row.anomaly_class]
        assert rows and all(annotations.ucf_class(row.video) == row.anomaly_class for row in rows)
