"""The progress line of long jobs, and the summary at their end: where everything is and what to type next."""

import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

WINDOW = 60.0  # seconds over which the rate is taken


class Progress:
    """One line of a job: done, rate, elapsed, ETA, and the numbers that matter.

    A terminal shows it in place; a pipe or a log file gets a line every few seconds and one at the end. The rate, and
    the ETA by it, are those of the last minute: compilation at the start does not count for ever.
    """

    def __init__(self, stage: str, total: int, unit: str = "", start: int = 0, file: TextIO | None = None) -> None:
        """`unit` names one of what is counted, in the singular; `start` of `total` were done before."""
        self.stage, self.total, self.unit = stage, total, unit
        self.file = file or sys.stdout
        self.terminal = self.file.isatty()
        self.every = 0.2 if self.terminal else 5.0
        self.began = time.monotonic()
        self.last = 0.0
        self.past = deque([(self.began, start)])  # (time, done) within WINDOW

    def show(self, done: int, note: str | Callable[[], str] = "") -> None:
        """Says that `done` are done; `note` has the two or three numbers that matter, or makes them when a line is
        due."""
        now = time.monotonic()
        self.past.append((now, done))
        while len(self.past) > 2 and now - self.past[0][0] > WINDOW:
            self.past.popleft()
        if done < self.total and now - self.last < self.every:
            return
        self.last = now
        line = self.line(done, now, note if isinstance(note, str) else note())
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="\n" if done >= self.total else "", file=self.file, flush=True)
        else:
            print(line, file=self.file, flush=True)

    def line(self, done: int, now: float, note: str) -> str:
        """`rft: 120/300  1.1 s/step  elapsed 2:06  ETA 3:09  reward 2.410`."""
        (then, before), elapsed = self.past[0], now - self.began
        seconds = (now - then) / (done - before) if done > before else 0.0
        parts = [f"{self.stage}: {done}/{self.total}", _rate(seconds, self.unit), f"elapsed {_clock(elapsed)}"]
        if done < self.total and seconds:
            parts.append(f"ETA {_clock(seconds * (self.total - done))}")
        return "  ".join(part for part in (*parts, note) if part)


def _rate(seconds: float, unit: str) -> str:
    """Of a unit that takes so many seconds: `2.5 steps/s`, `4.0 s/step`."""
    if not seconds:
        return ""
    if seconds < 1:
        return f"{1 / seconds:.1f} {unit}s/s" if unit else f"{1 / seconds:.1f}/s"
    return f"{seconds:.1f} s/{unit}" if unit else f"{seconds:.1f} s each"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def summary(title: str, places: dict[str, str | Path], following: Sequence[Sequence[str | Path]] = ()) -> str:
    """The last lines of a job: what was done, where each thing is, and the commands to type next. The words of a
    command are quoted for the shell where they need it; `vau` is written as this shell finds it."""
    width = max(map(len, places), default=0)
    lines = [*([title] if title else []), *(f"  {name:{width}}  {place}" for name, place in places.items())]
    for number, words in enumerate(following):
        words = [vau(), *words[1:]] if words[0] == "vau" else words
        lines.append(("next: " if number == 0 else "   or ") + shlex.join(map(str, words)))
    return "\n".join(lines)


def vau() -> str:
    """The command of this package, as it can be typed here: an environment that is not active needs its path."""
    beside = Path(sys.executable).with_name("vau")
    found = shutil.which("vau")
    if not beside.exists() or (found and Path(found).samefile(beside)):
        return "vau"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
