"""Users' rewards run in processes of their own: whatever one does costs its completion and nothing else."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vau_jax.common.files import InputError
from vau_jax.datasets.vau_bench import example_of, load
from vau_jax.rl.user_rewards import UserRewards, decode, encode
from vau_jax.tasks import TASKS
from vau_jax.tasks.example import Example, Reflection

REWARD = "tests.reward_functions:{}"


@pytest.fixture(scope="module")
def example(dataset: Path) -> Example:
    row = load(dataset / "train.csv")[0][0]
    record = Reflection("a", {"choice": "A"}, True, "b", "c")
    return replace(example_of(row, "qa", dataset / "videos"), reflection=record)


@pytest.fixture(scope="module")
def hostile() -> Iterator[UserRewards]:
    rewards = UserRewards(((REWARD.format("hostile"), 1.0),), 4, seconds=3.0)
    yield rewards
    rewards.close()


DEEDS = {
    "exit": "SystemExit: 0",
    "end": "ended its process (exit code 0)",
    "crash": "ended its process (signal 11)",
    "hang": "took longer than 3 s",
    "hang without signals": "took longer than 3 s",
    "leave a child": "took longer than 3 s",
    "raise": "IndexError: list index out of range",
    "vector": "ValueError: the reward is [1.], expected a finite number of float32",
    "text": "TypeError: must be real number, not str",
    "inf": "ValueError: the reward is inf, expected a finite number of float32",
    "huge": "ValueError: the reward is 1e+39, expected a finite number of float32",
}


def test_what_a_reward_does_fails_its_completion_alone(hostile: UserRewards, example: Example) -> None:
    """Each deed between two completions that are well; the hanging ones all at the same time."""
    texts = [text for deed in DEEDS for text in (deed, "number")]
    began = time.monotonic()
    values, errors = hostile(texts, [example] * len(texts))
    assert time.monotonic() - began < 60
    assert errors[::2] == [f"tests.reward_functions:hostile: {error}" for error in DEEDS.values()]
    assert np.isnan(values[::2]).all()
    assert errors[1::2] == [None] * len(DEEDS) and (values[1::2] == 0.5).all()


def test_what_a_reward_prints_and_reads_is_not_the_answer(hostile: UserRewards, example: Example) -> None:
    values, errors = hostile(["print", "read", "print"], [example] * 3)
    assert errors == [None] * 3 and values[:, 0].tolist() == [0.25, 0.0, 0.25]


@pytest.mark.parametrize("task", TASKS)
def test_a_reward_sees_the_example_as_it_is(dataset: Path, task: str) -> None:
    row = load(dataset / "train.csv")[0][0]
    given = replace(example_of(row, task, dataset), rotation=1)
    assert decode(json.loads(json.dumps(encode(given)))) == given


def test_several_rewards_are_asked_in_several_processes_at_once(example: Example) -> None:
    """Eight times half a second in four processes; each column is its function's."""
    rewards = UserRewards(((REWARD.format("slow"), 1.0), (REWARD.format("vowels"), 0.5)), 4, seconds=30.0)
    rewards(["warm"] * 8, [example] * 8)  # the processes are there
    values, errors = rewards([f"a{i}" for i in range(8)], [example] * 8)
    assert errors == [None] * 8 and len(set(values[:, 0])) == 4 and (values[:, 1] == 0.5).all()
    rewards.close()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tests.reward_functions:missing", "has no attribute 'missing'"),
        ("tests.no_such_module:f", "No module named"),
        ("tests.reward_functions:NOT_A_FUNCTION", "is int, expected a function"),
        ("just_a_name", "cannot be imported"),
        ("rewards_that_exit:f", r"cannot be imported \(SystemExit: 0\)"),
        ("rewards_that_end:f", r"importing them ended the process \(exit code 0\)"),
    ],
)
def test_a_reward_that_is_not_there_is_named(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_that_exit.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "rewards_that_end.py").write_text("import os; os._exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=words):
        UserRewards(((path, 1.0),), 1, seconds=1.0)


def test_the_processes_end_with_the_run_also_in_the_middle_of_a_reward(example: Example) -> None:
    """Their input ends when the run is killed."""
    rewards = UserRewards(((REWARD.format("hostile"), 1.0),), 1, seconds=60.0)
    worker = rewards.workers.idle.get()
    hang = {"function": 0, "completion": "hang", "example": encode(example)}
    worker.process.stdin.write(json.dumps(hang).encode() + b"\n")
    worker.process.stdin.close()
    assert worker.process.wait(30) == 0 and not os.path.exists(f"/proc/{worker.process.pid}")
