"""One completion from an OpenAI-compatible chat endpoint, of an untrusted server.

A server can cost one completion, `seconds` per try, and a few megabytes at most: a response is read uncompressed and up
to MOST_BYTES, and a prompt is sent to the named server only.
"""

import asyncio
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
from ml_collections import ConfigDict

from vau_jax.common.files import InputError, dump_json

Message = dict[str, Any]
MOST_BYTES = 2**22  # of a response; 100,000 tokens of text are half a megabyte
MOST_PAUSE = 120.0  # seconds that a server may ask for between two tries
REDIRECTS = 3  # on the same server
PASSING = (408, 409, 429)  # status codes after which another try may help, with 500 and more


class NoCompletion(Exception):  # noqa: N818 - what a server does is not our error
    """The reason why there is no completion, as one line."""


@dataclass(frozen=True)
class Completion:
    """A text, or why the response has none, and the tokens that it cost."""

    text: str
    complaint: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """The server of `config` (see `endpoint` in configs/base.py). Raises InputError for an invalid one."""

    def __init__(self, config: ConfigDict) -> None:
        check_url(config.url)
        if not config.url or not config.model:
            raise InputError(f"an endpoint needs url and model, found url={config.url!r} and model={config.model!r}")
        if config.concurrency < 1 or config.seconds <= 0 or config.retries < 0:
            raise InputError(
                f"concurrency={config.concurrency}, seconds={config.seconds:g}, retries={config.retries}: "
                "expected one question at once or more, some seconds, and no negative number of retries"
            )
        self.config = config
        self.key = os.environ.get(config.key_variable, "")
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError(f"the key in {config.key_variable} has spaces, line breaks or letters beyond ASCII")

    def client(self) -> httpx.AsyncClient:
        """Connections to the server; time is limited per try here, not per chunk of a response."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency)
        headers = {"Authorization": f"Bearer {self.key or 'none'}", "Accept-Encoding": "identity"}
        return httpx.AsyncClient(timeout=None, limits=limits, headers=headers, follow_redirects=False)

    async def complete(self, client: httpx.AsyncClient, messages: Sequence[Message], seed: int) -> Completion:
        """One completion; tried again after rate limits, server errors and broken connections, with growing pauses or
        those that the server asks for. Raises NoCompletion."""
        c = self.config
        asked = {"model": c.model, "messages": list(messages), "temperature": c.temperature, "seed": seed}
        asked |= {"max_tokens": c.max_tokens} | ({"response_format": {"type": "json_object"}} if c.json_mode else {})
        body = dump_json(asked).encode()
        for retry in range(c.retries + 1):
            pause = min(0.5 * 2.0**retry, 8.0) * random.uniform(0.75, 1.0)  # noqa: S311 - spreads the load
            try:
                async with asyncio.timeout(c.seconds):
                    response, received = await self._send(client, body)
            except TimeoutError:
                reason = f"no whole response within {c.seconds:g} s"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return read_completion(received)
                reason = f"HTTP {response.status_code}: {received.decode(errors='replace')}"
                pause = _pause_asked_for(response.headers, pause)
                if (response.status_code not in PASSING and response.status_code < 500) or pause > MOST_PAUSE:
                    break
            if retry < c.retries:
                await asyncio.sleep(pause)
        raise NoCompletion(self.one_line(reason))

    async def _send(self, client: httpx.AsyncClient, body: bytes) -> tuple[httpx.Response, bytes]:
        """The response to a request, after redirects on the same server, and its body."""
        url = self.config.url.rstrip("/") + "/chat/completions"
        request = client.build_request("POST", url, content=body, headers={"Content-Type": "application/json"})
        for _ in range(REDIRECTS + 1):
            response = await client.send(request, stream=True)
            try:
                if response.next_request is None:
                    return response, await _read(response)
            finally:
                await response.aclose()
            here, there = (f"{u.scheme}://{u.netloc.decode()}" for u in (request.url, response.next_request.url))
            if here != there:
                raise NoCompletion(
                    f"HTTP {response.status_code}: redirected to another server, {there}, which gets no prompt"
                )
            request = response.next_request
        raise NoCompletion(f"HTTP {response.status_code}: more than {REDIRECTS} redirects")

    def one_line(self, text: str) -> str:
        """The beginning of a text that a server wrote: without line breaks, control characters and our key."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:200]


def check_url(url: str) -> None:
    """Raises InputError for an invalid address, or one that would put a secret into saved configs."""
    if "@" in url or "?" in url or "#" in url:
        raise InputError(
            "the url of an endpoint may hold no user, password or query, as it is kept with results: expected one "
            "such as http://localhost:8000/v1, and the key in the environment variable that key_variable names"
        )
    try:
        parts = urlsplit(url)
        whole = bool(not url or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0))
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"the url of an endpoint is {url!r}: expected one such as http://localhost:8000/v1")


def read_completion(body: bytes) -> Completion:
    """The completion in a response to a chat request, whatever it contains."""
    try:
        result = json.loads(body)
    except (ValueError, RecursionError):
        result = None
    content = _at(result, "choices", 0, "message", "content")
    text = content if isinstance(content, str) and _is_unicode(content) else ""
    return Completion(
        text if text.strip() else "",
        "" if text.strip() else f"the response has no text: {body.decode(errors='replace')}",
        _count(_at(result, "usage", "prompt_tokens")),
        _count(_at(result, "usage", "completion_tokens")),
    )


async def _read(response: httpx.Response) -> bytes:
    """The body, as it was sent: nothing is decompressed, as a kilobyte may hold a gigabyte."""
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise NoCompletion(f"the response is encoded as {encoding[:20]!r}, although no encoding was accepted")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MOST_BYTES:
            raise NoCompletion(f"the response has more than {MOST_BYTES} bytes")
    return bytes(body)


def _pause_asked_for(headers: httpx.Headers, otherwise: float) -> float:
    """Seconds of a Retry-After header, a number of seconds or a date."""
    asked = headers.get("Retry-After", "")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without its zone
            return otherwise
    return seconds if seconds >= 0 else otherwise


def _at(value: Any, *path: str | int) -> Any:
    """The value at a path in parsed JSON; None without."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def _count(value: Any) -> int:
    """A number of tokens reported by a server; 0 for an invalid one."""
    return value if type(value) is int and 0 <= value < 2**40 else 0


def _is_unicode(text: str) -> bool:
    """False with half a surrogate pair, which JSON can name and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
