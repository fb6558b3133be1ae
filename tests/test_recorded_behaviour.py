"""Behaviour is that of the code before tasks and datasets had packages of their own: see tests/recorded.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import recorded

RECORDED = recorded.read()
FILES = sorted(RECORDED["examples"])


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def compare(found: Any, expected: Any, path: str = "") -> None:
    """Numbers to 1e-5: float32 arithmetic has other roundings on other processors."""
    if isinstance(expected, dict):
        assert set(found) >= set(expected), f"{path}: {set(expected) - set(found)} is missing"
        for name, value in expected.items():
            compare(found[name], value, f"{path}/{name}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), path
    elif isinstance(expected, list) and expected and isinstance(expected[0], float | list):
        assert len(found) == len(expected), path
        for i, value in enumerate(expected):
            compare(found[i], value, f"{path}/{i}")
    else:
        assert found == expected, path


def test_completions_are_parsed_and_rewarded_as_recorded() -> None:
    compare(as_json(recorded.readings(RECORDED["texts"])), RECORDED["readings"])


@pytest.mark.parametrize("name", FILES)
def test_examples_and_prompts_of_published_annotations_are_those_recorded(name: str, vau_bench: Path) -> None:
    file, protocol = name.split()
    assert recorded.examples_of(vau_bench / file, protocol) == RECORDED["examples"][name]


@pytest.mark.parametrize("name", recorded.BATCHES)
def test_training_batches_are_those_recorded(name: str, model_folder: Path, dataset: Path) -> None:
    """But for the groups of patches, which were one frame or window each."""
    expected = RECORDED["batches"][name]
    for batch in expected:
        batch["arrays"] = {k: x for k, x in batch["arrays"].items() if "frames" not in k and "windows" not in k}
    compare(as_json(recorded.batches(name, model_folder, dataset)), expected)


@pytest.mark.parametrize("style", ["think", "reflection"])
def test_metrics_of_an_evaluation_are_those_recorded(style: str, vau_bench: Path) -> None:
    found = recorded.evaluation(RECORDED["texts"], vau_bench / "test_ucf_crime.csv", style)
    compare(as_json(found), RECORDED["evaluation"][style])


@pytest.mark.parametrize("stage", recorded.TRAINING)
def test_training_computes_the_losses_recorded(stage: str, model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    compare(recorded.training(stage, model_folder, dataset, tmp_path), RECORDED["training"][stage])
