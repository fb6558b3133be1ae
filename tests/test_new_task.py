"""A new task is one class: "is it night?", defined here, is asked, read, rewarded, trained, evaluated and shown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.records import example, record
from tests.runs import small
from tests.small_models import writing_model
from vau_jax import ask
from vau_jax.common.metric_writer import read_metrics
from vau_jax.eval import evaluate, records, report, scores
from vau_jax.tasks import TASKS, parsing, prompts, rewards, statistics
from vau_jax.tasks.base import ReportRow, Task, stripped
from vau_jax.tasks.columns import Column, Columns, Values
from vau_jax.tasks.example import Annotation, Example
from vau_jax.tasks.record import Record
from vau_jax.train import loop


class Night(Task):
    """The answer is yes or no; the truth is whether the description speaks of the dark."""

    name = "night"
    columns: ClassVar = {"night": Column((), np.int32, -1)}
    question = "Is it night in this surveillance video?"
    short_question = "Is it night?"
    answer_instruction = "The answer is yes or no."
    command = "night"
    title = "Is it night?"
    report_rows = (ReportRow("Night accuracy", ("tasks", "night", "accuracy"), ("baselines", "night", "majority")),)

    def truth(self, annotation: Annotation) -> Mapping[str, Any] | None:
        return {"night": "dark" in annotation.description or len(annotation.description) % 2 == 0}

    def truth_values(self, truth: Mapping[str, Any], choices: Sequence[str]) -> Values:
        return {"night": int(truth["night"])}

    def identity(self, annotation: Annotation) -> Any:
        return annotation.description

    def answer(self, example: Example) -> str:
        return "yes" if example.truth["night"] else "no"

    def value(self, text: str, choices: Sequence[str]) -> Values:
        night = {"no": 0, "yes": 1}.get(stripped(text))
        return {} if night is None else {"night": night}

    def conclusion(self, choices: Sequence[str]) -> re.Pattern[str] | None:
        return re.compile(r"the answer is (yes|no)")

    def correct(self, answers: Columns, target: Columns) -> jax.Array:
        return (answers.night == target.night) & (answers.night >= 0)

    def metrics(self, final: Columns, target: Columns, records: Sequence[Record], protocol: str) -> dict[str, Any]:
        return {"accuracy": statistics.estimate(final.night == target.night)}

    def baselines(self, target: Columns, records: Sequence[Record]) -> dict[str, Any]:
        return {"majority": statistics.majority(target.night)}

    def show(self, values: Mapping[str, Any], choices: Sequence[str]) -> str | None:
        return {0: "no", 1: "yes"}.get(values["night"])


@pytest.fixture(autouse=True)
def night(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "night", Night())
    jax.clear_caches()  # programs that were compiled for the other tasks


DARK, LIGHT = "A dark street.", "A street at noon."


def test_it_is_asked_and_answered() -> None:
    asked = example("night", description=DARK)
    assert prompts.question(asked, "think", "full").startswith("Is it night in this surveillance video?\nThe answer is")
    text = "".join(span.text for span in prompts.completion(asked, "think"))
    assert text.endswith("<answer>yes</answer>")
    assert parsing.parse([text], "night").final.night.tolist() == [1]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap], ids=["plain", "jit", "vmap"])
def test_it_is_rewarded_beside_other_tasks(transform: Any) -> None:
    examples = [example("night", description=DARK), example("night", description=LIGHT), example("qa")]
    texts = [f"<think>t</think><answer>{answer}</answer>" for answer in ("yes", "yes", "B")]
    parsed = parsing.parse(texts, [e.task for e in examples], choices=[e.choices for e in examples])
    target = parsing.targets_of(examples)
    assert transform(rewards.REWARDS["accuracy"])(parsed, target).tolist() == [1.0, 0.0, 1.0]
    assert transform(rewards.REWARDS["tiou"])(parsed, target).tolist() == [0.0, 0.0, 0.0]


def test_reasoning_that_says_otherwise_is_noticed() -> None:
    text = "<think>t</think><draft>no</draft><reflect>r</reflect><revise>the answer is no</revise><answer>yes</answer>"
    assert parsing.parse([text], "night", reflection=True).contradicted.tolist() == [True]


def test_records_of_it_are_scored_and_vote() -> None:
    found = [
        record("night", ["<answer>yes</answer>", "<answer>no</answer>", "<answer>yes</answer>"], description=DARK),
        record("night", ["<answer>yes</answer>", "hm", "<answer>no</answer>"], description=LIGHT),
    ]
    result = scores.score(found)
    assert result["tasks"]["night"]["accuracy"]["value"] == 0.5
    assert result["baselines"]["night"]["majority"]["value"] == 0.5
    assert result["samples"]["night"]["vote"]["value"] == 0.5
    assert found[0].predictions == ["yes", "no", "yes"]


def config(name: str, model: Path, dataset: Path, split: str = "train") -> ConfigDict:
    c = small(name, model, dataset, split)
    c.data.tasks = ("night", "qa")
    return c


@pytest.mark.parametrize("name", ["vau_r1_sft", "vau_r1_multi_rft"])
def test_it_is_trained(name: str, model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = config(name, model_folder, dataset)
    loop.run(c, tmp_path)
    (step,) = read_metrics(tmp_path)
    assert np.isfinite([step["loss"], step["grad_norm"]]).all()
    if c.stage == "rft":
        assert 0 <= step["final_score/night"] <= 1


def test_it_is_evaluated_and_reported(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    result = evaluate.run(config("eval", model_folder, dataset, "test"), tmp_path / "eval")
    assert result["tasks"]["night"]["accuracy"]["n"] == 12
    assert {r.task for r in records.load(tmp_path / "eval")} == {"night", "qa"}
    table = report.write([tmp_path], tmp_path / "report.html")
    assert "Night accuracy" in table
    assert "Is it night?" in (tmp_path / "report.html").read_text()


def test_it_can_be_asked_of_a_video(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "COMMANDS", {task.command: task for task in TASKS.values()})
    model = writing_model(tmp_path / "model", "<think>dark</think><answer>yes</answer>")
    asker = ask.Asker(str(model), "float32")
    question = ask.Question(str(dataset / "videos" / "train_00000.mp4"), "night")
    assert asker.read(asker.complete(question), question).text == "yes"
