"""Readers of datasets: general video questions, and one dataset in four formats; and that training takes them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.runs import prompts_of, small
from vau_jax.common.files import InputError
from vau_jax.common.metric_writer import read_metrics
from vau_jax.data import loading, pipeline
from vau_jax.data.processor import Processor
from vau_jax.data_prep import vau_bench as vau_bench_tool
from vau_jax.datasets import DATASETS, array_record, vau_bench, video_qa
from vau_jax.eval import records, scores
from vau_jax.tasks import TASKS, parsing, prompts, rewards
from vau_jax.tasks.example import Annotation, Example
from vau_jax.train import loop

THREE = {
    "problem": "What falls?",
    "options": ["A. a box", "B. a man", "C. nothing"],
    "answer": "B",
    "videos": ["a.mp4"],
}


def data(folder: Path, *lines: dict[str, Any], **changed: Any) -> ConfigDict:
    """A config.data of question lines."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = ConfigDict(
        {"dataset": "video_qa", "csv": str(path), "videos": str(folder), "tasks": ("qa",), "protocol": "clean"}
    )
    c.update(changed)
    return c


# --- Video questions ----------------------------------------------------------------------------------------------


def test_a_line_is_an_example(tmp_path: Path) -> None:
    ((example,), audit) = video_qa.read(data(tmp_path, THREE))
    assert (example.question, example.choices) == ("What falls?", ("a box", "a man", "nothing"))
    assert (example.truth, example.media) == ({"choice": 1}, (tmp_path / "a.mp4",))
    assert (audit.rows, audit.entries) == (1, [])


@pytest.mark.parametrize(
    ("changed", "choice"),
    [
        ({"answer": "C"}, 2),
        ({"answer": "(C)"}, 2),
        ({"answer": "C. nothing"}, 2),
        ({"answer": "a box"}, 0),
        ({"answer": None, "solution": "<answer>A</answer>"}, None),
        ({"options": ["a box", "a man"], "answer": "a man"}, 1),
        ({"options": [f"{c}. {i}" for i, c in enumerate("ABCDEFG")], "answer": "G"}, 6),
        ({"problem_type": "multiple choice", "data_source": "x"}, 1),
    ],
    ids=str,
)
def test_answers_are_letters_or_texts(changed: dict[str, Any], choice: int | None, tmp_path: Path) -> None:
    examples, audit = video_qa.read(data(tmp_path, THREE | changed))
    assert [example.truth["choice"] for example in examples] == ([] if choice is None else [choice])
    assert len(audit.entries) == (choice is None)


def test_lines_of_video_r1_are_read(tmp_path: Path) -> None:
    line = {"problem_id": 2, "problem": "What falls?", "data_type": "video", "problem_type": "multiple choice"}
    line |= {"options": THREE["options"], "solution": "<answer>B</answer>", "path": "./folder/a.mp4", "process": ""}
    ((example,), _) = video_qa.read(data(tmp_path, line))
    assert example.truth == {"choice": 1} and example.media == (tmp_path / "folder" / "a.mp4",)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"problem_type": "numerical"}, "problem_type is not multiple choice: numerical"),
        ({"data_type": "image"}, "it shows images"),
        ({"images": ["a.png"]}, "it shows images"),
        ({"problem": " "}, "no question text"),
        ({"options": ["A. one"]}, "expected 2 to 26 options"),
        ({"options": ["A. one", "B. "]}, "expected 2 to 26 options"),
        ({"options": "A or B"}, "options are not a list of texts"),
        ({"answer": "D"}, "the answer is none of the options: 'D'"),
        ({"answer": 3}, "the answer is not a text: '3'"),
        ({"videos": [3]}, "videos are not a list of names"),
        ({"videos": ["../a.mp4"]}, "leads out of the folder of videos"),
        ({"videos": ["/a.mp4"]}, "leads out of the folder of videos"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_used_is_listed_and_nothing_stops(
    changed: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    examples, audit = video_qa.read(data(tmp_path, THREE | changed, THREE))
    assert len(examples) == 1
    ((line, found),) = [(entry.line, entry.reason) for entry in audit.entries]
    assert line == 1 and reason in found


def test_questions_about_a_video_have_ids_of_their_own(tmp_path: Path) -> None:
    other = THREE | {"problem": "Who falls?"}
    text = {key: value for key, value in THREE.items() if key != "videos"}
    examples, audit = video_qa.read(data(tmp_path, THREE, other, text, THREE))
    assert len({example.id for example in examples}) == len(examples) == 3
    assert [(entry.line, entry.what) for entry in audit.entries] == [(4, "qa")]
    assert examples[2].media == ()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    c = data(tmp_path, THREE)
    Path(c.csv).write_text('{"problem": "x"\n')
    with pytest.raises(InputError, match="line 1"):
        video_qa.read(c)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_options_is_asked_shuffled_read_and_rewarded(count: int, tmp_path: Path) -> None:
    options = [f"{letter}. thing {i}" for i, letter in enumerate("ABCDEFG"[:count])]
    ((example,), _) = video_qa.read(data(tmp_path, THREE | {"options": options, "answer": "B"}))
    turned = pipeline.TASKS["qa"].shuffled(example, tuple(range(count))[::-1])
    assert prompts.question(turned, "think", "short").splitlines()[1:] == [
        f"{letter}. thing {count - 1 - i}" for i, letter in enumerate("ABCDEFG"[:count])
    ]
    right = "".join(span.text for span in prompts.completion(turned, "think"))
    texts = [right, "<think>t</think><answer>A</answer>", "<think>t</think><answer>H</answer>"]
    parsed = parsing.parse(texts, "qa", choices=[turned.choices] * 3)
    assert parsed.format_ok.tolist() == [True, True, False]
    target = parsing.targets_of([turned] * 3)
    assert np.asarray(rewards.REWARDS["accuracy"](parsed, target)).tolist() == [1.0, float(count == 2), 0.0]


@pytest.fixture
def questions(dataset: Path, tmp_path: Path) -> Path:
    """Questions about one video, about two, and about none."""
    for name in ("train_00000.mp4", "train_00001.mp4"):
        shutil.copy2(dataset / "videos" / name, tmp_path)
    lines = [
        THREE | {"videos": ["train_00000.mp4"]},
        THREE | {"videos": ["train_00000.mp4", "train_00001.mp4"], "problem": "In which?"},
        {**THREE, "videos": [], "problem": "What is heavy?"},
        THREE | {"videos": ["train_00001.mp4"], "options": [f"{c}. {c}" for c in "ABCDEFG"]},
    ]
    data(tmp_path, *lines)
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param("vau_r1_sft", marks=pytest.mark.long), "vau_r1_multi_rft"])
def test_video_questions_train(name: str, questions: Path, model_folder: Path, tmp_path: Path) -> None:
    """One step of a batch with one video, two, and none."""
    c = small(name, model_folder, questions)
    c.data.dataset, c.data.csv, c.data.videos = "video_qa", str(questions / "questions.jsonl"), str(questions)
    c.data.tasks, c.data.max_frames = ("qa",), 4
    c.data.bucket = (256, 1024, 48, 64, 12, 64)
    loop.run(c, tmp_path / "run")
    (step,) = read_metrics(tmp_path / "run")
    assert np.isfinite([step["loss"], step["grad_norm"]]).all()


def without_videos(name: str, questions: Path, model: Path) -> ConfigDict:
    """A config whose examples are the last of `questions`, some more times."""
    lines = [{**THREE, "videos": [], "problem": f"What is heavy? ({i})"} for i in range(4)]
    c = small(name, model, questions)
    c.data.dataset, c.data.csv, c.data.videos = "video_qa", data(questions, *lines).csv, str(questions)
    c.data.tasks = ("qa",)
    return c


@pytest.mark.parametrize(("name", "rank"), [("vau_r1_sft", 0), ("vau_r1_multi_rft", 2)], ids=["sft, full", "rft, lora"])
def test_a_batch_without_any_video_trains(
    name: str, rank: int, questions: Path, model_folder: Path, tmp_path: Path
) -> None:
    c = without_videos(name, questions, model_folder)
    c.lora.rank = rank
    if c.stage == "rft":
        c.user_rewards = (("tests.reward_functions:vowels", 1.0),)
    loop.run(c, tmp_path / "run")
    (step,) = read_metrics(tmp_path / "run")
    assert np.isfinite(step["loss"]) and step["grad_norm"] > 0


def test_examples_without_video_are_padded_like_those_beside_them(questions: Path, model_folder: Path) -> None:
    """Other processes, and batches drawn before, may have videos: all have the arrays that the agreed shape names."""
    c = small("vau_r1_sft", model_folder, questions).data
    c.dataset, c.csv, c.videos, c.tasks = "video_qa", str(questions / "questions.jsonl"), str(questions), ("qa",)
    examples, processor = pipeline.load_examples(c)[0], Processor(model_folder)
    loader, collator = loading.make_loader(processor, c, augment=False), pipeline.Collator(processor, c)
    items = [loader(example, np.random.default_rng(0)) for example in examples]
    without = [item for item in items if not item.example.media]
    assert collator(without).batch.vision is None
    shape = collator.shape(items)
    assert shape.patches
    mixed, alone = collator(items, shape).batch.vision, collator(without, shape).batch.vision
    assert mixed.patches.shape[1:] == alone.patches.shape[1:] and not alone.patches.any()


# --- One dataset in four formats ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic training split, imported; as ArrayRecord, and as TFDS."""
    import tensorflow_datasets as tfds

    import vau_jax.data_prep.vau_bench_tfds  # noqa: F401 - registers the builder

    folder = tmp_path_factory.mktemp("imported")
    files = {"train": [str(dataset / "train.csv")]}
    vau_bench_tool.import_splits(folder, files, {"msad": dataset / "videos"}, 0, 1, records=True)
    tfds.builder("vau_bench/msad", imported=folder, data_dir=folder / "tfds").download_and_prepare()
    return folder


FORMATS = {
    "vau_bench": "train.jsonl",
    "array_record": "train.array_record",
    "vau_bench_tfds": "tfds/vau_bench/msad/1.1.0",
}


def test_every_format_gives_the_same_examples_and_batches(imported: Path, dataset: Path, model_folder: Path) -> None:
    c = small("vau_r1_sft", model_folder, dataset).data
    c.tasks, c.augment = ("qa", "grounding", "classification", "description"), True
    results = {}
    for c.dataset, name in FORMATS.items():
        c.csv = str(imported / name)
        examples, _ = pipeline.load_examples(c)
        iterator = pipeline.train_iterator(prompts_of(examples, Processor(model_folder), c), 4, seed=0)
        host = next(iterator)
        iterator.close()
        results[c.dataset] = examples, host.batch.tokens, host.batch.vision.patches, host.completions.tokens
    first, *others = results.values()
    assert len(first[0]) == 96
    for examples, *arrays in others:
        assert examples == first[0]
        assert all(np.array_equal(a, b) for a, b in zip(arrays, first[1:], strict=True))


@pytest.mark.parametrize(
    ("dataset_name", "csv", "changed", "words"),
    [
        ("array_record", "missing", {}, "does not exist"),
        ("array_record", "train.jsonl", {}, "not a complete ArrayRecord file"),
        ("vau_bench_tfds", "train.jsonl", {}, "not a prepared TFDS dataset"),
        ("vau_bench_tfds", FORMATS["vau_bench_tfds"], {"split": "test"}, "data.split='test'.* has train"),
        ("array_record", FORMATS["array_record"], {"protocol": "paper"}, "protocol=paper needs the CSV"),
    ],
    ids=str,
)
def test_a_wrong_file_is_one_line(
    dataset_name: str, csv: str, changed: dict[str, str], words: str, imported: Path, dataset: Path, model_folder: Path
) -> None:
    c = small("vau_r1_sft", model_folder, dataset).data
    c.dataset, c.csv = dataset_name, str(imported / csv)
    c.update(changed)
    with pytest.raises(InputError, match=words):
        DATASETS[dataset_name](c)


def test_a_file_of_records_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    row = vau_bench.Row("a.mp4", "msad", "?", tuple("wxyz"), "A", "Fire", (1.0, 2.0), "", "", {})
    array_record.write(tmp_path / "a.array_record", [row] * 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.array_record"]


# --- Other labels -------------------------------------------------------------------------------------------------


def test_an_example_may_bring_its_own_labels() -> None:
    from tests.records import example as make_example
    from vau_jax.tasks.classification import TASK

    labels = ("Normal", "Panic", "Car_crash")
    known = Annotation(label="Car_crash", labels=labels)
    base = make_example("classification")
    example = Example("x", "classification", base.media, "", TASK.choices(known), TASK.truth(known))
    assert "one of these: Normal, Panic, Car_crash." in prompts.question(example, "think", "full")
    texts = [f"<think>t</think><answer>{answer}</answer>" for answer in ("car crash", "Panic", "Fire")]
    parsed = parsing.parse(texts, "classification", choices=[labels] * 3)
    assert parsed.final.label.tolist() == [2, 1, -1]
    accuracy = rewards.REWARDS["accuracy"](parsed, parsing.targets_of([example] * 3))
    assert np.asarray(accuracy).tolist() == [1.0, 0.0, 0.0]


def labelled(labels: tuple[str, ...], label: str) -> Example:
    annotation = Annotation(label=label, labels=labels)
    return Example("x", "classification", (), "", TASKS["classification"].choices(annotation), {"label": label})


@pytest.mark.parametrize("label", ["Überfall", "Other.", "Class 1", "fire"])
def test_labels_that_no_completion_could_name_are_one_clear_error(label: str) -> None:
    with pytest.raises(InputError, match="could never be read from a completion"):
        parsing.targets_of([labelled(("Fire", label), label)])


def test_a_label_may_begin_another() -> None:
    labels = ("Fire", "Fire alarm")
    text = (
        "<think>t</think><draft>Fire</draft><reflect>r</reflect><revise>So the answer is Fire alarm.</revise>"
        "<answer>Fire alarm</answer>"
    )
    parsed = parsing.parse([text], "classification", reflection=True, choices=[labels])
    assert parsed.format_ok.all() and not parsed.contradicted.any()
    assert parsed.final.label.tolist() == [1]


def test_metrics_and_baselines_are_over_all_label_sets() -> None:
    """Indices differ between sets; binary accuracy needs the label Normal."""
    sets = [("Fire", "Normal"), ("Normal", "Fire"), ("Fire", "Normal"), ("Normal", "Fire")]
    examples = [labelled(labels, label) for labels, label in zip(sets, ["Fire", "Fire", "Fire", "Normal"], strict=True)]
    fire = ["<think>t</think><answer>Fire</answer>"]
    result = scores.score([records.make(example, fire, "think") for example in examples])
    assert result["baselines"]["classification"]["majority_class"]["answer"] is not None
    assert result["baselines"]["classification"]["majority_class"]["value"] == 0.75
    assert result["tasks"]["classification"]["multiclass"]["value"] == 0.75
    other = [records.make(labelled(("calm", "fight"), "calm"), ["<think>t</think><answer>fight</answer>"], "think")]
    assert "binary" not in scores.score(other)["tasks"]["classification"]


def test_more_than_one_interval_and_more_options_than_letters_are_clear_errors() -> None:
    two = Example("x", "grounding", (), "", (), {"intervals": [[1.0, 2.0], [3.0, 4.0]]})
    with pytest.raises(InputError, match="a video has 2 anomalous intervals: expected at most 1"):
        parsing.targets_of([two])
    many = Example("x", "qa", (), "?", tuple(f"option {i}" for i in range(27)), {"choice": 26})
    with pytest.raises(InputError, match="a question has 27 options: expected at most 26"):
        parsing.targets_of([many])


def test_rotations_of_few_options_take_turns(tmp_path: Path, model_folder: Path) -> None:
    (example,), _ = video_qa.read(data(tmp_path, {**THREE, "videos": [], "options": ["a man", "a box"], "answer": "A"}))
    c = small("eval", model_folder, tmp_path, "x").data
    loader = loading.make_loader(Processor(model_folder), c, augment=False)
    c.shuffle_options = False
    shown = [loader(replace(example, rotation=r), np.random.default_rng(0)).example.choices[0] for r in range(4)]
    assert shown == ["a man", "a box", "a man", "a box"]
