"""What a chat endpoint may send instead of a completion: it costs that question its answer, and bounded time and
memory."""

import gzip
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.chat_server import Answer, endpoint, last, question, serve
from vau_jax.common import config_flags
from vau_jax.common.chat import Chat, Reply
from vau_jax.common.files import InputError

SECONDS = 2.0
LARGE = 2**27  # what a server would send if one let it


def plain(value: Any) -> Answer:
    """A body that is this as JSON."""
    return Answer(body=json.dumps(value).encode())


def content(value: Any, **more: Any) -> Answer:
    return plain({"choices": [{"message": {"role": "assistant", "content": value, **more}}], "usage": {}})


def endless(start: bytes, piece: bytes, pause: float = 0.0) -> Answer:
    """A response that goes on with `piece` for as long as anybody reads, or up to LARGE bytes."""

    def write(wire: BinaryIO) -> None:
        wire.write(start)
        for _ in range(LARGE // len(piece)):
            wire.write(piece)
            time.sleep(pause)

    return Answer(raw=write)


def raw(data: bytes) -> Answer:
    return Answer(raw=lambda wire: (wire.write(data), None)[1])


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TOOL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ODD: dict[str, Callable[[str], Answer]] = {  # by the address of another server
    name: answer if callable(answer) else (lambda other, answer=answer: answer)
    for name, answer in {
        "html": Answer(body=b"<!doctype html>\n<html><body>\n<h1>Sign in</h1>\n</body></html>"),
        "empty body": Answer(body=b""),
        "blank body": Answer(body=b" \n\t"),
        "null": plain(None),
        "number": plain(7),
        "text": plain("hello"),
        "list": plain([]),
        "object": plain({}),
        "NaN": Answer(body=b"NaN"),
        "half": Answer(body=b'{"choices": [{"message": {"content": "a'),
        "two objects": Answer(body=b"{} {}"),
        "digits": Answer(body=b'{"choices": ' + b"9" * 100_000 + b"}"),
        "not UTF-8": Answer(body=b'{"choices": [{"message": {"content": "\xff\xfe\xfa"}}]}'),
        "deep": Answer(body=b"[" * 100_000),
        "deep object": Answer(body=b'{"choices":' * 100_000),
        "error with status 200": plain({"error": {"message": "overloaded"}}),
        "events": Answer(body=b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'),
        "choices null": plain({"choices": None}),
        "choices empty": plain({"choices": [], "usage": None}),
        "choices object": plain({"choices": {"0": {}}}),
        "choices infinite": Answer(body=b'{"choices": Infinity}'),
        "choice null": plain({"choices": [None]}),
        "choice list": plain({"choices": [[]]}),
        "choice empty": plain({"choices": [{}]}),
        "message null": plain({"choices": [{"message": None}]}),
        "message text": plain({"choices": [{"message": "hello"}]}),
        "content missing": plain({"choices": [{"message": {"role": "assistant"}}]}),
        "content null": content(None),
        "content list": content([{"type": "text", "text": "hello"}]),
        "content number": content(3.5),
        "content true": content(True),
        "content empty": content(""),
        "content blank": content(" \n"),
        "content half a surrogate pair": content("a \ud800 b"),
        "tool calls": content(None, tool_calls=[TOOL]),
        "refusal": content(None, refusal="I cannot help with that."),
        "status 204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
        "status 400 with control characters": Answer(status=400, body=b"\x1b[2J\x1b]0;title\x07 no\r\nno\x00" * 1000),
        "status 500 deep": Answer(status=500, body=b"[" * 100_000),
        "status 429 for ever": Answer(status=429, headers={"Retry-After": "1e300"}, body=b"{}"),
        "status 429 not a number": Answer(status=429, headers={"Retry-After": "nan"}, body=b"{}"),
        "redirect to another server": lambda other: Answer(status=307, headers={"Location": f"{other}/chat"}, body=b""),
        "redirect to itself": Answer(status=307, headers={"Location": "/v1/chat/completions"}, body=b""),
        "redirect to nothing": Answer(status=308, headers={"Location": "http://[/"}, body=b""),
        "redirect to a large page": endless(b"HTTP/1.1 302 x\r\nLocation: /x\r\n\r\n", b" " * 65536),
        "cut": Answer("hello", cut=True),
        "length too small": raw(OK + b'Content-Length: 4\r\n\r\n{"choices": []}'),
        "length twice": raw(OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nnull"),
        "length no number": raw(OK + b"Content-Length: many\r\n\r\nnull"),
        "chunk without size": raw(CHUNKED + b"null\r\n"),
        "chunk too large": raw(CHUNKED + b"f" * 30 + b"\r\nnull\r\n0\r\n\r\n"),
        "chunk cut": raw(CHUNKED + b"ff\r\nnull"),
        "not HTTP": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        "nothing": raw(b""),
        "large header": raw(OK + b"X: " + b"x" * 2**20 + b"\r\n\r\nnull"),
        "many headers": endless(OK, b"X-Header: value\r\n" * 1000),
        "continue for ever": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.1),
        "whitespace without end": endless(OK + b"\r\n", b" " * 65536),
        "error without end": endless(b"HTTP/1.1 503 x\r\n\r\n", b" " * 65536),
        "chunks without end": endless(CHUNKED, b"8000\r\n" + b" " * 0x8000 + b"\r\n"),
        "gzip bomb": lambda other: Answer(headers={"Content-Encoding": "gzip"}, body=gzip.compress(b" " * LARGE, 1)),
        "unknown encoding": Answer(headers={"Content-Encoding": "zst\x7f"}, body=b"{}"),
        "body drop by drop": endless(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.2),
        "headers drop by drop": endless(OK, b"X", 0.2),
        "silence": Answer(delay=1.5 * SECONDS),
    }.items()
}


def peak() -> int:
    """The most bytes that this process held since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * held


@dataclass
class Outcome:
    """What became of all questions of ODD, and of one that is answered, which were asked at once."""

    replies: dict[str, Reply] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0
    elsewhere: int = 0  # requests that another server got


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    cache = tmp_path_factory.mktemp("odd") / "a.jsonl"
    names = [*ODD, "fine"]
    with (
        serve(lambda request, n: Answer("hello")) as other,
        serve(lambda request, n: answers[last(request)]) as server,
    ):
        answers = {name: make(other.url) for name, make in ODD.items()} | {"fine": Answer("hello", delay=0.3)}
        chat = Chat(endpoint(server.url, seconds=SECONDS, retries=0, concurrency=len(names)), cache)
        peak()
        before, start = peak(), time.monotonic()
        found = dict(chat.ask_all(map(question, names)))
        made = Outcome({names[i]: reply for i, reply in found.items()}, [], time.monotonic() - start, peak() - before)
        made.elsewhere = len(other.requests)
    made.cached = [json.loads(line)["text"] for line in cache.read_text().splitlines()]
    yield made


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_leaves_its_question_unanswered_with_one_line(outcome: Outcome, name: str) -> None:
    reply = outcome.replies[name]
    assert reply.text == "" and reply.error.strip()
    assert reply.error.isprintable() and len(reply.error) <= 200


def test_a_question_among_odd_replies_is_answered_and_nothing_else_is_kept(outcome: Outcome) -> None:
    assert outcome.replies["fine"] == Reply("hello")
    assert outcome.cached == ["hello"]


def test_odd_replies_take_bounded_time_and_memory(outcome: Outcome) -> None:
    assert outcome.seconds < SECONDS + 20
    assert outcome.bytes < LARGE / 2


def test_a_prompt_goes_to_no_other_server(outcome: Outcome) -> None:
    assert outcome.elsewhere == 0
    assert "redirected to another server, http://127.0.0.1:" in outcome.replies["redirect to another server"].error


def test_a_redirect_on_the_same_server_is_followed(tmp_path: Path) -> None:
    first = Answer(status=307, headers={"Location": "/v1/chat/completions/"}, body=b"")
    with serve(lambda request, n: Answer("fine") if n else first) as server:
        assert Chat(endpoint(server.url), None).ask(question("q")).text == "fine"
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize(
    "usage", [None, [], 7, {}, {"prompt_tokens": None}, {"prompt_tokens": "9"}, {"prompt_tokens": -1}], ids=json.dumps
)
def test_an_answer_with_odd_usage_is_an_answer(usage: Any) -> None:
    whole = {"choices": [{"message": {"content": "hello"}}], "usage": usage}
    with serve(lambda request, n: plain(whole)) as server:
        chat = Chat(endpoint(server.url), None)
        assert chat.ask(question("q")) == Reply("hello")
    assert chat.tokens.total() == 0


def test_a_question_takes_no_longer_than_all_its_tries_may() -> None:
    slow = Answer(status=429, headers={"Retry-After": "30"}, body=b"{}")
    with serve(lambda request, n: slow) as server:
        start = time.monotonic()
        reply = Chat(endpoint(server.url, seconds=0.3, retries=2), None).ask(question("q"))
    assert time.monotonic() - start < 20
    assert reply.error == "no answer within 0.9 s"


def test_an_empty_answer_is_asked_for_again(tmp_path: Path) -> None:
    with serve(lambda request, n: content("" if n == 0 else "now")) as server:
        assert Chat(endpoint(server.url), tmp_path / "a.jsonl").ask(question("q")) == Reply("now")
    assert len(server.requests) == 2


def test_an_empty_text_in_the_file_of_answers_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with serve(lambda request, n: Answer("now")) as server:
        key = Chat(endpoint(server.url), path).key(question("q"), 0)
        lines = [{"key": key, "text": ""}, {"key": key, "text": None}, {"key": [], "text": "x"}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[" * 100_000 + "\n")
        assert Chat(endpoint(server.url), path).ask(question("q")).text == "now"


@pytest.mark.parametrize(
    "url",
    ["http://user:secret@localhost/v1", "http://localhost/v1?api_key=secret", "http://localhost/v1#secret", "secret@"],
)
def test_a_secret_in_the_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InputError, match="no user, password or query") as caught:
        Chat(endpoint(url), None)
    assert "secret" not in str(caught.value)


def test_a_secret_in_the_url_of_an_endpoint_that_is_not_used_is_refused_too() -> None:
    arguments = ["train", "--config=configs/vau_r1_qa_rft.py", "--config.judge.url=http://user:secret@localhost/v1"]
    with pytest.raises(InputError, match="no user, password or query") as caught:
        config_flags.read(arguments)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost/v1", "http:///v1", "http://[::1", "http://a:0/v1"])
def test_an_url_that_is_no_address_is_named(url: str) -> None:
    with pytest.raises(InputError, match="expected one such as http://localhost"):
        Chat(endpoint(url), None)


@pytest.mark.parametrize("changed", [{"concurrency": 0}, {"seconds": 0.0}, {"retries": -1}])
def test_limits_that_allow_no_answer_are_named(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected one question at once or more"):
        Chat(endpoint("http://localhost/v1", **changed), None)


def test_a_server_that_repeats_our_key_does_not_get_it_into_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serve(lambda request, n: Answer(status=401, body=b"wrong key sk-secret")) as server:
        assert Chat(endpoint(server.url), None).ask(question("q")).error == "HTTP 401: wrong key ***"


def test_a_key_that_fits_no_header_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with pytest.raises(InputError, match="the key in OPENAI_API_KEY has spaces") as caught:
        Chat(endpoint("http://localhost/v1"), None)
    assert "secret" not in str(caught.value)
