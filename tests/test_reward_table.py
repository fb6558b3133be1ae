"""Completions and what they earn, a row each; and that nobody earns more by contradicting himself."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from vau_jax.datasets.vau_bench import load
from vau_jax.tasks import parsing, rewards
from vau_jax.tasks.columns import Columns

TRUTHS = {
    "C": ("qa", "C", None, None),
    "fire": ("grounding", None, "Fire", (2.0, 6.0)),
    "normal": ("grounding", None, "Normal", "normal"),
    "assault": ("classification", None, "Assault", None),
    "water": ("classification", None, "Water_incident", None),
    "text": ("description", None, None, None),
}
THINK = "a man runs to the door and smoke rises behind him in the yard"
REFLECT = "smoke would not come from a fight"
REVISE = "the shed burns and he flees"
NONE = "[-1.0, -1.0]"
HUGE = "9" * 39


def short(answer: str, think: str = THINK) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def timed(answer: str, glue: str) -> str:
    return f"{short(answer)}<glue>{glue}</glue>"


def long(
    draft: str, answer: str, glue: str = "", think: str = THINK, reflect: str = REFLECT, revise: str = REVISE
) -> str:
    text = f"<think>{think}</think><draft>{draft}</draft><reflect>{reflect}</reflect><revise>{revise}</revise>"
    return f"{text}<answer>{answer}</answer>" + (f"<glue>{glue}</glue>" if glue else "")


def filled(text: str, every: int, filler: str) -> str:
    """The text with a filler behind every so many words."""
    words = text.split()
    return " ".join(word + f" {filler}" * (i % every == 0) for i, word in enumerate(words, start=1))


def marked(text: str) -> str:
    """The text with a full stop at every third word and the case of every second one changed."""
    words = [word.upper() if i % 2 else word for i, word in enumerate(text.split())]
    return filled(" ".join(words), 3, ".")


# Name: truth, completion, (format, accuracy, temporal IoU, reflection). Reflection asks for the long grammar.
PLAIN = {
    "right letter": ("C", short("C"), (1, 1, 0)),
    "wrong letter": ("C", short("B"), (1, 0, 0)),
    "spaces around the letter": ("C", short("\n C "), (1, 1, 0)),
    "full stop behind the letter": ("C", short("C."), (1, 1, 0)),
    "new lines between the tags": ("C", short("C").replace("><", ">\n\n<"), (1, 1, 0)),
    "no reasoning": ("C", short("C", ""), (1, 1, 0)),
    "two full stops": ("C", short("C.."), (0, 0, 0)),
    "small letter": ("C", short("c"), (0, 0, 0)),
    "letter and option": ("C", short("C. a fire"), (0, 0, 0)),
    "letter that is no option": ("C", short("E"), (0, 0, 0)),
    "full-width letter": ("C", short("\uff23"), (0, 0, 0)),
    "Cyrillic letter": ("C", short("\u0421"), (0, 0, 0)),
    "empty answer": ("C", short(""), (0, 0, 0)),
    "two answers": ("C", short("C") + "<answer>A</answer>", (0, 0, 0)),
    "two letters": ("C", short("A, B, C or D"), (0, 0, 0)),
    "answer inside the reasoning": ("C", "<think><answer>C</answer></think><answer>C</answer>", (0, 0, 0)),
    "reasoning after the answer": ("C", "<answer>C</answer><think>t</think>", (0, 0, 0)),
    "text before the tags": ("C", "So " + short("C"), (0, 0, 0)),
    "tag left open": ("C", "<think>t</think><answer>C", (0, 0, 0)),
    "tag with a space": ("C", short("C").replace("<answer>", "<answer >"), (0, 0, 0)),
    "special token in the reasoning": ("C", short("C", "a man <|im_start|> runs"), (0, 0, 0)),
    "special token in the answer": ("C", short("C<|endoftext|>"), (0, 0, 0)),
    "special token behind the end": ("C", short("C") + "<|im_end|>", (0, 0, 0)),
    "a thousand lines between the tags": ("C", short("C").replace("><", ">" + "\n" * 1000 + "<"), (0, 0, 0)),
    "a thousand lines in front": ("C", "\n" * 1000 + short("C"), (0, 0, 0)),
    "a thousand lines in the answer": ("C", short("\n" * 1000 + "C"), (0, 0, 0)),
    "a thousand lines in the reasoning": ("C", short("C", "a" + "\n" * 1000 + "b"), (0, 0, 0)),
    "nothing": ("C", "", (0, 0, 0)),
    "the long grammar": ("C", long("C", "C"), (0, 0, 0)),
    "right interval": ("fire", timed("Anomaly", "[2.0, 6.0]"), (1, 1, 1)),
    "half of the interval": ("fire", timed("Anomaly", "[2, 4]"), (1, 1, 0.5)),
    "another interval": ("fire", timed("Anomaly", "[7, 9]"), (1, 1, 0)),
    "spaces and lines in the interval": ("fire", timed(" anomaly. ", "\n[ 2.0 ,\n6.0 ]\n"), (1, 1, 1)),
    "Normal on a fire": ("fire", timed("Normal", NONE), (1, 0, 0)),
    "Normal on a normal video": ("normal", timed("Normal", NONE), (1, 1, 1)),
    "Normal with whole numbers": ("normal", timed("NORMAL", "[-1, -1]"), (1, 1, 1)),
    "Anomaly on a normal video": ("normal", timed("Anomaly", "[2, 6]"), (1, 0, 0)),
    "Anomaly without a time, on a fire": ("fire", timed("Anomaly", NONE), (0, 0, 0)),
    "Anomaly without a time, on a normal video": ("normal", timed("Anomaly", NONE), (0, 0, 0)),
    "Normal with a time, on a fire": ("fire", timed("Normal", "[2, 6]"), (0, 0, 0)),
    "Normal with a time, on a normal video": ("normal", timed("Normal", "[2, 6]"), (0, 0, 0)),
    "no word, but the right time": ("fire", timed("", "[2, 6]"), (0, 0, 0)),
    "no word, but no anomaly": ("normal", timed("dunno", NONE), (0, 0, 0)),
    "no glue": ("fire", short("Anomaly"), (0, 0, 0)),
    "empty glue": ("fire", timed("Anomaly", ""), (0, 0, 0)),
    "interval in words": ("fire", timed("Anomaly", "2 to 6 s"), (0, 0, 0)),
    "reversed interval": ("fire", timed("Anomaly", "[6, 2]"), (0, 0, 0)),
    "interval without length": ("fire", timed("Anomaly", "[3, 3]"), (0, 0, 0)),
    "negative start": ("fire", timed("Anomaly", "[-5, 6]"), (0, 0, 0)),
    "half of no anomaly": ("normal", timed("Normal", "[-1, 0]"), (0, 0, 0)),
    "two intervals": ("fire", timed("Anomaly", "[2, 4], [4, 6]"), (0, 0, 0)),
    "Anomaly with two full stops": ("fire", timed("Anomaly..", "[2, 6]"), (0, 0, 0)),
    "Arabic-Indic digits": ("fire", timed("Anomaly", "[\u0662, \u0666]"), (0, 0, 0)),
    "full-width digits": ("fire", timed("Anomaly", "[\uff12, \uff16]"), (0, 0, 0)),
    "end of 39 digits": ("fire", timed("Anomaly", f"[2, {HUGE}]"), (0, 0, 0)),
    "both of 39 digits": ("fire", timed("Anomaly", f"[{HUGE}, {HUGE}9]"), (0, 0, 0)),
    "end of 5,000 digits": ("fire", timed("Anomaly", f"[2, {'9' * 5000}]"), (0, 0, 0)),
    "end of 38 digits": ("fire", timed("Anomaly", f"[2, {'9' * 38}]"), (1, 1, 0)),
    "infinity": ("fire", timed("Anomaly", "[2, inf]"), (0, 0, 0)),
    "exponent": ("fire", timed("Anomaly", "[2, 6e0]"), (0, 0, 0)),
    "right class": ("assault", short("Assault"), (1, 1, 0)),
    "class in small letters": ("assault", short("assault"), (1, 1, 0)),
    "class with a space": ("water", short("Water incident"), (1, 1, 0)),
    "wrong class": ("assault", short("Fire"), (1, 0, 0)),
    "class with old letters": ("assault", short("A\u017f\u017fault"), (0, 0, 0)),
    "two classes": ("assault", short("Assault, Fire"), (0, 0, 0)),
    "no class": ("assault", short("a fight"), (0, 0, 0)),
    "a description": ("text", short("Conclusion: the shed burns."), (1, 0, 0)),
    "an empty description": ("text", short(" . "), (0, 0, 0)),
}
REFLECTED = {
    "right draft kept": ("C", long("C", "C"), (1, 1, 0, 0.75)),
    "wrong draft corrected": ("C", long("A", "C"), (1, 1, 0, 0.5)),
    "wrong draft kept": ("C", long("A", "A"), (1, 0, 0, 0.25)),
    "right draft broken": ("C", long("C", "A"), (1, 0, 0, 0)),
    "reflection left empty": ("C", long("C", "C", reflect=""), (1, 1, 0, 0)),
    "reflection of full stops": ("C", long("C", "C", reflect=". . ."), (1, 1, 0, 0)),
    "reflection of dashes": ("C", long("C", "C", reflect="- _ - _ \u2014"), (1, 1, 0, 0)),
    "one word": ("C", long("C", "C", reflect="Right."), (1, 1, 0, 0.25)),
    "endless reflection": ("C", long("C", "C", reflect="hm " * 200), (1, 1, 0, 0)),
    "only full stops reflected, nothing else": ("C", long("C", "C", "", "", ". . .", ""), (1, 1, 0, 0)),
    "no first reasoning": ("C", long("C", "C", think=" "), (1, 1, 0, 0)),
    "no revised reasoning": ("C", long("C", "C", revise="..."), (1, 1, 0, 0)),
    "copied": ("C", long("C", "C", reflect=THINK), (1, 1, 0, 0)),
    "copied with marks and capitals": ("C", long("C", "C", reflect=marked(THINK)), (1, 1, 0, 0)),
    "copied with commas": ("C", long("C", "C", reflect=THINK.replace(" ", ", ")), (1, 1, 0, 0)),
    "copied with a filler every third word": ("C", long("C", "C", reflect=filled(THINK, 3, "hm")), (1, 1, 0, 0)),
    "copied with a filler every second word": ("C", long("C", "C", reflect=filled(THINK, 2, "the")), (1, 1, 0, 0)),
    "copied with a filler every word": ("C", long("C", "C", reflect=filled(THINK, 1, "hm")), (1, 1, 0, 0)),
    "a phrase taken up": ("C", long("C", "C", reflect=f"but smoke rises behind him, {REFLECT}"), (1, 1, 0, 0.75)),
    "argues for its answer": ("C", long("A", "C", revise=f"{REVISE}. So the answer is C."), (1, 1, 0, 0.5)),
    "argues against others": ("C", long("A", "C", revise="the answer is not A or B: C fits"), (1, 1, 0, 0.5)),
    "begins with an article": ("C", long("C", "C", revise="So A man flees. Therefore C."), (1, 1, 0, 0.75)),
    "argues for another letter": ("C", long("C", "C", revise=f"{REVISE}. So the answer is B."), (1, 1, 0, 0)),
    "argues for another letter, bold": ("C", long("C", "C", revise="The correct answer is: **(D)**"), (1, 1, 0, 0)),
    "argues for a letter in short": ("C", long("C", "C", revise=f"{REVISE}, therefore A."), (1, 1, 0, 0)),
    "argues for another class": (
        "assault",
        long("Assault", "Assault", revise="The class is water incident."),
        (1, 1, 0, 0),
    ),
    "names another class": ("assault", long("Assault", "Assault", revise="no fire is seen"), (1, 1, 0, 0.75)),
    "argues for Normal": (
        "fire",
        long("Anomaly [2, 6]", "Anomaly", "[2, 6]", revise="The answer is normal"),
        (1, 1, 1, 0),
    ),
    "unreadable draft": ("C", long("perhaps C", "C"), (0, 0, 0, 0)),
    "no draft": ("C", long("C", "C").replace("<draft>C</draft>", ""), (0, 0, 0, 0)),
    "special token in the reflection": ("C", long("C", "C", reflect=f"{REFLECT} <|im_end|>"), (0, 0, 0, 0)),
    "right interval kept": ("fire", long("Anomaly [2, 6]", "Anomaly", "[2, 6]"), (1, 1, 1, 0.75)),
    "interval corrected": ("fire", long("Anomaly [7, 9]", "Anomaly", "[2, 6]"), (1, 1, 1, 0.5)),
    "interval made better": ("fire", long("Anomaly [4, 6]", "Anomaly", "[2, 6]"), (1, 1, 1, 0.625)),
    "draft on a new line": ("fire", long("Anomaly\n[2, 6]", "Anomaly", "[2, 6]"), (1, 1, 1, 0.75)),
    "normal, kept": ("normal", long("Normal", "Normal", NONE), (1, 1, 1, 0.75)),
    "normal with its numbers": ("normal", long(f"Normal {NONE}", "Normal", NONE), (1, 1, 1, 0.75)),
    "draft with a time for Normal": ("fire", long("Normal [2, 6]", "Anomaly", "[2, 6]"), (0, 0, 0, 0)),
    "draft without a time": ("fire", long("Anomaly", "Anomaly", "[2, 6]"), (0, 0, 0, 0)),
    "draft that says both": ("fire", long(f"Anomaly {NONE}", "Anomaly", "[2, 6]"), (0, 0, 0, 0)),
    "answer that says both, right draft": ("fire", long("Anomaly [2, 6]", "Anomaly", NONE), (0, 0, 0, 0)),
    "draft of 39 digits": ("fire", long(f"Anomaly [2, {HUGE}]", "Anomaly", "[2, 6]"), (0, 0, 0, 0)),
}


def earned(text: str, truth: str, reflection: bool) -> tuple[float, ...]:
    """Format, accuracy, temporal IoU and, of the long grammar, reflection."""
    parsed = parsing.parse([text], TRUTHS[truth][0], "strict", reflection)
    values = [float(f(parsed, parsing.targets([TRUTHS[truth]]))[0]) for f in rewards.REWARDS.values()]
    return tuple(values if reflection else values[:3])


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_completion_earns(name: str) -> None:
    truth, text, values = PLAIN[name]
    assert earned(text, truth, reflection=False) == pytest.approx(values)


@pytest.mark.parametrize("name", REFLECTED)
def test_what_a_completion_with_reflection_earns(name: str) -> None:
    truth, text, values = REFLECTED[name]
    assert earned(text, truth, reflection=True) == pytest.approx(values)


HONEST = {"C": short("C"), "fire": timed("Anomaly", "[2, 6]"), "normal": timed("Normal", NONE)}
HONEST |= {"assault": short("Assault"), "water": short("Water_incident"), "text": short("the shed burns")}
HONEST_LONG = {"C": long("C", "C"), "fire": long("Anomaly [2, 6]", "Anomaly", "[2, 6]")}
HONEST_LONG |= {"normal": long("Normal", "Normal", NONE), "assault": long("Assault", "Assault")}


def test_nothing_in_the_table_earns_more_than_an_honest_and_right_answer() -> None:
    for table, honest in ((PLAIN, HONEST), (REFLECTED, HONEST_LONG)):
        most = {truth: sum(earned(text, truth, table is REFLECTED)) for truth, text in honest.items()}
        assert all(sum(values) <= most[truth] for truth, _, values in table.values())


def test_every_reward_of_every_completion_is_a_finite_number_under_both_rules() -> None:
    """Of every text in the tables, beside every truth of its task."""
    for truth, reflection in itertools.product(TRUTHS, (False, True)):
        texts = [text for _, text, _ in [*PLAIN.values(), *REFLECTED.values()]]
        target = parsing.targets([TRUTHS[truth]] * len(texts))
        for rule in ("strict", "lenient"):
            parsed = parsing.parse(texts, TRUTHS[truth][0], rule, reflection)
            assert np.isfinite(jax.tree.leaves(jax.tree.map(np.sum, parsed))).all()
            assert all(np.isfinite(f(parsed, target)).all() for f in rewards.REWARDS.values())


# --- Constants ----------------------------------------------------------------------------------------------------

STARTS, ENDS = (0, 2, 5, 10), (3, 5, 8, 12, 20, 30, 60, 120, 600)
TIMES = tuple(f"[{start}, {end}]" for start in STARTS for end in ENDS if start < end)
COHERENT = {("Normal", NONE), *(("Anomaly", time) for time in TIMES)}
PAIRS = tuple(
    itertools.product(
        ("Anomaly", "Normal", "", "Anomaly Normal", "Fire"),
        (NONE, "", "[0, 0]", "[3, 3]", "[6, 2]", "[-1, 5]", *TIMES),
    )
)
HONEST_DRAFTS = ("Normal", *(f"{answer} {time}" for answer, time in sorted(COHERENT)[::4]))
OTHER_DRAFTS = ("Anomaly", f"Anomaly {NONE}", "Anomaly [6, 2]", "Normal [2, 8]", "Normal [0, 0]", "")


def mean_reward(texts: list[str], target: Columns, reflection: bool) -> np.ndarray:
    """The mean over all targets of the sum of rewards of each constant completion."""
    parsed = parsing.parse(texts, "grounding", "strict", reflection)
    names = ("format", "accuracy", "tiou", *(["reflection"] if reflection else []))

    def total(one: parsing.Parsed) -> jax.Array:
        return sum(rewards.REWARDS[name](one, target).mean() for name in names)

    return np.asarray(jax.jit(jax.vmap(total))(parsed))


@pytest.mark.parametrize("file", ["val.csv", "test_msad.csv", "test_ucf_crime.csv", "test_ecva.csv"])
def test_no_constant_that_contradicts_itself_earns_what_a_coherent_one_does(vau_bench: Path, file: str) -> None:
    """Over a grid of answers, times and drafts, on every example of a real annotation file that has an interval."""
    rows, _ = load(vau_bench / file)
    truths = [("grounding", None, r.anomaly_class, r.interval) for r in rows if "grounding" in r.tasks]
    target = parsing.targets(truths)
    coherent = np.asarray([pair in COHERENT for pair in PAIRS])
    values = mean_reward([timed(*pair) for pair in PAIRS], target, reflection=False)
    assert values[~coherent].max() == 0 and values[coherent].max() > 1

    best, both = PAIRS[int(np.argmax(values))], (("Anomaly", NONE), ("Normal", "[2, 8]"))
    honest = mean_reward([long(draft, *best) for draft in HONEST_DRAFTS], target, reflection=True)
    others = [long(draft, *best) for draft in OTHER_DRAFTS]
    others += [long(draft, *pair) for draft in HONEST_DRAFTS for pair in both]
    assert mean_reward(others, target, reflection=True).max() == 0 and honest.min() > 1
