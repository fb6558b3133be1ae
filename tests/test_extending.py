"""The README's section "Extending": every block runs as it stands, and what it adds is used."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.records import example
from tests.runs import small
from tests.small_models import make_model
from vau_jax.common.metric_writer import read_metrics
from vau_jax.datasets import DATASETS
from vau_jax.datasets.audit import Audit
from vau_jax.models import hf
from vau_jax.models.config import FAMILIES
from vau_jax.models.hf import VISION_NAMES
from vau_jax.tasks import TASKS, parsing, statistics
from vau_jax.tasks.base import Task, stripped
from vau_jax.tasks.columns import Column
from vau_jax.tasks.example import Example
from vau_jax.tasks.rewards import REWARDS
from vau_jax.train import loop, sft
from vau_jax.train.update import STAGES
from vau_jax.vlm import VideoLM

README = (Path(__file__).parents[1] / "vau_jax" / "README.md").read_text()
SECTION = README.split("## Extending")[1].split("\n## ")[0]
PARTS = dict(re.findall(r"\*\*An? ([\w ]+)\*\*.*?```python\n(.*?)```", SECTION, re.DOTALL))
DICTIONARIES = {"TASKS": TASKS, "DATASETS": DATASETS, "REWARDS": REWARDS, "STAGES": STAGES}
DICTIONARIES |= {"FAMILIES": FAMILIES, "VISION_NAMES": VISION_NAMES}
USED = {"Task": Task, "Column": Column, "stripped": stripped, "statistics": statistics, "Audit": Audit, "Path": Path}
USED |= {"Example": Example, "jnp": jnp, "np": np, "sft": sft}


@pytest.fixture
def run_block(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a block with the names that it uses; what it adds to dictionaries is taken out after the test."""

    def run(part: str) -> dict[str, Any]:
        for dictionary in DICTIONARIES.values():
            for name, value in dictionary.items():
                monkeypatch.setitem(dictionary, name, value)
        before = {name: set(dictionary) for name, dictionary in DICTIONARIES.items()}
        names = {**USED, **DICTIONARIES}
        exec(PARTS[part], names)
        for name, dictionary in DICTIONARIES.items():
            for added in set(dictionary) - before[name]:
                value = dictionary.pop(added)
                monkeypatch.setitem(dictionary, added, value)
        jax.clear_caches()
        return names

    return run


def test_there_are_five_blocks() -> None:
    assert list(PARTS) == ["task", "dataset", "reward", "loss", "model family"]


def test_a_task(run_block: Any) -> None:
    run_block("task")
    asked = example("night", description="A dark street.")
    parsed = parsing.parse(["<think>t</think><answer>yes</answer>", "<think>t</think><answer>no</answer>"], "night")
    accuracy = REWARDS["accuracy"](parsed, parsing.targets_of([asked] * 2))
    assert parsed.format_ok.all() and accuracy.tolist() == [1.0, 0.0]


def test_a_dataset(run_block: Any, dataset: Path, model_folder: Path, tmp_path: Path) -> None:
    run_block("dataset")
    lines = [f"train_0000{i}.mp4|What happens?|a fire|a fall|calm|{'ABC'[i % 3]}" for i in range(4)]
    (tmp_path / "bars.txt").write_text("\n".join(lines))
    c = small("vau_r1_sft", model_folder, dataset)
    c.data.dataset, c.data.csv, c.data.tasks = "bars", str(tmp_path / "bars.txt"), ("qa",)
    loop.run(c, tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[0]["loss"])


def test_a_reward(run_block: Any) -> None:
    names = run_block("reward")
    assert (names["brief"]("x" * 399, None), names["brief"]("x" * 400, None)) == (1.0, 0.0)
    texts = [f"<think>{'word ' * count}</think><answer>A</answer>" for count in (0, 10, 40)]
    parsed = parsing.parse(texts, "qa")
    assert REWARDS["thoughtful"](parsed, parsing.targets_of([example("qa")] * 3)).tolist() == [0.0, 0.5, 1.0]


def test_a_loss(run_block: Any, dataset: Path, model_folder: Path, tmp_path: Path) -> None:
    run_block("loss")
    c = small("vau_r1_sft", model_folder, dataset)
    c.stage, c.micro_batches = "focal", 2
    loop.run(c, tmp_path)
    (step,) = read_metrics(tmp_path)
    assert step["loss"] > 0 and step["grad_norm"] > 0


def test_a_model_family(run_block: Any, tmp_path: Path) -> None:
    run_block("model family")
    folder = make_model(tmp_path / "model", family="qwen2_5_vl")
    expected = hf.flatten(VideoLM.load(folder).params)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "acme_vl"}))
    params = hf.flatten(VideoLM.load(folder).params)
    assert params.keys() == expected.keys()
    assert all(np.array_equal(params[name], expected[name]) for name in params)
