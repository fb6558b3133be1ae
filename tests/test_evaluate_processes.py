"""An evaluation on several processes: each decodes whole videos, and the files are those of one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vau_jax.common.files import InputError
from vau_jax.data import pipeline
from vau_jax.tasks.example import Example

ROOT = Path(__file__).parents[1]


def options(model: Path, data: Path, workdir: Path, **changed: Any) -> list[str]:
    values = {
        "checkpoint": model,
        "data.csv": data / "test.csv",
        "data.videos": data / "videos",
        "data.wording": "short",
        "data.max_frames": 8,
        "data.max_completion_tokens": 8,
        "data.bucket": "(128, 576, 48, 64, 12, 64)",
        "dtype": "float32",
        "batch_size": 4,
        "rotations": 2,
        **changed,
    }
    return [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items())]


def start(processes: int, args: Sequence[str], program: str = "vau_jax.evaluate") -> subprocess.Popen[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "RUN_PYTHON": sys.executable}
    command = ["bash", "launch/local_multi.sh", str(processes), program, *args]
    if processes == 1:
        command, env["ALONE"] = ["bash", "launch/run.sh", program, *args], "1"
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(processes: int, args: Sequence[str]) -> str:
    output, _ = (process := start(processes, args)).communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def result(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name != "about"}


@pytest.fixture(scope="module")
def alone(model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "eval"
    run(1, options(model_folder, dataset, folder))
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_files_are_those_of_one_process(
    count: int, alone: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Also after one of them was killed in the middle, which the others name; nothing else is left in the folder."""
    args = options(model_folder, dataset, tmp_path / "eval")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "predictions.mine.jsonl").write_text("a file of somebody's own\n")
    first = start(count, args)
    part = tmp_path / "eval" / "predictions.00001.jsonl"
    while not (part.exists() and part.read_text().count("\n") > 2):
        assert first.poll() is None, first.communicate()[0][-3000:]
        time.sleep(0.01)
    os.kill(json.loads((tmp_path / "eval" / "heartbeats" / "00001.json").read_text())["pid"], signal.SIGKILL)
    said = first.communicate(timeout=120)[0]
    assert first.returncode not in (0, 2)
    assert re.search(r"\[0\] error: process 0 of \d ends because it lost process 1 \(.*, pid \d+, last seen", said)
    before = part.read_text().splitlines()
    said = run(count, args)
    assert (tmp_path / "eval" / "predictions.jsonl").read_bytes() == (alone / "predictions.jsonl").read_bytes()
    assert set(before[:2]) <= set((alone / "predictions.jsonl").read_text().splitlines())
    assert result(tmp_path / "eval") == result(alone)
    there, expected = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "eval", alone))
    assert there == expected | {"predictions.mine.jsonl"}
    assert said.count("evaluated") == 1, "the first process sums up"


@pytest.mark.long
def test_a_students_drafts_on_several_processes_are_those_of_one(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Files and card; a process draws for whole videos, so that each reads its own."""
    shared = ("data.csv", "data.videos", "data.wording", "data.max_frames", "data.max_completion_tokens", "data.bucket")
    values = dict(argument[9:].split("=", 1) for argument in options(model_folder, dataset, tmp_path)[1:])
    values = {name: values[name] for name in shared} | {"data.tasks": "('qa', 'grounding')", "data.max_examples": 13}
    values |= {"student.checkpoint": model_folder, "student.dtype": "float32", "student.batch_size": 4}
    args = ["--config=reflection", *(f"--config.{name}={value}" for name, value in values.items())]
    for count in (1, 2, 3):
        process = start(count, [*args, f"--workdir={tmp_path / str(count)}"], "vau_jax.data_prep.reflection")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        assert output.count("reflection: built") == 1, "the first process sums up"
    one, *others = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "123")
    assert others == [one, one] and len(one["drafts.jsonl"].splitlines()) == 13


def test_a_mistake_of_one_process_is_said_by_all_and_none_waits(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    process = start(2, options(model_folder, dataset, tmp_path / "eval", batch_size=3, **{"mesh.fsdp": 2}))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.count("error: process 0 of 2: mesh data=1, fsdp=2, tensor=1 does not fit 1 device(s)") == 2


@pytest.mark.long
def test_a_judge_and_a_report_are_the_first_processs(alone: Path, tmp_path: Path) -> None:
    """Both end on two processes; the judge is told by all that there are no descriptions, the report is written."""
    asked = (f"--workdir={alone}", "--config.url=http://localhost:1/v1", "--config.model=m")
    judge = start(2, asked, "vau_jax.judge")
    assert judge.communicate()[0].count("has no descriptions to mark") == 2 and judge.returncode == 2
    report = start(2, (str(alone), f"--out={tmp_path / 'report.html'}"), "vau_jax.report")
    said = report.communicate()[0]
    assert report.returncode == 0, said
    assert (tmp_path / "report.html").is_file() and said.count("QA accuracy  ") == 1


def example(video: str, task: str) -> Example:
    return Example(f"{video}/{task}", task, (Path(video),), "", (), {})


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_example_has_one_process_and_each_video_too(count: int) -> None:
    every = [example(f"{n}.mp4", task) for task in ("qa", "grounding") for n in range(5)]
    shares = [pipeline.share(every, number, count) for number in range(count)]
    assert sorted(e.id for one in shares for e in one) == sorted(e.id for e in every)
    videos = [{e.media for e in one} for one in shares]
    assert all(not a & b for i, a in enumerate(videos) for b in videos[:i])


def test_together_raises_the_mistake_as_it_is_in_one_process() -> None:
    from vau_jax.common import processes

    def fail() -> None:
        raise InputError("as it is")

    with pytest.raises(InputError, match=r"^as it is$"):
        processes.together(fail)
