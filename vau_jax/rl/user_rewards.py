"""User rewards: functions named by import path, called for each completion in separate processes.

    def reward(completion: str, example: Example) -> float | None

`example` is a vau_jax.tasks.example.Example, with `id`, `task`, `question`, `choices`, `truth` and `meta`

A larger number is better; None gives no reward to this completion. An exception, an exit of the process (sys.exit, a
crash), more than `rollout.reward_seconds`, or a result that is not a finite number fails this completion alone: it is
left out of the baseline and of the loss, counted, and reported.

A process imports the functions and is asked by lines of JSON; state that the functions keep between calls is local to
each process. Accelerators belong to the training: JAX in these processes has the CPU alone.
"""

import importlib
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vau_jax.common.files import InputError, dump_json
from vau_jax.common.workers import Died, Pool, Worker
from vau_jax.tasks.example import Example, Reflection

LARGEST = float(np.finfo(np.float32).max)  # dtype of the sum of rewards
Reward = Callable[[str, Example], float | None]
IMPORT = 600.0  # seconds in which a process must have imported the functions, with all that these import


class UserRewards:
    """All user rewards of a run: (import path, weight) pairs. Raises InputError for one that cannot be imported."""

    def __init__(self, weighted: Sequence[tuple[str, float]], workers: int, seconds: float) -> None:
        for pair in weighted:
            if isinstance(pair, str) or len(pair) != 2 or isinstance(pair[1], str):
                raise InputError(
                    f"user_rewards has {pair!r}: expected pairs, (('package.module:function', weight), ...)"
                )
        if not seconds > 0:
            raise InputError(f"rollout.reward_seconds={seconds}: expected a number above 0")
        self.names = tuple(path for path, _ in weighted)
        self.weights = tuple(float(weight) for _, weight in weighted)
        self.seconds = seconds
        self.workers = Pool(workers, self._start) if self.names else None
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="reward") if self.names else None
        if self.workers:
            self.workers.ask({"ready": True}, IMPORT)

    def __call__(self, texts: Sequence[str], examples: Sequence[Example]) -> tuple[np.ndarray, list[str | None]]:
        """float32 [N, R], NaN where a function returned None or failed; and what failed of each completion, or None."""
        if not self.names:
            return np.zeros((len(texts), 0), np.float32), [None] * len(texts)
        scored = list(self.threads.map(self._score, texts, map(encode, examples)))
        return np.asarray([values for values, _ in scored], np.float32), [error for _, error in scored]

    def _score(self, text: str, example: dict[str, Any]) -> tuple[list[float], str | None]:
        """The functions' numbers for one completion, and what failed."""
        values, errors = [], []
        for number, name in enumerate(self.names):
            answer = self._ask({"function": number, "completion": text, "example": example})
            if error := answer.get("error"):
                errors.append(f"{name}: {error}")
            values.append(math.nan if answer.get("value") is None else answer["value"])
        return values, "; ".join(errors) or None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.workers.ask(request, self.seconds)[0]
        except Died as death:
            return {"error": f"took longer than {self.seconds:g} s" if death.late else f"ended its process ({death})"}
        except InputError as error:  # of a replacement process: the function can no longer be imported
            return {"error": str(error)}

    def _start(self) -> Worker:
        """A process that has imported the functions. Raises InputError."""
        path = os.pathsep.join(sys.path)  # importable here implies importable in the process
        worker = Worker("vau_jax.rl.user_rewards", PYTHONPATH=path, JAX_PLATFORMS="cpu")
        try:
            answer, _ = worker.ask({"functions": self.names}, IMPORT)
        except Died as death:
            reason = f"took longer than {IMPORT:g} s" if death.late else f"ended the process ({death})"
            raise InputError(f"user rewards {', '.join(self.names)}: importing them {reason}") from death
        if "error" in answer:
            worker.stop()
            raise InputError(answer["error"])
        return worker

    def close(self) -> None:
        """Ends the processes."""
        if self.workers:
            self.workers.close()


def encode(example: Example) -> dict[str, Any]:
    """As JSON values."""
    return {**asdict(example), "media": [str(path) for path in example.media]}


def decode(raw: dict[str, Any]) -> Example:
    """The inverse of `encode`."""
    reflection = raw["reflection"] and Reflection(**raw["reflection"])
    media = tuple(Path(path) for path in raw["media"])
    return Example(**{**raw, "media": media, "choices": tuple(raw["choices"]), "reflection": reflection})


# --- The worker's side --------------------------------------------------------------------------------------------


def load(path: str) -> Reward:
    """The function at `package.module:function`. Raises InputError when there is none."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except BaseException as error:  # also where the module calls sys.exit
        raise InputError(
            f"user reward {path!r} cannot be imported ({_told(error)}): give package.module:function, and put its "
            "folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise InputError(f"user reward {path!r} is {type(function).__name__}, expected a function")
    return function


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def score(function: Reward, completion: str, example: Example) -> dict[str, Any]:
    """The function's number under "value" (None: no reward), or the failure under "error"."""
    try:
        value = function(completion, example)
        if value is None:
            return {"value": None}
        if getattr(value, "shape", ()) != () or not (math.isfinite(value) and abs(value) <= LARGEST):
            raise ValueError(f"the reward is {value}, expected a finite number of float32")
        return {"value": float(value)}
    except BaseException as error:  # an exception in a user's code costs only one completion
        return {"error": _told(error)}


def serve(requests: Callable[[], dict[str, Any]], answers: BinaryIO) -> None:
    """Answers requests; the first names the functions."""
    functions: list[Reward] = []
    while True:
        request, answer = requests(), {}
        if "functions" in request:
            try:
                functions = [load(path) for path in request["functions"]]
            except InputError as error:
                answer = {"error": str(error)}
        elif "function" in request:
            answer = score(functions[request["function"]], request["completion"], decode(request["example"]))
        answers.write(dump_json({"done": True, **answer}).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Functions may read and print: their standard input is empty, and what they print goes to standard error."""
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            waiting.put(json.loads(line))
        os._exit(0)  # the run is over, even if a function is still running

    threading.Thread(target=read, daemon=True).start()
    serve(waiting.get, answers)  # in the main thread, where functions may use signals


if __name__ == "__main__":
    main()
