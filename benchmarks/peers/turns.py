"""The peer's side of taking turns with benchmarks/grpo_step.py.

A line on stdin is the turn to make one step; its seconds are the answer, a line on stdout. After the last step comes
one line more, a JSON object with what the peer has to say about its run.
"""

import json
import os
import sys
import time
from typing import Any


class Turns:
    """The answers have stdout to themselves: what libraries print there goes to stderr."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.began = 0.0
        self.steps = 0

    def begin(self) -> None:
        """Waits for the turn."""
        if not sys.stdin.readline():
            sys.exit("there is no turn: the other side has ended")
        self.began = time.perf_counter()

    def end(self) -> None:
        self.answer(time.perf_counter() - self.began)
        self.steps += 1

    def answer(self, value: Any) -> None:
        print(json.dumps(value), file=self.answers, flush=True)
