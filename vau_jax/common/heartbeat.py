"""Signs of life of a run's processes, in its folder: which one hangs, is slow, or has ended."""

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
EVERY = 5.0  # seconds between the signs of a process
SILENT = 20.0  # seconds without one after which a process is named; JAX ends the others some time later


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
    def kept_up(self) -> Iterator[None]:
        """Gives a sign every few seconds whatever the process does, and says who of the others has ceased to."""
        done = threading.Event()
        thread = threading.Thread(target=self._keep_up, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _keep_up(self, done: threading.Event) -> None:
        seen: dict[int, tuple[str, float]] = {}  # process -> its last line, and when that was new by this host's clock
        silent: set[int] = set()
        while not done.wait(self.every):
            self._write()
            for line in self._lines():
                number, text = line["process"], dump_json(line)
                if number not in seen or seen[number][0] != text:
                    seen[number] = text, time.monotonic()
                    silent.discard(number)
                elif time.monotonic() - seen[number][1] > SILENT and number not in silent:
                    silent.add(number)
                    print(f"no sign for {SILENT:.0f} s of {_name(line)}", file=sys.stderr, flush=True)


def forget(workdir: Path) -> None:
    """Removes the signs of work that is done; called by all processes, after they were together."""
    if processes.is_first():
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)


def _name(line: dict[str, Any]) -> str:
    after = "" if line["step"] is None else f" after step {line['step']}"
    return f"process {line['process']} ({line['host']}, pid {line['pid']}, last seen {line['time']}{after})"


@contextmanager
def naming_lost_processes(heartbeat: Heartbeat, way_on: str, grace: float = 3.0) -> Iterator[None]:
    """Ends the process with a message that names the other processes of the run that have ended, if any, and says how
    it goes on. `grace`: seconds in which one that lives gives a sign."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, InputError) or not (lost := heartbeat.lost(error, grace)):
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends because it lost {lost}; {way_on} "
            f"({short(error)})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly end would wait for those that have ended


@contextmanager
def signs_of_life(workdir: Path, way_on: str) -> Iterator[Callable[[int], None]]:
    """For work that processes do each alone: each says how far it is, and names those that are lost. Yields what tells
    how much of its work a process has done."""
    if jax.process_count() == 1:
        yield lambda done: None
        return
    own = Heartbeat(workdir)
    with naming_lost_processes(own, way_on, grace=1.5 * EVERY), own.kept_up():
        yield own.beat
