"""Request filter of the page's server: only the page itself, in browsers that reached it by its address.

A page on another site can make a visitor's browser send requests to this machine; it can also give its own name this
machine's address (DNS rebinding). Neither is accepted: the Host must be one of ours, an Origin must equal the Host,
only the resources of the page are served, so that the model is reached through the queue alone, and a request may name
uploaded files only. (gradio itself would copy any readable file, and fetch addresses.)
"""

import asyncio
import ipaddress
import json
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vau_jax.web.uploads import Uploads

UPLOAD = "/gradio_api/upload"
READ = re.compile(
    r"/(config|theme\.css|favicon\.ico|(assets|static|svelte)/.*|gradio_api/(queue/data|upload_progress|heartbeat/\w+))?"
)
POSTED = re.compile(r"/gradio_api/(upload|queue/join|cancel|reset|run/predict)")  # run: what needs no queue
FILE = "/gradio_api/file="
MOST_BYTES = 2**20  # of a request that is no upload, and of what stands around the file in an upload
SILENCE = 60.0  # seconds that a body may stand still


class Guard:
    """`app` behind these rules; `names` are further hosts it is called by, besides this machine's loopback and `bound`,
    the address that it listens on. A file has at most `max_file` bytes.
    """

    def __init__(self, app: ASGIApp, bound: str, names: Iterable[str], uploads: Uploads, max_file: int) -> None:
        self.app, self.uploads, self.max_file = app, uploads, max_file
        self.everywhere = bound in ("0.0.0.0", "::")  # noqa: S104 - a comparison
        machine = (socket.gethostname(), socket.getfqdn()) if self.everywhere else (bound,)
        self.names = {name.lower() for name in ("localhost", "127.0.0.1", "::1", *machine, *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http":  # the page has no websocket
            with suppress(ClientDisconnect):  # in the middle of a body
                await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, receive = self._size(scope), _with_time_limit(receive) if scope["method"] == "POST" else receive
        problem = self._problem(scope, size)
        if problem is None and scope["method"] == "POST":
            if scope["path"] == UPLOAD:
                await self._upload(size, scope, receive, send)
                return
            body = await Request(scope, receive).body()
            problem, receive = self._input_problem(body), _again(body, receive)
        if problem:
            status, text = problem
            await PlainTextResponse(text, status)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, size: int, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.uploads.reserve(size):
            text = f"there is no room for more files (at most {self.uploads.most / 2**20:.0f} MB, --max_total_mb): "
            await PlainTextResponse(text + "try again later", 507)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.uploads.ended(size)

    def _problem(self, scope: Scope, size: int) -> tuple[int, str] | None:
        """Status and one line, where a request is refused."""
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_ours(host):
            return 421, "this page is not served under that name (--name)"
        if origin is not None and _after_scheme(origin) != host.lower():
            return 403, "this page takes no requests from other pages"
        if scope["method"] in ("GET", "HEAD"):
            shown = path.startswith(FILE) and self.uploads.holds(path.removeprefix(FILE))
            return None if shown or READ.fullmatch(path) else (404, "not found")
        if scope["method"] != "POST" or not POSTED.fullmatch(path):
            return 404, "not found"
        if size < 0:
            return 411, "a request must say how long it is"
        most = MOST_BYTES + (self.max_file if path == UPLOAD else 0)
        return (413, f"the request is larger than {most / 2**20:.0f} MB") if size > most else None

    def _input_problem(self, body: bytes) -> tuple[int, str] | None:
        """Likewise, for the inputs of a function."""
        try:
            result = json.loads(body)
            # No NaN, and no half of a surrogate pair, which nothing could write.
            json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
            paths = list(_paths(result))
        except (ValueError, RecursionError):
            return 400, "the request is not JSON"
        if not all(isinstance(path, str) and self.uploads.holds(path) for path in paths):
            return 403, "the request names a file that was not uploaded"
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. Any address does where all are listened on: only names can be made
        to point here by others."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.names or (self.everywhere and _is_address(name))

    @staticmethod
    def _size(scope: Scope) -> int:
        """Bytes of the body; -1 where the request does not say."""
        stated = Headers(scope=scope).get("content-length", "")
        return int(stated) if re.fullmatch(r"[0-9]{1,15}", stated) else -1


def _paths(value: Any) -> Iterator[Any]:
    """What stands under "path" anywhere in parsed JSON, which is how gradio's requests name files."""
    if isinstance(value, dict):
        yield from ([value["path"]] if "path" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be received once more."""
    waiting = [body]

    async def received() -> Message:
        return {"type": "http.request", "body": waiting.pop()} if waiting else await receive()

    return received


def _with_time_limit(receive: Receive) -> Receive:
    """As when the browser goes away, where it says nothing for too long."""

    async def limited() -> Message:
        try:
            async with asyncio.timeout(SILENCE):
                return await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}

    return limited


def _after_scheme(origin: str) -> str:
    """Host and port of an Origin header."""
    return origin.partition("://")[2].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
