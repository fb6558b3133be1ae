"""The chat client and the reflection pipeline against `transformers serve` with a small random model."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import transformers_server
from tests.chat_server import endpoint
from vau_jax.common.chat import Chat, frames_content
from vau_jax.configs import reflection as reflection_config
from vau_jax.data_prep import reflection
from vau_jax.vlm import VideoLM


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with transformers_server.serve(model_folder) as url:
        yield url


def asked(url: str, model: Path, **changed: object) -> Chat:
    return Chat(endpoint(url, model=str(model), json_mode=False, temperature=0.0, max_tokens=12, **changed), None)


def test_its_answer_is_the_models(url: str, model_folder: Path, vlm: VideoLM) -> None:
    """Greedily, our port of the same folder writes the same text."""
    messages = [{"role": "user", "content": "What happens in the yard?"}]
    chat = asked(url, model_folder, seconds=60.0)
    ours = vlm.generate(vlm.encode([messages]), max_new_tokens=12, temperature=0.0).text[0][0]
    assert chat.ask(messages).text == ours != ""
    assert chat.tokens["completion"] == 12 and chat.tokens["prompt"] > 10


def test_it_sees_our_pictures(url: str, model_folder: Path) -> None:
    frames = np.full((2, 56, 56, 3), 90, np.uint8)
    chat = asked(url, model_folder, seconds=60.0)
    assert not chat.ask([{"role": "user", "content": [{"type": "text", "text": "What?"}]}]).error
    blind = chat.tokens["prompt"]
    content = [*frames_content(frames), {"type": "text", "text": "What?"}]
    assert not chat.ask([{"role": "user", "content": content}]).error
    assert chat.tokens["prompt"] - 2 * blind >= 2 * 4  # four visual tokens a picture


@pytest.mark.parametrize(
    ("changed", "error"), [({"seconds": 0.001}, "within 0.001 s"), ({"model": "another"}, "HTTP ")]
)
def test_its_errors_are_reported_and_do_not_raise(
    changed: dict[str, object], error: str, url: str, model_folder: Path
) -> None:
    chat = Chat(endpoint(url, **{"model": str(model_folder), "retries": 0, **changed}), None)
    assert error in chat.ask([{"role": "user", "content": "What?"}]).error


def test_student_and_teacher_of_random_weights(url: str, model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """Every question is asked and none is lost: each is a record, or stands among the rejected with a reason."""
    c = reflection_config.get_config()
    c.data.csv, c.data.videos = str(dataset / "test.csv"), str(dataset / "videos")
    c.data.tasks, c.data.max_examples = ("grounding",), 4
    for asked in (c.student, c.teacher):  # this server hangs on two questions at once
        asked.update({"url": url, "model": str(model_folder), "max_tokens": 24, "frames": 2, "concurrency": 1})
    c.student.samples = 2
    card = reflection.run(c, tmp_path)
    assert len((tmp_path / "student.jsonl").read_text().splitlines()) == 8
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert card["questions"] == 4 == card["accepted"] + len(rejected)
    assert all(entry["reason"] for entry in rejected)
