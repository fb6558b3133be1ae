"""The chat client against a real server: errors, limits, timeouts, and that nothing is paid for twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.chat_server import Answer, endpoint, last, pictures, question, serve
from vau_jax.common import chat
from vau_jax.common.chat import Chat
from vau_jax.common.files import InputError


def test_many_questions_get_their_own_answers(tmp_path: Path) -> None:
    with serve(lambda request, n: Answer(f"re: {last(request)}", delay=0.05)) as server:
        asked = Chat(endpoint(server.url, concurrency=4), tmp_path / "a.jsonl")
        found = dict(asked.ask_all([question(f"q{i}") for i in range(20)]))
    assert {i: reply.text for i, reply in found.items()} == {i: f"re: q{i}" for i in range(20)}
    assert 1 < server.most_at_once <= 4
    assert asked.tokens == {"prompt": 2000, "completion": 200}


def test_cost_is_counted(tmp_path: Path) -> None:
    with serve(lambda request, n: Answer("x")) as server:
        asked = Chat(endpoint(server.url, price_prompt=2.0, price_completion=10.0), tmp_path / "a.jsonl")
        asked.ask(question("q"))
    assert asked.cost == pytest.approx((100 * 2 + 10 * 10) / 1e6)


@pytest.mark.parametrize(
    "first",
    [
        Answer(status=429, headers={"Retry-After": "0"}, body=b'{"error": {"message": "slow down"}}'),
        Answer(status=500, body=b"{}"),
        Answer("x", delay=1.5),
        Answer("x", cut=True),
    ],
    ids=["rate limit", "server error", "timeout", "half response"],
)
def test_a_passing_failure_is_tried_again(tmp_path: Path, first: Answer) -> None:
    with serve(lambda request, n: first if n == 0 else Answer("fine")) as server:
        reply = Chat(endpoint(server.url, seconds=1.0), tmp_path / "a.jsonl").ask(question("q"))
    assert (reply.text, reply.error) == ("fine", "")
    assert len(server.requests) == 2


def test_a_lasting_failure_is_an_error_and_is_not_kept(tmp_path: Path) -> None:
    with serve(lambda request, n: Answer(status=503, body=b"{}")) as server:
        reply = Chat(endpoint(server.url, retries=1), tmp_path / "a.jsonl").ask(question("q"))
    assert reply.text == "" and reply.error == "HTTP 503: {}"
    with serve(lambda request, n: Answer("now")) as server:
        assert Chat(endpoint(server.url), tmp_path / "a.jsonl").ask(question("q")).text == "now"


def test_an_endpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    reply = Chat(endpoint("http://127.0.0.1:9/v1", retries=0), tmp_path / "a.jsonl").ask(question("q"))
    assert reply.error.startswith("ConnectError: ")


def test_answers_are_paid_for_once(tmp_path: Path) -> None:
    with serve(lambda request, n: Answer(f"answer {n}")) as server:
        first = Chat(endpoint(server.url), tmp_path / "a.jsonl").ask(question("q"))
        again = Chat(endpoint(server.url), tmp_path / "a.jsonl").ask(question("q"))
        other = Chat(endpoint(server.url, model="another"), tmp_path / "a.jsonl").ask(question("q"))
    assert first == again != other
    assert len(server.requests) == 2


def test_after_a_kill_complete_answers_count_and_a_partial_one_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with serve(lambda request, n: Answer("x" * 50)) as server:
        asked = Chat(endpoint(server.url), path)
        for text in ("a", "b"):
            asked.ask(question(text))
        path.write_bytes(path.read_bytes()[:-20])
        asked = Chat(endpoint(server.url), path)
        for text in ("a", "b", "c"):
            assert asked.ask(question(text)).text == "x" * 50
        assert len(server.requests) == 4
        asked = Chat(endpoint(server.url), path)
        for text in ("a", "b", "c"):
            asked.ask(question(text))
        assert len(server.requests) == 4


def test_an_answer_that_fails_its_check_is_asked_again_a_few_times(tmp_path: Path) -> None:
    def check(text: str) -> str:
        return "" if text.startswith("{") else "no JSON"

    with serve(lambda request, n: Answer("{}" if n == 1 else "nonsense")) as server:
        asked = Chat(endpoint(server.url), tmp_path / "a.jsonl")
        assert asked.ask(question("q"), check).text == "{}"
        assert asked.ask(question("hopeless"), check).error == "no JSON"
    assert len(server.requests) == 2 + chat.ATTEMPTS
    assert len({request["seed"] for request in server.requests[:2]}) == 2


def test_json_mode_and_frames_are_sent(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = np.full((2, 32, 48, 3), (200, 40, 40), np.uint8)
    with serve(lambda request, n: Answer("{}")) as server:
        content = [*chat.frames_content(frames), {"type": "text", "text": "What?"}]
        Chat(endpoint(server.url), tmp_path / "a.jsonl").ask(question(content))
    shown = pictures(server.requests[0])
    assert len(shown) == 2 and all(np.abs(image.astype(int) - frames[0]).max() < 12 for image in shown)
    assert server.requests[0]["response_format"] == {"type": "json_object"}


def test_an_endpoint_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs url and model"):
        Chat(endpoint("http://x", model=""), tmp_path / "a.jsonl")


def test_the_file_of_answers_holds_no_key_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serve(lambda request, n: Answer("x")) as server:
        Chat(endpoint(server.url), tmp_path / "a.jsonl").ask(question("q"))
    assert "sk-secret" not in (tmp_path / "a.jsonl").read_text()
    assert set(json.loads((tmp_path / "a.jsonl").read_text())) == {"key", "text"}
