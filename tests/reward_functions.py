"""Rewards as a user would write them; tests name them by import path."""

import os
import signal
import sys
import time

import numpy as np

from vau_jax.tasks.example import Example


def vowels(completion: str, example: Example) -> float:
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))


def fussy(completion: str, example: Example) -> float | None:
    """Fails in three ways, abstains, or scores, by the completion's length."""
    case = len(completion) % 5
    if case == 0:
        raise RuntimeError("no such judge")
    return {1: float("nan"), 2: float("inf"), 3: None, 4: 1.0}[case]


def only_classification(completion: str, example: Example) -> float:
    """Groups of other tasks have equal rewards."""
    return vowels(completion, example) if example.task == "classification" else 0.5


def slow(completion: str, example: Example) -> float:
    """The process that it runs in."""
    time.sleep(0.5)
    return os.getpid()


def hostile(completion: str, example: Example) -> object:
    """Does what the completion says."""
    deeds = {
        "exit": lambda: sys.exit(0),
        "end": lambda: os._exit(0),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: time.sleep(1000),
        "hang without signals": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)), time.sleep(1000)),
        "leave a child": lambda: (os.fork() or time.sleep(1000)) and os._exit(0),
        "raise": lambda: [][1],
        "print": lambda: print('{"value": 7}', flush=True) or 0.25,
        "read": lambda: len(sys.stdin.read()),
        "vector": lambda: np.ones(1),
        "text": lambda: "1.0",
        "inf": lambda: float("inf"),
        "huge": lambda: 1e39,
        "number": lambda: np.float32(0.5),
    }
    return deeds[completion]()


NOT_A_FUNCTION = 3


def told(text: str, example: object) -> float:
    """Like `only_classification`; writes who was asked about what to the file that TOLD names."""
    if path := os.environ.get("TOLD"):
        with open(path, "a") as file:
            file.write(f"{os.getppid()} {example.id}\n")
    return only_classification(text, example)
