"""Completions to arrays, by one of two rules that are kept apart.

`strict` is what training rewards: the grammar exactly (each tag once, in order, only white space between), then values.
`lenient` is what evaluation reads: tags where there are any, else a letter, class name or time expression that stands
alone after the reasoning.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vau_jax.data.annotations import LABELS, Interval
from vau_jax.files import InputError
from vau_jax.types import Target, pytree

TASKS = ("qa", "grounding", "classification", "description")
VERIFIABLE = TASKS[:3]  # those with an answer that is right or wrong
UNKNOWN, NORMAL, INTERVAL = 0, 1, 2  # kinds of interval: none given, "no anomaly", seconds
TAG = re.compile(r"<(/?)(think|draft|reflect|revise|answer|glue)>")
PLAIN_ORDER = ("think", "answer")
REFLECTION_ORDER = ("think", "draft", "reflect", "revise", "answer")


@pytree
class Answers:
    """N answers; a field that an answer does not have is -1 or UNKNOWN."""

    choice: np.ndarray  # int32 [N]: 0..3
    label: np.ndarray  # int32 [N]: index into annotations.LABELS
    anomaly: np.ndarray  # int32 [N]: 0 normal, 1 anomaly
    kind: np.ndarray  # int32 [N]: UNKNOWN, NORMAL or INTERVAL
    interval: np.ndarray  # float32 [N, 2]: seconds, zeros unless kind is INTERVAL
    swapped: np.ndarray  # bool [N]: the interval stood in the text with its end first


@pytree
class Parsed:
    """N completions as numbers."""

    task: np.ndarray  # int32 [N]: index into TASKS
    form: np.ndarray  # bool [N]: the grammar is kept exactly
    final: Answers
    draft: Answers
    reflect_words: np.ndarray  # int32 [N]: words inside <reflect>, 0 without one
    reflect_copied: np.ndarray  # float32 [N]: share of its runs of three words that stand in <think> too


class _Answer(NamedTuple):
    choice: int = -1
    label: int = -1
    anomaly: int = -1
    kind: int = UNKNOWN
    interval: tuple[float, float] = (0.0, 0.0)
    swapped: bool = False


def parse(
    texts: Sequence[str],
    task: str | Sequence[str],
    rule: Literal["strict", "lenient"] = "strict",
    reflection: bool = False,
) -> Parsed:
    """Reads N completions. `task` is one of TASKS, or one for each text; `reflection` asks for the long grammar.

    Under "strict" a completion that breaks the grammar has no values at all.
    """
    tasks = [task] * len(texts) if isinstance(task, str) else list(task)
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or len(tasks) != len(texts) or rule not in ("strict", "lenient"):
        raise InputError(
            f"parse wants a task of {', '.join(TASKS)} for each of {len(texts)} texts and rule strict or lenient, "
            f"found tasks {unknown or len(tasks)} and rule {rule!r}"
        )
    read = _strict if rule == "strict" else _lenient
    forms, finals, drafts, words, copied = [], [], [], [], []
    for text, name in zip(texts, tasks, strict=True):
        sections = strict_sections(text, name, reflection)
        forms.append(sections is not None)
        final, draft = read(text, sections, name)
        finals.append(final)
        drafts.append(draft)
        found = sections or loose_sections(text)
        words.append(len(found.get("reflect", "").split()))
        copied.append(_copied(found.get("reflect", ""), found.get("think", "")))
    return Parsed(
        task=np.asarray([TASKS.index(name) for name in tasks], np.int32),
        form=np.asarray(forms, bool),
        final=_stack(finals),
        draft=_stack(drafts),
        reflect_words=np.asarray(words, np.int32),
        reflect_copied=np.asarray(copied, np.float32),
    )


def _copied(text: str, source: str) -> float:
    """The share of a text's runs of three words that another has; 0 for one without such a run."""
    runs, known = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (text.split(), source.split()))
    return len(runs & known) / len(runs) if runs else 0.0


def _stack(answers: list[_Answer]) -> Answers:
    columns = list(zip(*answers, strict=True)) or [()] * len(_Answer._fields)
    kinds = (np.int32, np.int32, np.int32, np.int32, np.float32, bool)
    arrays = [np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    arrays[4] = arrays[4].reshape(-1, 2)
    return Answers(*arrays)


# --- Sections -----------------------------------------------------------------------------------------------------


def strict_sections(text: str, task: str, reflection: bool) -> dict[str, str] | None:
    """Tag -> content when the text keeps the grammar exactly, else None."""
    order = REFLECTION_ORDER if reflection and task in VERIFIABLE else PLAIN_ORDER
    order = (*order, "glue") if task == "grounding" else order
    sections, at = {}, 0
    tags = list(TAG.finditer(text))
    if [m.group(1) + m.group(2) for m in tags] != [slash + name for name in order for slash in ("", "/")]:
        return None
    for opened, closed in zip(tags[::2], tags[1::2], strict=True):
        if text[at : opened.start()].strip():
            return None
        sections[opened.group(2)] = text[opened.end() : closed.start()]
        at = closed.end()
    return None if text[at:].strip() else sections


def loose_sections(text: str) -> dict[str, str]:
    """Tag -> content of its last complete occurrence; what follows the reasoning stands under "rest"."""
    found = {m.group(1): m.group(2) for m in re.finditer(r"<(\w+)>((?:(?!<\1>).)*?)</\1>", text, re.DOTALL)}
    rest = re.split(r"</(?:think|revise)>", text)[-1]
    return {**found, "rest": TAG.sub(" ", rest)}


# --- Values -------------------------------------------------------------------------------------------------------

_NUMBER = r"-?\d+(?:\.\d+)?"
_PAIR = re.compile(rf"\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]\s*")


def _strict(text: str, sections: dict[str, str] | None, task: str) -> tuple[_Answer, _Answer]:
    if sections is None:
        return _Answer(), _Answer()
    final = _value(sections["answer"], task)
    draft = _value(sections.get("draft", ""), task)
    if task == "grounding":
        kind, interval = _pair(sections["glue"])
        final = final._replace(kind=kind, interval=interval)
        name, _, pair = sections.get("draft", "").strip().partition(" ")
        anomaly = _anomaly(name)
        kind, interval = (NORMAL, (0.0, 0.0)) if anomaly == 0 and not pair else _pair(pair)
        draft = _Answer(anomaly=anomaly, kind=kind, interval=interval)
    return final, draft


def _value(text: str, task: str) -> _Answer:
    """The value inside <answer> or <draft>: spaces around it, its case and a full stop behind it do not matter."""
    if task not in VERIFIABLE:
        return _Answer()
    text = text.strip().removesuffix(".").strip()
    if task == "qa":
        return _Answer(choice="ABCD".index(text)) if re.fullmatch("[A-D]", text) else _Answer()
    return _Answer(label=_label(text)) if task == "classification" else _Answer(anomaly=_anomaly(text))


def _fold(text: str) -> str:
    return re.sub(r"[\s_]+", " ", text.strip()).casefold()


_LABEL_OF = {_fold(label): index for index, label in enumerate(LABELS)}


def _label(text: str) -> int:
    return _LABEL_OF.get(_fold(text), -1)


def _anomaly(text: str) -> int:
    return {"normal": 0, "anomaly": 1}.get(text.strip().removesuffix(".").casefold(), -1)


def _pair(text: str) -> tuple[int, tuple[float, float]]:
    """`[s, e]`: (-1, -1) is NORMAL; reversed, empty or negative bounds are no interval."""
    match = _PAIR.fullmatch(text)
    if match is None:
        return UNKNOWN, (0.0, 0.0)
    start, end = float(match[1]), float(match[2])
    if (start, end) == (-1.0, -1.0):
        return NORMAL, (0.0, 0.0)
    return (INTERVAL, (start, end)) if 0 <= start < end else (UNKNOWN, (0.0, 0.0))


# --- Lenient ------------------------------------------------------------------------------------------------------

_CLOCK = r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)"
_SPAN = re.compile(
    rf"(?:from|between)?\s*\[?\s*{_CLOCK}\s*(?:s|sec|seconds?)?\s*(?:,|-|–|to|until|till|and)\s*{_CLOCK}(?![\d:])",
    re.IGNORECASE,
)
_LETTER = re.compile(r"(?<![\w'])\(?([A-D])(?:[.):](?=\s|$)|(?=\s*$)|(?=\s*[,;\n]))")


def _lenient(text: str, sections: dict[str, str] | None, task: str) -> tuple[_Answer, _Answer]:
    found = sections or loose_sections(text)
    outside = found.get("rest", "")
    final = _lenient_value(found.get("answer", outside), task)
    if task == "grounding":
        kind, interval, swapped = _lenient_interval(found.get("glue", outside))
        if kind == UNKNOWN and final.anomaly == 0:
            kind = NORMAL
        anomaly = final.anomaly if final.anomaly >= 0 else {NORMAL: 0, INTERVAL: 1}.get(kind, -1)
        final = _Answer(anomaly=anomaly, kind=kind, interval=interval, swapped=swapped)
    draft = _lenient_value(found.get("draft", ""), task)
    if task == "grounding":
        kind, interval, swapped = _lenient_interval(found.get("draft", ""))
        kind = NORMAL if kind == UNKNOWN and draft.anomaly == 0 else kind
        draft = draft._replace(kind=kind, interval=interval, swapped=swapped)
    return final, draft


def _lenient_value(text: str, task: str) -> _Answer:
    exact = _value(text, task)
    if exact != _Answer() or task not in VERIFIABLE:
        return exact
    if task == "qa":
        letters = {match.group(1) for match in _LETTER.finditer(text)}
        return _Answer(choice="ABCD".index(letters.pop())) if len(letters) == 1 else _Answer()
    if task == "classification":
        folded = f" {re.sub(r'[^a-z ]', ' ', _fold(text))} "
        named = {index for name, index in _LABEL_OF.items() if f" {name} " in folded}
        return _Answer(label=named.pop()) if len(named) == 1 else _Answer()
    words = set(re.findall(r"[a-z]+", text.casefold()))
    normal, anomaly = bool(words & {"normal"}), bool(words & {"anomaly", "abnormal", "anomalous"})
    return _Answer(anomaly=int(anomaly)) if normal != anomaly else _Answer()


def _lenient_interval(text: str) -> tuple[int, tuple[float, float], bool]:
    """The first time span in a text; `1:05` and `01:02:03.5` are clock times, a reversed span is turned round."""
    if re.search(r"\[\s*-1(?:\.0*)?\s*,\s*-1(?:\.0*)?\s*\]", text):
        return NORMAL, (0.0, 0.0), False
    match = _SPAN.search(text)
    if match is None:
        return UNKNOWN, (0.0, 0.0), False
    start, end = _seconds(*match.groups()[:3]), _seconds(*match.groups()[3:])
    if start == end:
        return UNKNOWN, (0.0, 0.0), False
    return INTERVAL, (min(start, end), max(start, end)), start > end


def _seconds(first: str | None, second: str | None, last: str) -> float:
    """h:m:s, m:s (the regex fills `first` first) or s."""
    total = 0.0
    for part in (first, second):
        total = total * 60 + float(part) if part is not None else total
    return total * 60 + float(last)


# --- Truth --------------------------------------------------------------------------------------------------------


def targets(items: Sequence[tuple[str, str | None, str | None, Interval]]) -> Target:
    """The truth of N examples, each (task, answer letter, class name, interval), as arrays."""
    kinds = [UNKNOWN if i is None else NORMAL if i == "normal" else INTERVAL for _, _, _, i in items]
    return Target(
        task=np.asarray([TASKS.index(task) for task, _, _, _ in items], np.int32),
        choice=np.asarray(["ABCD".index(letter) if letter else -1 for _, letter, _, _ in items], np.int32),
        label=np.asarray([LABELS.index(label) if label else -1 for _, _, label, _ in items], np.int32),
        kind=np.asarray(kinds, np.int32),
        interval=np.asarray([i if isinstance(i, tuple) else (0, 0) for _, _, _, i in items], np.float32).reshape(-1, 2),
    )
