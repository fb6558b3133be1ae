"""A chat endpoint on loopback whose answers, errors and pauses a test writes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vau_jax.configs import base


@dataclass
class Answer:
    """What the server sends: a completion's text, or anything else."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: bytes | None = None  # instead of a completion
    cut: bool = False  # break off in the middle
    raw: Callable[[BinaryIO], None] | None = None  # writes all that goes over the wire, instead of a response


@dataclass
class Server:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0


@contextmanager
def serve(script: Callable[[dict[str, Any], int], Answer]) -> Iterator[Server]:
    """`script(request, number)` says what the number-th request gets."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(request)
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self.reply(script(request, number))
            finally:
                with lock:
                    server.at_once -= 1

        def reply(self, answer: Answer) -> None:
            time.sleep(answer.delay)
            if answer.raw:
                self.close_connection = True
                with suppress(ConnectionError):  # the client waits no longer
                    answer.raw(self.wfile)
                return
            completion = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer.text}}
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
            body = answer.body if answer.body is not None else json.dumps(completion).encode()
            with suppress(ConnectionError):
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if answer.cut else body)
            if answer.cut:
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    class Http(ThreadingHTTPServer):
        request_queue_size = 100  # many ask at once
        daemon_threads = True
        block_on_close = False  # an answer without end is not waited for

    http = Http(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def pictures(request: dict[str, Any]) -> list[np.ndarray]:
    """The frames that a request shows, uint8 [H, W, 3]."""
    import base64
    import io

    content = request["messages"][-1]["content"]
    urls = [item["image_url"]["url"] for item in content if item["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls]


def endpoint(url: str, **changes: Any) -> ConfigDict:
    c = base.endpoint()
    c.update({"url": url, "model": "m", "seconds": 5.0, **changes})
    return c


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def last(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]
