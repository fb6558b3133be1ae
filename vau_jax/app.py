"""A local page to ask a model about a video (the extra `app`).

    vau app --model=DIR [--port=7860] [--host=127.0.0.1] [--max_mb=500] [--max_seconds=1800]

Drop a video in, or take the example, choose the task, and see the text while it is written, then the answer, its place
on the time line and frames of the interval; what was asked before stays in a list. The page is for this machine alone
unless --host says otherwise, and nothing is fetched from or sent to anywhere else. Uploaded files are removed after an
hour, when there is no room for others, and at the end.
"""

import argparse
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from vau_jax import cli
from vau_jax.ask import MOST_TEXT, Asker, Question, check, shown
from vau_jax.common import compiled
from vau_jax.common.files import InputError
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decoders import VideoError
from vau_jax.datasets import synthetic
from vau_jax.eval import gallery
from vau_jax.tasks import TASKS
from vau_jax.web.uploads import Uploads, open_folder

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from vau_jax.web.guard import Guard
except ImportError as error:
    raise SystemExit("the app needs gradio: pip install gradio, or in a checkout: bash launch/venv.sh app") from error

FRAMES = 8  # number of frames shown of the interval
BEAT = 0.2  # seconds between checks whether a client still waits
TITLES = {task.title: task for task in sorted(TASKS.values(), key=lambda task: task.shuffles)}  # with options last

KEPT = 20  # answers in the list of a visit
EXAMPLE = "example_fire.mp4"

Entry = dict[str, Any]  # what the list keeps of an answer, as asked.html.jinja shows it
# The text so far, the answer as HTML, frames with their times, the answers of this visit, and they as HTML.
Shown = tuple[str, str, list[tuple[np.ndarray, str]], list[Entry], str]


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """No client waits for the text any more."""


class Model:
    """A model that computes in one thread: a question waits until the previous one has ended, also where nobody
    waits for that any more, as a computation of the device cannot be broken off."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.thread = ThreadPoolExecutor(1)
        self.closed = threading.Event()

    def close(self) -> None:
        """Stops decoding soon and permanently: a process that ends does not wait for a complete answer."""
        self.closed.set()
        self.thread.shutdown(wait=False, cancel_futures=True)

    def streamed(self, question: Question) -> Iterator[str]:
        """The partial completion as it grows, at last the complete one. Closing the iterator stops decoding."""
        texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stopped = threading.Event()

        def watch(text: str) -> None:
            if stopped.is_set() or self.closed.is_set():
                raise _Stopped
            texts.put(text)

        whole = self.thread.submit(self.asker.complete, question, watch)
        whole.add_done_callback(lambda _: texts.put(None))
        text: str | None = ""
        try:
            while text is not None:
                yield text
                with suppress(queue.Empty):  # yields repeatedly, as an iterator can be closed only at a yield
                    text = texts.get(timeout=BEAT)
            yield whole.result()
        finally:
            stopped.set()
            whole.cancel()  # if it has not begun


def respond(
    model: Model,
    uploads: Uploads,
    max_seconds: float,
    asked: list[Entry],
    video: str | None,
    task: str,
    *texts: str | None,
) -> Iterator[Shown]:
    """What the page shows, again and again, from the press of the button on; a mistake is a plain message. `asked` are
    the answers of this visit so far, the newest first; `texts` are the question and its options."""
    asker, listed = model.asker, gallery.render("asked.html.jinja", asked=asked)
    try:
        if not video:
            raise InputError("there is no video yet: drop a file into the box on the left")
        text, *options = ((text or "").strip() for text in texts)
        question = Question(video, TITLES[task].command, text, tuple(option for option in options if option))
        check(question)
        duration = asker.decoders.probe(video).duration
        if not duration <= max_seconds:
            raise InputError(
                f"the video lasts {duration:.0f} s, and at most {max_seconds:.0f} s are taken (--max_seconds)"
            )
        completion = ""
        for completion in model.streamed(question):
            yield completion, "", [], asked, listed
        answer = asker.read(completion, question)
        told = shown(answer.text, answer.interval, completion, question.task, duration)
        asked = [{"video": Path(video).name, "task": task, "question": text_of(question), **told}, *asked][:KEPT]
        listed = gallery.render("asked.html.jinja", asked=asked)
        page = gallery.render("answer.html.jinja", **told)
        yield completion, page, _frames(asker, video, answer.interval, duration), asked, listed
    except (InputError, VideoError) as error:
        problem = str(error).replace(str(video), Path(video).name) if video else str(error)
        yield "", gallery.render("answer.html.jinja", problem=problem), [], asked, listed
    finally:
        if video:
            uploads.mark_answered(Path(video))


def _frames(
    asker: Asker, video: str, interval: tuple[float, float] | None, duration: float
) -> list[tuple[np.ndarray, str]]:
    """Frames of the interval, or of all the video, each with its time; none where the interval is outside."""
    start, end = interval or (0.0, duration)
    if start >= duration:
        return []
    options = VideoOptions(nframes=FRAMES, video_start=start, video_end=min(end, duration), max_pixels=320 * 320)
    clip = asker.decoders.read(video, options, 2, 1)
    times = clip.times if clip.times is not None else start + clip.seconds_per_frame * np.arange(len(clip.frames))
    return [(frame, f"{time:.1f} s") for frame, time in zip(clip.frames, times, strict=True)]


def text_of(question: Question) -> str:
    """The user's own words of a question."""
    options = " ".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, question.options, strict=False))
    return " ".join(part for part in (question.text, options) if part)


def limits(asker: Asker, max_seconds: float, max_mb: int) -> str:
    """What the page takes and what the model sees of it, in Markdown."""
    options = asker.video_options
    return (
        f"Files up to {max_mb} MB and {max_seconds:.0f} s, removed after an hour. The model sees "
        f"{options.fps:g} frames a second, {options.max_frames} at most, without sound, and writes up to "
        f"{asker.max_new_tokens} tokens."
    )


def build(model: Model, uploads: Uploads, max_seconds: float, max_mb: int, example: Path) -> gr.Blocks:
    """The page; `example` is a clip at hand."""
    with gr.Blocks(title="vau_jax", analytics_enabled=False) as page:
        gr.Markdown("# Ask about a video")
        with gr.Row():
            with gr.Column():
                video = gr.Video(sources=["upload"], label="Video", height=320)
                gr.Markdown(limits(model.asker, max_seconds, max_mb), elem_id="limits")
                take = gr.Button("Use the example clip", size="sm")
                task = gr.Radio(list(TITLES), value=next(iter(TITLES)), label="Task")
                info = "needed with options; may be left empty otherwise"
                text = gr.Textbox("", label="Question", info=info, max_length=MOST_TEXT)
                with gr.Group(visible=False) as choices:
                    options = [gr.Textbox("", label=f"Option {letter}", max_length=MOST_TEXT) for letter in "ABCD"]
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                written = gr.Textbox(label="What the model writes", lines=6, max_lines=20)
                answer = gr.HTML(elem_id="answer")
                frames = gr.Gallery(label="Frames", columns=4, object_fit="contain", height="auto", format="webp")
                asked, listed = gr.State([]), gr.HTML(elem_id="asked")
        take.click(lambda: str(example), None, video, queue=False, api_name=False)
        task.change(lambda title: gr.Group(visible=TITLES[title].shuffles), task, choices, queue=False, api_name=False)
        run = ask.click(
            partial(respond, model, uploads, max_seconds),
            [asked, video, task, text, *options],
            [written, answer, frames, asked, listed],
            api_name=False,
        )
        stop.click(None, cancels=[run])
    return page


@contextmanager
def serve(
    page: gr.Blocks, uploads: Uploads, host: str, port: int, max_mb: int, names: Iterable[str] = ()
) -> Iterator[str]:
    """The page for browsers on `host`, until the block ends; its address. Port 0 is any free one. `names`: see Guard.
    Raises OSError where nothing can listen there."""
    page.queue(max_size=16, default_concurrency_limit=1, api_open=False)  # there is only one model
    fonts = ["system-ui", "sans-serif"]  # names alone: gradio's own fonts would be fetched
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        max_file_size=f"{max_mb}mb",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
    )
    guarded = Guard(app, host, names, uploads, max_mb * 2**20)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        server = uvicorn.Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
            yield f"http://{shown}:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(timeout=5)
            page.close(verbose=False)


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    compiled.use(compiled.AUTO)
    asker = Asker(args.model, args.dtype, args.max_new_tokens)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the files are removed
    with (
        open_folder(args.max_total_mb * 2**20) as uploads,
        tempfile.TemporaryDirectory(prefix="vau_jax_example_") as folder,
        closing(Model(asker)) as model,
        suppress(KeyboardInterrupt),
    ):
        synthetic.write_example(Path(folder) / EXAMPLE)
        page = build(model, uploads, args.max_seconds, args.max_mb, Path(folder) / EXAMPLE)
        try:
            with serve(page, uploads, args.host, args.port, args.max_mb, args.name) as address:
                print(f"open {address}", flush=True)
                threading.Event().wait()
        except OSError as error:
            raise InputError(f"cannot serve on {args.host}:{args.port}: {error} (--host, --port)") from error


if __name__ == "__main__":
    cli.main("app")
