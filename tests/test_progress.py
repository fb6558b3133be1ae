"""The progress line of long jobs: what it says, in a terminal and in a file, and the summary at the end."""

import io
import sys
from pathlib import Path

import pytest

from vau_jax.common import progress
from vau_jax.common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_done_rate_elapsed_eta_and_the_numbers(clock: list[float]) -> None:
    out = io.StringIO()
    job = Progress("rft", 300, "step", start=100, file=out)
    clock[0] += 40.0
    job.show(120, "reward 2.410")
    assert out.getvalue() == "rft: 120/300  2.0 s/step  elapsed 0:40  ETA 6:00  reward 2.410\n"
    clock[0] += 5.0
    job.show(300, "reward 2.500")
    assert out.getvalue().splitlines()[1].startswith("rft: 300/300  4.4 steps/s  elapsed 0:45  reward")


def test_the_rate_is_of_the_last_minute(clock: list[float]) -> None:
    """A slow first step, in which programs are compiled, is forgotten."""
    out = io.StringIO()
    job = Progress("sft", 1000, "step", file=out)
    clock[0] += 120.0
    job.show(1)
    for step in range(2, 100):
        clock[0] += 1.0
        job.show(step)
    assert "  1.0 s/step  " in out.getvalue().splitlines()[-1]


def test_a_file_gets_a_line_every_few_seconds_and_the_last(clock: list[float]) -> None:
    out, notes = io.StringIO(), []
    job = Progress("frames", 100, file=out)
    for done in range(1, 101):
        clock[0] += 0.5
        job.show(done, lambda: notes.append(1) or "")
    assert len(out.getvalue().splitlines()) == 11 == len(notes)  # a number that is not shown is not computed
    assert out.getvalue().splitlines()[-1].startswith("frames: 100/100")


def test_a_terminal_shows_one_line_in_place(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    job = Progress("frames", 10, "video", file=out)
    for done in range(1, 11):
        clock[0] += 1.0
        job.show(done, "a note that is longer than the terminal")
    assert out.getvalue().count("\n") == 1 and out.getvalue().count("\r") == 10
    assert all(len(line.replace("\x1b[K", "").strip()) <= 39 for line in out.getvalue().split("\r"))


def test_hours_are_shown(clock: list[float]) -> None:
    out = io.StringIO()
    job = Progress("rft", 10, "step", file=out)
    clock[0] += 3723.0
    job.show(1)
    assert "elapsed 1:02:03  ETA 9:18:27" in out.getvalue()


def test_a_summary_quotes_the_next_command_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "vau", lambda: "vau")
    text = progress.summary("done", {"scores": Path("a b/metrics.json")}, [("vau", "report", Path("a b")), ("ls",)])
    assert text.splitlines() == ["done", "  scores  a b/metrics.json", "next: vau report 'a b'", "   or ls"]


def test_the_next_command_can_be_typed_where_the_environment_is_not_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("vau", "python"):
        (tmp_path / ".venv" / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert progress.vau() == ".venv/bin/vau"
    monkeypatch.setenv("PATH", f"{tmp_path}/.venv/bin:/usr/bin")
    assert progress.vau() == "vau"
