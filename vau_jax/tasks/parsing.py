"""Completions to arrays, by one of two separate rules.

`strict` is the rule of the training rewards: the grammar exactly (each tag once, in order, only white space between),
every value parseable, and no two values that contradict each other. `lenient` is the rule of evaluation: tags where
they exist, else a letter, class name or time expression on its own after the reasoning. Each task defines its values
and how they are parsed.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vau_jax.common.files import InputError
from vau_jax.tasks import TASKS as TASK_OF
from vau_jax.tasks import columns_of_all, grammar
from vau_jax.tasks.base import Task
from vau_jax.tasks.columns import Columns, Values, stack
from vau_jax.tasks.example import Annotation, Example
from vau_jax.tasks.record import Record
from vau_jax.types import pytree

TASKS = tuple(TASK_OF)
VERIFIABLE = tuple(name for name, task in TASK_OF.items() if task.verifiable)

Interval = None | Literal["normal"] | tuple[float, float]


@pytree
class Parsed:
    """N parsed completions as arrays. A word is a run of letters and digits; punctuation does not count."""

    task: np.ndarray  # int32 [N]: index into TASKS
    format_ok: np.ndarray  # bool [N]: the completion keeps the strict rule
    final: Columns  # the final answers, the columns of all tasks
    draft: Columns
    reflect_words: np.ndarray  # int32 [N]: words inside <reflect>, 0 without one
    reflect_copied: np.ndarray  # float32 [N]: share of them copied from <think>, by `grammar.copied_share`
    think_words: np.ndarray  # int32 [N]
    revise_words: np.ndarray  # int32 [N]
    contradicted: np.ndarray  # bool [N]: <revise> states another answer than <answer>, by `_contradicts`


def parse(
    texts: Sequence[str],
    task: str | Sequence[str],
    rule: Literal["strict", "lenient"] = "strict",
    reflection: bool = False,
    choices: Sequence[Sequence[str]] | None = None,
) -> Parsed:
    """Parses N completions.

    `task` is one of TASKS, or one for each text; `reflection` selects the long grammar. `choices` are the options or
    labels of each text's example, where they differ from the task's own (four options; VAU-Bench's labels). Under
    "strict" a completion that breaks the rule has no values at all.
    """
    tasks = [task] * len(texts) if isinstance(task, str) else list(task)
    unknown = sorted(set(tasks) - set(TASK_OF))
    if unknown or len(tasks) != len(texts) or rule not in ("strict", "lenient"):
        raise InputError(
            f"parse needs a task of {', '.join(TASK_OF)} for each of {len(texts)} texts and rule strict or lenient, "
            f"found tasks {unknown or len(tasks)} and rule {rule!r}"
        )
    if choices is None:
        choices = [TASK_OF[name].default_choices for name in tasks]
    rows = [
        _read(text, TASK_OF[name], rule, reflection, own) for text, name, own in zip(texts, tasks, choices, strict=True)
    ]
    read = {name: [row[name] for row in rows] for name in ("format_ok", "final", "draft", *_COUNTS, *_CHECKS)}
    columns = columns_of_all()
    return Parsed(
        task=np.asarray([list(TASK_OF).index(name) for name in tasks], np.int32),
        format_ok=np.asarray(read["format_ok"], bool),
        final=stack(columns, read["final"]),
        draft=stack(columns, read["draft"]),
        **{name: np.asarray(read[name], np.int32) for name in _COUNTS},
        reflect_copied=np.asarray(read["reflect_copied"], np.float32),
        contradicted=np.asarray(read["contradicted"], bool),
    )


_COUNTS = ("reflect_words", "think_words", "revise_words")
_CHECKS = ("reflect_copied", "contradicted")


def _read(text: str, task: Task, rule: str, reflection: bool, choices: Sequence[str]) -> dict[str, Any]:
    """One completion: the fields of `Parsed`, answers as values by column."""
    exact_sections = grammar.strict_sections(text, task.tags(reflection))
    exact = None if exact_sections is None else task.strict(exact_sections, choices)
    sections = exact_sections or grammar.loose_sections(text)
    final, draft = task.lenient(sections, choices) if rule == "lenient" else exact or ({}, {})
    think, reflect, revise = (grammar.words(sections.get(tag, "")) for tag in ("think", "reflect", "revise"))
    return {
        "format_ok": exact is not None,
        "final": final,
        "draft": draft,
        "reflect_words": len(reflect),
        "think_words": len(think),
        "revise_words": len(revise),
        "reflect_copied": grammar.copied_share(reflect, think),
        "contradicted": _contradicts(sections.get("revise", ""), final, task, choices),
    }


def _contradicts(reasoning: str, final: Values, task: Task, choices: Sequence[str]) -> bool:
    """Whether the reasoning explicitly states (`the answer is B`, `so B`) another answer than the one given.

    The last such statement counts. Reasoning without one contradicts nothing: its argument is not interpreted.
    """
    pattern = task.conclusion(choices) if final else None
    stated = pattern.findall(reasoning) if pattern else []
    if not stated:
        return False
    value = task.value(stated[-1], choices)
    return any(final.get(name) != each for name, each in value.items()) or not value


def targets(items: Sequence[tuple[str, str | None, str | None, Interval]]) -> Columns:
    """The truth of N questions of VAU-Bench, each (task, answer letter, class name, interval), as arrays [N, ...].

    The columns are "task" (int32, index into TASKS) and those of all tasks. Raises InputError for an interval that
    float32 cannot represent: it could not be scored.
    """
    rows: list[tuple[str, Values]] = []
    for name, letter, label, interval in items:
        annotation = Annotation(
            options=("",) * 4,
            answer="ABCD".index(letter) if letter else None,
            label=label or None,
            intervals=None if interval is None else () if interval == "normal" else (tuple(interval),),
        )
        values: Values = {}
        for task in TASK_OF.values():
            truth = task.truth(annotation)
            values |= {} if truth is None else task.truth_values(truth, task.choices(annotation))
        rows.append((name, values))
    return _with_tasks(rows)


def targets_of(examples: Sequence[Example | Record]) -> Columns:
    """The truth of N examples, or of their N records, in the format of `targets`; columns of other tasks are missing
    values.
    """
    return _with_tasks([(e.task, TASK_OF[e.task].truth_values(e.truth, e.choices)) for e in examples])


def _with_tasks(rows: Sequence[tuple[str, Values]]) -> Columns:
    indices = np.asarray([list(TASK_OF).index(name) for name, _ in rows], np.int32)
    return Columns(task=indices, **stack(columns_of_all(), [values for _, values in rows]))


def stack_answers(answers: Sequence[Values]) -> Columns:
    """N answers as arrays [N, ...] of all tasks' columns."""
    return stack(columns_of_all(), answers)


def values_at(answers: Columns, index: int, task: Task) -> Values:
    """Answer `index` as JSON values of the task's own columns, including missing ones."""
    return {name: np.asarray(answers[name][index]).tolist() for name in task.columns}
