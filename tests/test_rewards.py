"""Rewards: the reference implementation's flaws come out right, every value is in its range, jit and vmap agree."""

import jax
import numpy as np
import pytest

from vau_jax.datasets.vau_bench import LABELS
from vau_jax.tasks import parsing, rewards
from vau_jax.tasks.columns import Columns


def truth(task: str, answer: str | None = None, label: str | None = None, interval: object = None) -> Columns:
    return parsing.targets([(task, answer, label, interval)])


def reward(name: str, text: str, target: Columns, reflection: bool = False, rule: str = "strict") -> float:
    parsed = parsing.parse([text], parsing.TASKS[int(target.task[0])], rule, reflection)
    return float(rewards.REWARDS[name](parsed, target)[0])


def plain(answer: str, glue: str = "") -> str:
    return f"<think>it looks so</think><answer>{answer}</answer>{glue}"


NORMAL = truth("grounding", label="Normal", interval="normal")
FIRE = truth("grounding", label="Fire", interval=(2.0, 6.0))
UNKNOWN = truth("grounding", label="Fire", interval=None)
C = truth("qa", answer="C")

# What the reference's rules get wrong, each with the right outcome: (what, reward, completion, truth, rule, value).
FLAWS = [
    ("an empty answer is not Normal", "accuracy", plain("", "<glue>[-1.0, -1.0]</glue>"), NORMAL, "strict", 0.0),
    (
        "text without a capital letter is not Normal",
        "accuracy",
        plain("no idea", "<glue>[-1, -1]</glue>"),
        NORMAL,
        "strict",
        0.0,
    ),
    ("lower case anomaly is right", "accuracy", plain("anomaly", "<glue>[2.0, 6.0]</glue>"), FIRE, "strict", 1.0),
    ("the article a is no answer", "accuracy", "<think>x</think>A video shows C", C, "lenient", 1.0),
    ("Based on is not B", "accuracy", "<think>x</think>Based on the video, C", C, "lenient", 1.0),
    (
        "no anomaly on a normal video is right",
        "tiou",
        plain("Normal", "<glue>[-1.0, -1.0]</glue>"),
        NORMAL,
        "strict",
        1.0,
    ),
    ("a zero-length interval is no overlap", "tiou", plain("Anomaly", "<glue>[3.0, 3.0]</glue>"), FIRE, "strict", 0.0),
    (
        "a zero-length interval on a normal video",
        "tiou",
        plain("Anomaly", "<glue>[0.0, 0.0]</glue>"),
        NORMAL,
        "strict",
        0.0,
    ),
    (
        "no anomaly where the interval is unknown",
        "tiou",
        plain("Normal", "<glue>[-1.0, -1.0]</glue>"),
        UNKNOWN,
        "strict",
        0.0,
    ),
    ("inner spaces keep the form", "format", "<think> x </think>\n <answer> C </answer>", C, "strict", 1.0),
    ("inner spaces keep the answer", "accuracy", plain(" C "), C, "strict", 1.0),
    ("a full stop keeps the answer", "accuracy", plain("C."), C, "strict", 1.0),
    ("a tag may not repeat", "format", "<think>x</think><answer>C</answer><answer>A</answer>", C, "strict", 0.0),
    ("a tag may not nest", "format", "<think>x<answer>C</answer></think><answer>C</answer>", C, "strict", 0.0),
    ("text outside the tags breaks the form", "format", "so <think>x</think><answer>C</answer>", C, "strict", 0.0),
    ("a reversed interval is turned round", "tiou", plain("Anomaly", "<glue>[6.0, 2.0]</glue>"), FIRE, "lenient", 1.0),
    ("a clock time is read", "tiou", plain("Anomaly", "<glue>00:02, 00:06</glue>"), FIRE, "lenient", 1.0),
    (
        "a reversed interval earns nothing in training",
        "tiou",
        plain("Anomaly", "<glue>[6.0, 2.0]</glue>"),
        FIRE,
        "strict",
        0.0,
    ),
]


@pytest.mark.parametrize(("name", "text", "target", "rule", "value"), [f[1:] for f in FLAWS], ids=[f[0] for f in FLAWS])
def test_flaw_of_the_reference(name: str, text: str, target: Columns, rule: str, value: float) -> None:
    assert reward(name, text, target, rule=rule) == value


@pytest.mark.parametrize(
    ("glue", "value"),
    [
        ("[2.0, 6.0]", 1.0),
        ("[4.0, 8.0]", 1 / 3),
        ("[6.0, 9.0]", 0.0),
        ("[3.0, 4.0]", 0.25),
        ("[-1.0, -1.0]", 0.0),
        ("soon", 0.0),
    ],
)
def test_tiou(glue: str, value: float) -> None:
    assert reward("tiou", plain("Anomaly", f"<glue>{glue}</glue>"), FIRE) == pytest.approx(value)


def test_classification_ignores_case_and_underscores() -> None:
    target = truth("classification", label="Water_incident")
    assert reward("accuracy", plain("water incident"), target) == 1.0
    assert reward("accuracy", plain("Fire"), target) == 0.0


def reflected(draft: str, answer: str, reflect: str = "the smoke says otherwise") -> str:
    return (
        f"<think>t</think><draft>{draft}</draft><reflect>{reflect}</reflect><revise>r</revise><answer>{answer}</answer>"
    )


# Draft, answer, value: honest and right beats everything else.
EFFECTS = [("C", "C", 0.75), ("A", "C", 0.5), ("A", "B", 0.25), ("A", "A", 0.25), ("C", "A", 0.0)]


@pytest.mark.parametrize(("draft", "answer", "value"), EFFECTS)
def test_reflection_effect(draft: str, answer: str, value: float) -> None:
    assert reward("reflection", reflected(draft, answer), C, reflection=True) == pytest.approx(value)


def test_a_wrong_draft_on_purpose_never_pays() -> None:
    values = {(d, a): reward("reflection", reflected(d, a), C, reflection=True) for d in "ABCD" for a in "ABCD"}
    assert max(values, key=values.get) == ("C", "C")
    assert all(values["C", "C"] > values[d, "C"] for d in "ABD")


@pytest.mark.parametrize(
    ("words", "share"), [(0, 0.0), (1, 1 / 3), (3, 1.0), (100, 1.0), (125, 0.5), (150, 0.0), (400, 0.0)]
)
def test_a_reflection_is_worth_less_when_it_is_too_short_or_too_long(words: int, share: float) -> None:
    text = " ".join(["word"] * words)
    assert reward("reflection", reflected("C", "C", text), C, reflection=True) == pytest.approx(0.75 * share)


def test_a_reflection_copied_from_the_first_reasoning_earns_nothing() -> None:
    think = "a man runs to the door and smoke rises behind him in the yard"
    copied = reflected("C", "C", think).replace("<think>t<", f"<think>{think}<")
    assert reward("reflection", copied, C, reflection=True) == 0.0
    own = reflected("C", "C", "smoke rises behind him, which a fight would not explain").replace(
        "<think>t<", f"<think>{think}<"
    )
    assert reward("reflection", own, C, reflection=True) == 0.75


def test_without_a_draft_there_is_no_reward() -> None:
    text = "<think>t</think><reflect>the smoke says otherwise</reflect><revise>r</revise><answer>C</answer>"
    assert reward("reflection", text, C, reflection=True) == 0.0


STRATEGIES = {  # what a policy that knows the draft with 0.6 and mends half of its errors can do with that
    "honest": lambda draft, final: reflected(draft, final),
    "wrong on purpose": lambda draft, final: reflected("A", final),
    "no reflection": lambda draft, final: f"<think>t</think><answer>{final}</answer>",
    "empty reflection": lambda draft, final: reflected(draft, final, ""),
    "endless reflection": lambda draft, final: reflected(draft, final, "hm " * 200),
    "copied reflection": lambda draft, final: reflected(draft, final, "t t t t"),
    "draft kept unread": lambda draft, final: reflected(draft, draft),
    "flipped": lambda draft, final: reflected(draft, "B" if draft == "C" else final),
}


def test_learning_by_reward_alone_ends_with_an_honest_draft_and_a_right_answer(rng: np.random.Generator) -> None:
    """A bandit over strategies, trained by REINFORCE on the sum of format, accuracy and reflection rewards."""

    def total(name: str, draft: str, final: str) -> float:
        text = STRATEGIES[name](draft, final).replace("<think>t<", "<think>t t t t<")
        return sum(reward(kind, text, C, reflection=True) for kind in ("format", "accuracy", "reflection"))

    outcomes = {(d, f): i for i, (d, f) in enumerate([("C", "C"), ("A", "C"), ("A", "A")])}
    table = np.array([[total(name, d, f) for d, f in outcomes] for name in STRATEGIES])
    chances = [0.6, 0.4 * 0.5, 0.4 * 0.5]  # draft right; wrong and mended; wrong and not
    logits = np.zeros(len(STRATEGIES))
    for _ in range(400):
        policy = np.exp(logits) / np.exp(logits).sum()
        chosen = rng.choice(len(STRATEGIES), 64, p=policy)
        rewards_ = table[chosen, rng.choice(3, 64, p=chances)]
        advantages = rewards_ - rewards_.mean()
        onehot = np.eye(len(STRATEGIES))[chosen]
        logits += 0.3 * (advantages[:, None] * (onehot - policy)).mean(0) * len(STRATEGIES)
    assert list(STRATEGIES)[int(np.argmax(logits))] == "honest"
    assert np.exp(logits)[0] / np.exp(logits).sum() > 0.9


def test_for_any_final_interval_the_best_draft_is_one_as_good() -> None:
    """The effect as a function of the draft's IoU is largest where draft and final answer score the same."""
    for end in (3.0, 4.0, 6.0):
        final = f"<answer>Anomaly</answer><glue>[2.0, {end}]</glue>"
        values = []
        for draft_end in (3.0, 4.0, 6.0):
            draft = f"<think>t</think><draft>Anomaly [2.0, {draft_end}]</draft>"
            text = f"{draft}<reflect>a b c</reflect><revise>r</revise>{final}"
            values.append(reward("reflection", text, FIRE, reflection=True))
        assert int(np.argmax(values)) == (3.0, 4.0, 6.0).index(end)


def random_batch(rng: np.random.Generator, n: int) -> tuple[parsing.Parsed, Columns]:
    """Arrays as they could come out of any n completions."""

    def answers() -> Columns:
        start = rng.uniform(0, 10, n)
        return Columns(
            choice=rng.integers(-1, 4, n),
            label=rng.integers(-1, len(LABELS), n),
            anomaly=rng.integers(-1, 2, n),
            interval_count=rng.integers(-1, 2, n),
            intervals=np.stack([start, start + rng.uniform(0, 5, n)], -1).astype(np.float32)[:, None],
            swapped=np.zeros(n, bool),
        )

    parsed = parsing.Parsed(
        task=rng.integers(0, 3, n),
        format_ok=rng.random(n) < 0.7,
        final=answers(),
        draft=answers(),
        reflect_words=rng.integers(0, 200, n),
        reflect_copied=rng.random(n),
        think_words=rng.integers(0, 3, n),
        revise_words=rng.integers(0, 3, n),
        contradicted=rng.random(n) < 0.3,
    )
    return parsed, Columns(task=parsed.task, **answers())


RANGES = {"format": (0, 1), "accuracy": (0, 1), "tiou": (0, 1), "reflection": (0, 0.75)}


@pytest.mark.parametrize("name", rewards.REWARDS)
def test_values_stay_in_their_range(name: str, rng: np.random.Generator) -> None:
    values = np.asarray(rewards.REWARDS[name](*random_batch(rng, 2000)))
    low, high = RANGES[name]
    assert values.dtype == np.float32
    assert low <= values.min() < values.max() <= high + 1e-6


@pytest.mark.parametrize("name", rewards.REWARDS)
def test_jit_and_vmap_give_the_same(name: str, rng: np.random.Generator) -> None:
    parsed, target = random_batch(rng, 64)
    plain_values = np.asarray(rewards.REWARDS[name](parsed, target))
    np.testing.assert_allclose(jax.jit(rewards.REWARDS[name])(parsed, target), plain_values, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(rewards.REWARDS[name])(parsed, target), plain_values, rtol=1e-6)


def test_tiou_equals_brute_force(rng: np.random.Generator) -> None:
    """Counting hundredths of a second, on random intervals."""
    a, b = (np.sort(rng.integers(0, 1000, (200, 2)), axis=1) + np.asarray([0, 1]) for _ in range(2))
    ticks = np.arange(1002)
    inside = [(ticks >= x[:, :1]) & (ticks < x[:, 1:]) for x in (a, b)]
    expected = (inside[0] & inside[1]).sum(1) / (inside[0] | inside[1]).sum(1)
    texts = [plain("Anomaly", f"<glue>[{s / 100}, {e / 100}]</glue>") for s, e in a]
    target = parsing.targets([("grounding", None, "Fire", (s / 100, e / 100)) for s, e in b])
    np.testing.assert_allclose(rewards.REWARDS["tiou"](parsing.parse(texts, "grounding"), target), expected, atol=1e-5)
