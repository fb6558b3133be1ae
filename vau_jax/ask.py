"""Asks a model about one video.

    python -m vau_jax.ask --model=DIR --video=FILE --task=qa --option "a fire" --option "a fall" ... "What happens?"
    python -m vau_jax.ask --model=DIR --video=FILE --task=ground|classify
    python -m vau_jax.ask --model=DIR --video=FILE --task=describe "What does the man in red do?"

DIR is a Hugging Face folder or the workdir of a run; a run is asked in the words, and sees the frames, of its training.
Prints the answer, and the interval where the task has one.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from vau_jax.common.files import InputError, exit_on_input_error, read_json
from vau_jax.data.pipeline import video_options
from vau_jax.data.video import decode_worker
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.datasets.vau_bench import LABELS, Row
from vau_jax.tasks import parsing, prompts
from vau_jax.vlm import DTYPES, VideoLM

TASKS = {"qa": "qa", "ground": "grounding", "classify": "classification", "describe": "description"}
MOST_TEXT = 4000  # characters of a question with its options; each may be up to four tokens


@dataclass(frozen=True)
class Question:
    """What is asked about a video file; qa wants a text and four options, the other tasks may have a text."""

    video: str
    task: str  # a key of TASKS
    text: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a completion says."""

    text: str  # for people; the completion where nothing in it can be read
    interval: tuple[float, float] | None = None  # seconds


class Asker:
    """A model that stays loaded; videos are decoded in a process of their own, which a bad file cannot take along."""

    def __init__(self, model: str, dtype: str = "bfloat16", max_new_tokens: int = 0) -> None:
        """`max_new_tokens` 0 is the run's own, or 1024. Raises InputError."""
        self.data = _run_settings(Path(model))
        self.vlm = VideoLM.load(model, dtype)
        self.decoders = DecoderPool(1, self.data.get("video_seconds", decode_worker.SECONDS))
        self.vlm.processor.read_video = self.decoders.read
        self.max_new_tokens = max_new_tokens or self.data.get("max_completion_tokens", 1024)

    def complete(self, question: Question, watch: Callable[[str], None] | None = None) -> str:
        """The model's whole text; `watch` is called with what there is of it while it is written. Raises InputError."""
        check(question)
        sampled = asdict(video_options(self.data, self.vlm.processor.video_options)) if self.data else {}
        video = {"type": "video", "video": question.video, **sampled}
        text = {"type": "text", "text": _words(question, self.data)}
        batch = self.vlm.encode([[{"role": "user", "content": [video, text]}]])
        see = watch and (lambda out: watch(out.text[0][0]))
        return self.vlm.generate(batch, max_new_tokens=self.max_new_tokens, temperature=0.0, watch=see).text[0][0]

    def read(self, completion: str, question: Question) -> Answer:
        """The answer that a completion holds."""
        return read(completion, question, self.data.get("style") in prompts.WITH_DRAFT)


def check(question: Question) -> None:
    """Raises InputError for a question that cannot be asked."""
    if question.task == "qa" and (not question.text or len([o for o in question.options if o]) != 4):
        raise InputError(
            f'the task qa wants a question and four options, found "{question.text[:100]}" and '
            f"{[o[:100] for o in question.options[:9]]}"
        )
    words = "".join((question.text, *question.options))
    if len(words) > MOST_TEXT:
        raise InputError(
            f"a question and its options may have {MOST_TEXT} characters together, found {len(words)}: shorten them"
        )
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the question holds what is no character: {error.reason}") from error
    if not os.path.isfile(question.video):
        raise InputError(f"video {question.video} does not exist: give a video file")


def _run_settings(model: Path) -> ConfigDict:
    """config.data of the run whose workdir or checkpoint `model` is; empty for a model folder."""
    for folder in (model, model.parent.parent):
        if (folder / "config.json").is_file() and (folder / "model").is_dir():
            return ConfigDict(read_json(folder / "config.json")["data"])
    return ConfigDict()


def _words(question: Question, data: ConfigDict) -> str:
    """The user's text."""
    if question.task == "describe" and "description" not in data.get("tasks", ()):
        return question.text or "Describe what happens in the video."
    row = Row("", "msad", question.text, question.options, None, None, None, "", "", {})
    words = prompts.load_words(data.get("templates", ""))
    asked = prompts.question(row, TASKS[question.task], data.get("style", "think"), data.get("wording", "full"), words)
    return f"{question.text}\n{asked}" if question.text and question.task != "qa" else asked


def read(completion: str, question: Question, reflection: bool) -> Answer:
    """The answer that a completion holds, or the completion where there is none."""
    if question.task == "describe":
        return Answer(parsing.TAG.sub("\n", completion).strip())
    final = parsing.parse([completion], TASKS[question.task], "lenient", reflection).final
    if question.task == "qa" and final.choice[0] >= 0:
        return Answer(f"{'ABCD'[final.choice[0]]}. {question.options[final.choice[0]]}")
    if question.task == "classify" and final.label[0] >= 0:
        return Answer(LABELS[final.label[0]])
    if question.task == "ground" and final.kind[0] == parsing.INTERVAL:
        start, end = final.interval[0].tolist()
        return Answer(f"Anomaly\n{start:.1f} s to {end:.1f} s", (start, end))
    if question.task == "ground" and final.kind[0] == parsing.NORMAL:
        return Answer("Normal")
    return Answer(f"no answer in the expected form; the model wrote:\n{completion.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="ask a model about one video")
    parser.add_argument("--model", required=True, help="Hugging Face folder or workdir of a run")
    parser.add_argument("--video", required=True, help="video file")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--option", action="append", default=[], help="an answer to choose from; qa wants four")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--max_new_tokens", type=int, default=0, help="0: the run's own, or 1024")
    parser.add_argument("--verbose", action="store_true", help="print the reasoning too")
    parser.add_argument("question", nargs="?", default="")
    a = parser.parse_args()

    logging.set_verbosity(logging.ERROR)  # orbax warns of a file that parameters alone do not need

    def run() -> None:
        question = Question(a.video, a.task, a.question, tuple(a.option))
        check(question)  # before the model is loaded, which takes long
        asker = Asker(a.model, a.dtype, a.max_new_tokens)
        completion = asker.complete(question)
        found = asker.read(completion, question).text
        print(f"{completion.strip()}\n\n{found}" if a.verbose else found)

    exit_on_input_error(run)


if __name__ == "__main__":
    main()
