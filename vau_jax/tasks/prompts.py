"""The words: what each task asks, and the completion that answers it.

A completion follows the grammar that `vau_jax.parsing` reads:

    <think>…</think><answer>…</answer>[<glue>[s, e]</glue>]
    <think>…</think><draft>…</draft><reflect>…</reflect><revise>…</revise><answer>…</answer>[<glue>…</glue>]

with style "reflection"; "two_pass" is the same with nothing inside <reflect>.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vau_jax.common.files import InputError, read_json
from vau_jax.datasets import tables
from vau_jax.datasets.vau_bench import LABELS, SECTIONS, Interval, Row
from vau_jax.tasks import parsing

STYLES = ("reflection", "two_pass", "think", "direct")
WITH_DRAFT = ("reflection", "two_pass")
WORDINGS = ("full", "short")


@dataclass(frozen=True)
class Words:
    """Every text that a user's prompt is made of.

    `{question}`, `{options}` (a line each, `A. ...`), `{labels}` and `{sections}` in a text are replaced by what they
    name.
    """

    forms: dict[str, str]  # by style: how the completion is to be laid out
    asks: dict[str, str]  # by task: what stands inside <answer>
    questions: dict[str, str]  # by task: what is asked, with the wording "full"
    short_questions: dict[str, str]  # by task: all that is said with the wording "short"


WORDS = Words(
    forms={
        "reflection": (
            "First reason inside <think></think> and give a first answer inside <draft></draft>. Then check it "
            "against the video inside <reflect></reflect>, reason once more inside <revise></revise>, and give the "
            "final answer inside <answer></answer>."
        ),
        "two_pass": (
            "First reason inside <think></think> and give a first answer inside <draft></draft>. Leave "
            "<reflect></reflect> empty, reason a second time inside <revise></revise>, and give the final answer "
            "inside <answer></answer>."
        ),
        "think": "Reason inside <think></think>, then give the answer inside <answer></answer>.",
        "direct": "Give the answer alone, inside <answer></answer>.",
    },
    asks={
        "description": ("The reasoning describes what is seen. The answer has a line for each of these: {sections}."),
        "qa": "The answer is the letter of the right option.",
        "grounding": (
            "The answer is Anomaly or Normal; add the time of the anomaly in seconds as <glue>[start, end]</glue>, or "
            "<glue>[-1.0, -1.0]</glue> when there is none."
        ),
        "classification": "The answer is one of these: {labels}.",
    },
    questions={
        "qa": "{question}\n{options}",
        "grounding": "Does this surveillance video show something abnormal, and when?",
        "classification": "Which kind of abnormal event does this surveillance video show, if any?",
        "description": "Describe this surveillance video, and explain what in it is abnormal, if anything.",
    },
    short_questions={
        "qa": "{question}\n{options}",
        "grounding": "When is the anomaly?",
        "classification": "Which kind is it?",
        "description": "What happens, and why?",
    },
)


def load_words(path: str | os.PathLike) -> Words:
    """WORDS with what a JSON file says differently; the file has the fields of `Words`, or some of them. "" is no file.

    Raises InputError for a file that is no such object, or names an unknown field, style or task.
    """
    if not path:
        return WORDS
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object with {', '.join(vars(WORDS))}")
    for field, texts in raw.items():
        known = vars(WORDS).get(field)
        if known is None:
            raise InputError(f"{path}: {field!r} is unknown: expected some of {', '.join(vars(WORDS))}")
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise InputError(f"{path}: {field} must be an object of texts")
        if unknown := sorted(texts.keys() - known.keys()):
            raise InputError(f"{path}: {field}.{unknown[0]} is unknown: expected some of {', '.join(known)}")
    return Words(**{field: known | raw.get(field, {}) for field, known in vars(WORDS).items()})


@dataclass(frozen=True)
class Reflection:
    """A reflection record: the text between the tags, and the first answer in the form annotations have.

    `draft` holds one of `choice` ("A".."D", in the row's own order of options), `label` (a class), or `interval`
    (None for "no anomaly", or seconds). `{check}` in a text stands for a walk through the options as they
    are shown, up to the right one (`A flood, B fire`), because their order can change.
    """

    think: str
    draft: dict[str, Any]
    draft_is_right: bool
    reflect: str
    revise: str


def load_reflections(path: str | os.PathLike) -> dict[str, Reflection]:
    """Reads a JSONL of reflection records by the name of their example (`pipeline.Example.name`), or, of a record that
    names none, by `video/task`. Raises InputError naming the bad line."""
    path, records = Path(path), {}
    for number, raw in tables.json_lines(path, tables.read(path, "reflection file (config.data.reflection)")):
        try:
            video, task = raw.pop("video"), raw.pop("task")
            name = raw.pop("example", f"{video}/{task}")
            if not all(isinstance(text, str) for text in (video, task, name)):
                raise ValueError("video, task and example must be texts")
            record = _checked(Reflection(**raw))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} line {number} is no reflection record: {str(error)[:200]!r}") from error
        if name in records:
            raise InputError(f"{path} line {number} is a second record of {name}: each example has one")
        records[name] = record
    return records


def _checked(record: Reflection) -> Reflection:
    """A record that JSON gave. Raises ValueError where a field has another type or a draft says nothing."""
    if not all(isinstance(text, str) for text in (record.think, record.reflect, record.revise)):
        raise ValueError("think, reflect and revise must be texts")
    if not isinstance(record.draft_is_right, bool):
        raise ValueError("draft_is_right must be true or false")
    match record.draft:
        case {"choice": "A" | "B" | "C" | "D"} | {"interval": None | [int() | float(), int() | float()]}:
            return record
        case {"label": str(label)} if label in LABELS:
            return record
    raise ValueError(
        'draft must hold "choice" (A to D), "label" (a class) or "interval" (null or two times in seconds)'
    )


def style_of(task: str, style: str) -> str:
    """The style of a task's completions: descriptions have nothing to draft."""
    return "think" if task == "description" and style in WITH_DRAFT else style


def question(row: Row, task: str, style: str, wording: str, words: Words = WORDS) -> str:
    """The user's text for a row and task; `wording` "short" leaves out the instructions on form."""
    if wording == "short":
        text = words.short_questions[task]
    else:
        text = f"{words.questions[task]}\n{words.asks[task]} {words.forms[style_of(task, style)]}"
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", row.options, strict=False))
    values = {"question": row.question, "options": options, "labels": ", ".join(LABELS)}
    values["sections"] = ", ".join(SECTIONS)
    # One pass, so that what a row says is never taken for a place to fill in.
    return re.sub(r"\{(question|options|labels|sections)\}", lambda place: values[place[1]], text)


def facts(row: Row) -> str:
    """What the annotation says of the video, a line each."""
    lines = [f"Description: {row.description}"] if row.description else []
    return "\n".join([*lines, *(f"{title}: {text}" for title, text in row.reasoning.items())])


def hint(row: Row, task: str) -> str:
    """A line of the annotation that helps without being the answer's form: the evidence, or what happens; for
    grounding the rough time too."""
    seen = row.reasoning.get("Key Evidence") or row.description or row.key_object or "watch the whole video"
    if task == "grounding" and isinstance(row.interval, tuple):
        return f"{seen} It begins near {row.interval[0]:.0f} s."
    return seen


def shuffle_options(row: Row, order: Sequence[int]) -> Row:
    """The row with option i taken from place order[i], the answer's letter following its text."""
    if not row.options:
        return row
    answer = None if row.answer is None else "ABCD"[list(order).index("ABCD".index(row.answer))]
    return Row(**{**vars(row), "options": tuple(row.options[i] for i in order), "answer": answer})


def format_interval(interval: Interval) -> str:
    """`[12.0, 30.5]`, or `[-1.0, -1.0]` for no anomaly; with more digits where a tenth of a second is coarse."""
    if not isinstance(interval, tuple | list):
        return "[-1.0, -1.0]"
    start, end = interval
    digits = 1 if end - start > 0.2 else 6
    return f"[{start:.{digits}f}, {end:.{digits}f}]"


def final_answer(row: Row, task: str) -> str:
    """What stands inside <answer> when the answer is right."""
    if task == "qa":
        return row.answer or ""
    if task == "classification":
        return row.anomaly_class or ""
    if task == "description":
        return parsing.prose("\n".join(f"{title}: {text}" for title, text in row.reasoning.items()))
    return "Normal" if row.interval == "normal" else "Anomaly"


def target(row: Row, task: str) -> str:
    """The right answer as text: with the interval, for grounding."""
    found = final_answer(row, task)
    known = task == "grounding" and isinstance(row.interval, tuple)
    return f"{found} {format_interval(row.interval)}" if known else found


def draft_answer(draft: dict[str, Any], order: Sequence[int]) -> str:
    """What stands inside <draft>; a letter moves with its option."""
    if "choice" in draft:
        return "ABCD"[list(order).index("ABCD".index(draft["choice"]))]
    if "label" in draft:
        return draft["label"]
    return f"Anomaly {format_interval(draft['interval'])}" if draft["interval"] else "Normal"


@dataclass(frozen=True)
class Span:
    """A piece of a completion and its weight in the SFT loss."""

    text: str
    weight: float = 1.0


SECTION_WEIGHTS = {"think": 1.0, "draft": 1.0, "wrong_draft": 0.0, "reflect": 1.0, "revise": 1.0, "answer": 1.0}


def completion(
    row: Row,
    task: str,
    style: str,
    reflection: Reflection | None,
    order: Sequence[int] = (0, 1, 2, 3),
    weights: Mapping[str, float] = SECTION_WEIGHTS,
) -> list[Span]:
    """The right completion for a row whose options are already in `order`, in pieces weighted by section.

    Without a record the reasoning comes from the annotation, in one pass; a description's is the annotation's own, its
    answer the six sections. With one, "think" has its first and its
    revised reasoning in one pass, "two_pass" all but the reflection. A wrong draft has weight 0 unless `weights` say
    otherwise: the model is to learn to correct, not to err. Tags and special tokens in the annotation's words are left
    out. Raises InputError for a task that the row has no answer to.
    """
    if task not in row.tasks:
        raise InputError(
            f"{row.video} has no right answer for {task}: its annotation serves {', '.join(row.tasks) or 'no task'}"
        )
    answer = f"<answer>{final_answer(row, task)}</answer>"
    if task == "grounding":
        answer += f"<glue>{format_interval(row.interval)}</glue>"
    if style == "direct":
        return [Span(answer, weights["answer"])]
    if reflection is None:
        think = parsing.prose(row.description if task == "description" else plain_reasoning(row))
        return [Span(f"<think>{think}</think>", weights["think"]), Span(answer, weights["answer"])]
    think, reflect, revise = (
        parsing.prose(text.replace("{check}", check(row)))
        for text in (reflection.think, reflection.reflect, reflection.revise)
    )
    if style == "think":
        return [Span(f"<think>{think} {revise}</think>", weights["think"]), Span(answer, weights["answer"])]
    reflect = "" if style == "two_pass" else reflect
    return [
        Span(f"<think>{think}</think><draft>", weights["think"]),
        Span(draft_answer(reflection.draft, order), weights["draft" if reflection.draft_is_right else "wrong_draft"]),
        Span(f"</draft><reflect>{reflect}</reflect>", weights["reflect"]),
        Span(f"<revise>{revise}</revise>", weights["revise"]),
        Span(answer, weights["answer"]),
    ]


def check(row: Row) -> str:
    """The options in the order shown, up to and including the right one: `A flood, B fire`."""
    last = "ABCD".index(row.answer) if row.answer else -1
    return ", ".join(f"{letter} {text}" for letter, text in zip("ABCD"[: last + 1], row.options, strict=False))


def plain_reasoning(row: Row) -> str:
    """Reasoning in prose from the annotation: what is seen, why it matters, what follows."""
    parts = [row.reasoning.get(title, "") for title in ("Key Evidence", "Detailed Explanation", "Conclusion")]
    return " ".join(part for part in parts if part) or row.description or "The video has been watched."
