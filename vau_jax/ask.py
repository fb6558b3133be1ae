"""Asks a model about videos.

    vau ask --model=DIR --video=FILE --task=qa --option "a fire" --option "a fall" ... "What happens?"
    vau ask --model=DIR --video=FILE --task=ground|classify
    vau ask --model=DIR --video=FILE --task=describe "What does the man in red do?"
    vau ask --model=DIR --video=FOLDER --task=ground --task=describe --out=answers

DIR is a Hugging Face folder or the workdir of a run; a run is asked in the words, and sees the frames, of its training.
Of one video and task it prints the answer, and the interval where the task has one. Of more, or with --out, it writes
answers.jsonl and report.html: see `vau_jax.ask_all`.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vau_jax import cli
from vau_jax.common import compiled
from vau_jax.common.files import InputError
from vau_jax.data.loading import video_options
from vau_jax.data.video import decode_worker
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.eval import gallery
from vau_jax.models import checkpoint
from vau_jax.tasks import TASKS, parsing, prompts
from vau_jax.tasks.base import Shown
from vau_jax.tasks.example import Example
from vau_jax.tasks.intervals import format_interval
from vau_jax.vlm import VideoLM

COMMANDS = {task.command: task for task in TASKS.values()}
MOST_TEXT = 4000  # characters of a question with its options; each may be up to four tokens


@dataclass(frozen=True)
class Question:
    """What is asked about a video file; a task may want a text and options, or take a text besides its own."""

    video: str
    task: str  # a key of COMMANDS
    text: str = ""
    options: tuple[str, ...] = ()


class Asker:
    """A model that stays loaded; videos are decoded in a process of their own, which a bad file cannot take along."""

    def __init__(self, model: str, dtype: str = "bfloat16", max_new_tokens: int = 0) -> None:
        """`max_new_tokens` 0 is the run's own, or 1024. Raises InputError."""
        self.data = ConfigDict(checkpoint.settings(model).get("data", {}))
        self.vlm = VideoLM.load(model, dtype)
        self.decoders = DecoderPool(1, self.data.get("video_seconds", decode_worker.SECONDS))
        self.vlm.processor.read_video = self.decoders.read
        self.max_new_tokens = max_new_tokens or self.data.get("max_completion_tokens", 1024)

    @property
    def video_options(self) -> VideoOptions:
        """How videos are sampled: as in the run's training, or as the model folder says."""
        default = self.vlm.processor.video_options
        return video_options(self.data, default) if self.data else default

    def complete(self, question: Question, watch: Callable[[str], None] | None = None) -> str:
        """The model's complete text; `watch` is called with the partial text while it grows. Raises InputError."""
        check(question)
        sampled = asdict(self.video_options) if self.data else {}
        video = {"type": "video", "video": question.video, **sampled}
        text = {"type": "text", "text": _prompt(question, self.data)}
        batch = self.vlm.encode([[{"role": "user", "content": [video, text]}]])
        show = watch and (lambda out: watch(out.text[0][0]))
        return self.vlm.generate(batch, max_new_tokens=self.max_new_tokens, temperature=0.0, watch=show).text[0][0]

    def read(self, completion: str, question: Question) -> Shown:
        """The answer that a completion holds."""
        return read(completion, question, self.data.get("style") in prompts.WITH_DRAFT)


def shown(answer: str, interval: Sequence[float] | None, completion: str, task: str, seconds: float) -> dict[str, Any]:
    """What pages show of an answer about a video of so many seconds: it, a bar of its interval, the model's text."""
    text = f"Anomaly {format_interval(interval)}" if interval else answer.partition("\n")[0]
    bars = [gallery.bar("predicted", text, seconds)] if COMMANDS[task].timed and seconds else []
    return {"found": answer, "bars": bars, "duration": seconds, "sections": gallery.sections(completion)}


def check(question: Question) -> None:
    """Raises InputError for a question that cannot be asked."""
    if question.task not in COMMANDS:
        raise InputError(f"--task={question.task} is unknown: expected one of {', '.join(COMMANDS)}")
    if fault := COMMANDS[question.task].check_question(question.text, question.options):
        raise InputError(fault)
    words = "".join((question.text, *question.options))
    if len(words) > MOST_TEXT:
        raise InputError(
            f"a question and its options may have {MOST_TEXT} characters together, found {len(words)}: shorten them"
        )
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the question contains an invalid character: {error.reason}") from error
    if not os.path.isfile(question.video):
        raise InputError(f"video {question.video} does not exist: give a video file")


def example_of(question: Question) -> Example:
    """A user's question as an example without truth."""
    task = COMMANDS[question.task]
    choices = question.options if task.shuffles else task.default_choices
    return Example("", task.name, (Path(question.video),), question.text, choices, truth={})


def _prompt(question: Question, data: ConfigDict) -> str:
    """The user's text."""
    task, templates = COMMANDS[question.task], prompts.load_templates(data.get("templates", ""))
    style, wording = data.get("style", "think"), data.get("wording", "full")
    prompt = prompts.question(example_of(question), style, wording, templates)
    return task.user_prompt(question.text, prompt, trained=task.name in data.get("tasks", ()))


def read(completion: str, question: Question, reflection: bool) -> Shown:
    """The answer in a completion, or the completion itself if it has none."""
    task, choices = COMMANDS[question.task], example_of(question).choices
    final = parsing.parse([completion], task.name, "lenient", reflection, [choices]).final
    shown = task.display(parsing.values_at(final, 0, task), completion, choices)
    return shown or Shown(f"no answer in the expected format; the model wrote:\n{completion.strip()}")


def main(args: argparse.Namespace) -> None:
    """The program: see its options in `vau_jax.cli`."""
    from vau_jax import ask_all  # noqa: PLC0415 - which reads this module in turn

    videos = ask_all.videos_of(args.video)
    questions = [Question(str(v), task, args.question, tuple(args.option)) for v in videos for task in args.task]
    for question in questions:  # before the model is loaded, which is slow
        check(question)
    compiled.use(compiled.AUTO)
    if len(questions) > 1 or args.out:
        out = args.out or Path("answers")
        answers = ask_all.ask_all(args.model, questions, out, args.dtype, args.max_new_tokens)
        print(ask_all.summary(answers, out))
        return
    asker = Asker(args.model, args.dtype, args.max_new_tokens)
    completion = asker.complete(questions[0])
    answer = asker.read(completion, questions[0]).text
    print(f"{completion.strip()}\n\n{answer}" if args.verbose else answer)


if __name__ == "__main__":
    cli.main("ask")
