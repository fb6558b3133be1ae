"""The page to ask a model on, in Chromium, with files that are really uploaded."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests import clips
from tests.small_models import writing_model
from vau_jax import app
from vau_jax.ask import Asker, Question

ROOT = Path(__file__).parents[1]
SAID = "Smoke rises where two cars met; flames <img src=x onerror='hacked()'>"
TEXT = f"<think>{SAID}</think><answer>Anomaly</answer><glue>[1, 2.5]</glue>"


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Asker:
    return Asker(str(writing_model(tmp_path_factory.mktemp("app") / "model", TEXT)), "float32")


@pytest.fixture(scope="module")
def address(asker: Asker) -> Iterator[str]:
    page = app.build(asker, max_seconds=5.0)
    yield app.serve(page, "127.0.0.1", None, max_mb=1, wait=False)
    page.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page()
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url[:99]))
    page.add_init_script("window.hacked = () => { window.was = 1 }")
    page.goto(address)
    yield page
    page.close()


def ask(page: Page, path: Path) -> str:
    page.set_input_files("input[type=file]", path)
    page.wait_for_selector("video")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#answer .found")
    return page.locator("#answer").inner_text()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write(tmp_path_factory.mktemp("clips") / "<b>clip.mp4", count=80)  # 4 s


def test_an_uploaded_video_is_answered_with_its_time_line_and_frames(page: Page, clip: Path) -> None:
    assert ask(page, clip).startswith("Anomaly\n1.0 s to 2.5 s")
    bar = page.locator("#answer .bar.predicted")
    assert bar.evaluate("e => [e.style.left, e.style.width]") == ["25%", "37.5%"]
    page.wait_for_selector(".grid-wrap img")
    times = [float(t.split()[0]) for t in page.locator(".caption-label").all_inner_texts()]
    assert len(times) == app.FRAMES and 1.0 <= min(times) < 1.2 and 2.2 < max(times) <= 2.5
    assert page.get_by_label("What the model writes").input_value() == TEXT


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
    assert "lasts 6 s" in ask(page, clips.write(tmp_path / "long.mp4", count=120))


def test_a_file_that_is_too_large_is_not_taken(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.mp4").write_bytes(bytes(2**21))
    page.set_input_files("input[type=file]", tmp_path / "large.mp4")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_without_a_video_the_page_asks_for_one(page: Page) -> None:
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("there is no video yet").wait_for()


def test_four_options_are_asked_for_with_that_task_alone(page: Page, clip: Path) -> None:
    assert not page.get_by_label("Option A").is_visible()
    page.get_by_role("radio", name="Four options").check()
    page.get_by_label("Option A").wait_for()
    assert "wants a question and four options" in ask(page, clip)


def test_the_text_arrives_while_it_is_written(asker: Asker, clip: Path) -> None:
    texts = list(app.streamed(asker, Question(str(clip), "ground")))
    assert texts[-1] == TEXT and len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_nobody_waiting_ends_the_decoding(asker: Asker, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, seen = asker.complete, []

    def slow(question: Question, watch: Callable[[str], None]) -> str:
        def pausing(text: str) -> None:
            seen.append(text)
            watch(text)
            time.sleep(0.2)

        return complete(question, pausing)

    monkeypatch.setattr(asker, "complete", slow)
    texts = app.streamed(asker, Question(str(clip), "ground"))
    next(texts)
    texts.close()  # returns when the thread that decodes has ended
    assert len(seen) <= 2 and seen[-1] != TEXT


def test_a_mistake_at_the_start_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vau_jax.app", f"--model={tmp_path}/none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "does not exist: give a Hugging Face folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
