"""Evaluation: what is asked, written and counted; several samples, several orders of the options, several devices."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tables, video_files
from tests.runs import small
from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.data import loading, pipeline
from vau_jax.data.processor import Processor
from vau_jax.eval import evaluate, records, scores
from vau_jax.models import checkpoint
from vau_jax.tasks import TASKS, prompts
from vau_jax.tasks.record import Record
from vau_jax.types import State
from vau_jax.vlm import VideoLM

ROOT = Path(__file__).parents[1]


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_evaluation_counts_a_broken_video_as_wrong(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "test_00004.mp4").write_bytes(b"broken")
    c = small("eval", model_folder, dataset, "test")
    c.data.videos = str(tmp_path / "videos")
    result = evaluate.run(c, tmp_path / "eval")
    assert result["failed"] == 3
    assert result["tasks"]["qa"]["accuracy"]["n"] == 12


def test_evaluation_resumes_after_the_examples_that_are_done(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = small("eval", model_folder, dataset, "test")
    first = evaluate.run(c, tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:10]) + lines[10][:20])
    (tmp_path / "metrics.json").unlink()
    assert {**evaluate.run(c, tmp_path), "about": first["about"]} == first
    assert sorted(path.read_text().splitlines()) == sorted(line.strip() for line in lines)


# --- What is evaluated anew ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(model_folder: Path, dataset: Path, tmp_path: Path) -> ConfigDict:
    """Four questions about copies of the first test videos."""
    c = small("eval", model_folder, dataset, "test")
    rows = tables.read(dataset / "test.csv")[:4]
    c.data.csv, c.data.videos = tables.write(tmp_path / "data" / "rows.csv", rows), str(tmp_path / "data")
    for row in rows:
        shutil.copy2(dataset / "videos" / row["Video Name"], tmp_path / "data")
    c.data.tasks = ("qa",)
    return c


def test_questions_about_one_video_are_scored_each(tiny: ConfigDict, tmp_path: Path) -> None:
    rows = tables.read(tiny.data.csv)
    tables.write(tiny.data.csv, [*rows, {**rows[0], "Question": "Who comes last?"}])
    result = evaluate.run(tiny, tmp_path / "eval")
    found = records.load(tmp_path / "eval")
    asked = [(r.video, r.question.splitlines()[0]) for r in found]
    assert result["examples"] == 5 == len({r.example for r in found})
    assert asked[4] == (asked[0][0], "Who comes last?")


@pytest.mark.parametrize("what", ["annotations", "videos", "words"])
def test_what_changed_is_evaluated_again(
    what: str, tiny: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = tmp_path / "words.json"
    words.write_text('{"short_questions": {"qa": "{question}"}}')
    tiny.data.templates = str(words)
    first = evaluate.run(tiny, tmp_path / "eval")
    if what == "annotations":  # of the same length
        text = Path(tiny.data.csv).read_text()
        Path(tiny.data.csv).write_text(text[:-20] + text[-20:].replace("0", "1"))
    elif what == "videos":
        video_files.write(next(Path(tiny.data.videos).glob("*.mp4")), count=9)
    else:
        words.write_text('{"short_questions": {"qa": "{options}"}}')
    assert evaluate.run(tiny, tmp_path / "eval")["fingerprint"] != first["fingerprint"]
    assert "evaluated already" not in capsys.readouterr().out


@pytest.fixture
def trained(model_folder: Path, vlm: VideoLM, tmp_path: Path) -> Path:
    """A run with one checkpoint."""
    checkpoint.copy_model_files(model_folder, tmp_path / "run")
    save(tmp_path / "run", 1, vlm)
    return tmp_path / "run"


def save(run: Path, step: int, vlm: VideoLM) -> None:
    checkpoints = checkpoint.Checkpoints(run)
    checkpoints.save(step, State(np.int32(step), vlm.params, {}), {}, 0.0)
    checkpoints.close()


@pytest.mark.parametrize("inside", ["", "eval"])
def test_an_evaluation_inside_its_run_is_resumed(
    inside: str, tiny: ConfigDict, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    own = base.get_config().to_json_best_effort()
    (trained / "config.json").write_text(own)
    tiny.checkpoint = str(trained)
    evaluate.run(tiny, trained / inside)
    evaluate.run(tiny, trained / inside)
    assert "evaluated already" in capsys.readouterr().out
    assert (trained / "config.json").read_text() == own


def test_damaged_results_are_rebuilt(tiny: ConfigDict, trained: Path, tmp_path: Path) -> None:
    tiny.checkpoint = str(trained)
    whole = evaluate.run(tiny, tmp_path / "eval")
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text()
    (tmp_path / "eval" / "predictions.jsonl").write_text('x\n[1]\n{"fingerprint": 1}\n' + lines)
    (tmp_path / "eval" / "metrics.json").write_text("[]")
    again = evaluate.run(tiny, tmp_path / "eval")
    assert again["tasks"] == whole["tasks"]
    assert (tmp_path / "eval" / "predictions.jsonl").read_text() == lines


def test_a_folder_that_cannot_be_created_is_one_line(tiny: ConfigDict, trained: Path) -> None:
    tiny.checkpoint = str(trained)
    (trained / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*file/eval: Not a directory"):
        evaluate.run(tiny, trained / "file" / "eval")


def test_another_checkpoint_is_another_model(trained: Path, vlm: VideoLM, tmp_path: Path) -> None:
    """A later step; and the same step, of a run that was made anew in the same folder."""
    before = checkpoint.contents(trained)
    shutil.copytree(trained, tmp_path / "copy")
    assert checkpoint.contents(tmp_path / "copy") == before
    save(trained, 2, vlm)
    later = checkpoint.contents(trained)
    shutil.rmtree(trained / "checkpoints")
    save(trained, 2, vlm)
    assert before != later != checkpoint.contents(trained)


def test_other_weights_of_the_same_size_are_another_model(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    assert checkpoint.contents(folder) == checkpoint.contents(model_folder)
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(data)
    os.utime(weights, ns=times)
    assert checkpoint.contents(folder) != checkpoint.contents(model_folder)


def test_samples_do_not_depend_on_the_others_of_a_batch(tiny: ConfigDict, tmp_path: Path) -> None:
    tiny.samples, tiny.temperature = 2, 1.0
    rows, found = tables.read(tiny.data.csv), []
    for name, order in (("there", rows), ("back", rows[::-1])):
        tables.write(tiny.data.csv, order)
        evaluate.run(tiny, tmp_path / name)
        found.append({r.example: r.completions for r in records.load(tmp_path / name)})
    assert found[0] == found[1]
    assert len({text for texts in found[0].values() for text in texts}) == 8


def test_the_total_is_weighted_as_in_training(loaded: dict[str, loading.Loaded]) -> None:
    record = records.of_loaded(loaded["grounding"], [right(loaded["grounding"])], "think")
    weights = {"format": 0.5, "accuracy": 0.0, "tiou": 2.0, "judge": 0.0}
    found = scores.score([record], weights=weights)["rewards"]
    assert found["accuracy"]["value"] == 1.0 and found["total"]["value"] == 0.5 + 2.0


def test_a_total_has_no_rewards_that_an_evaluation_cannot_give(tiny: ConfigDict, tmp_path: Path) -> None:
    tiny.rewards = ConfigDict({"judge": 1.0})
    with pytest.raises(InputError, match=r"rewards\.judge=1\.0 cannot be part"):
        evaluate.run(tiny, tmp_path / "eval")


# --- Records ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(model_folder: Path, dataset: Path) -> dict[str, loading.Loaded]:
    """An anomalous test clip as each task asks of it."""
    c = small("eval", model_folder, dataset, "test")
    c.data.tasks = ("qa", "grounding", "classification", "description")
    examples, _ = pipeline.load_examples(c.data)
    video = next(e.video for e in examples if e.truth.get("intervals"))
    chosen = [e for e in examples if e.video == video]
    loader = loading.make_loader(Processor(model_folder), c.data, augment=False)
    batch = next(pipeline.eval_batches(pipeline.Prompts(chosen, loader), 4, seed=0))
    return {item.example.task: item for item in batch.examples}


def right(item: loading.Loaded) -> str:
    """A completion with the truth."""
    task = TASKS[item.example.task]
    answer = task.answer(item.example) if task.verifiable else "It burns."
    return f"<think>x</think><answer>{answer}</answer>{task.closing(item.example)}"


@pytest.mark.parametrize("task", ["qa", "grounding", "classification"])
def test_a_record_says_what_was_asked_answered_and_worth(task: str, loaded: dict[str, loading.Loaded]) -> None:
    item = loaded[task]
    found = records.of_loaded(item, [right(item), "hm"], "think")
    assert [round(score, 4) for score in found.scores] == [1.0, 0.0] and found.format_ok == [True, False]
    assert found.predictions == [found.target, None]
    assert 4 <= found.duration <= 12 and len(found.prompt_hash) == 16
    assert records.of_line(records.to_line(found, "f")) == found
    options = item.example.choices
    shown = all(f"{letter}. {text}" in found.question for letter, text in zip("ABCD", options, strict=False))
    assert shown == (task != "classification")


def test_a_record_with_reflection_has_the_draft_too(loaded: dict[str, loading.Loaded]) -> None:
    item = loaded["grounding"]
    ((start, end),) = item.example.truth["intervals"]
    text = right(item).replace(
        "<answer>", f"<draft>Anomaly [{start}, {end + 1}]</draft><reflect>a b c</reflect><revise>r</revise><answer>"
    )
    found = records.of_loaded(item, [text], "reflection")
    assert found.draft_predictions == [f"Anomaly [{start:.1f}, {end + 1:.1f}]"]
    assert found.draft_scores == [pytest.approx((end - start) / (end + 1 - start), abs=1e-4)]
    assert found.format_ok == [True]


def test_a_line_of_another_format_is_no_record(loaded: dict[str, loading.Loaded]) -> None:
    line = records.to_line(records.of_loaded(loaded["qa"], ["hm"], "think"), "f")
    raw = json.loads(line)
    others = [line[:-1], line[:-9] + "\n", "[]\n", json.dumps({**raw, "format": 1}) + "\n"]
    others += [json.dumps({**raw, "more": 1}) + "\n", json.dumps({k: raw[k] for k in list(raw)[:-1]}) + "\n"]
    assert [records.of_line(other) for other in others] == [None] * 6
    assert records.of_line(line, "g") is None and records.of_line(line, "f") is not None


def test_a_description_has_its_reference_and_no_score(loaded: dict[str, loading.Loaded]) -> None:
    item = loaded["description"]
    found = records.of_loaded(item, [right(item)], "think")
    assert found.scores == [] and found.predictions == [None]
    assert item.example.truth["description"] in found.reference


def test_a_description_is_compared_by_words_with_the_annotation(loaded: dict[str, loading.Loaded]) -> None:
    """The annotation's own text has every word; another has few."""
    item = loaded["description"]
    own = records.of_loaded(item, [f"{prompts.facts(item.example)} {item.example.meta['key_object']}"], "think")
    other = records.of_loaded(item, ["A dog sleeps."], "think")
    high, low = (scores.score([r])["tasks"]["description"]["word_overlap"] for r in (own, other))
    assert high["key_objects"]["value"] == 1.0 and high["rouge_l"]["value"] > 0.9
    assert low["key_objects"]["value"] == 0.0 and low["rouge_l"]["value"] < 0.1


@pytest.mark.parametrize("task", TASKS)
def test_what_is_said_of_grey_frames_is_no_answer(task: str, loaded: dict[str, loading.Loaded]) -> None:
    failed = replace(loaded[task], failure="damaged")
    found = records.of_loaded(failed, [right(failed)] * 2, "think")
    assert found.predictions == [None, None] and found.completions == ["", ""] and found.format_ok == [False, False]
    assert found.scores in ([0.0, 0.0], []) and found.failure == "damaged"


def test_frames_of_a_failed_video_count_as_wrong(loaded: dict[str, loading.Loaded]) -> None:
    """Its length is in the annotations: what is abnormal is missed, and a normal video is a false alarm."""
    item = loaded["grounding"]
    seen = records.of_loaded(item, [right(item)], "think")
    example = replace(item.example, meta={**item.example.meta, "duration": 8.0})
    missed = records.of_loaded(replace(item, example=example, failure="damaged"), [right(item)], "think")
    normal = replace(missed, truth={"intervals": []})
    assert missed.duration == 8.0
    values = [scores.score([seen, one])["frames"] for one in (seen, missed, normal)]
    assert [v["videos"] for v in values] == [2, 2, 2] and values[0]["auc"] == 1.0
    assert values[1]["auc"] < 1.0 and values[2]["auc"] < 1.0


# --- Runs ---------------------------------------------------------------------------------------------------------


def test_samples_and_rotations(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """Two samples of everything; each question with its options in four orders, about the same frames."""
    c = small("eval", model_folder, dataset, "test")
    c.samples, c.rotations, c.temperature, c.data.max_examples = 2, 4, 1.0, 6
    c.data.tasks = ("qa", "classification")
    result = evaluate.run(c, tmp_path)
    found = predictions(tmp_path)
    assert len(found) == result["examples"] == 3 * 4 + 3
    assert all(len(r["completions"]) == len(r["scores"]) == 2 for r in found)
    assert any(r["completions"][0] != r["completions"][1] for r in found)
    assert result["tasks"]["qa"]["accuracy"]["n"] == 3 == result["option_order"]["accuracy"]["n"]
    assert result["samples"]["qa"]["pass"].keys() == {"1", "2"}
    by_video: dict[str, list[dict]] = {}
    for r in found:
        if r["task"] == "qa":
            by_video.setdefault(r["video"], []).append(r)
    for group in by_video.values():
        orders = [[line[3:] for line in r["question"].splitlines()[-4:]] for r in group]
        assert [r["rotation"] for r in group] == [0, 1, 2, 3]
        assert all(order == orders[0][i:] + orders[0][:i] for i, order in enumerate(orders))
        answers = [order[r["truth"]["choice"]] for order, r in zip(orders, group, strict=True)]
        assert len(set(answers)) == 1


def test_votes_and_orders_are_counted_from_the_records(loaded: dict[str, loading.Loaded]) -> None:
    item = loaded["qa"]
    answer = TASKS["qa"].answer(item.example)
    wrong = right(item).replace(f">{answer}<", f">{'ABCD'.replace(answer, '')[0]}<")
    found = []
    for rotation, texts in enumerate([[right(item), right(item), wrong], [wrong, wrong, right(item)]]):
        turned = replace(item, example=replace(item.example, rotation=rotation))
        found.append(records.of_loaded(turned, texts, "think"))
    result = scores.score(found)
    qa = result["samples"]["qa"]
    assert (qa["vote"]["value"], qa["pass"]["1"]["value"], qa["pass"]["2"]["value"]) == (1.0, pytest.approx(2 / 3), 1.0)
    assert result["option_order"]["by_order"] == [1.0, 0.0]
    assert result["tasks"]["qa"]["accuracy"]["n"] == 1


def test_grounding_has_frame_level_scores(loaded: dict[str, loading.Loaded]) -> None:
    item = loaded["grounding"]
    perfect = scores.score([records.of_loaded(item, [right(item)], "think")])["frames"]
    assert perfect["auc"] == 1.0 and perfect["ap"] == 1.0 and perfect["left_out"] == 0
    unseen = replace(records.of_loaded(item, [right(item)], "think"), duration=None)
    assert "frames" not in scores.score([unseen])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"samples": 2}, "set temperature above 0"),
        ({"samples": 0}, "at least 1"),
        ({"rotations": 5}, "1 to 4"),
        ({"temperature": -0.5}, "temperature=-0.5: expected at least 0.01"),
        ({"data": {"max_completion_tokens": 0}}, "max_new_tokens=0: expected at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_said(
    changed: dict[str, Any], words: str, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    c = small("eval", model_folder, dataset, "test")
    c.update(changed)
    with pytest.raises(InputError, match=words):
        evaluate.run(c, tmp_path)


def test_two_devices_predict_what_one_does(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    args = ["--config=configs/eval.py", f"--config.checkpoint={model_folder}", f"--config.data.csv={dataset}/test.csv"]
    args += [f"--config.data.videos={dataset}/videos", "--config.dtype=float32", "--config.data.max_examples=8"]
    args += ["--config.data.max_completion_tokens=8", "--config.data.max_frames=8", "--config.data.budget=model"]
    texts = []
    for count in (1, 2):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        env = {**os.environ, "XLA_FLAGS": flags}
        command = [sys.executable, "-m", "vau_jax.evaluate", *args, f"--workdir={tmp_path / str(count)}"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append([(r["example"], r["completions"]) for r in predictions(tmp_path / str(count))])
    assert texts[0] == texts[1] and len(texts[0]) == 8


def test_the_readme_documents_the_fields_of_a_record() -> None:
    """Each with its comment in the type."""
    source = (ROOT / "vau_jax" / "tasks" / "record.py").read_text()
    commented = re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", source, re.MULTILINE)
    assert [name for name, _ in commented] == [field.name for field in fields(Record)]
    readme = (ROOT / "launch" / "README.md").read_text()
    assert "\n".join(f"| `{name}` | {comment} |" for name, comment in commented) in readme
