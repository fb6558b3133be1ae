"""General video question answering: JSON lines with `problem`, `options`, `answer` and `videos`.

The fields are those of EasyVideoR1; Video-R1's are read too (`solution` for `answer`, with or without <answer> tags,
and `path` for `videos`). Questions have 2 to 26 options; a line without videos is a question about its text alone.

    {"problem": "What falls?", "options": ["A. a box", "B. a man", "C. nothing"], "answer": "B", "videos": ["a.mp4"]}

Lines whose `problem_type` is not multiple choice, that show images, or whose answer is none of their options are left
out, and listed in the audit.
"""

import hashlib
import re
from pathlib import Path, PurePath
from typing import Any

from ml_collections import ConfigDict

from vau_jax.common.files import InputError, dump_json
from vau_jax.datasets import tables
from vau_jax.datasets.audit import Audit
from vau_jax.tasks import TASKS
from vau_jax.tasks.base import LETTERS
from vau_jax.tasks.example import Annotation, Example

MULTIPLE_CHOICE = "multiple choice"
_LETTERED = re.compile(r"\(?([A-Z])[.):](?:\s+(.*))?", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class _UnusableError(ValueError):
    """The reason why a line is left out."""


def read(config: ConfigDict) -> tuple[list[Example], Audit]:
    """The examples of a config.data whose `csv` is such a file, for each task that a line can serve.

    Raises InputError for a missing file, a line that is no JSON object, and a protocol other than clean.
    """
    if config.protocol != "clean":
        raise InputError(f"data.protocol={config.protocol!r}: only VAU-Bench has another protocol than clean")
    path, folder = Path(config.csv), Path(config.videos)
    lines = tables.json_lines(path, tables.read(path, "question file (config.data.csv)"))
    audit, examples = Audit(str(path), config.protocol, len(lines)), {}
    for number, raw in lines:
        videos: tuple[str, ...] = ()
        try:
            videos = _videos(raw)
            annotation = _annotation(raw)
        except _UnusableError as fault:
            audit.note(number, ", ".join(videos), "excluded", "row", str(fault))
            continue
        for name in config.tasks:
            example = _example(number, annotation, videos, name, folder, raw)
            if example is None:
                continue
            if example.id in examples:
                audit.exclude(example, "asked by an earlier row, with the same answer")
            examples.setdefault(example.id, example)
    return list(examples.values()), audit


def _example(
    number: int, annotation: Annotation, videos: tuple[str, ...], name: str, folder: Path, raw: dict[str, Any]
) -> Example | None:
    """A line as an example of a task; None where it has no answer to it."""
    task = TASKS[name]
    truth = task.truth(annotation)
    if truth is None:
        return None
    digest = hashlib.sha256(dump_json([videos, task.identity(annotation)]).encode()).hexdigest()[:10]
    return Example(
        id=f"{videos[0] if videos else 'text'}/{name}/{digest}",
        task=name,
        media=tuple(folder / video for video in videos),
        question=annotation.question,
        choices=task.choices(annotation),
        truth=truth,
        meta={"video": videos[0] if videos else "", "source": str(raw.get("data_source", "")), "line": number},
    )


def _videos(raw: dict[str, Any]) -> tuple[str, ...]:
    """The names of the line's videos, inside the folder of videos."""
    if raw.get("images") or raw.get("data_type", "video") == "image":
        raise _UnusableError("it shows images")
    given = raw.get("videos", raw.get("path"))
    videos = [given] if isinstance(given, str) else given or []
    if not isinstance(videos, list) or not all(isinstance(video, str) and video for video in videos):
        raise _UnusableError(f"videos are not a list of names: {str(given)[:100]!r}")
    for video in videos:
        if PurePath(video).is_absolute() or ".." in PurePath(video).parts:
            raise _UnusableError(f"a video's name leads out of the folder of videos: {video}")
    return tuple(str(PurePath(video)) for video in videos)


def _annotation(raw: dict[str, Any]) -> Annotation:
    """The question of a line, and the index of the right option."""
    if raw.get("problem_type", MULTIPLE_CHOICE) != MULTIPLE_CHOICE:
        raise _UnusableError(f"problem_type is not multiple choice: {str(raw['problem_type'])[:100]}")
    problem, options = raw.get("problem"), raw.get("options")
    if not isinstance(problem, str) or not problem.strip():
        raise _UnusableError("no question text")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise _UnusableError(f"options are not a list of texts: {str(options)[:100]!r}")
    texts = _without_letters(options)
    if not 2 <= len(texts) <= len(LETTERS) or not all(texts):
        raise _UnusableError(f"expected 2 to {len(LETTERS)} options with text: {len(texts)}")
    return Annotation(question=problem.strip(), options=texts, answer=_answer(raw, texts))


def _without_letters(options: list[str]) -> tuple[str, ...]:
    """The texts of options without their letters, where all have them in order."""
    matches = [_LETTERED.fullmatch(option.strip()) for option in options]
    if all(match and match[1] == LETTERS[i] for i, match in enumerate(matches[: len(LETTERS)])):
        return tuple((match[2] or "").strip() for match in matches if match)
    return tuple(option.strip() for option in options)


def _answer(raw: dict[str, Any], texts: tuple[str, ...]) -> int:
    """The index of the right option, given by its letter, its letter and text, or its text."""
    given = raw.get("answer", raw.get("solution"))
    if not isinstance(given, str):
        raise _UnusableError(f"the answer is not a text: {str(given)[:100]!r}")
    tagged = _ANSWER.search(given)
    answer = (tagged[1] if tagged else given).strip()
    letter = answer.rstrip(".)").lstrip("(")
    if len(letter) == 1 and letter in LETTERS[: len(texts)]:
        return LETTERS.index(letter)
    if (match := _LETTERED.fullmatch(answer)) and match[1] in LETTERS[: len(texts)]:
        answer = (match[2] or "").strip()
    if texts.count(answer) != 1:
        raise _UnusableError(f"the answer is none of the options: {answer[:100]!r}")
    return texts.index(answer)
