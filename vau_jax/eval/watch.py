"""The report of runs that still go on, served to browsers on this machine: it is made again when a file has changed."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vau_jax.common.files import InputError

HOST = "127.0.0.1"
WATCHED = ("metrics.jsonl", "metrics.json", "predictions.jsonl", "judged/*.json")


class Pages:
    """The newest page of what is in `folders`, and its stamp; `make(stamp)` makes one, or raises InputError."""

    def __init__(self, folders: Sequence[Path], make: Callable[[str], str]) -> None:
        self.folders, self.make = folders, make
        self.seen: dict[Path, tuple[int, int]] | None = None
        self.stamp, self.html = "0", ""

    def refresh(self) -> None:
        """Makes the page again if a file has changed. What cannot be shown raises InputError where there was no page
        yet; later it is said, and the page stays."""
        files = sorted({path for f in self.folders for name in WATCHED for path in f.rglob(name)})
        now = {path: (stat.st_size, stat.st_mtime_ns) for path in files if (stat := path.stat())}
        if now == self.seen:
            return
        stamp = str(int(self.stamp) + 1)
        try:
            html = self.make(stamp)
        except InputError as error:
            if not self.html:
                raise
            print(f"the page stays as it was: {error}", file=sys.stderr, flush=True)
        else:
            self.stamp, self.html = stamp, html
        self.seen = now


@contextmanager
def serving(pages: Pages, port: int) -> Iterator[str]:
    """Serves the newest page until the block ends; its address. Raises InputError where nothing can listen."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            own = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
            if self.headers.get("Host") not in own:  # a page elsewhere whose name leads here
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "this page is for this machine alone")
            elif self.path == "/":
                self._send(HTTPStatus.OK, "text/html", pages.html)
            elif self.path == "/stamp":
                self._send(HTTPStatus.OK, "text/plain", pages.stamp)
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is one page only: /")

        def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise InputError(f"--port={port}: cannot serve on {HOST}: {error.strerror}: choose another") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def follow(pages: Pages, port: int, every: float) -> None:
    """Serves the page until SIGINT or SIGTERM, and looks for changed files `every` so many seconds."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with suppress(KeyboardInterrupt):
        pages.refresh()
        with serving(pages, port) as address:
            print(f"open {address} (Ctrl-C ends)", flush=True)
            while not ended.wait(every):
                with suppress(FileNotFoundError):  # an evaluation that is replaced while it is read
                    pages.refresh()
