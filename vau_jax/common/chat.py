"""Requests to a model behind an OpenAI-compatible chat endpoint: concurrent, each paid for once, all counted.

Answers are appended to a JSONL file as they arrive, under a hash of the model and the messages, so that a repeated call
after a kill asks only unanswered questions. A failed question has the reason in place of an answer, and the others
continue.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
from anyio.from_thread import start_blocking_portal
from ml_collections import ConfigDict
from PIL import Image

from vau_jax.common.endpoint import Endpoint, Message, NoCompletion
from vau_jax.common.files import dump_json

ATTEMPTS = 3  # at an answer that passes its check


@dataclass(frozen=True)
class Reply:
    """The result of one question: a text, or why there is none."""

    text: str = ""
    error: str = ""


class Chat:
    """An endpoint, by `config` (see `endpoint` in configs/base.py); `cache` is the JSONL of its answers, if they
    are to be kept."""

    def __init__(self, config: ConfigDict, cache: str | os.PathLike | None) -> None:
        self.endpoint = Endpoint(config)
        self.config, self.cache = config, Path(cache) if cache else None
        self.answers = _read_answers(self.cache) if self.cache else {}
        self.tokens: Counter[str] = Counter()  # used by this object: "prompt" and "completion"

    @property
    def cost(self) -> float:
        """Of the tokens used by this object, in the currency of config.prices."""
        c = self.config
        return (self.tokens["prompt"] * c.price_prompt + self.tokens["completion"] * c.price_completion) / 1e6

    def key(self, messages: Sequence[Message], attempt: int) -> str:
        """A hash of everything that determines an answer."""
        c = self.config
        asked = [c.model, c.temperature, c.max_tokens, attempt, list(messages)]
        return hashlib.sha256(dump_json(asked, sort_keys=True).encode()).hexdigest()

    def ask(self, messages: Sequence[Message], check: Callable[[str], str] = lambda text: "") -> Reply:
        """An answer that passes `check`, or after some attempts why there is none."""
        ((_, reply),) = self.ask_all([messages], check)
        return reply

    def ask_all(
        self,
        questions: Iterable[Sequence[Message]],
        check: Callable[[str], str] = lambda text: "",
        samples: int = 1,
    ) -> Iterator[tuple[int, Reply]]:
        """(number of the question, its reply) in order of arrival, `samples` different ones per question,
        config.concurrency at once. Questions are taken as they are needed, so that those with pictures need not all be
        in memory. One call at a time.
        """
        asked = ((number, sample, q) for number, q in enumerate(questions) for sample in range(samples))
        waiting: dict[Future[Reply], int] = {}
        slots = asyncio.Semaphore(self.config.concurrency)
        with (  # requests run in another thread, while this one prepares the next questions
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(self.endpoint.client()) as client,
        ):
            while True:
                for number, sample, question in asked:
                    reply = portal.start_task_soon(self._ask, client, slots, question, check, sample)
                    waiting[reply] = number
                    if len(waiting) >= 2 * self.config.concurrency:
                        break
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(done), done.result()

    async def _ask(
        self,
        client: httpx.AsyncClient,
        slots: asyncio.Semaphore,
        messages: Sequence[Message],
        check: Callable[[str], str],
        sample: int,
    ) -> Reply:
        """One question, in all its attempts, within the time that config.seconds and config.retries give."""
        complaint, seconds = "", self.config.seconds * (1 + self.config.retries)
        async with slots:
            try:
                async with asyncio.timeout(seconds):
                    for attempt in range(sample * ATTEMPTS, (sample + 1) * ATTEMPTS):
                        text, complaint = await self._answer(client, messages, attempt)
                        complaint = complaint or check(text)
                        if not complaint:
                            return Reply(text)
            except TimeoutError:
                complaint = complaint or f"no answer within {seconds:g} s"
            except NoCompletion as reason:
                complaint = str(reason)
        return Reply(error=complaint)

    async def _answer(self, client: httpx.AsyncClient, messages: Sequence[Message], attempt: int) -> tuple[str, str]:
        """(text, why there is none). Raises NoCompletion."""
        key = self.key(messages, attempt)
        if key in self.answers:
            return self.answers[key], ""
        try:
            result = await self.endpoint.complete(client, messages, attempt)
        except NoCompletion:
            raise
        except Exception as error:  # any error of a server costs this question alone
            raise NoCompletion(self.endpoint.one_line(f"{type(error).__name__}: {error}")) from error
        self.tokens["prompt"] += result.prompt_tokens
        self.tokens["completion"] += result.completion_tokens
        if result.text:
            self.answers[key] = result.text
            if self.cache:
                _append(self.cache, {"key": key, "text": result.text})
        return result.text, self.endpoint.one_line(result.complaint)


def json_object(text: str) -> dict[str, Any] | None:
    """An answer as a JSON object, also inside a fence of backticks; None where it is something else."""
    fenced = re.search(r"```(?:json)?(.*?)```", text, re.DOTALL)
    try:
        result = json.loads(fenced.group(1) if fenced else text)
        json.dumps(result, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


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
    """The complete lines of the file; one that a kill cut short is asked again."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
        lines.pop()
    result = {}
    for line in lines:
        try:
            record = json.loads(line)
            key, text = record["key"], record["text"]
        except (ValueError, RecursionError, KeyError, TypeError):
            continue  # the rest of a line that was cut short
        if isinstance(key, str) and isinstance(text, str) and text.strip():  # an empty text was never an answer
            result[key] = text
    return result


def _append(path: Path, record: dict[str, Any]) -> None:
    """One line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(dump_json(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
