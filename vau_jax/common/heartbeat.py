"""Heartbeats of a run's processes, files in its folder: which process hangs, is slow, or has ended."""

import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from vau_jax.common import processes
from vau_jax.common.files import InputError, dump_json, read_json, short, write_text

FOLDER = "heartbeats"  # in the folder of a run
EVERY = 5.0  # seconds between a process's heartbeats
TIMEOUT = 20.0  # seconds without a heartbeat after which a process is named; JAX ends the others some time later


class Heartbeat:
    """One line for each process in workdir/heartbeats: its host and pid, its step (in an evaluation the examples that
    it has answered), and the time that ended.
    """

    def __init__(self, workdir: Path, every: float = EVERY) -> None:
        self.folder, self.every, self.last = workdir / FOLDER, every, -math.inf
        self.line = {"process": jax.process_index(), "host": socket.gethostname(), "pid": os.getpid(), "step": None}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def beat(self, step: int, seconds: float | None = None) -> None:
        """Records that `step` took so many seconds; at most every few seconds."""
        self.line["step"] = step
        if seconds is not None:
            self.line["seconds/step"] = round(seconds, 3)
        if time.monotonic() - self.last >= self.every:
            self._write()

    def _write(self) -> None:
        self.last = time.monotonic()
        self.line["time"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        write_text(self.folder / f"{jax.process_index():05d}.json", dump_json(self.line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        return [read_json(path) for path in sorted(self.folder.glob("*.json"))]

    def lost(self, error: Exception, grace: float = 3.0) -> str:
        """Records that this process ends with `error`; and names the processes that have recorded nothing `grace`
        seconds later, which means that they have ended and caused the error. Empty: none.
        """
        self.line["ended"] = short(error)
        self._write()
        before = self._lines()
        time.sleep(grace)
        return ", ".join(_name(line) for line in self._lines() if "ended" not in line and line in before)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Writes a heartbeat every few seconds whatever the process does, and names others that have stopped to."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event) -> None:
        seen: dict[int, tuple[str, float]] = {}  # process -> its last line, and when that was new by this host's clock
        silent: set[int] = set()
        while not done.wait(self.every):
            self._write()
            for line in self._lines():
                number, text = line["process"], dump_json(line)
                if number not in seen or seen[number][0] != text:
                    seen[number] = text, time.monotonic()
                    silent.discard(number)
                elif time.monotonic() - seen[number][1] > TIMEOUT and number not in silent:
                    silent.add(number)
                    print(f"no heartbeat for {TIMEOUT:.0f} s from {_name(line)}", file=sys.stderr, flush=True)


def remove(workdir: Path) -> None:
    """Removes the heartbeats of finished work; called by all processes, after `processes.together`."""
    if processes.is_first():
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)


def _name(line: dict[str, Any]) -> str:
    after = "" if line["step"] is None else f" after step {line['step']}"
    return f"process {line['process']} ({line['host']}, pid {line['pid']}, last seen {line['time']}{after})"


@contextmanager
def naming_lost_processes(heartbeat: Heartbeat, resume_hint: str, grace: float = 3.0) -> Iterator[None]:
    """Ends the process with a message that names the other processes of the run that have ended, if any, and
    `resume_hint`. `grace`: seconds in which a live process writes a heartbeat."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, InputError) or not (lost := heartbeat.lost(error, grace)):
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends because it lost {lost}; {resume_hint} "
            f"({short(error)})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly end would wait for those that have ended


@contextmanager
def monitored(workdir: Path, resume_hint: str) -> Iterator[Callable[[int], None]]:
    """For work that each process does by itself: each writes heartbeats and names the processes that are lost. Yields a
    function to be called with the amount of work that is done."""
    if jax.process_count() == 1:
        yield lambda done: None
        return
    own = Heartbeat(workdir)
    with naming_lost_processes(own, resume_hint, grace=1.5 * EVERY), own.in_background():
        yield own.beat
