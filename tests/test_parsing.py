"""Completions to arrays: the strict grammar, and what lenient reading finds."""

import re
import time

import numpy as np
import pytest

from vau_jax.common.files import InputError
from vau_jax.data_prep import drafts, reflection
from vau_jax.datasets import vau_bench
from vau_jax.datasets.vau_bench import LABELS
from vau_jax.eval import gallery
from vau_jax.tasks import grammar, parsing

QA = "<think>t</think><answer>B</answer>"
GROUNDING = "<think>t</think><answer>Anomaly</answer><glue>[1.5, 3.0]</glue>"
LONG = "<think>t</think><draft>A</draft><reflect>a b c</reflect><revise>r</revise><answer>B</answer>"


def test_strict_reads_every_field() -> None:
    text = LONG.replace("<draft>A", "<draft>Anomaly [12.0, 30.5]").replace(
        "B</answer>", "Anomaly</answer><glue>[1.5, 3.0]</glue>"
    )
    parsed = parsing.parse([text], "grounding", "strict", reflection=True)
    assert parsed.format_ok.tolist() == [True]
    assert parsed.draft.intervals[:, 0].tolist() == [[12.0, 30.5]]
    assert parsed.final.intervals[:, 0].tolist() == [[1.5, 3.0]]
    assert parsed.final.interval_count.tolist() == parsed.draft.interval_count.tolist() == [1]
    assert parsed.reflect_words.tolist() == [3]


@pytest.mark.parametrize(
    ("text", "task", "reflection", "form"),
    [
        (QA, "qa", False, True),
        (QA, "qa", True, False),
        (LONG, "qa", True, True),
        (LONG, "qa", False, False),
        (GROUNDING, "grounding", False, True),
        (GROUNDING, "qa", False, False),
        (QA, "grounding", False, False),
        (f" \n{QA}\n ", "qa", False, True),
        (QA + "!", "qa", False, False),
        ("<answer>B</answer><think>t</think>", "qa", False, False),
        ("<think>t</think><answer>B", "qa", False, False),
        ("", "qa", False, False),
    ],
)
def test_strict_form(text: str, task: str, reflection: bool, form: bool) -> None:
    assert parsing.parse([text], task, "strict", reflection).format_ok.tolist() == [form]


def test_a_broken_form_has_no_values() -> None:
    parsed = parsing.parse([QA + "!"], "qa")
    assert parsed.final.choice.tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("<think>A or B?</think>D.", 3),
        ("<think>A or B?</think>The answer is (C)", 2),
        ("A person walks. B", 1),
        ("<answer>c</answer>", -1),
        ("<answer>B. a fire</answer>", 1),
        ("A and B are both there, so A, or B", -1),
        ("I cannot tell", -1),
        ("", -1),
    ],
)
def test_lenient_letter(text: str, choice: int) -> None:
    assert parsing.parse([text], "qa", "lenient").final.choice.tolist() == [choice]


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("from 12.5 until 30 seconds", (12.5, 30.0)),
        ("between 1:05 and 1:10", (65.0, 70.0)),
        ("01:02:03.5 to 01:02:04", (3723.5, 3724.0)),
        ("12 to 30 seconds", (12.0, 30.0)),
        ("[30.5, 12.0]", (12.0, 30.5)),
        ("3s - 5s", (3.0, 5.0)),
        ("at 12 seconds", None),
        ("nothing", None),
    ],
)
def test_lenient_interval(text: str, interval: tuple[float, float] | None) -> None:
    final = parsing.parse([f"<think>at [1, 2]</think>Anomaly {text}"], "grounding", "lenient").final
    assert (tuple(final.intervals[0, 0].tolist()) if final.interval_count[0] == 1 else None) == interval


def test_a_reversed_interval_is_flagged() -> None:
    final = parsing.parse(["<glue>[9, 4]</glue>"], "grounding", "lenient").final
    assert final.swapped.tolist() == [True]


def test_lenient_reads_normal_without_an_interval() -> None:
    final = parsing.parse(["<answer>Normal</answer>"], "grounding", "lenient").final
    assert (final.anomaly[0], final.interval_count[0]) == (0, 0)


@pytest.mark.parametrize("label", LABELS)
def test_every_label_is_read(label: str) -> None:
    for rule, text in (("strict", f"<think>t</think><answer>{label}</answer>"), ("lenient", f"It is {label.lower()}.")):
        assert parsing.parse([text], "classification", rule).final.label.tolist() == [LABELS.index(label)]


def test_tasks_can_be_mixed() -> None:
    parsed = parsing.parse([QA, GROUNDING], ["qa", "grounding"])
    assert parsed.format_ok.tolist() == [True, True]
    assert parsed.task.tolist() == [0, 1]


def test_no_texts_give_empty_arrays() -> None:
    parsed = parsing.parse([], "qa")
    assert parsed.final.intervals.shape == (0, 1, 2)
    assert parsed.format_ok.shape == (0,)


def test_targets_tell_the_three_codes_apart() -> None:
    target = parsing.targets(
        [("grounding", None, "Fire", None), ("grounding", None, "Normal", "normal"), ("qa", "D", None, (1.0, 2.0))]
    )
    assert target.interval_count.tolist() == [-1, 0, 1]
    assert target.choice.tolist() == [-1, -1, 3]
    np.testing.assert_array_equal(target.intervals[:, 0], [[0, 0], [0, 0], [1, 2]])


@pytest.mark.parametrize("interval", [(1e39, 2e39), (0.0, float("inf")), (0.0, float("nan")), (6.0, 2.0), (-1.0, 2.0)])
def test_a_true_interval_that_cannot_be_scored_is_named(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=re.escape(f"interval {interval}: expected 0 <= start <= end")):
        parsing.targets([("grounding", None, "Fire", interval)])


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(InputError, match="describe"):
        parsing.parse([QA], "describe")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<answer>Anomaly</answer><glue>[-1, -1]</glue>", (-1, -1)),
        ("<answer>Normal</answer><glue>[2, 6]</glue>", (-1, -1)),
        ("<think>t</think><answer>Normal</answer><glue>[2, 6]</glue>", (-1, -1)),
        ("<answer>Normal</answer><glue>from 2 to 6 s</glue>", (-1, -1)),
        ("An anomaly, [-1.0, -1.0]", (-1, -1)),
        ("<answer>?</answer><glue>[2, 6]</glue>", (1, 1)),
        ("<answer>Normal</answer><glue>?</glue>", (0, 0)),
        ("<answer>Anomaly</answer><glue>?</glue>", (1, -1)),
        ("The video is normal. From 0 to 10 s people walk.", (0, 0)),
        ("There is no anomaly: [-1, -1]", (0, 0)),
        ("I see no signs of any abnormality.", (0, 0)),
        ("Nothing abnormal from 0 to 10 s", (0, 0)),
        ("This is not normal: 2 to 6 s", (1, 1)),
        ("It is not normal and not abnormal", (-1, -1)),
    ],
)
def test_lenient_reads_no_answer_that_contradicts_its_time(text: str, read: tuple[int, int]) -> None:
    """In a final answer and, but for the tags, in a draft; what reads as an answer and a time never disagrees."""
    final = parsing.parse([text], "grounding", "lenient").final
    assert (final.anomaly[0], final.interval_count[0]) == read


@pytest.mark.parametrize("text", ["Normal [2, 6]", "Anomaly [-1, -1]"])
def test_lenient_reads_no_draft_that_contradicts_its_time(text: str) -> None:
    draft = parsing.parse([f"<draft>{text}</draft>"], "grounding", "lenient", reflection=True).draft
    assert (draft.anomaly[0], draft.interval_count[0]) == (-1, -1)


@pytest.mark.parametrize("number", ["9" * 39, "9" * 5000, f"{'9' * 40}:10", f"1:{'9' * 40}:10", f"{'9' * 38}:00:00"])
@pytest.mark.parametrize("form", ["<glue>[2, {}]</glue>", "<glue>[{0}, {0}1]</glue>", "from 2 until {} s"])
def test_a_time_that_float32_does_not_hold_is_no_time(form: str, number: str) -> None:
    final = parsing.parse([f"Anomaly {form.format(number)}"], "grounding", "lenient").final
    assert (final.interval_count[0], final.intervals.tolist()) == (-1, [[[0.0, 0.0]]])


def test_a_colon_behind_a_time_is_punctuation() -> None:
    final = parsing.parse(["From 2 to 6.5: smoke rises"], "grounding", "lenient").final
    assert final.intervals[:, 0].tolist() == [[2.0, 6.5]]


@pytest.mark.parametrize(
    ("text", "copied"),
    [
        ("", 0.0),
        ("smoke rises", 0.0),
        ("Smoke, rises - SLOWLY", 1.0),
        ("smoke hm rises hm slowly", 0.6),
        ("smoke hm hm rises slowly", 0.0),
        ("slowly rises smoke", 0.0),
        ("so smoke rises slowly over there", 0.5),
    ],
)
def test_what_is_copied(text: str, copied: float) -> None:
    """The share of the words in runs of three that <think> has, at most one foreign word between two of them."""
    found = f"<think>There smoke rises slowly.</think><reflect>{text}</reflect>"
    assert parsing.parse([found], "qa", "lenient").reflect_copied.tolist() == [pytest.approx(copied)]


def test_prose_keeps_what_may_stand_inside_a_tag() -> None:
    text = "a <answer>B</answer> <|im_end|>c" + "\n" * 30 + "d"
    assert grammar.prose(text) == "a B c d"
    assert grammar.prose("x < y\n\nz") == "x < y\n\nz"


# --- Time ---------------------------------------------------------------------------------------------------------

SIZE = 100_000  # characters
UNITS = (
    *(
        "\n",
        " ",
        "\t",
        "\u3000",
        "[",
        "]",
        "[ ",
        "[-1",
        "[-1,",
        "-1, ",
        "(A",
        "A ",
        "A\n",
        "A,",
        "(",
        "-",
        "\u2013",
        "'",
    ),
    *(
        "9",
        "9\n",
        "1:",
        "1.",
        "0.",
        "5 ",
        "5, ",
        "5 to",
        "5s ",
        "from ",
        "between ",
        "\u0663",
        "a",
        "_",
        "\u00e9",
        "fire ",
    ),
    *("<", "</", "<a", "<a>", "<|", "<think>", "</think>", "<answer>", "<think></think>", "<reflect>a", "<glue>["),
    *("answer is ", "so B ", "no any ", "##", "## ", "**", "```", ". ", "overlook", "annotat", "word "),
)
FRAME = "<think>{0}</think><draft>5{0}</draft><reflect>{0}</reflect><revise>{0}</revise><answer>5{0}</answer>{0}"


def seconds(function: object, *args: object) -> float:
    """Processor time of a call, which a loaded machine does not change much."""
    began = time.process_time()
    function(*args)
    return time.process_time() - began


@pytest.mark.parametrize("unit", UNITS)
def test_a_text_of_any_kind_is_read_in_time_that_grows_with_its_length(unit: str) -> None:
    body = unit * (SIZE // len(unit))
    texts = [*[body] * len(parsing.TASKS), FRAME.format(body[: SIZE // 6])]
    for rule in ("strict", "lenient"):
        assert seconds(parsing.parse, texts, (*parsing.TASKS, "grounding"), rule, True) < 5


OTHER_READERS = {
    "prose": grammar.prose,
    "gallery": gallery.sections,
    "first sentence": drafts.first_sentence,
    "sections of an annotation": vau_bench.parse_reasoning,
    "denial of an anomaly": vau_bench.NO_ANOMALY.search,
    "doubt": reflection.DOUBT.search,
    "leak": reflection.LEAK.search,
}


@pytest.mark.parametrize("name", OTHER_READERS)
def test_other_readers_of_text_take_such_time_too(name: str) -> None:
    assert sum(seconds(OTHER_READERS[name], unit * (SIZE // len(unit))) for unit in UNITS) < 20
