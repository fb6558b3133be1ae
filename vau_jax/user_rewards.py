"""Users' own rewards: functions named by import path, called for each completion in threads.

    def reward(completion: str, example: Example) -> float | None        example: vau_jax.data.pipeline.Example

A larger number is better; None says nothing about this completion. An exception or a number that is not finite fails
this completion alone: it is left out of the baseline and of the loss, counted, and shown.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vau_jax.data.pipeline import Example
from vau_jax.files import InputError

Reward = Callable[[str, Example], float | None]


def load(path: str) -> Reward:
    """The function at `package.module:function`. Raises InputError when there is none."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"user reward {path!r} cannot be imported ({error}): give package.module:function, and put its folder on "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise InputError(f"user reward {path!r} is {type(function).__name__}, expected a function")
    return function


class UserRewards:
    """All user rewards of a run: (import path, weight) pairs."""

    def __init__(self, weighted: Sequence[tuple[str, float]], threads: int) -> None:
        for pair in weighted:
            if isinstance(pair, str) or len(pair) != 2 or isinstance(pair[1], str):
                raise InputError(
                    f"user_rewards has {pair!r}: expected pairs, (('package.module:function', weight), ...)"
                )
        self.names = tuple(path for path, _ in weighted)
        self.weights = tuple(float(weight) for _, weight in weighted)
        self.functions = [load(path) for path in self.names]
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="reward") if self.functions else None

    def __call__(self, texts: Sequence[str], examples: Sequence[Example]) -> tuple[np.ndarray, list[str | None]]:
        """float32 [N, R], NaN where a function said nothing or failed; and what failed for each completion, or None."""
        if self.pool is None:
            return np.zeros((len(texts), 0), np.float32), [None] * len(texts)
        scored = list(self.pool.map(self._score, texts, examples))
        return np.asarray([values for values, _ in scored], np.float32), [error for _, error in scored]

    def _score(self, text: str, example: Example) -> tuple[list[float], str | None]:
        values, error = [], None
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                value = function(text, example)
                if value is not None and not math.isfinite(value):
                    raise ValueError(f"the reward is {value}, expected a finite number")
                value = math.nan if value is None else float(value)
            except Exception as problem:  # whatever a user's code raises must not stop the run
                value, error = math.nan, f"{name}: {type(problem).__name__}: {problem}"
            values.append(value)
        return values, error
