"""Rewards as a user would write them; tests name them by import path."""

import os

from vau_jax.data.pipeline import Example


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


NOT_A_FUNCTION = 3


def told(text: str, example: object) -> float:
    """Like `only_classification`; writes who was asked about what to the file that TOLD names."""
    if path := os.environ.get("TOLD"):
        with open(path, "a") as file:
            file.write(f"{os.getpid()} {example.name}\n")
    return only_classification(text, example)
