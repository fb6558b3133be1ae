"""Asks a model about many videos: an answer a line in a JSONL file, and a page to look at.

A video that cannot be read is a line with its failure, and the others go on. A call that was killed goes on where it
stopped, and another call with the same model and question asks only what is new.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vau_jax.ask import COMMANDS, Asker, Question, shown
from vau_jax.common import progress
from vau_jax.common.files import InputError, dump_json, locked, read_lines, write_text
from vau_jax.common.progress import Progress
from vau_jax.data.video.decoders import VideoError
from vau_jax.data.video.listing import videos_below
from vau_jax.eval import gallery
from vau_jax.models import checkpoint

ANSWERS, PAGE = "answers.jsonl", "report.html"


@dataclass(frozen=True)
class Answered:
    """One answer, as a line of answers.jsonl stores it."""

    fingerprint: str  # of the model, the settings, the question and the video file
    video: str  # path of the file
    task: str  # as on the command line: qa, ground, classify, describe
    question: str
    options: list[str]
    answer: str  # as text; empty after a failure
    interval: list[float] | None  # start and end in seconds, where the answer has one
    completion: str  # everything that the model wrote
    seconds: float | None  # length of the video
    failure: str | None  # why the video could not be used


def videos_of(places: Sequence[str]) -> list[Path]:
    """The files among `places`, and the videos in the folders among them, each once. Raises InputError for a place that
    is not there, and where there is no video."""
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise InputError(f"video {place} does not exist: give a video file or a folder of them")
        found |= dict.fromkeys(videos_below(place) if place.is_dir() else [place.resolve()])
    if not found:
        raise InputError(f"{', '.join(places)} has no video file")
    return list(found)


def ask_all(
    model: str, questions: Sequence[Question], out: Path, dtype: str = "bfloat16", max_new_tokens: int = 0
) -> list[Answered]:
    """Asks the questions, one after the other, that `out` has no answer to; writes ANSWERS and PAGE there.

    Raises InputError where `out` cannot be written to or is in use, and for a model that cannot be read.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out={out}: {error.strerror}") from error
    contents = checkpoint.contents(model)
    keys = [_fingerprint([contents, dtype, max_new_tokens], question) for question in questions]
    with locked(out):
        known = _known(out / ANSWERS, keys)
        todo = [(key, question) for key, question in zip(keys, questions, strict=True) if key not in known]
        asker = Asker(model, dtype, max_new_tokens) if todo else None
        line = Progress("ask", len(questions), "question", start=len(known))
        with (out / ANSWERS).open("a", encoding="utf-8") as file:
            for key, question in todo:
                known[key] = _ask(asker, question, key)
                file.write(dump_json(vars(known[key])) + "\n")
                file.flush()
                line.show(len(known), partial(_headline, known))
        answers = [known[key] for key in keys]
        write_text(out / PAGE, page(model, answers))
    return answers


def _fingerprint(settings: list[Any], question: Question) -> str:
    stat = Path(question.video).stat()
    asked = [question.video, stat.st_size, stat.st_mtime_ns, question.task, question.text, question.options]
    return hashlib.sha256(dump_json([settings, asked]).encode()).hexdigest()


def _known(path: Path, keys: Sequence[str]) -> dict[str, Answered]:
    """The answers of earlier calls to the same questions. The file keeps those of others too, but no half line."""
    lines = [line for line in read_lines(path) if line.endswith("\n")] if path.exists() else []
    try:
        records = [Answered(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} holds something else than answers ({error}): choose another --out") from error
    write_text(path, "".join(lines))
    return {record.fingerprint: record for record in records if record.fingerprint in keys}


def _ask(asker: Asker, question: Question, key: str) -> Answered:
    """One answer; a video that cannot be used is a failure."""
    asked = {"fingerprint": key, "video": question.video, "task": question.task, "question": question.text}
    asked |= {"options": list(question.options)}
    try:
        seconds = asker.decoders.probe(question.video).duration
        completion = asker.complete(question)
    except (InputError, VideoError) as error:
        return Answered(**asked, answer="", interval=None, completion="", seconds=None, failure=str(error))
    answer = asker.read(completion, question)
    interval = list(answer.interval) if answer.interval else None
    return Answered(
        **asked, answer=answer.text, interval=interval, completion=completion, seconds=seconds, failure=None
    )


def _headline(known: dict[str, Answered]) -> str:
    failed = sum(answered.failure is not None for answered in known.values())
    found = sum(answered.interval is not None for answered in known.values())
    return f"with an interval {found}  failed {failed}"


# --- The page ---


def page(model: str, answers: Sequence[Answered]) -> str:
    """A card for each video as HTML: its frames, and each answer with its interval on the time line."""
    by_video: defaultdict[str, list[Answered]] = defaultdict(list)
    for answered in answers:
        by_video[answered.video].append(answered)
    pictures = gallery.strips([Path(video) for video in by_video])
    cards = [
        {"name": Path(video).name, "path": video, "strip": strip, "answers": list(map(_of_page, group))}
        for (video, group), strip in zip(by_video.items(), pictures, strict=True)
    ]
    strips = {f"strip{number}": card["strip"] for number, card in enumerate(cards) if card["strip"]}
    failed = sum(answered.failure is not None for answered in answers)
    return gallery.render("answers.html.jinja", model=model, cards=cards, strips=strips, failed=failed)


def _of_page(a: Answered) -> dict[str, Any]:
    """What the page says of an answer."""
    asked = {"title": COMMANDS[a.task].title, "question": a.question, "failure": a.failure}
    return asked | shown(a.answer, a.interval, a.completion, a.task, a.seconds or 0.0)


def summary(answers: Sequence[Answered], out: Path) -> str:
    """The last lines of the program."""
    failed = sum(answered.failure is not None for answered in answers)
    title = f"ask: {len(answers)} questions answered, {failed} of them about videos that cannot be read"
    return progress.summary(title, {"answers": out / ANSWERS, "page": out / PAGE})
