"""Evaluation during training: its numbers, what it leaves unchanged, the best checkpoint, early stopping, its cost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.runs import small
from vau_jax.common.files import InputError, read_json
from vau_jax.common.metric_writer import read_metrics
from vau_jax.data import pipeline
from vau_jax.eval import evaluate
from vau_jax.models import checkpoint
from vau_jax.train import evaluation, loop


def config(model: Path, data: Path, steps: int = 4, **changed: Any) -> ConfigDict:
    """SFT with an evaluation every two steps, which is cheap enough."""
    c = small("vau_r1_sft", model, data)
    c.steps, c.optim.lr, c.checkpoint.every = steps, 1e-3, 4
    c.eval.csv, c.eval.every, c.eval.share, c.eval.max_examples = str(data / "test.csv"), 2, 1.0, 6
    c.data.max_completion_tokens = 48
    c.update_from_flattened_dict(changed)
    return c


@pytest.fixture(scope="module")
def trained(model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.run(config(model_folder, dataset), tmp_path_factory.mktemp("evaluated") / "run")


def test_the_curves_have_its_numbers_at_its_steps(trained: Path) -> None:
    lines = read_metrics(trained)
    assert [line["step"] for line in lines if "eval/score" in line] == [2, 4]
    last = lines[-1]
    assert last["eval/examples"] == 6 and last["eval/failed"] == 0 and last["seconds/eval"] > 0
    assert 0 <= last["eval/qa/accuracy"] <= 1 and "eval/grounding/mIoU" in last and "eval/rewards/format" in last


def test_its_numbers_are_those_of_vau_evaluate(trained: Path, dataset: Path, tmp_path: Path) -> None:
    """Of all the file's examples, on the checkpoint of the same step."""
    asked = config(Path(read_json(trained / "config.json")["model"]), dataset, 5, **{"eval.max_examples": 0})
    asked.init_from, asked.steps, asked.optim.lr = str(trained), 1, 0.0  # a step that changes nothing
    loop.run(asked, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    c = small("eval", trained, dataset, "test")
    c.checkpoint, c.data.max_completion_tokens = str(tmp_path / "run"), 48
    result = evaluate.run(c, tmp_path / "eval")
    for task, numbers in result["tasks"].items():
        for name, number in numbers.items():
            value = number.get("value") if isinstance(number, dict) else number
            if isinstance(value, int | float):
                assert line[f"eval/{task}/{name}"] == pytest.approx(value, abs=1e-6), (task, name)
    assert line["eval/examples"] == result["examples"] > 6
    assert line["eval/rewards/format"] == pytest.approx(result["rewards"]["format"]["value"], abs=1e-6)


def test_the_training_is_the_same_bits_with_and_without(
    trained: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    c = config(model_folder, dataset)
    c.eval.csv = ""
    loop.run(c, tmp_path)
    one, other = (checkpoint.restore_params(folder / "checkpoints" / "4") for folder in (trained, tmp_path))
    flat = [np.concatenate([x.ravel() for x in _leaves(tree)]) for tree in (one, other)]
    np.testing.assert_array_equal(*flat)
    names = ("loss", "grad_norm", "tokens_seen")
    curves = [[[line[name] for name in names] for line in read_metrics(folder)] for folder in (trained, tmp_path)]
    assert curves[0] == curves[1]


def _leaves(tree: Any) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def test_evaluations_that_would_take_more_than_their_share_are_left_out() -> None:
    """With 3 seconds for each and steps of one second: a tenth of the time at most, and nearly that."""
    spent, count = 3.0, 1
    for trained in range(2, 301, 2):
        if evaluation.share_with_another(spent, count, trained) <= 0.1:
            spent, count = spent + 3.0, count + 1
    assert 0.08 < spent / (spent + 300) <= 0.1


def test_the_second_evaluation_is_left_out_where_the_first_took_long(
    model_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first compiles."""
    loop.run(config(model_folder, dataset, **{"eval.share": 0.01, "eval.max_examples": 1}), tmp_path)
    assert ["eval/score" in line for line in read_metrics(tmp_path)] == [False, True, False, False]
    assert "the evaluation at step 4 is left out: evaluations would take" in capsys.readouterr().out


def test_the_best_checkpoint_is_the_one_evaluated_best(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is not the step of a checkpoint; and the run stops after two evaluations that are no better. The
    same command says so, and goes on with more patience."""
    scores = {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.3, 5: 0.4, 6: 0.5}
    left = iter(scores.values())
    monkeypatch.setattr(evaluation, "scalars", lambda answered, protocol: {checkpoint.SCORE: next(left)})
    run, changed = tmp_path / "run", {"eval.max_examples": 1, "eval.patience": 2, "data.max_completion_tokens": 8}
    c = config(model_folder, dataset, 6, **changed, **{"eval.every": 1, "checkpoint.every": 2})
    loop.run(c, run)
    assert read_json(run / "best.json") == {"step": 3, "metric": "eval/score"}
    assert checkpoint.steps(run) == [3, 4, 5]
    assert read_json(run / "stopped.json") == {"step": 5, "without_improvement": 2}
    assert "5 steps are done, and no more: its last 2 evaluations" in loop.summary(c, run)
    loop.run(c, run)
    assert len(read_metrics(run)) == 5, "it is done"
    (run / "stopped.json").unlink()  # as where a kill came before it was written
    loop.run(c, run)
    assert checkpoint.steps(run) == [3, 4, 5] and read_json(run / "stopped.json")["step"] == 5
    c.eval.patience = 4
    loop.run(c, run)
    assert checkpoint.steps(run) == [3, 5, 6] and len(read_metrics(run)) == 6
    assert not (run / "stopped.json").exists() and read_json(run / "best.json")["step"] == 3
    _, position = checkpoint.Checkpoints(run).restore(6, loop.Run(c).learner.abstract_state)
    assert position["evaluation"]["history"] == [list(pair) for pair in scores.items()], "it went on from what it was"


def test_an_evaluation_without_the_metric_is_none_of_the_best(
    model_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean of errors that no answer gave: no improvement, and no end of the run."""
    name = "eval/grounding/start_error"
    given = {"checkpoint.best": f"-{name}", "eval.max_examples": 0, "data.tasks": ("grounding",)}
    run = loop.Run(config(model_folder, dataset, **given))
    found = iter(({}, {name: 3.0}, {}, {name: 2.0}))
    monkeypatch.setattr(evaluation, "scalars", lambda answered, protocol: next(found))
    monkeypatch.setattr(run.evaluation, "_answers", lambda *_: [])
    seen = []
    for step in (1, 2, 3, 4):
        run.evaluation.config.every = 1
        run.evaluation.after(step, 1e9, run.learner, lambda: False)
        seen.append((run.evaluation.improved_at(step), run.evaluation.without_improvement, run.evaluation.last))
    assert seen == [(False, 0, {}), (True, 0, {name: 3.0}), (False, 1, {}), (True, 0, {name: 2.0})]
    run.close()


def test_a_run_that_is_asked_to_end_gives_its_evaluation_up(
    model_folder: Path, dataset: Path, capsys: pytest.CaptureFixture
) -> None:
    """Between two batches; what it was trained with is kept."""
    run = loop.Run(config(model_folder, dataset))
    asked = iter((False, True))
    assert run.evaluation.after(2, 1.0, run.learner, lambda: next(asked)) == {}
    assert run.evaluation.history == [] and run.evaluation.trained == 1.0
    assert "evaluation at step 2 is left out: the run is asked to end" in capsys.readouterr().out
    run.close()


def test_which_examples_are_asked_does_not_depend_on_their_order(model_folder: Path, dataset: Path) -> None:
    every, _ = pipeline.load_examples(evaluation.data_of(config(model_folder, dataset)))
    kept = evaluation.chosen(every, 6)
    assert {e.id for e in evaluation.chosen(every[::-1], 6)} == {e.id for e in kept}
    assert {e.id for e in kept} < {e.id for e in evaluation.chosen(every, 9)}
    assert evaluation.chosen(every, 0) == every and [every.index(e) for e in kept] == sorted(map(every.index, kept))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"eval.tasks": ("description",)}, "have no score to compare checkpoints by"),
        ({"eval.tasks": ("dance",)}, "expected some of"),
        ({"eval.every": 0}, "eval.every=0"),
        ({"eval.csv": "", "eval.patience": 2}, "eval.patience=2"),
        ({"eval.csv": "", "checkpoint.best": "eval/score"}, "set eval.csv"),
        ({"eval.share": 0.0}, "eval.share=0"),
        ({"eval.csv": "absent.csv"}, "absent.csv"),
        ({"checkpoint.best": "eval/qa/nonsense"}, "is no metric of these examples: expected one of .*eval/qa/accuracy"),
        ({"eval.videos": "/nope"}, "evaluations during training .*video folder /nope does not exist"),
    ],
    ids=str,
)
def test_a_mistake_is_said_before_the_first_step(
    changed: dict[str, Any], words: str, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        loop.run(config(model_folder, dataset, **changed), tmp_path / "run")
