"""Worker processes that answer requests: one that hangs or crashes costs its current request only.

A request and its answer are a line of JSON each; bytes may follow an answer.
"""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vau_jax.common.files import dump_json

Answer = dict[str, Any]


class Died(Exception):  # noqa: N818 - what happened, and to the process
    """A process ended, or was ended, before it answered."""

    def __init__(self, code: int, late: bool) -> None:
        super().__init__(f"exit code {code}" if code >= 0 else f"signal {-code}")
        self.code = code  # as of subprocess: negative for a signal
        self.late = late  # it was killed because its time was up


class Worker:
    """One process, `python -m module arguments`, used by one thread at a time."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self.done = 0
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the run, which then closes the worker's input
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ends the process and what it has started."""
        self._kill()
        self._wait()

    def _kill(self) -> None:
        if self.process.returncode is None:  # its number is still its own
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _wait(self) -> int:
        """Returns the exit code when the process has ended, at the latest for the lack of further input."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        return code

    def ask(
        self, request: Any, seconds: float = math.inf, follows: Callable[[Answer], int] = lambda answer: 0
    ) -> tuple[Answer, bytes]:
        """The answer, and the `follows(answer)` bytes behind it. Raises Died, also for one that takes longer than
        `seconds`.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(seconds, end) if seconds < math.inf else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            answer, size = None, 0
            self.process.stdin.write(dump_json(request).encode() + b"\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or b"null")
            size = follows(answer) if answer else 0
            behind = self.process.stdout.read(size)
        except (BrokenPipeError, json.JSONDecodeError):
            answer = None
        except BaseException:  # an answer that is never read must not be the next request's
            self.stop()
            raise
        finally:
            if timer:
                timer.cancel()
        if answer is None or len(behind) != size:
            raise Died(self._wait(), late.is_set())
        if late.is_set():  # at the last moment: the next request is another process's
            self._wait()
        self.done += 1
        return answer, behind


class Pool:
    """At most `count` workers, created by `start` when they are needed, and replaced when they have died or answered
    `most` requests; thread-safe.
    """

    def __init__(self, count: int, start: Callable[[], Worker], most: float = math.inf) -> None:
        self.start, self.most = start, most
        self.idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()  # None: one that is not started
        for _ in range(count):
            self.idle.put(None)

    def ask(self, *args: Any, **kwargs: Any) -> tuple[Answer, bytes]:
        """As `Worker.ask`; also raises what `start` does."""
        worker = self.idle.get()
        try:
            if worker and (not worker.alive or worker.done >= self.most):
                worker.stop()
                worker = None
            worker = worker or self.start()
            return worker.ask(*args, **kwargs)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        """Ends the processes that are idle."""
        for _ in range(self.idle.qsize()):
            if worker := self.idle.get():
                worker.stop()
            self.idle.put(None)
