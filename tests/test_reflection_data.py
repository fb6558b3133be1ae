"""Reflection records: drafts, a teacher behind a real server, every reason to turn a record down, the mix, resuming."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import video_files
from tests.chat_server import Answer, pictures, serve
from vau_jax.common.files import InputError
from vau_jax.configs import reflection as reflection_config
from vau_jax.data import pipeline
from vau_jax.data_prep import drafts, reflection, teacher
from vau_jax.data_prep.drafts import Draft
from vau_jax.datasets.vau_bench import Row, example_of, load
from vau_jax.tasks import parsing, prompts, rewards
from vau_jax.tasks.description import SECTIONS
from vau_jax.tasks.example import Reflection

ROOT = Path(__file__).parents[1]
ROW = Row(
    video="a.mp4",
    source="msad",
    question="What happens?",
    options=("a fight", "a fire", "a fall", "a theft"),
    answer="B",
    anomaly_class="Fire",
    interval=(10.0, 20.0),
    key_object="flames",
    description="Flames rise from a parked truck near the gate.",
    reasoning=dict.fromkeys(SECTIONS, "Flames and smoke rise from the truck."),
)
QA = example_of(ROW, "qa")
GOOD = "I said a fight, but flames and smoke rise from the truck, and nobody fights."
REVISED = "The truck burns, people step back, smoke fills the yard. So a fire is what happens."


@pytest.fixture
def config(dataset: Path) -> ConfigDict:
    c = reflection_config.get_config()
    c.data.csv, c.data.videos = str(dataset / "test.csv"), str(dataset / "videos")
    c.keep.likeness = 1.0
    c.teacher.seconds = 5.0
    return c


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "reflection.jsonl").read_text().splitlines()]


def reply(reflect: str = GOOD, revise: str = REVISED) -> Answer:
    return Answer(json.dumps({"reflect": reflect, "revise": revise}))


# --- Drafts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "value", "expected"),
    [
        ("qa", {"choice": "B"}, 1.0),
        ("qa", {"choice": "A"}, 0.0),
        ("classification", {"label": "Fire"}, 1.0),
        ("classification", {"label": "Arson"}, 0.0),
        ("grounding", {"interval": (10.0, 20.0)}, 1.0),
        ("grounding", {"interval": (15.0, 20.0)}, 0.5),
        ("grounding", {"interval": None}, 0.0),
    ],
)
def test_drafts_are_scored_as_training_scores_them(task: str, value: dict[str, Any], expected: float) -> None:
    assert drafts.score(example_of(ROW, task), value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", parsing.VERIFIABLE)
def test_drafts_by_rule_are_wrong_as_often_as_asked(task: str) -> None:
    made = [drafts.by_rule(example_of(replace(ROW, video=f"{i}.mp4"), task), 0.7, 0)[0] for i in range(400)]
    wrong = np.mean([draft.score < 0.5 for draft in made])
    assert abs(wrong - 0.7) < 0.07
    assert all(draft.score in (0.0, 1.0) or 0 < draft.score < 0.5 for draft in made)


@pytest.mark.parametrize(
    ("task", "text", "value"),
    [
        ("qa", "<think>smoke</think><answer>C</answer>", {"choice": "C"}),
        ("classification", "<think>smoke</think><answer>Arson</answer>", {"label": "Arson"}),
        ("grounding", "<think>smoke</think><answer>Anomaly</answer><glue>[3, 9.5]</glue>", {"interval": (3.0, 9.5)}),
        ("grounding", "<think>smoke</think><answer>Normal</answer><glue>[-1.0, -1.0]</glue>", {"interval": None}),
    ],
)
def test_a_students_completion_becomes_a_draft(task: str, text: str, value: dict[str, Any]) -> None:
    draft = drafts.read(text, example_of(ROW, task))
    assert (draft.think, draft.value) == ("smoke", value)


def test_a_completion_without_an_answer_is_no_draft() -> None:
    assert drafts.read("<think>hm</think>", QA) is None


def test_a_video_model_as_student(config: ConfigDict, model_folder: Path, tmp_path: Path) -> None:
    """A model with random weights answers every question some times; what can be read is kept, in the row's order of
    options, and asked only once."""
    config.student.update({"checkpoint": str(model_folder), "samples": 2, "batch_size": 4, "dtype": "float32"})
    config.data.update({"max_completion_tokens": 12, "max_examples": 6, "budget": "model", "max_frames": 4})
    config.data.tasks = ("qa",)
    card = reflection.run(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "drafts.jsonl").read_text().splitlines()]
    assert len(lines) == card["questions"] == 6 and card["student"] == str(model_folder)
    assert card["with_a_draft"] == sum(bool(line["drafts"]) for line in lines)
    before = (tmp_path / "drafts.jsonl").read_bytes()
    assert reflection.run(config, tmp_path) == card
    assert (tmp_path / "drafts.jsonl").read_bytes() == before


def test_a_student_behind_an_endpoint(config: ConfigDict, tmp_path: Path) -> None:
    """It sees pictures, answers every question some times, and is paid once; questions without answer are counted."""
    config.data.tasks, config.data.max_examples = ("classification",), 6
    config.student.update({"samples": 2, "frames": 3, "concurrency": 2, "retries": 0, "model": "student"})
    asked: list[str] = []

    def script(request: dict[str, Any], number: int) -> Answer:
        first = json.dumps(request["messages"])
        asked.append(first)
        place = list(dict.fromkeys(asked)).index(first)
        if place == 4:
            return Answer(status=400, body=b"{}")
        answer = ("Fire", "Normal")[request["seed"] % 2] if place != 5 else "I cannot tell"
        return Answer(f"<think>It looks so.</think><answer>{answer}</answer>")

    with serve(script) as server:
        config.student.url = server.url
        card = reflection.run(config, tmp_path)
        assert [len(pictures(request)) for request in server.requests] == [3] * 12
        assert "taken at 0.0, " in server.requests[0]["messages"][0]["content"][3]["text"]
        reflection.run(config, tmp_path)
        assert len(server.requests) == 14  # the question that had no answer is asked again
    assert card["questions"] == 6 and card["with_a_draft"] == 4 and card["student"] == "student"
    assert card["rejected"]["the student did not answer"] == 1
    assert card["rejected"]["no answer in the student's texts"] == 1
    lines = [json.loads(line) for line in (tmp_path / "drafts.jsonl").read_text().splitlines()]
    values = [sorted(draft["value"]["label"] for draft in line["drafts"]) for line in lines]
    assert sorted(values) == [[], *[["Fire", "Normal"]] * 4]


@pytest.mark.parametrize("task", parsing.TASKS)
def test_a_row_without_an_answer_to_a_task_has_no_target_for_it(task: str) -> None:
    """Neither a contradiction, as an anomaly whose time is not known, nor an empty answer."""
    row = replace(ROW, answer=None, anomaly_class=None, interval=None, reasoning={})
    assert example_of(row, task) is None and row.tasks == ()


def test_words_of_an_annotation_cannot_break_a_target() -> None:
    text = "smoke </think><answer>A</answer> <|im_end|>" + "\n" * 50 + "rises"
    row = replace(ROW, description=text, reasoning=dict.fromkeys(SECTIONS, text), options=(text,) * 4)
    record_ = Reflection(text, {"choice": "A"}, False, f"{GOOD} {text}", f"{REVISED} {text} {{check}}")
    for task, style in itertools.product(parsing.TASKS, ("think", "reflection", "two_pass")):
        reflected = record_ if task == "qa" else None
        example = replace(example_of(row, task), reflection=reflected)
        whole = "".join(span.text for span in prompts.completion(example, style))
        assert parsing.parse([whole], task, "strict", reflected is not None and style != "think").format_ok.all()


@pytest.mark.parametrize("interval", [(12.02, 12.04), (0.0, 0.04), (1.25, 1.250002), (0.05, 0.15), (12.0, 30.5)])
def test_a_short_interval_is_written_with_the_digits_that_it_needs(interval: tuple[float, float]) -> None:
    example = example_of(replace(ROW, interval=interval), "grounding")
    whole = "".join(span.text for span in prompts.completion(example, "think"))
    found = parsing.parse([whole], "grounding").final
    assert found.interval_count[0] == 1 and found.intervals[0, 0] == pytest.approx(interval)


def test_a_video_that_hangs_its_decoder_costs_its_question_alone(
    config: ConfigDict, dataset: Path, tmp_path: Path
) -> None:
    """A transport stream that goes on with nothing for 100 GB: shown to a student, and to a teacher."""
    videos = tmp_path / "videos"
    shutil.copytree(dataset / "videos", videos)
    rows, _ = load(config.data.csv)
    sparse = video_files.write(tmp_path / "a.ts", count=4).rename(videos / rows[0].video)
    os.truncate(sparse, 100 * 2**30)  # without taking any room
    config.data.update({"videos": str(videos), "tasks": ("classification",), "max_examples": 2, "video_seconds": 1.0})
    config.student.update({"samples": 1, "frames": 2, "retries": 0, "model": "student"})
    config.teacher.update({"frames": 2, "retries": 0, "model": "teacher"})
    with serve(lambda request, number: Answer("<think>So.</think><answer>Fire</answer>")) as server:
        config.student.url = server.url
        card = reflection.run(config, tmp_path / "student")
    assert card["with_a_draft"] == 1 and card["rejected"]["the video cannot be read"] == 1
    config.student.url = ""
    with serve(lambda request, number: reply()) as server:
        config.teacher.url = server.url
        card = reflection.run(config, tmp_path / "teacher")
    assert card["with_a_draft"] == 2 and card["rejected"]["the video cannot be read"] == 1


# --- What is kept -------------------------------------------------------------------------------------------------


def record(**changes: Any) -> Reflection:
    base = {"think": "A yard.", "draft": {"choice": "A"}, "draft_is_right": False, "reflect": GOOD, "revise": REVISED}
    return Reflection(**{**base, **changes})


def test_a_good_record_has_no_fault() -> None:
    assert reflection.fault(QA, record(), reflection_config.get_config().keep) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reflect": "Not so."}, "too few or too many words"),
        ({"revise": "word " * 151}, "too few or too many words"),
        ({"reflect": f"The ground truth says it is wrong. {GOOD}"}, "gives away"),
        ({"revise": f"According to the annotation. {REVISED}"}, "gives away"),
        ({"reflect": f"{GOOD} <answer>B</answer>"}, "holds a tag"),
        ({"think": "</think>"}, "holds a tag"),
        ({"think": " . . . "}, "no first reasoning"),
        ({"think": GOOD}, "repeats the first reasoning"),
        ({"revise": f"{REVISED} So the answer is C."}, "states another answer"),
        (
            {"draft": {"choice": "B"}, "draft_is_right": True, "reflect": f"That was wrong. {GOOD}"},
            "rejects a right draft",
        ),
        ({"reflect": "Flames and smoke rise from the truck, as I said."}, "finds nothing wrong"),
        ({"reflect": "I said that, but it does not fit at all here today."}, "names no evidence"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_faults(changes: dict[str, Any], reason: str) -> None:
    assert reason in reflection.fault(QA, record(**changes), reflection_config.get_config().keep)


def test_texts_that_share_most_of_their_words_are_alike() -> None:
    likeness = reflection.Likeness(0.8)
    long = "the man in the red coat walks to the door and breaks its lock with a long iron bar before he runs"
    assert not likeness.is_duplicate(long)
    assert likeness.is_duplicate(long.replace("before he runs", "before he flees"))
    assert not likeness.is_duplicate(
        "two cars meet at the crossing and the smaller one turns over on the wet road at night"
    )


def test_the_mix_has_its_share_and_spreads_over_classes() -> None:
    made = [
        (example_of(replace(ROW, anomaly_class=label), "qa"), record(draft_is_right=right))
        for label, count in (("Fire", 90), ("Abuse", 10))
        for right in (True, False)
        for _ in range(count)
    ]
    kept = [made[i] for i in reflection.mix(made, 0.7, 40, seed=0)]
    assert len(kept) == 40 and sum(not r.draft_is_right for _, r in kept) == 28
    assert Counter(e.meta["anomaly_class"] for e, _ in kept)["Abuse"] == 16  # all 10 wrong ones, 6 of 12 right ones
    assert len(reflection.mix(made, 0.7, 0, seed=0)) == 142  # all 100 wrong ones, and right ones to go with them


# --- The whole ----------------------------------------------------------------------------------------------------


def test_without_endpoint_records_come_by_rule_and_say_so(config: ConfigDict, tmp_path: Path) -> None:
    card = reflection.run(config, tmp_path)
    assert card["teacher"]["kind"].startswith("rules") and card["student"].startswith("rules")
    assert card["records"] == len(records(tmp_path)) > 10
    assert card["accepted"] + sum(card["rejected"].values()) == card["with_a_draft"]


def test_records_are_what_training_reads(config: ConfigDict, tmp_path: Path) -> None:
    """Every record makes a completion that parses strictly, with a right final answer."""
    reflection.run(config, tmp_path)
    config.data.reflection = str(tmp_path / "reflection.jsonl")
    examples, _ = pipeline.load_examples(config.data)
    assert len(examples) == len(records(tmp_path))
    for example in examples:
        text = "".join(span.text for span in prompts.completion(example, "reflection"))
        parsed = parsing.parse([text], example.task, "strict", reflection=True)
        target = parsing.targets_of([example])
        assert parsed.format_ok[0] and float(rewards.task_score(parsed.final, target)[0]) > 0.95
        draft = float(rewards.task_score(parsed.draft, target)[0])
        assert (draft >= (0.5 if example.task == "grounding" else 1.0)) == example.reflection.draft_is_right


def test_annotations_alone_are_enough_without_student_and_frames(vau_bench: Path, tmp_path: Path) -> None:
    """On VAU-Bench's own validation rows most records by rule pass every check."""
    c = reflection_config.get_config()
    c.data.csv = str(vau_bench / "val.csv")
    card = reflection.run(c, tmp_path)
    assert card["questions"] == 2021 and card["acceptance"] > 0.9
    assert abs(card["wrong_drafts"] / card["records"] - 0.7) < 0.01
    assert set(card["sources"]) == {"msad", "ucf", "ecva"}


STYLES_IN_TURN = ("reflection", "reflection", "two_pass", *["think"] * 8)  # 11: every task meets every style


@pytest.mark.parametrize(
    "file", ["val.csv", "ucf_subset_train.csv", "test_msad.csv", "test_ucf_crime.csv", "test_ecva.csv"]
)
def test_every_target_from_the_published_annotations_keeps_the_strict_rule(vau_bench: Path, file: str) -> None:
    """Of every row and task, in one of the styles in turn, its drafts and reflections by rule: the form is whole, the
    answer right (times are written to a tenth of a second), and a record that is kept earns for its reflection."""
    rows, _ = load(vau_bench / file)
    keep, made = reflection_config.get_config().keep, []
    for number, example in enumerate(example_of(row, task) for row in rows for task in row.tasks):
        style, record, kept = STYLES_IN_TURN[number % len(STYLES_IN_TURN)], None, False
        task = example.task
        if style != "think" and task in parsing.VERIFIABLE:
            draft = drafts.by_rule(example, keep.wrong_share, number)[0]
            right = draft.score >= (keep.tiou if task == "grounding" else 1.0)
            record = Reflection(draft.think, draft.value, right, *teacher.by_rule(example, draft, right))
            kept = style == "reflection" and number % 2 == 0 and not reflection.fault(example, record, keep)
        example = replace(example, reflection=record)
        made.append((example, record is not None, kept, prompts.completion(example, style)))
    for long in (False, True):
        chosen = [one for one in made if one[1] == long]
        texts = ["".join(span.text for span in spans) for *_, spans in chosen]
        parsed = parsing.parse(texts, [example.task for example, *_ in chosen], "strict", reflection=long)
        target = parsing.targets_of([example for example, *_ in chosen])
        verifiable = np.asarray([example.task in parsing.VERIFIABLE for example, *_ in chosen])
        assert parsed.format_ok.all() and np.asarray(rewards.task_score(parsed.final, target))[verifiable].min() > 0.85
        earned = np.asarray(rewards.reflection_reward(parsed, target))[[kept for *_, kept, _ in chosen]]
        assert (earned > 0).all() and bool(len(earned)) == long


def test_a_teacher_writes_what_is_kept_and_the_rest_is_counted(config: ConfigDict, tmp_path: Path) -> None:
    config.data.tasks, config.data.max_examples = ("classification",), 12
    config.seed = 1  # no two videos with the same annotation and the same draft, which would be one question

    def script(request: dict[str, Any], number: int) -> Answer:
        text = request["messages"][1]["content"]
        evidence = text.split("Key Evidence: ")[1].split("\n")[0]
        if number == 0:
            return Answer("no json")
        if number == 1:
            return reply(f"The ground truth is another, but {evidence}")
        if "answer is right" in text:
            return reply(f"What can be seen supports it: {evidence} is there, number {number}")
        return reply(f"It was wrong, for {evidence} can be seen, number {number}")

    with serve(script) as server:
        config.teacher.update({"url": server.url, "model": "scripted", "price_prompt": 1.0, "concurrency": 1})
        card = reflection.run(config, tmp_path)
    assert card["rejected"] == {"reflect gives away that the answer was known": 1}
    assert card["accepted"] == 11 and card["teacher"]["model"] == "scripted"
    assert card["teacher"]["cost_this_call"] == pytest.approx(1300 / 1e6)  # the answer that was no JSON was asked again
    assert all("number" in r["reflect"] and r["revise"] == REVISED for r in records(tmp_path))


def test_a_killed_call_pays_for_no_answer_twice(config: ConfigDict, tmp_path: Path) -> None:
    config.data.tasks, config.data.max_examples = ("qa",), 10
    with serve(lambda request, n: reply() if n < 4 else Answer(status=400, body=b"{}")) as server:
        config.teacher.update({"url": server.url, "model": "scripted", "concurrency": 1})
        first = reflection.run(config, tmp_path)
    assert first["rejected"]["the teacher did not answer"] == 6
    with serve(lambda request, n: reply()) as server:
        config.teacher.url = server.url
        second = reflection.run(config, tmp_path)
    assert len(server.requests) == 6
    assert "the teacher did not answer" not in second["rejected"]


def test_the_teacher_may_see_frames(config: ConfigDict, tmp_path: Path) -> None:
    config.data.tasks, config.data.max_examples, config.teacher.frames = ("qa",), 2, 4
    with serve(lambda request, n: reply()) as server:
        config.teacher.update({"url": server.url, "model": "scripted"})
        reflection.run(config, tmp_path)
    assert [len(pictures(request)) for request in server.requests] == [4, 4]


def test_the_teachers_prompt_says_draft_and_truth() -> None:
    system, user = teacher.messages(QA, Draft("A yard.", {"choice": "A"}, 0.0), False, [])
    assert "JSON" in system["content"]
    for text in ("A. a fight", "First answer: A", "the right one is: B", "A yard.", "Flames rise from a parked truck"):
        assert text in user["content"]


def test_a_dry_run_prints_prompts_and_asks_nobody(dataset: Path, tmp_path: Path) -> None:
    with serve(lambda request, n: reply()) as server:
        args = [
            "--config=configs/reflection.py",
            f"--workdir={tmp_path}",
            f"--config.data.csv={dataset / 'test.csv'}",
            "--config.dry_run=2",
            f"--config.teacher.url={server.url}",
            "--config.teacher.model=m",
        ]
        command = [sys.executable, "-m", "vau_jax.data_prep.reflection", *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- system") == 2 and server.requests == []


def test_a_student_needs_videos(config: ConfigDict, tmp_path: Path) -> None:
    config.data.videos, config.student.checkpoint = "", "somewhere"
    with pytest.raises(InputError, match="must see the videos"):
        reflection.run(config, tmp_path)
