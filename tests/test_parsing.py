"""Completions to arrays: the strict grammar, and what lenient reading finds."""

import numpy as np
import pytest

from vau_jax import parsing
from vau_jax.data.annotations import LABELS
from vau_jax.files import InputError

QA = "<think>t</think><answer>B</answer>"
GROUNDING = "<think>t</think><answer>Anomaly</answer><glue>[1.5, 3.0]</glue>"
LONG = "<think>t</think><draft>A</draft><reflect>a b c</reflect><revise>r</revise><answer>B</answer>"


def test_strict_reads_every_field() -> None:
    text = LONG.replace("<draft>A", "<draft>Anomaly [12.0, 30.5]").replace(
        "B</answer>", "Anomaly</answer><glue>[1.5, 3.0]</glue>"
    )
    parsed = parsing.parse([text], "grounding", "strict", reflection=True)
    assert parsed.form.tolist() == [True]
    assert parsed.draft.interval.tolist() == [[12.0, 30.5]]
    assert parsed.final.interval.tolist() == [[1.5, 3.0]]
    assert parsed.final.kind.tolist() == parsed.draft.kind.tolist() == [parsing.INTERVAL]
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
    assert parsing.parse([text], task, "strict", reflection).form.tolist() == [form]


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
    assert (tuple(final.interval[0].tolist()) if final.kind[0] == parsing.INTERVAL else None) == interval


def test_a_reversed_interval_is_flagged() -> None:
    final = parsing.parse(["<glue>[9, 4]</glue>"], "grounding", "lenient").final
    assert final.swapped.tolist() == [True]


def test_lenient_reads_normal_without_an_interval() -> None:
    final = parsing.parse(["<answer>Normal</answer>"], "grounding", "lenient").final
    assert (final.anomaly[0], final.kind[0]) == (0, parsing.NORMAL)


@pytest.mark.parametrize("label", LABELS)
def test_every_label_is_read(label: str) -> None:
    for rule, text in (("strict", f"<think>t</think><answer>{label}</answer>"), ("lenient", f"It is {label.lower()}.")):
        assert parsing.parse([text], "classification", rule).final.label.tolist() == [LABELS.index(label)]


def test_tasks_can_be_mixed() -> None:
    parsed = parsing.parse([QA, GROUNDING], ["qa", "grounding"])
    assert parsed.form.tolist() == [True, True]
    assert parsed.task.tolist() == [0, 1]


def test_no_texts_give_empty_arrays() -> None:
    parsed = parsing.parse([], "qa")
    assert parsed.final.interval.shape == (0, 2)
    assert parsed.form.shape == (0,)


def test_targets_tell_the_three_codes_apart() -> None:
    target = parsing.targets(
        [("grounding", None, "Fire", None), ("grounding", None, "Normal", "normal"), ("qa", "D", None, (1.0, 2.0))]
    )
    assert target.kind.tolist() == [parsing.UNKNOWN, parsing.NORMAL, parsing.INTERVAL]
    assert target.choice.tolist() == [-1, -1, 3]
    np.testing.assert_array_equal(target.interval, [[0, 0], [0, 0], [1, 2]])


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(InputError, match="describe"):
        parsing.parse([QA], "describe")
