"""The grammar of completions: tags, sections and words, whatever the task.

    <think>…</think><answer>…</answer>[<glue>[s, e]</glue>]
    <think>…</think><draft>…</draft><reflect>…</reflect><revise>…</revise><answer>…</answer>[<glue>…</glue>]

Every pattern takes time in proportion to the text, whatever the text: a model can write anything.
"""

import re
from collections.abc import Sequence

TAG = re.compile(r"<(/?)(think|draft|reflect|revise|answer|glue)>")
PLAIN_ORDER = ("think", "answer")
REFLECTION_ORDER = ("think", "draft", "reflect", "revise", "answer")

# How reasoning states its answer: `the answer is`, `so`.
STATES = r"(?i:\b(?:answer|option|choice|class|category|label)\s{0,3}(?:is|:))"
SO = r"(?i:\b(?:so|thus|hence|therefore|choose|pick|must be))"

# --- Sections -----------------------------------------------------------------------------------------------------

SPECIAL = re.compile(r"<\|\w+\|>")  # a special token of the chat template, written out
LONG_SPACE = re.compile(r"\s{17,}")  # a longer run of white space than any layout needs


def strict_sections(text: str, order: Sequence[str]) -> dict[str, str] | None:
    """Tag -> content when the text has the tags of `order` and nothing else, each once, in this order; else None.

    White space is allowed between tags and around values, at most 16 characters in a row. Special tokens
    (`<|im_start|>`) are not allowed.
    """
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
    """Tag -> content of its last complete occurrence; the text after the reasoning is under "rest".

    An occurrence is complete when the tag is closed before it is opened again; tags inside it are part of its content.
    """
    tags = list(TAG.finditer(text))
    following: dict[str, re.Match[str]] = {}
    closing: list[re.Match[str] | None] = []  # of each tag: the next one of its name, where that closes
    for tag in reversed(tags):
        closing.append(after if (after := following.get(tag[2])) and after[1] else None)
        following[tag[2]] = tag
    sections, at = {}, 0
    for tag, closed in zip(tags, reversed(closing), strict=True):
        if not tag[1] and closed and tag.start() >= at:
            sections[tag[2]] = text[tag.end() : closed.start()]
            at = closed.end()
    ends = [tag.end() for tag in tags if tag[1] and tag[2] in ("think", "revise")]
    return {**sections, "rest": TAG.sub(" ", text[ends[-1] if ends else 0 :])}


def prose(text: str) -> str:
    """A text that is valid inside a tag: without tags of the grammar, special tokens and long white space."""
    return LONG_SPACE.sub(" ", SPECIAL.sub("", TAG.sub("", text)))


# --- Words of the reasoning ---------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def copied_share(words: Sequence[str], source: Sequence[str]) -> float:
    """The share of words that are copied from the source, 0 without words.

    A word counts as copied when it is part of three words that are adjacent in the source, in this order, also with one
    other word between two of them. Punctuation, case and filler words thus do not hide a copy, while short phrases that
    two texts about one video share by chance count little.
    """
    known = set(zip(source, source[1:], source[2:], strict=False))
    copied: set[int] = set()
    for i in range(len(words) - 2):
        for j in (i + 1, i + 2):
            for k in (j + 1, j + 2):
                if k < len(words) and (words[i], words[j], words[k]) in known:
                    copied |= {i, j, k}
    return len(copied) / len(words) if words else 0.0
