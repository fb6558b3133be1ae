"""Prompts and completions: the templates of all tasks, and the right completion of an example.

A completion follows the grammar parsed by `vau_jax.tasks.grammar`; style "two_pass" is "reflection" with an empty
<reflect>.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vau_jax.common.files import InputError, read_json
from vau_jax.tasks import TASKS, grammar, published_prompts
from vau_jax.tasks.base import LETTERS
from vau_jax.tasks.example import Example

STYLES = ("reflection", "two_pass", "think", "direct")
WITH_DRAFT = ("reflection", "two_pass")
WORDINGS = ("full", "short")
TEXTS = ("formats", "answer_instructions", "questions", "short_questions")  # fields that a JSON file may have

FORMATS = {
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
}


TURNS = (  # of a description in two turns, as VAU-Eval is published
    "Describe this surveillance video in five sentences: who and what is seen, what they do, and anything unusual.",
    "Now explain in detail whether something abnormal happens in the video, what it is, and how you can tell.",
)
DEFAULT = "default"  # name of these templates, where a run was trained with others


@dataclass(frozen=True)
class Templates:
    """All texts of a user's prompt.

    Placeholders: `{question}`, `{options}` (a line each, `A. ...`), `{labels}` and `{sections}`; in whole prompts also
    `{options_list}` (a Python list of `A. ...`), `{options_line}` (in one line) and `{option_1}` to `{option_4}`.
    """

    formats: dict[str, str]  # by style: the layout of the completion
    answer_instructions: dict[str, str]  # by task: instruction about the text inside <answer>
    questions: dict[str, str]  # by task: the question, with the wording "full"
    short_questions: dict[str, str]  # by task: the whole prompt with the wording "short"
    whole: dict[str, dict[str, str]] = field(default_factory=dict)  # by task and style: goes before all of the above
    turns: tuple[str, ...] = TURNS  # of a description in two turns
    text_first: bool = False  # the text stands before the video


def default_templates() -> Templates:
    """The templates of the tasks."""
    return Templates(
        formats=FORMATS,
        answer_instructions={name: task.answer_instruction for name, task in TASKS.items()},
        questions={name: task.question for name, task in TASKS.items()},
        short_questions={name: task.short_question for name, task in TASKS.items()},
    )


def load_templates(path: str | os.PathLike) -> Templates:
    """The default templates, overridden by the first four fields of `Templates` in a JSON file, some or all, or by a
    folder of VAU-R1's code (see published_prompts.py); "" and DEFAULT are neither.

    Raises InputError for a file that is no such object, or names an unknown field, style or task.
    """
    templates = default_templates()
    if path in ("", DEFAULT):
        return templates
    if Path(path).is_dir():
        whole, text_first, turns = published_prompts.read(Path(path))
        return replace(templates, whole=whole, turns=tuple(turns) or TURNS, text_first=text_first)
    default = {name: texts for name, texts in vars(templates).items() if name in TEXTS}
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object with {', '.join(default)}")
    for name, texts in raw.items():
        known = default.get(name)
        if known is None:
            raise InputError(f"{path}: {name!r} is unknown: expected some of {', '.join(default)}")
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise InputError(f"{path}: {name} must be an object of texts")
        if unknown := sorted(texts.keys() - known.keys()):
            raise InputError(f"{path}: {name}.{unknown[0]} is unknown: expected some of {', '.join(known)}")
    return replace(templates, **{name: known | raw.get(name, {}) for name, known in default.items()})


def template_files(path: str | os.PathLike) -> list[Path]:
    """The files that `load_templates` reads."""
    if path in ("", DEFAULT):
        return []
    return published_prompts.files(Path(path)) if Path(path).is_dir() else [Path(path)]


def style_of(task: str, style: str) -> str:
    """The style of a task's completions: tasks without right answers have no draft."""
    return style if TASKS[task].verifiable or style not in WITH_DRAFT else "think"


def question(example: Example, style: str, wording: str, templates: Templates | None = None) -> str:
    """The user's text for an example; `wording` "short" leaves out the format instructions."""
    templates, name = templates or default_templates(), example.task
    if forms := templates.whole.get(name):
        text = _whole(forms, name, style)
    elif wording == "short":
        text = templates.short_questions[name]
    else:
        layout = templates.formats[style_of(name, style)]
        text = f"{templates.questions[name]}\n{templates.answer_instructions[name]} {layout}"
    fields = TASKS[name].fields(example) | _options(example)
    # One pass, so that text of an example is never interpreted as a placeholder.
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda field: fields[field[1]], text)


def _whole(forms: Mapping[str, str], task: str, style: str) -> str:
    """The whole prompt of a style. Raises InputError where there is none."""
    if style not in forms:
        raise InputError(f"data.templates has no prompt of {task} for data.style={style}: it has {', '.join(forms)}")
    return forms[style]


def _options(example: Example) -> dict[str, str]:
    """Values of the placeholders that whole prompts may have besides."""
    lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False)]
    return {
        "options_list": str(lettered),
        "options_line": " ".join(lettered),
        **{f"option_{n}": choice for n, choice in enumerate(example.choices, start=1)},
    }


def facts(example: Example) -> str:
    """The annotation's facts about the video, one per line."""
    meta = example.meta
    lines = [f"Description: {meta['description']}"] if meta.get("description") else []
    return "\n".join([*lines, *(f"{title}: {text}" for title, text in meta.get("reasoning", {}).items())])


@dataclass(frozen=True)
class Span:
    """A part of a completion and its weight in the SFT loss."""

    text: str
    weight: float = 1.0


SECTION_WEIGHTS = {"think": 1.0, "draft": 1.0, "wrong_draft": 0.0, "reflect": 1.0, "revise": 1.0, "answer": 1.0}


def completion(example: Example, style: str, weights: Mapping[str, float] = SECTION_WEIGHTS) -> list[Span]:
    """The right completion of an example as spans weighted by section.

    Without a reflection record the reasoning comes from the annotation, in one pass. With one, style "think" has its
    first and its revised reasoning in one pass, "two_pass" everything except the reflection. A wrong draft has weight 0
    unless `weights` says otherwise: the model should learn to correct errors, not to make them. Tags and special tokens
    in the annotation's text are left out.
    """
    task, reflection = TASKS[example.task], example.reflection
    answer = f"<answer>{task.answer(example)}</answer>{task.closing(example)}"
    if style == "direct":
        return [Span(answer, weights["answer"])]
    if reflection is None:
        think = grammar.prose(task.plain_reasoning(example))
        return [Span(f"<think>{think}</think>", weights["think"]), Span(answer, weights["answer"])]
    check = task.check(example)
    think, reflect, revise = (
        grammar.prose(text.replace("{check}", check))
        for text in (reflection.think, reflection.reflect, reflection.revise)
    )
    if style == "think":
        return [Span(f"<think>{think} {revise}</think>", weights["think"]), Span(answer, weights["answer"])]
    reflect = "" if style == "two_pass" else reflect
    draft = task.draft_text(reflection.draft, example)
    return [
        Span(f"<think>{think}</think><draft>", weights["think"]),
        Span(draft, weights["draft" if reflection.draft_is_right else "wrong_draft"]),
        Span(f"</draft><reflect>{reflect}</reflect>", weights["reflect"]),
        Span(f"<revise>{revise}</revise>", weights["revise"]),
        Span(answer, weights["answer"]),
    ]
