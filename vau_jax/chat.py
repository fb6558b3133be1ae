"""Questions to a model behind an OpenAI-compatible chat endpoint: many at once, each paid for once, all counted.

Answers are kept in a JSONL file as they come, under a hash of the model and the messages, so that a killed call that
is repeated asks only what has no answer yet. Retries with growing pauses, after rate limits (429, Retry-After),
server errors and timeouts, are the `openai` client's own.
"""

import base64
import hashlib
import io
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
from ml_collections import ConfigDict
from PIL import Image

from vau_jax.files import InputError

Message = dict[str, Any]
ATTEMPTS = 3  # at an answer that passes its check


@dataclass(frozen=True)
class Reply:
    """What came of one question: a text, or why there is none."""

    text: str = ""
    error: str = ""


class Chat:
    """An endpoint, by `config` (see `endpoint` in configs/base.py); `cache` is the JSONL of its answers, if they
    are to be kept."""

    def __init__(self, config: ConfigDict, cache: str | os.PathLike | None) -> None:
        if not config.url or not config.model:
            raise InputError(f"an endpoint needs url and model, found url={config.url!r} and model={config.model!r}")
        self.config, self.cache = config, Path(cache) if cache else None
        self.client = openai.OpenAI(
            base_url=config.url,
            api_key=os.environ.get(config.key_variable, "none"),
            timeout=config.seconds,
            max_retries=config.retries,
        )
        self.lock = threading.Lock()
        self.answers = _read_answers(self.cache) if self.cache else {}
        self.tokens: Counter[str] = Counter()  # used by this object: "prompt" and "completion"

    @property
    def cost(self) -> float:
        """Of the tokens used by this object, in the currency of config.prices."""
        c = self.config
        return (self.tokens["prompt"] * c.price_prompt + self.tokens["completion"] * c.price_completion) / 1e6

    def key(self, messages: Sequence[Message], attempt: int) -> str:
        """Of everything that decides an answer."""
        c = self.config
        asked = [c.model, c.temperature, c.max_tokens, attempt, list(messages)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def ask(self, messages: Sequence[Message], check: Callable[[str], str] = lambda text: "", sample: int = 0) -> Reply:
        """An answer that `check` has nothing to say against, or after some attempts why there is none; another one for
        each `sample`."""
        complaint = ""
        for attempt in range(sample * ATTEMPTS, (sample + 1) * ATTEMPTS):
            try:
                text = self._answer(messages, attempt)
            except (openai.OpenAIError, ValueError) as error:  # ValueError: an answer that is no whole JSON
                return Reply(error=f"{type(error).__name__}: {str(error)[:200]}")
            complaint = check(text)
            if not complaint:
                return Reply(text)
        return Reply(error=complaint)

    def ask_all(
        self,
        questions: Iterable[Sequence[Message]],
        check: Callable[[str], str] = lambda text: "",
        samples: int = 1,
    ) -> Iterator[tuple[int, Reply]]:
        """(number of the question, a reply) as they come, `samples` to a question, config.concurrency asked at once.
        Questions are taken as they are needed, so that those with pictures need not all be in memory."""
        asked = ((number, sample, q) for number, q in enumerate(questions) for sample in range(samples))
        waiting: dict[Future[Reply], int] = {}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            while True:
                for number, sample, question in asked:
                    waiting[pool.submit(self.ask, question, check, sample)] = number
                    if len(waiting) >= 2 * self.config.concurrency:
                        break
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(done), done.result()

    def _answer(self, messages: Sequence[Message], attempt: int) -> str:
        key = self.key(messages, attempt)
        if key in self.answers:
            return self.answers[key]
        c = self.config
        response = self.client.chat.completions.create(
            model=c.model,
            messages=list(messages),
            temperature=c.temperature,
            max_tokens=c.max_tokens,
            seed=attempt,
            **({"response_format": {"type": "json_object"}} if c.json_mode else {}),
        )
        text = (response.choices[0].message.content or "") if response.choices else ""
        used = response.usage
        with self.lock:
            self.tokens["prompt"] += used.prompt_tokens if used else 0
            self.tokens["completion"] += used.completion_tokens if used else 0
            self.answers[key] = text
            if self.cache:
                _append(self.cache, {"key": key, "text": text})
        return text


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that an answer is, also inside a fence of backticks; None where it is something else."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        found = json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def frames_content(frames: np.ndarray) -> list[Message]:
    """Content items with frames uint8 [F, H, W, 3] as JPEG pictures."""
    items = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="JPEG", quality=85)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        items.append({"type": "image_url", "image_url": {"url": url}})
    return items


def _read_answers(path: Path) -> dict[str, str]:
    """The whole lines of the file; one that a kill cut short is asked again."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
        lines.pop()
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
            found[record["key"]] = record["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the rest of a line that was cut short
    return found


def _append(path: Path, record: dict[str, Any]) -> None:
    """One line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
