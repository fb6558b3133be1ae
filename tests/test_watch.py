"""`vau report --watch`: the page of a run that goes on, for browsers on this machine alone."""

import http.client
import json
import signal
import subprocess
import sys
import time
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
    assert shown.stamp == "1" and shown.html is first and "There is no evaluation yet." in first
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


def test_a_folder_without_a_run_is_an_error_at_the_start_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = pages(tmp_path)
    with pytest.raises(InputError, match="has no run"):
        shown.refresh()
    add(tmp_path / "run", 1)
    shown.refresh()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shown.refresh()
    assert "1 steps" in shown.html and "the page stays as it was" in capsys.readouterr().err


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


def test_the_browser_shows_new_steps_by_itself_and_keeps_the_choices(browser: Browser, tmp_path: Path) -> None:

    add(tmp_path / "run", 1)
    evaluation(tmp_path / "eval", RECORDS, "e", tmp_path)
    shown = pages(tmp_path)
    shown.refresh()
    with watch.serving(shown, 0) as address:
        page = browser.new_page()
        told = []
        page.on("console", lambda message: told.append(message.text))
        page.goto(address)
        page.select_option("[name=task]", "grounding")
        add(tmp_path / "run", 2)
        shown.refresh()
        page.locator("summary", has_text="2 steps").wait_for(timeout=20_000)
        assert page.locator("[name=task]").input_value() == "grounding"
        assert page.locator("#count").inner_text() == "2 shown"
        page.close()
    assert told == []


def test_it_ends_by_a_signal_without_a_traceback(tmp_path: Path) -> None:
    add(tmp_path / "run", 1)
    command = [sys.executable, "-m", "vau_jax.report", str(tmp_path), "--watch"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("open http://127.0.0.1:")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    add(tmp_path / "run", 1)
    shown = pages(tmp_path)
    with watch.serving(shown, 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(InputError, match=f"--port={port}"), watch.serving(shown, port):
            pass
