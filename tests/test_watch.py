"""`vau report --watch`: the page of a run that goes on, for browsers on this machine alone."""

import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.reports import RECORDS, evaluation
from vau_jax.common.files import InputError
from vau_jax.eval import report, watch

ROOT = Path(__file__).parents[1]


def add(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")


def pages(folder: Path) -> watch.Pages:
    return watch.Pages([folder], lambda stamp: report._live_page([folder], 10, {}, stamp))


def test_the_page_is_made_again_when_a_file_changes_and_only_then(tmp_path: Path) -> None:
    add(tmp_path / "run", 1)
    shown = pages(tmp_path)
    shown.refresh()
    first = shown.html
    shown.refresh()
    assert shown.stamp == "1" and shown.html is first and "There is no evaluation yet" in first
    add(tmp_path / "run", 2)
    shown.refresh()
    assert shown.stamp == "2" and "2 steps" in shown.html


def test_a_line_that_is_half_written_changes_nothing(tmp_path: Path) -> None:
    add(tmp_path / "run", 1)
    shown = pages(tmp_path)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    shown.refresh()
    assert "1 steps" in shown.html


def test_a_folder_without_a_run_waits_for_one(tmp_path: Path) -> None:
    shown = pages(tmp_path)
    shown.refresh()
    assert "There is no evaluation yet" in shown.html
    add(tmp_path / "run", 1)
    shown.refresh()
    assert "1 steps" in shown.html


def test_what_cannot_be_shown_is_an_error_at_the_start_and_said_once_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = pages(tmp_path / "absent")
    with pytest.raises(InputError, match="absent has no run"):
        shown.refresh()
    add(tmp_path / "run", 1)
    shown = pages(tmp_path)
    shown.refresh()
    (tmp_path / "metrics.json").write_text('{"name": "old"}')
    shown.refresh()
    shown.refresh()
    assert "1 steps" in shown.html and capsys.readouterr().err.count("the page stays as it was") == 1


@pytest.mark.parametrize(
    ("host", "path", "status"),
    [("127.0.0.1", "/", 200), ("localhost", "/stamp", 200), ("evil.example", "/", 403), ("localhost", "/etc", 404)],
)
def test_it_answers_this_machine_alone(tmp_path: Path, host: str, path: str, status: int) -> None:
    add(tmp_path / "run", 1)
    shown = pages(tmp_path)
    shown.refresh()
    with watch.serving(shown, 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", path, headers={"Host": f"{host}:{port}"})
        assert connection.getresponse().status == status


def test_the_browser_shows_new_steps_by_itself_and_stays_where_it_was(browser: Browser, tmp_path: Path) -> None:
    """With the choices made, what was unfolded, and the same card at the same height."""
    add(tmp_path / "run", 1)
    evaluation(tmp_path / "eval", RECORDS, "e", tmp_path)
    shown = pages(tmp_path)
    shown.refresh()
    with watch.serving(shown, 0) as address:
        page = browser.new_page()
        told = []
        page.on("console", lambda message: told.append(message.text))
        page.goto(address)
        page.set_viewport_size({"width": 500, "height": 500})
        page.select_option("[name=task]", "grounding")
        card = page.locator(".card:visible").nth(1)
        card.locator("summary", has_text="think").click()
        card.evaluate("card => scrollBy(0, card.getBoundingClientRect().top - 40)")
        height = card.bounding_box()["y"]
        add(tmp_path / "run", 2)
        shown.refresh()
        page.locator("summary", has_text="2 steps").wait_for(state="attached", timeout=20_000)
        assert page.locator("[name=task]").input_value() == "grounding"
        assert page.locator("#count").inner_text() == "2 shown"
        assert card.locator("details[open] summary").all_text_contents() == ["think"]
        for _ in range(50):
            page.wait_for_timeout(100)
            if abs(card.bounding_box()["y"] - height) < 3:
                break
        assert abs(card.bounding_box()["y"] - height) < 3
        page.close()
    assert told == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_by_a_signal_without_a_traceback(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "vau_jax.report", str(tmp_path), "--watch", "--every=1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().removeprefix("open ").split()[0]
    add(tmp_path / "run", 1)
    deadline, text = time.monotonic() + 20, ""
    while "1 steps" not in text and time.monotonic() < deadline:
        time.sleep(0.2)
        text = urllib.request.urlopen(address).read().decode()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert "1 steps" in text and process.returncode == 0 and errors == ""


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    add(tmp_path / "run", 1)
    shown = pages(tmp_path)
    with watch.serving(shown, 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(InputError, match=f"--port={port}"), watch.serving(shown, port):
            pass
