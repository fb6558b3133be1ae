"""The page to ask a model on, in Chromium, with files that are really uploaded."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tests import video_files
from tests.chat_server import Answer, serve
from tests.small_models import writing_model
from vau_jax import app, cli
from vau_jax.ask import Asker, Question
from vau_jax.datasets import synthetic
from vau_jax.web.guard import Guard
from vau_jax.web.uploads import PREFIX, Uploads, open_folder

ROOT = Path(__file__).parents[1]
SAID = "Smoke rises where two cars met; flames <img src=x onerror='hacked()'>"
TEXT = f"<think>{SAID}</think><answer>Anomaly</answer><glue>[1, 2.5]</glue>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writing_model(tmp_path_factory.mktemp("app") / "model", TEXT)


@pytest.fixture(scope="module")
def asker(folder: Path) -> Asker:
    return Asker(str(folder), "float32")


@pytest.fixture(scope="module")
def uploads() -> Iterator[Uploads]:
    with open_folder(3 * 2**20) as uploads:
        yield uploads


@pytest.fixture(scope="module")
def address(asker: Asker, uploads: Uploads, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    example = tmp_path_factory.mktemp("example") / app.EXAMPLE
    synthetic.write_example(example)
    page = app.build(app.Model(asker), uploads, 5.0, 1, example)
    with app.serve(page, uploads, "127.0.0.1", 0, max_mb=1) as address:
        yield address


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page()
    page.asked = []
    page.refused = []
    page.on("request", lambda request: page.asked.append(request.url[:99]))
    page.on("response", lambda response: page.refused.extend([response.url[:99]] if response.status >= 400 else []))
    page.add_init_script("window.hacked = () => { window.was = 1 }")
    page.goto(address)
    yield page
    page.close()


@dataclass
class Computing:
    """What the model is asked, and how many questions it computes at once."""

    questions: list[Question] = field(default_factory=list)
    now: int = 0
    most: int = 0
    texts: list[str] = field(default_factory=list)  # as they were written


@pytest.fixture
def computing(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> Computing:
    """Watches the model, which takes half a second to read a video and a fifth for each token."""
    complete, seen = asker.complete, Computing()

    def slow(question: Question, watch: Callable[[str], None]) -> str:
        def pausing(text: str) -> None:
            seen.texts.append(text)
            watch(text)
            time.sleep(0.2)

        seen.questions.append(question)
        seen.now += 1
        seen.most = max(seen.most, seen.now)
        try:
            time.sleep(0.5)
            return complete(question, pausing)
        finally:
            seen.now -= 1

    monkeypatch.setattr(asker, "complete", slow)
    return seen


def ask(page: Page, path: Path) -> str:
    page.set_input_files("input[type=file]", path)
    page.wait_for_selector("video")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#answer .found")
    return page.locator("#answer").inner_text()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video_files.write(tmp_path_factory.mktemp("clips") / "<b>clip.mp4", count=80)  # 4 s


def test_an_uploaded_video_is_answered_with_its_time_line_and_frames(page: Page, clip: Path) -> None:
    assert ask(page, clip).startswith("Anomaly\n1.0 s to 2.5 s")
    bar = page.locator("#answer .bar.predicted")
    assert bar.evaluate("e => [e.style.left, e.style.width]") == ["25%", "37.5%"]
    page.wait_for_selector(".grid-wrap img")
    times = [float(t.split()[0]) for t in page.locator(".caption-label").all_inner_texts()]
    assert len(times) == app.FRAMES and 1.0 <= min(times) < 1.2 and 2.2 < max(times) <= 2.5
    assert page.get_by_label("What the model writes").input_value() == TEXT
    assert not page.refused


def test_what_was_asked_stays_in_a_list_of_this_visit(page: Page, browser: Browser, clip: Path, address: str) -> None:
    """Of several videos and questions, the newest first, each to be read whole; another visit begins anew."""
    ask(page, clip)
    page.get_by_label("Question").fill(f"What of {SAID}?")
    page.get_by_label(list(app.TITLES)[1], exact=True).check()
    page.get_by_role("button", name="Ask").click()
    page.wait_for_function("document.querySelectorAll('#asked li').length == 2")
    lines = page.locator("#asked summary").all_inner_texts()
    assert lines[1].startswith("bclip.mp4: ") and lines[1].endswith("Anomaly")
    page.locator("#asked summary").first.click()
    first = page.locator("#asked li").first
    assert SAID in first.inner_text() and page.evaluate("window.was") is None
    assert first.locator("p").first.inner_text() == f"What of {SAID}?"
    other = browser.new_page()
    other.goto(address)
    other.get_by_role("button", name="Ask").wait_for()
    assert other.locator("#asked li").count() == 0
    other.close()


def test_the_list_of_a_visit_is_bounded(asker: Asker, uploads: Uploads, clip: Path) -> None:
    asked = [{"video": "v", "task": "t", "question": "", "found": "f", "bars": [], "duration": 1.0, "sections": []}]
    model = app.Model(asker)
    *_, last = app.respond(model, uploads, 9.0, asked * app.KEPT, str(clip), next(iter(app.TITLES)), "", *[""] * 4)
    assert len(last[3]) == app.KEPT and last[3][0]["video"] == clip.name and last[3][1]["video"] == "v"
    model.close()


def test_an_example_video_is_at_hand(page: Page) -> None:
    page.get_by_role("button", name="Use the example clip").click()
    page.wait_for_selector("video")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#answer .found")
    assert page.locator("#answer").inner_text().startswith("Anomaly\n1.0 s to 2.5 s")
    assert page.locator("#asked summary").first.inner_text().startswith(app.EXAMPLE)
    assert not page.refused


def test_limits_are_said_before_they_are_met(page: Page) -> None:
    said = page.locator("#limits").inner_text()
    assert "up to 1 MB and 5 s, removed after an hour" in said
    assert "2 frames a second" in said and "up to 1024 tokens" in said
    found = Axe().run(page, context={"include": [["#limits"], ["#asked"]]}).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found] == []


def test_texts_of_the_model_stay_texts_and_nothing_is_fetched_elsewhere(page: Page, clip: Path, address: str) -> None:
    ask(page, clip)
    page.locator("#answer summary", has_text="think").click()
    assert page.locator("#answer details p").first.inner_text() == SAID
    assert page.evaluate("window.was") is None
    assert [url for url in page.asked if not url.startswith((address, "data:", "blob:"))] == []


def test_a_file_that_is_no_video_gets_a_plain_message(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "<b>notes.mp4"
    path.write_text("no video")
    page.set_input_files("input[type=file]", path)
    page.wait_for_selector("video")
    page.get_by_role("button", name="Ask").click()
    message = page.locator("#answer [role=alert]").inner_text()
    assert message.startswith("cannot open ") and "notes.mp4" in message and "/tmp" not in message


def test_a_video_that_is_too_long_gets_a_plain_message(page: Page, tmp_path: Path) -> None:
    assert "lasts 6 s" in ask(page, video_files.write(tmp_path / "long.mp4", count=120))


def test_a_file_that_is_too_large_is_not_taken(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.mp4").write_bytes(bytes(2**21))
    page.set_input_files("input[type=file]", tmp_path / "large.mp4")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_without_a_video_the_page_asks_for_one(page: Page) -> None:
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("there is no video yet").wait_for()


def test_four_options_are_asked_for_with_that_task_alone(page: Page, clip: Path) -> None:
    assert not page.get_by_label("Option A").is_visible()
    page.get_by_role("radio", name="Multiple choice").check()
    page.get_by_label("Option A").wait_for()
    assert "needs a question and 2 to 26 options" in ask(page, clip)


def test_the_text_arrives_while_it_is_written(asker: Asker, clip: Path) -> None:
    texts = list(app.Model(asker).streamed(Question(str(clip), "ground")))
    assert texts[-1] == TEXT and len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_stop_and_ask_again_waits_for_the_stopped_one(page: Page, clip: Path, computing: Computing) -> None:
    page.set_input_files("input[type=file]", clip)
    page.wait_for_selector("video")
    page.get_by_role("button", name="Ask").click()
    wait_for(lambda: computing.now == 1)
    with page.expect_response(lambda response: response.url.endswith("/reset")):  # the last that Stop sends
        page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#answer .found")
    assert computing.most == 1 and len(computing.questions) == 2


def test_nobody_waiting_ends_the_decoding(asker: Asker, clip: Path, computing: Computing) -> None:
    model = app.Model(asker)
    texts = model.streamed(Question(str(clip), "ground"))
    while not next(texts):
        pass
    texts.close()
    model.thread.shutdown()
    assert len(computing.texts) <= 2 and computing.texts[-1] != TEXT


def test_a_process_that_ends_does_not_wait_for_a_whole_answer(asker: Asker, clip: Path, computing: Computing) -> None:
    model = app.Model(asker)
    texts = model.streamed(Question(str(clip), "ground"))
    next(texts)
    model.close()
    model.thread.shutdown()
    assert TEXT not in computing.texts


def test_a_question_waits_until_a_stopped_one_has_really_ended(asker: Asker, clip: Path, computing: Computing) -> None:
    """One is stopped while it reads its video, one before it begins; the next one is answered after them."""
    model, question = app.Model(asker), Question(str(clip), "ground")
    first, second = model.streamed(question), model.streamed(replace(question, text="never"))
    next(first)
    next(second)
    time.sleep(0.1)
    assert computing.now == 1
    first.close()
    second.close()
    assert list(model.streamed(question))[-1] == TEXT
    assert computing.most == 1 and [q.text for q in computing.questions] == ["", ""]


# --- What others may send -----------------------------------------------------------------------------------------

TASK = "When is the anomaly?"


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        yield client


def file_data(path: object) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def upload(http: httpx.Client, data: bytes, **headers: str) -> httpx.Response:
    return http.post("gradio_api/upload", files={"files": ("clip.mp4", data)}, headers=headers)


def join(http: httpx.Client, *data: Any) -> str:
    """What the page would get for its inputs: the answer as HTML, or why the request was refused."""
    functions = http.get("config").json()["dependencies"]
    number = next(f["id"] for f in functions if f["queue"] and f["outputs"])
    data = (None, *data)  # before them the answers of the visit, which the server knows
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "s"})
    joined = http.post("gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
    if joined.status_code != 200:
        return joined.text
    with http.stream("GET", "gradio_api/queue/data", params={"session_hash": "s"}) as events:
        for line in events.iter_lines():
            if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return message["output"]["data"][1]
    raise AssertionError("the queue ended without an answer")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", "10.0.0.1"]
)
def test_the_page_is_served_under_its_own_names_alone(http: httpx.Client, host: str) -> None:
    assert http.get("", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:80", "localhost."])
def test_the_page_is_served_under_this_machines_names(http: httpx.Client, host: str) -> None:
    assert http.get("", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("bound", "host", "ours"),
    [
        ("0.0.0.0", "192.168.1.5:7860", True),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", "evil.example", False),
        ("::", "[fe80::1]:7860", True),
        ("192.168.1.5", "192.168.1.5", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("127.0.0.1", "page.example", True),
    ],
)
def test_which_names_are_ours(uploads: Uploads, bound: str, host: str, ours: bool) -> None:
    assert Guard(None, bound, ["page.example"], uploads, 1).is_ours(host) == ours


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_other_pages_may_send_nothing(http: httpx.Client, uploads: Uploads, origin: str) -> None:
    before = uploads.used()
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for response in (
        upload(http, b"x", Origin=origin),
        http.request("OPTIONS", "gradio_api/upload", headers=asked),
        http.get("config", headers=asked),
    ):
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    assert uploads.used() == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("POST", f"gradio_api/{name}") for name in ("call/predict", "call/v2/predict", "api/predict", "run/x")],
        *[
            ("POST", f"gradio_api/{name}")
            for name in ("component_server", "process_recording", "stream/x", "vibe-edit")
        ],
        *[("GET", f"gradio_api/{name}") for name in ("file=/etc/passwd", "file/etc/passwd", "info", "openapi.json")],
        *[("GET", f"gradio_api/{name}") for name in ("file=http://127.0.0.1:9/", "proxy=http://127.0.0.1:9/")],
        *[("GET", name) for name in ("docs", "openapi.json", "monitoring", "monitoring/summary", "gradio_api/runs")],
        ("PUT", "gradio_api/upload"),
        ("DELETE", "config"),
    ],
)
def test_what_the_page_does_not_use_is_not_served(http: httpx.Client, method: str, path: str) -> None:
    assert http.request(method, path, json={"data": [None, TASK, "", "", "", "", ""]}).text == "not found"


def test_files_beside_the_uploaded_ones_are_not_served(http: httpx.Client, uploads: Uploads) -> None:
    assert http.get(f"gradio_api/file={uploads.folder}/%2e%2e/%2e%2e/etc/passwd").text == "not found"


def test_the_model_is_reached_through_the_queue_alone(http: httpx.Client, clip: Path, computing: Computing) -> None:
    path = upload(http, clip.read_bytes()).json()[0]
    data = [file_data(path), TASK, "", "", "", "", ""]
    for function in http.get("config").json()["dependencies"]:
        for asked in ({"fn_index": function["id"]}, {"fn_index": function["id"], "session_hash": "t"}):
            http.post("gradio_api/run/predict", json={"data": data, **asked})
    assert not computing.questions
    assert "1.0 s to 2.5 s" in join(http, *data)
    assert len(computing.questions) == 1


@pytest.mark.parametrize("where", ["local", "device", "address", "folder above"])
def test_a_file_that_was_not_uploaded_is_not_read(
    http: httpx.Client, uploads: Uploads, clip: Path, computing: Computing, where: str
) -> None:
    with serve(lambda request, number: Answer("")) as other:
        named = {
            "local": file_data(clip),
            "device": file_data("/dev/zero"),
            "address": file_data(f"{other.url}/x.mp4"),
            "folder above": file_data(f"{uploads.folder}/../{clip}"),
        }
        before = uploads.used()
        assert join(http, named[where], TASK, "", "", "", "", "") == "the request names a file that was not uploaded"
        assert uploads.used() == before and not other.requests and not computing.questions


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x" * 40_000, "", "", "", ""], "may have 4000 characters together, found 40000"),
        (["x", "y" * 2000, "y" * 2000, "", ""], "found 4001"),
        (["\ud800", "", "", "", ""], "the request is not JSON"),
        ([7, [], {}, None, True], "1.0 s to 2.5 s"),  # as no question, or as what they are when written
        (["<|video_pad|>" * 9, "", "", "", ""], "the prompt has 10 places for images or videos, but 1"),
    ],
    ids=["long", "long together", "no character", "no texts", "marks of the model"],
)
def test_questions_that_the_page_would_not_send(http: httpx.Client, clip: Path, texts: list[Any], words: str) -> None:
    path = upload(http, clip.read_bytes()).json()[0]
    assert words in join(http, file_data(path), TASK, *texts)


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"\xff", b"", b'{"data": [NaN', b"9" * 5000],
    ids=["deep", "bytes", "nothing", "half", "digits"],
)
def test_a_request_that_is_no_json_is_refused_in_one_line(http: httpx.Client, body: bytes) -> None:
    response = http.post("gradio_api/queue/join", content=body)
    assert (response.status_code, response.text) == (400, "the request is not JSON")


def test_requests_have_a_largest_size(http: httpx.Client) -> None:
    large = "the request is larger than "
    assert http.post("gradio_api/queue/join", content=b" " * 2**21).text == large + "1 MB"
    assert upload(http, bytes(3 * 2**20)).text == large + "2 MB"
    assert http.post("gradio_api/upload", content=iter([b"x"])).status_code == 411


def test_uploaded_files_have_a_largest_size_together_and_answered_ones_make_room(
    http: httpx.Client, uploads: Uploads, page: Page, tmp_path: Path
) -> None:
    for path in uploads.files():
        uploads.mark_answered(path)
    data = [bytes([i]) * 900_000 for i in range(6)]
    kept = [Path(upload(http, one).json()[0]) for one in data[:3]]
    refused = upload(http, data[3])
    assert refused.status_code == 507 and refused.text.startswith("there is no room for more files (at most 3 MB")
    (tmp_path / "more.mp4").write_bytes(data[4])
    page.set_input_files("input[type=file]", tmp_path / "more.mp4")
    page.get_by_text("there is no room for more files").first.wait_for()
    uploads.mark_answered(kept[1])
    assert upload(http, data[5]).status_code == 200
    assert [path.exists() for path in kept] == [True, False, True]
    assert uploads.used() <= uploads.most
    for path in uploads.files():
        path.unlink()


def test_an_upload_that_breaks_off_leaves_nothing(address: str, uploads: Uploads) -> None:
    before, port = uploads.used(), int(address.rstrip("/").rsplit(":", 1)[1])
    head = 'Content-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n"
        lines += f"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n{head}"
        connection.sendall(lines.encode() + bytes(400_000))
        wait_for(lambda: uploads.used() > before)
    wait_for(lambda: uploads.used() == before and not uploads.coming)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_terminated_page_leaves_no_files(folder: Path, tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "vau_jax.app", f"--model={folder}", "--port=0"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        with httpx.Client(base_url=process.stdout.readline().split()[1], timeout=60, trust_env=False) as http:
            assert Path(upload(http, b"x" * 1000).json()[0]).is_relative_to(tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob(PREFIX + "*"))


def test_a_mistake_at_the_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["app", f"--model={tmp_path}/none"])
    with pytest.raises(SystemExit) as ended:
        cli.main("app")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "does not exist: give a Hugging Face folder" in line
