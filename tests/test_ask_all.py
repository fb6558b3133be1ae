"""`vau ask` about folders of videos: a line an answer, a page, and nothing lost by broken files and kills."""

import json
import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests import video_files
from vau_jax import ask, ask_all, cli
from vau_jax.common.files import InputError

HOSTILE = "<img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in two folders and codecs, upright and lying, a broken one, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "inside").mkdir()
    video_files.write(folder / "a.mp4", count=40, fps=20)
    video_files.write(folder / "inside" / "b.webm", count=30, fps=10, size=(96, 128), codec="libvpx-vp9")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("none")
    return folder


def call(model: Path, videos: Path, out: Path, *options: str) -> list[dict]:
    """The lines of answers.jsonl."""
    words = [f"--model={model}", f"--video={videos}", f"--out={out}", "--max_new_tokens=6", "--dtype=float32", *options]
    cli.call(["ask", *words])
    return [json.loads(line) for line in (out / ask_all.ANSWERS).read_text().splitlines()]


@pytest.fixture(scope="module")
def answered(model_folder: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "new"
    call(model_folder, videos, out, "--task=ground", "--task=describe")
    return out


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / ask_all.ANSWERS).read_text().splitlines()]


def test_every_video_of_a_folder_is_a_line_for_each_task(answered: Path, videos: Path) -> None:
    lines = lines_of(answered)
    names = ["a.mp4", "broken.mp4", "inside/b.webm"]
    found = [(str(Path(line["video"]).relative_to(videos)), line["task"]) for line in lines]
    assert found == [(name, task) for name in names for task in ("ground", "describe")]
    assert [line["seconds"] for line in lines] == [2.0, 2.0, None, None, 3.0, 3.0]
    assert all((line["failure"] is not None) == (line["seconds"] is None) for line in lines)
    assert all(line["completion"] and line["answer"] for line in lines if not line["failure"])


def test_an_answer_is_the_one_that_the_video_alone_gets(
    answered: Path, videos: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--model={model_folder}", f"--video={videos}/a.mp4", "--task=describe", "--dtype=float32"]
    cli.call(["ask", *words, "--max_new_tokens=6"])
    assert capsys.readouterr().out.strip() == lines_of(answered)[1]["answer"].strip()


def test_a_second_call_asks_only_what_is_new(
    answered: Path, videos: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(answered, tmp_path / "out"))
    with (out / ask_all.ANSWERS).open("a") as file:
        file.write('{"fingerprint": "half a li')  # of a call that was killed
    asked = []
    complete = ask.Asker.complete
    monkeypatch.setattr(ask.Asker, "complete", lambda self, q, w=None: asked.append(q.video) or complete(self, q, w))
    new = shutil.copy(videos / "a.mp4", tmp_path / "new.mp4")
    lines = call(model_folder, videos, out, "--task=ground", "--task=describe", f"--video={new}")
    assert asked == [str(new)] * 2 and len(lines) == 8
    assert "Answers about 4 videos" in (out / ask_all.PAGE).read_text()


@pytest.mark.parametrize("mine", ['{"mine": 1}\n', '{"mine": 1}\n{"mine": 2}'], ids=["lines", "no end of the last"])
def test_what_is_no_folder_of_answers_is_left_alone(
    mine: str, model_folder: Path, videos: Path, tmp_path: Path
) -> None:
    (tmp_path / ask_all.ANSWERS).write_text(mine)
    with pytest.raises(InputError, match="holds something else than answers"):
        call(model_folder, videos, tmp_path, "--task=ground")
    assert (tmp_path / ask_all.ANSWERS).read_text() == mine


@pytest.mark.parametrize("place", ["none", "empty"])
def test_a_place_without_videos_is_said(place: str, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not exist" if place == "none" else "has no video file"):
        call(model_folder, tmp_path / place, tmp_path / "out", "--task=ground")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_meets_aa_and_shows_texts_as_texts(
    browser: Browser, answered: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    lines = lines_of(answered)
    text = f"<think>{HOSTILE}</think><answer>Anomaly</answer><glue>[0.5, 1.5]</glue>"
    lines[0] |= {"answer": f"Anomaly {HOSTILE}", "interval": [0.5, 1.5], "completion": text}
    (tmp_path / "report.html").write_text(ask_all.page(HOSTILE, [ask_all.Answered(**line) for line in lines]))
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.goto(f"file://{tmp_path}/report.html")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
    assert page.locator(".bar.predicted").first.evaluate("e => [e.style.left, e.style.width]") == ["25%", "50%"]
    assert page.locator(".card").count() == 3 and page.locator(".strip").count() == 2
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = Axe().run(page, options=rules).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
