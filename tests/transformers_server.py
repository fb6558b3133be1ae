"""`transformers serve` with a model folder, on loopback: a chat endpoint that knows nothing of this project."""

import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 120  # to start


@contextmanager
def serve(model: Path) -> Iterator[str]:
    """The server's URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.transformers_server", "serve", str(model)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(
        command + options, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not _is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.communicate()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def main() -> None:
    """Calls `transformers` beside torch's CPU build, for which torchvision's own reading of pictures is lacking."""
    import numpy as np
    import torch
    from PIL import Image

    import benchmarks.torchvision_operators  # noqa: F401

    def decode(data: torch.Tensor, **_: object) -> torch.Tensor:
        with Image.open(io.BytesIO(data.numpy().tobytes())) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)

    import torchvision.io

    torchvision.io.decode_image = decode
    from transformers.cli.transformers import main as transformers

    transformers()


if __name__ == "__main__":
    main()
