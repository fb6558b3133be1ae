"""Completions to arrays, by one of two rules that are kept apart.

`strict` is what training rewards: the grammar exactly (each tag once, in order, only white space between), with a value
that can be read in every place that wants one, and no value that contradicts another.
`lenient` is what evaluation reads: tags where there are any, else a letter, class name or time expression that stands
alone after the reasoning.

Under either rule an answer and a time that contradict each other (`Anomaly` with [-1, -1], `Normal` with an interval)
are no answer: whoever says both says neither, and reading one half would pay for naming both. Every pattern here takes
time in proportion to the text, whatever the text: a model can write anything.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vau_jax.common.files import InputError
from vau_jax.datasets.vau_bench import LABELS, Interval
from vau_jax.types import Target, pytree

TASKS = ("qa", "grounding", "classification", "description")
VERIFIABLE = TASKS[:3]  # those with an answer that is right or wrong
UNKNOWN, NORMAL, INTERVAL = 0, 1, 2  # kinds of interval: none given, "no anomaly", seconds
TAG = re.compile(r"<(/?)(think|draft|reflect|revise|answer|glue)>")
PLAIN_ORDER = ("think", "answer")
REFLECTION_ORDER = ("think", "draft", "reflect", "revise", "answer")
LARGEST = float(np.finfo(np.float32).max)  # seconds: a number beyond it cannot be read


@pytree
class Answers:
    """N answers; a field that an answer does not have is -1 or UNKNOWN."""

    choice: np.ndarray  # int32 [N]: 0..3
    label: np.ndarray  # int32 [N]: index into annotations.LABELS
    anomaly: np.ndarray  # int32 [N]: 0 normal, 1 anomaly; agrees with `kind`
    kind: np.ndarray  # int32 [N]: UNKNOWN, NORMAL or INTERVAL
    interval: np.ndarray  # float32 [N, 2]: finite seconds, zeros unless kind is INTERVAL
    swapped: np.ndarray  # bool [N]: the interval stood in the text with its end first


@pytree
class Parsed:
    """N completions as numbers. A word is a run of letters and digits: punctuation is none."""

    task: np.ndarray  # int32 [N]: index into TASKS
    format_ok: np.ndarray  # bool [N]: the completion keeps the strict rule
    final: Answers
    draft: Answers
    reflect_words: np.ndarray  # int32 [N]: words inside <reflect>, 0 without one
    reflect_copied: np.ndarray  # float32 [N]: share of them that are copied from <think>, by `_copied`
    think_words: np.ndarray  # int32 [N]
    revise_words: np.ndarray  # int32 [N]
    contradicted: np.ndarray  # bool [N]: <revise> states another answer than <answer>, by `_contradicts`


class _Answer(NamedTuple):
    choice: int = -1
    label: int = -1
    anomaly: int = -1
    kind: int = UNKNOWN
    interval: tuple[float, float] = (0.0, 0.0)
    swapped: bool = False


NOTHING = _Answer()


def parse(
    texts: Sequence[str],
    task: str | Sequence[str],
    rule: Literal["strict", "lenient"] = "strict",
    reflection: bool = False,
) -> Parsed:
    """Reads N completions. `task` is one of TASKS, or one for each text; `reflection` asks for the long grammar.

    Under "strict" a completion that breaks the rule has no values at all.
    """
    tasks = [task] * len(texts) if isinstance(task, str) else list(task)
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or len(tasks) != len(texts) or rule not in ("strict", "lenient"):
        raise InputError(
            f"parse wants a task of {', '.join(TASKS)} for each of {len(texts)} texts and rule strict or lenient, "
            f"found tasks {unknown or len(tasks)} and rule {rule!r}"
        )
    forms, finals, drafts, counts, copied, contradicted = [], [], [], [], [], []
    for text, name in zip(texts, tasks, strict=True):
        sections = strict_sections(text, name, reflection)
        exact = None if sections is None else _strict(sections, name)
        found = sections or loose_sections(text)
        final, draft = _lenient(found, name) if rule == "lenient" else exact or (NOTHING, NOTHING)
        think, reflect, revise = (_words(found.get(tag, "")) for tag in ("think", "reflect", "revise"))
        forms.append(exact is not None)
        finals.append(final)
        drafts.append(draft)
        counts.append((len(reflect), len(think), len(revise)))
        copied.append(_copied(reflect, think))
        contradicted.append(_contradicts(found.get("revise", ""), final, name))
    reflect_words, think_words, revise_words = np.asarray(counts, np.int32).reshape(-1, 3).T
    return Parsed(
        task=np.asarray([TASKS.index(name) for name in tasks], np.int32),
        format_ok=np.asarray(forms, bool),
        final=_stack(finals),
        draft=_stack(drafts),
        reflect_words=reflect_words,
        reflect_copied=np.asarray(copied, np.float32),
        think_words=think_words,
        revise_words=revise_words,
        contradicted=np.asarray(contradicted, bool),
    )


def _stack(answers: list[_Answer]) -> Answers:
    columns = list(zip(*answers, strict=True)) or [()] * len(_Answer._fields)
    kinds = (np.int32, np.int32, np.int32, np.int32, np.float32, bool)
    arrays = [np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    arrays[4] = arrays[4].reshape(-1, 2)
    return Answers(*arrays)


# --- Sections -----------------------------------------------------------------------------------------------------

SPECIAL = re.compile(r"<\|\w+\|>")  # a special token of the chat template, written out
LONG_SPACE = re.compile(r"\s{17,}")  # more white space at one place than any layout needs


def strict_sections(text: str, task: str, reflection: bool) -> dict[str, str] | None:
    """Tag -> content when the text keeps the grammar exactly, else None.

    White space may stand between tags and around values, no more than 16 characters of it at one place. A special token
    (`<|im_start|>`) has no place in a completion.
    """
    order = REFLECTION_ORDER if reflection and task in VERIFIABLE else PLAIN_ORDER
    order = (*order, "glue") if task == "grounding" else order
    sections, at = {}, 0
    tags = list(TAG.finditer(text))
    if [m.group(1) + m.group(2) for m in tags] != [slash + name for name in order for slash in ("", "/")]:
        return None
    if SPECIAL.search(text) or LONG_SPACE.search(text):
        return None
    for opened, closed in zip(tags[::2], tags[1::2], strict=True):
        if text[at : opened.start()].strip():
            return None
        sections[opened.group(2)] = text[opened.end() : closed.start()]
        at = closed.end()
    return None if text[at:].strip() else sections


def loose_sections(text: str) -> dict[str, str]:
    """Tag -> content of its last complete occurrence; what follows the reasoning stands under "rest".

    An occurrence is complete when the tag is closed before it is opened again; tags inside it are its content.
    """
    tags = list(TAG.finditer(text))
    following: dict[str, re.Match[str]] = {}
    closing: list[re.Match[str] | None] = []  # of each tag: the next one of its name, where that closes
    for tag in reversed(tags):
        closing.append(after if (after := following.get(tag[2])) and after[1] else None)
        following[tag[2]] = tag
    found, at = {}, 0
    for tag, closed in zip(tags, reversed(closing), strict=True):
        if not tag[1] and closed and tag.start() >= at:
            found[tag[2]] = text[tag.end() : closed.start()]
            at = closed.end()
    ends = [tag.end() for tag in tags if tag[1] and tag[2] in ("think", "revise")]
    return {**found, "rest": TAG.sub(" ", text[ends[-1] if ends else 0 :])}


def prose(text: str) -> str:
    """A text as it may stand inside a tag: without tags of the grammar, special tokens and long white space."""
    return LONG_SPACE.sub(" ", SPECIAL.sub("", TAG.sub("", text)))


# --- Words of the reasoning ---------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _copied(words: Sequence[str], source: Sequence[str]) -> float:
    """The share of words that are copied, 0 without words.

    Copied are three words that stand side by side in the source, in this order, also where one foreign word was put
    between two of them. So neither punctuation and case nor a filler after every word hide a copy, and phrases that two
    texts about one video share by chance stay few.
    """
    known = set(zip(source, source[1:], source[2:], strict=False))
    copied: set[int] = set()
    for i in range(len(words) - 2):
        for j in (i + 1, i + 2):
            for k in (j + 1, j + 2):
                if k < len(words) and (words[i], words[j], words[k]) in known:
                    copied |= {i, j, k}
    return len(copied) / len(words) if words else 0.0


_STATES = r"(?i:\b(?:answer|option|choice|class|category|label)\s{0,3}(?:is|:))"
_SO = r"(?i:\b(?:so|thus|hence|therefore|choose|pick|must be))"
_NAMES = "|".join(re.escape(label).replace("_", "[ _]") for label in LABELS)
_CONCLUSION = {
    # A letter; after A no more of a sentence, as that begins with the article.
    "qa": re.compile(
        rf"(?:{_STATES}|{_SO})[\s,:*(]{{0,4}}(?i:(?:option|answer)\s{{1,3}})?\(?"
        r"([B-D]\b|A(?=[)*]{0,3}\s{0,3}(?:[.,;:!?]|$)))"
    ),
    "classification": re.compile(rf"{_STATES}[\s*]{{0,4}}((?i:{_NAMES}))\b"),
    "grounding": re.compile(rf"{_STATES}[\s*]{{0,4}}((?i:normal|anomaly))\b"),
}


def _contradicts(reasoning: str, final: _Answer, task: str) -> bool:
    """Whether reasoning says in so many words (`the answer is B`, `so B`) another answer than the one that is given.

    The last such statement counts. Reasoning that states none contradicts nothing: what it argues for is not guessed.
    """
    stated = _CONCLUSION[task].findall(reasoning) if task in VERIFIABLE and final != NOTHING else []
    if not stated:
        return False
    value = _value(stated[-1], task)
    return (value.choice, value.label, value.anomaly) != (final.choice, final.label, final.anomaly)


# --- Values -------------------------------------------------------------------------------------------------------

_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_PAIR = re.compile(rf"\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]\s*")


def _strict(sections: dict[str, str], task: str) -> tuple[_Answer, _Answer] | None:
    """Final answer and draft; None where one that the grammar wants cannot be read, or contradicts itself."""
    if task not in VERIFIABLE:
        return (NOTHING, NOTHING) if _words(sections["answer"]) else None
    if task == "grounding":
        name, *pair = sections.get("draft", "").split(maxsplit=1) or [""]
        drafted = "[-1, -1]" if not pair and _value(name, task).anomaly == 0 else "".join(pair)
        final, draft = _timed(sections["answer"], sections["glue"]), _timed(name, drafted)
    else:
        final, draft = _value(sections["answer"], task), _value(sections.get("draft", ""), task)
    return None if final == NOTHING or ("draft" in sections and draft == NOTHING) else (final, draft)


def _timed(name: str, pair: str) -> _Answer:
    """`Anomaly` with an interval, or `Normal` with [-1, -1]; anything else is no answer."""
    anomaly, (kind, interval) = _value(name, "grounding").anomaly, _pair(pair)
    return _Answer(anomaly=anomaly, kind=kind, interval=interval) if anomaly == _SAYS.get(kind) else NOTHING


_SAYS = {NORMAL: 0, INTERVAL: 1}  # whether there is an anomaly, by kind of interval


def _value(text: str, task: str) -> _Answer:
    """The value inside <answer> or <draft>: spaces around it, its case and a full stop behind it do not matter."""
    text = text.strip().removesuffix(".").strip()
    if task not in VERIFIABLE or not text.isascii():  # other scripts have letters that fold to ours
        return NOTHING
    if task == "qa":
        return _Answer(choice="ABCD".index(text)) if re.fullmatch("[A-D]", text) else NOTHING
    if task == "classification":
        return _Answer(label=_LABEL_OF.get(_fold(text), -1))
    return _Answer(anomaly={"normal": 0, "anomaly": 1}.get(text.casefold(), -1))


def _fold(text: str) -> str:
    return re.sub(r"[\s_]+", " ", text.strip()).casefold()


_LABEL_OF = {_fold(label): index for index, label in enumerate(LABELS)}


def _pair(text: str) -> tuple[int, tuple[float, float]]:
    """`[s, e]`: (-1, -1) is NORMAL; reversed, empty, negative or endless bounds are no interval."""
    match = _PAIR.fullmatch(text)
    if match is None:
        return UNKNOWN, (0.0, 0.0)
    start, end = float(match[1]), float(match[2])
    if (start, end) == (-1.0, -1.0):
        return NORMAL, (0.0, 0.0)
    return (INTERVAL, (start, end)) if 0 <= start < end <= LARGEST else (UNKNOWN, (0.0, 0.0))


# --- Lenient ------------------------------------------------------------------------------------------------------

# No number begins inside another and nothing is read twice (`*+`, `++`): else a long one takes its length squared.
_CLOCK = r"(?:(\d++):)?(?:(\d++):)?(\d++(?:\.\d++)?+)"
_SPAN = re.compile(
    rf"(?<!\d){_CLOCK}\s*+(?:(?:seconds?|sec|s)\s*+)?(?:,|-|–|to|until|till|and)\s*+{_CLOCK}(?!\d|:\d)",
    re.IGNORECASE,
)
_NO_ANOMALY = re.compile(r"\[\s*+-1(?:\.0*+)?\s*+,\s*+-1(?:\.0*+)?\s*+\]")
_DENIED = re.compile(  # `no anomaly`, `nothing abnormal`, `not normal`: what follows is denied
    r"\b(?:no|not|nothing|without)\s{1,3}(?:(?:an?|any|signs?|evidence|of)\s{1,3}){0,4}"
    r"(normal|anomal(?:y|ies|ous)|abnormal(?:ity|ities)?)\b"
)
_LETTER = re.compile(r"(?<![\w'])\(?([A-D])(?:[.):](?=\s|$)|(?=\s*$)|(?=\s*[,;\n]))")


def _lenient(found: dict[str, str], task: str) -> tuple[_Answer, _Answer]:
    """Final answer and draft in the sections of a text."""
    outside = found.get("rest", "")
    final, draft = found.get("answer", outside), found.get("draft", "")
    if task != "grounding":
        return _lenient_value(final, task), _lenient_value(draft, task)
    # Beside `Normal` in a text without <glue>, times are of what the text describes.
    time = found["glue"] if "glue" in found else "" if _lenient_value(final, task).anomaly == 0 else outside
    return _lenient_timed(final, time), _lenient_timed(draft, draft)


def _lenient_timed(text: str, time: str) -> _Answer:
    """An answer and its time; one that is lacking follows from the other, but for the time of an anomaly."""
    anomaly = _lenient_value(text, "grounding").anomaly
    kind, interval, swapped = _lenient_interval(time)
    if kind == UNKNOWN:
        return _Answer(anomaly=anomaly, kind=NORMAL if anomaly == 0 else UNKNOWN)
    if anomaly not in (-1, _SAYS[kind]):
        return NOTHING
    return _Answer(anomaly=_SAYS[kind], kind=kind, interval=interval, swapped=swapped)


def _lenient_value(text: str, task: str) -> _Answer:
    exact = _value(text, task)
    if exact != NOTHING or task not in VERIFIABLE:
        return exact
    if task == "qa":
        letters = {match.group(1) for match in _LETTER.finditer(text)}
        return _Answer(choice="ABCD".index(letters.pop())) if len(letters) == 1 else NOTHING
    if task == "classification":
        folded = f" {re.sub(r'[^a-z ]', ' ', _fold(text))} "
        named = {index for name, index in _LABEL_OF.items() if f" {name} " in folded}
        return _Answer(label=named.pop()) if len(named) == 1 else NOTHING
    plain = _DENIED.sub(lambda m: " anomaly " if m[1] == "normal" else " normal ", text.casefold())
    words = set(re.findall(r"[a-z]+", plain))
    normal, anomaly = bool(words & {"normal"}), bool(words & {"anomaly", "abnormal", "anomalous"})
    return _Answer(anomaly=int(anomaly)) if normal != anomaly else NOTHING


def _lenient_interval(text: str) -> tuple[int, tuple[float, float], bool]:
    """The first time span in a text; `1:05` and `01:02:03.5` are clock times, a reversed span is turned round."""
    if _NO_ANOMALY.search(text):
        return NORMAL, (0.0, 0.0), False
    match = _SPAN.search(text)
    if match is None:
        return UNKNOWN, (0.0, 0.0), False
    start, end = _seconds(*match.groups()[:3]), _seconds(*match.groups()[3:])
    if start == end or not max(start, end) <= LARGEST:
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
    """The truth of N examples, each (task, answer letter, class name, interval), as arrays.

    Raises InputError for an interval that float32 does not hold: no score could be made of it.
    """
    for *_, interval in items:
        if isinstance(interval, tuple) and not 0 <= interval[0] <= interval[1] <= LARGEST:
            raise InputError(f"interval {interval}: expected 0 <= start <= end in seconds, finite in float32")
    kinds = [UNKNOWN if i is None else NORMAL if i == "normal" else INTERVAL for _, _, _, i in items]
    return Target(
        task=np.asarray([TASKS.index(task) for task, _, _, _ in items], np.int32),
        choice=np.asarray(["ABCD".index(letter) if letter else -1 for _, letter, _, _ in items], np.int32),
        label=np.asarray([LABELS.index(label) if label else -1 for _, _, label, _ in items], np.int32),
        kind=np.asarray(kinds, np.int32),
        interval=np.asarray([i if isinstance(i, tuple) else (0, 0) for _, _, _, i in items], np.float32).reshape(-1, 2),
    )
