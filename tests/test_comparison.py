"""Published numbers, and our own beside them only where they are of the same thing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import records
from vau_jax.configs.reproduce import evaluate
from vau_jax.datasets import vau_bench as reader
from vau_jax.eval import charts, comparison, published, tables
from vau_jax.eval.records import to_line
from vau_jax.eval.scores import score
from vau_jax.models import config as model_config

ROWS = dict(published.ROWS)


@pytest.fixture(autouse=True)
def _two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test files have two rows here."""
    few = {key: 6 if key[0] == published.POOLED else 2 for key in published.ROWS}
    monkeypatch.setattr(published, "ROWS", few)


RIGHT = {"qa": "<answer>B</answer>", "grounding": "<glue>[2, 6]</glue>", "classification": "<answer>Fire</answer>"}
RFT_QA = {"size": "Qwen2.5-VL-3B", "stage": "rft", "tasks": ["qa"], "style": "think", "lora": 0, "begins": ""}


def evaluation(folder: Path, row: str, file: str, model: dict[str, Any], **changed: Any) -> Path:
    """One right and one wrong answer, evaluated as the row says."""
    config = json.loads(evaluate.get_config(row).to_json_best_effort())
    config["data"]["csv"] = f"data/{file}.csv"
    for name, value in changed.pop("data", {}).items():
        config["data"][name] = value
    (task,) = config["data"]["tasks"]
    evaluated = [records.record(task, RIGHT[task], video="a.mp4"), records.record(task, "?", video="b.mp4")]
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(to_line(one, "f") for one in evaluated))
    result = {
        "name": folder.name,
        "blind": False,
        "protocol": config["data"]["protocol"],
        "model": model,
        "about": {"time": "now"},
        "settings": config,
        "excluded": [],
        **score(evaluated, config["data"]["protocol"]),
    } | changed
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


def shown(*folders: Path) -> dict[str, list[list[str]]]:
    return dict(comparison.tables(tables.evaluations(folders)))


@pytest.mark.parametrize("file", charts.SOURCES)
def test_the_rows_are_those_of_the_published_files(file: str, vau_bench: Path) -> None:
    """Under the published protocol; VAU-Eval is of the rows that have a description."""
    rows, _ = reader.load(vau_bench / f"{file}.csv", protocol="paper")
    count = Counter("vau_eval" if task == "description" else task for row in rows for task in row.tasks)
    assert {task: ROWS[charts.SOURCES[file], task] for task in count} == count


def test_every_published_number_is_there_once() -> None:
    """9 models x 2 data sets x (2 + 6), 5 x 3 x 2 x 4, 7 x 2 x 2, and 10 of the aggregator."""
    every = list(published.numbers())
    assert len(every) == 9 * 2 * 8 + 5 * 3 * 8 + 7 * 4 + 10
    asked = [(n.dataset, n.task, n.metric, n.model, n.training, n.thinking) for n in every]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("dataset", "task", "metric", "model", "training", "thinking", "value"),
    [
        ("MSAD", "qa", "accuracy", "Qwen2.5-VL-3B", "RFT", True, 87.08),
        ("MSAD", "qa", "accuracy", "Qwen2.5-VL-3B", "RFT", False, 88.33),
        ("UCF-Crime", "qa", "accuracy", "InternVL2.5-2B", "", True, 68.13),
        ("MSAD", "qa", "accuracy", "SRVAU-R1", "", False, 89.58),
        ("ECVA", "grounding", "R@0.7", "Qwen2.5-VL-3B", "SFT", True, 26.12),
        ("UCF-Crime", "grounding", "mIoU", "Qwen2.5-VL-7B", "", False, 22.72),
        (published.POOLED, "classification", "binary", "Qwen2.5-VL-3B", "RFT TAG", True, 74.14),
        ("MSAD", "vau_eval", "total", "Qwen2-VL-2B", "SFT", None, 32.84),
    ],
)
def test_a_published_number_is_under_what_it_is_of(
    dataset: str, task: str, metric: str, model: str, training: str, thinking: bool | None, value: float
) -> None:
    wanted = (dataset, task, metric, model, training, thinking)
    found = [n for n in published.numbers() if (n.dataset, n.task, n.metric, n.model, n.training, n.thinking) == wanted]
    assert [n.value for n in found] == [value]


def test_the_same_thing_stands_beside_the_published_number(tmp_path: Path) -> None:
    found = shown(evaluation(tmp_path / "rft_qa", "qa_think", "test_msad", RFT_QA))
    (title, lines), *more = found.items()
    assert title == "Questions, accuracy in %: MSAD, with reasoning" and not more
    row = next(line for line in lines if line[:2] == ["Qwen2.5-VL-3B", "RFT"])
    assert row[2:6] == ["accuracy", "87.08", "100.00 [100.0, 100.0]", "1"], "the unreadable answer is left out"


def test_reasoning_and_training_choose_the_row(tmp_path: Path) -> None:
    base = {"size": "Qwen2-VL-2B"}
    found = shown(
        evaluation(tmp_path / "base", "tag_direct", "test_ecva", base),
        evaluation(tmp_path / "sft", "tag_think", "test_ucf_crime", RFT_QA | {"stage": "sft", "tasks": ["grounding"]}),
    )
    direct = found["Grounding, %: ECVA, without reasoning"]
    assert next(line for line in direct if line[0] == "Qwen2-VL-2B" and line[2] == "mIoU")[3:5] == [
        "0.00", "50.00 [0.0, 100.0]"
    ]  # fmt: skip
    think = found["Grounding, %: UCF-Crime, with reasoning"]
    assert next(line for line in think if line[1:3] == ["SFT", "R@0.5"])[3:5] == ["0.81", "50.00 [0.0, 100.0]"]


@pytest.mark.parametrize(
    ("changed", "model", "reason"),
    [
        ({"protocol": "clean"}, RFT_QA, "protocol clean"),
        ({"blind": True}, RFT_QA, None),
        ({"data": {"shuffle_options": True}}, RFT_QA, "options shuffled"),
        ({"by_class": {"qa": {"Fire": {"n": 1}}}}, RFT_QA, "1 of 2 rows"),
        ({}, RFT_QA | {"size": ""}, "a model of another size"),
    ],
)
def test_what_differs_stands_apart_with_the_reason(
    tmp_path: Path, changed: dict[str, Any], model: dict[str, Any], reason: str | None
) -> None:
    found = shown(evaluation(tmp_path / "mine", "qa_think", "test_msad", model, **changed))
    if reason is None:
        assert found == {}, "a blind evaluation is of no data set"
        return
    (title, lines) = next(iter(found.items()))
    assert len(found) == 1 and title == "Not comparable with published numbers"
    assert lines[1][0] == "mine" and lines[1][-1] == reason


def test_a_run_after_sft_is_no_published_row(tmp_path: Path) -> None:
    found = shown(evaluation(tmp_path / "after", "qa_think", "test_msad", RFT_QA | {"begins": "runs/sft"}))
    line = next(line for line in found["Questions, accuracy in %: MSAD, with reasoning"][1:] if line[4])
    assert line[1] == "RFT, after SFT" and line[3] == ""


def test_classification_is_pooled_over_the_three_files(tmp_path: Path) -> None:
    model = RFT_QA | {"tasks": ["qa", "grounding"]}
    files = ("test_msad", "test_ucf_crime", "test_ecva")
    folders = [evaluation(tmp_path / file / "rft_qa_tag", "cls_direct", file, model) for file in files]
    lines = shown(*folders)["Classification, accuracy in %: MSAD, UCF-Crime and ECVA, without reasoning"]
    row = next(line for line in lines if line[1:3] == ["RFT QA-TAG", "multiclass"])
    assert row[3] == "47.53" and row[4].startswith("50.00") and row[5] == "6"
    apart = shown(*folders[:2])["Not comparable with published numbers"]
    assert {line[-1] for line in apart[1:]} == {"4 of 6 rows"}


def test_a_reflection_run_is_srvau_and_two_passes_are_not(tmp_path: Path) -> None:
    model = RFT_QA | {"style": "reflection", "tasks": ["qa", "grounding", "classification"]}
    found = shown(evaluation(tmp_path / "whole", "qa_direct", "test_msad", model))
    lines = found["Questions, accuracy in %: MSAD, without reasoning"]
    assert next(line for line in lines if line[0] == "SRVAU-R1")[3:5] == ["89.58", "100.00 [100.0, 100.0]"]


def test_the_whole_table_has_what_we_did_not_run(tmp_path: Path) -> None:
    titles = [title for title, _ in comparison.tables([], whole=True)]
    assert "VAU-Eval, marks of 10 and total of 50: UCF-Crime, not stated how asked" in titles and len(titles) > 12
    assert comparison.tables([]) == []


@pytest.mark.parametrize("size", model_config.SIZES)
def test_a_published_checkpoint_is_known_by_its_sizes(size: str) -> None:
    """As it is published, and as transformers saves it today, with the decoder's fields in a group of their own."""
    raw = model_config.SIZES[size]
    name = model_config.published_name(raw)
    assert name.lower() == size and (name.startswith("Qwen") and name.endswith("B"))
    text = raw.get("text_config", raw)
    nested = {"model_type": raw["model_type"], "text_config": text, "vision_config": raw["vision_config"]}
    assert model_config.published_name(nested) == name


def test_another_model_has_no_published_name(model_folder: Path) -> None:
    assert model_config.published_name(json.loads((model_folder / "config.json").read_text())) == ""
