"""Decoding in separate processes: a file that hangs or crashes a decoder costs that one video only.

A worker is `python -m vau_jax.data.video.decode_worker`: it reads a request, a line of JSON, from its standard input
and answers with a line of JSON and the frames' bytes. Its memory is limited by the system, its time by an alarm that
ends it even inside a decoder. It is replaced when it has died, and after some thousand videos, because decoders leak.
"""

import json
import math
import os
import resource
import signal
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from vau_jax.common.files import dump_json, short
from vau_jax.common.workers import Died, Pool, Worker
from vau_jax.data.video import clips
from vau_jax.data.video.clips import Clip, Probe, VideoOptions
from vau_jax.data.video.decoders import VideoError

VIDEOS_A_WORKER = 2000
MEMORY = 4 * 2**30  # bytes of data that a worker may hold
SECONDS = 120.0  # for one video


class DecoderPool(Pool):
    """`clips.read` and `clips.probe` in at most `workers` processes; thread-safe."""

    def __init__(self, workers: int, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.seconds = seconds
        one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        module = "vau_jax.data.video.decode_worker"
        super().__init__(workers, lambda: Worker(module, str(seconds), str(memory), **one_core), VIDEOS_A_WORKER)

    def read(self, path: str | os.PathLike, options: VideoOptions, factor: int, multiple: int) -> Clip:
        """As `clips.read`; also raises VideoError where the decoder crashes or takes longer than `seconds`."""
        return decode_clip(*self._ask(path, {"options": asdict(options), "factor": factor, "multiple": multiple}))

    def probe(self, path: str | os.PathLike) -> Probe:
        """As `clips.probe`, likewise."""
        return Probe(**self._ask(path, {})[0])

    def _ask(self, path: str | os.PathLike, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The answer and the frames' bytes. Raises VideoError."""
        try:
            request = {"path": os.fspath(path), **request}
            answer, frames = self.ask(request, follows=lambda answer: math.prod(answer.get("shape", (0,))))
        except Died as death:
            raise self._death(path, death.code) from death
        if "error" in answer:
            raise VideoError(answer["error"], answer["reason"])
        return answer, frames

    def _death(self, path: str | os.PathLike, code: int) -> Exception:
        """What it means that a worker is no more."""
        if code == -signal.SIGALRM:
            return VideoError(f"decoding {path} took longer than {self.seconds:g} s", "timeout")
        if code > 0:
            return RuntimeError(f"a decoder process did not start, or failed (exit code {code}): see its message above")
        return VideoError(f"the decoder crashed on {path} (signal {-code})", "crashed")


def encode_clip(clip: Clip) -> dict[str, Any]:
    """The fields of a clip besides the frames' bytes, as JSON values."""
    return {
        "shape": clip.frames.shape,
        "seconds_per_frame": clip.seconds_per_frame,
        "times": None if clip.times is None else clip.times.tolist(),
        "damage": clip.damage,
    }


def decode_clip(header: dict[str, Any], frames: bytes | memoryview) -> Clip:
    """The inverse of `encode_clip`."""
    times = None if header["times"] is None else np.asarray(header["times"])
    array = np.frombuffer(frames, np.uint8).reshape(header["shape"])
    return Clip(array, header["seconds_per_frame"], times, header["damage"])


# --- The worker's side --------------------------------------------------------------------------------------------


def serve(requests: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answers requests until there are none."""
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        frames = b""
        try:
            if "options" in request:
                options = VideoOptions(**request["options"])
                clip = clips.read(request["path"], options, request["factor"], request["multiple"])
                answer, frames = encode_clip(clip), memoryview(clip.frames).cast("B")
            else:
                answer = asdict(clips.probe(request["path"]))
        except VideoError as error:
            answer = {"error": str(error), "reason": error.reason}
        except MemoryError:
            answer = {"error": f"decoding {request['path']} takes more memory than a decoder may have"}
            answer["reason"] = "too large"
        except Exception as error:  # any error costs this file alone
            answer = {"error": f"cannot decode {request['path']}: {short(error)}", "reason": "unreadable"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(dump_json(answer).encode() + b"\n")
        answers.write(frames)
        answers.flush()


def main() -> None:
    """The process that decodes: bounded in time and memory, it answers requests until its input ends."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, whatever it is doing
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w")  # for tracebacks of our own
    with open(os.devnull, "wb") as nothing:  # output of the libraries would mix with the answers
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    serve(sys.stdin.buffer, answers, seconds)


if __name__ == "__main__":
    main()
