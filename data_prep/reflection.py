"""Reflection records for SFT: a first answer, a reflection on it, a revised reasoning, the answer.

    python -m data_prep.reflection --config=configs/reflection.py --workdir=DIR --config.data.csv=... \
        --config.data.videos=... [--config.student.checkpoint=RUN] \
        [--config.teacher.url=... --config.teacher.model=...]

1. The student answers every question some times; without one, drafts are made by rule.
2. The teacher, told draft and truth, writes reflection and revision; without one, the annotation's words are used.
3. Every record is checked as training would read it; what is turned down is counted by reason.
4. A mix of wrong and right drafts, spread over tasks, sources and classes, goes to DIR/reflection.jsonl.

DIR also gets drafts.jsonl, student.jsonl and answers.jsonl (of the endpoints, each answer paid for once),
rejected.jsonl, card.json. A killed call
goes on where it was. How SRVAU-R1 (arXiv 2602.01004) made its records is not published: this design is ours.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_prep import drafts, teacher
from data_prep.drafts import Draft
from vau_jax.common import cli, files
from vau_jax.common.files import InputError, dump_json
from vau_jax.data import pipeline
from vau_jax.datasets import vau_bench
from vau_jax.tasks import TASKS, grammar, parsing, prompts, rewards
from vau_jax.tasks.example import Example, Reflection

DOUBT = re.compile(
    r"\b(wrong|incorrect|mistaken|mistake|error|inaccurate|overlook\w*|miss(?:ed|es)?|not|however|instead|contradict\w*|"
    r"fails?|should|rather|but|too (?:early|late|short|long))\b",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(wrong|incorrect|mistaken|mistake|inaccurate)\b", re.IGNORECASE)
LEAK = re.compile(
    r"ground[- ]truth|annotat\w+|(?:reference|provided|given) answer|(?:correct|true|right) answer (?:is|was) (?:given|"
    r"provided)|according to the (?:label|answer key)|answer key|i was told|as an ai\b",
    re.IGNORECASE,
)
COMMON = frozenset(  # longer words that say nothing about a video
    re.findall(
        r"\w+",
        """about above after again also another anomaly answer because been before being both could does during each
        event from have however into like more most normal only other over shows some such than that their them then
        there these they this those through under very video were what when where which while with within without
        would""",
    )
)


# --- Checks ----------------------------------------------------------------------------------------------------


def fault(example: Example, record: Reflection, keep: ConfigDict) -> str:
    """Why a record is not kept; empty where it is."""
    task = TASKS[example.task]
    low, high = keep.words
    for name in ("reflect", "revise"):
        text = getattr(record, name)
        if not low <= len(text.split()) <= high:
            return f"{name} has too few or too many words"
        if LEAK.search(text):
            return f"{name} gives away that the answer was known"
    if any(grammar.TAG.search(text) for text in (record.think, record.reflect, record.revise)):
        return "a text holds a tag"
    whole = "".join(span.text for span in prompts.completion(replace(example, reflection=record), "reflection"))
    parsed = parsing.parse([whole], example.task, "strict", reflection=True, choices=[example.choices])
    target = parsing.targets_of([example])
    if not parsed.format_ok[0]:
        return "the completion breaks the grammar"
    if float(rewards.task_score(parsed.final, target)[0]) < task.exact_from:
        return "the final answer is not the truth"
    if parsed.contradicted[0]:
        return "revise states another answer"
    if parsed.reflect_copied[0] >= rewards.MOST_COPIED:
        return "the reflection repeats the first reasoning"
    if not parsed.think_words[0]:
        return "there is no first reasoning"
    if record.draft_is_right and DENIAL.search(record.reflect):
        return "the reflection rejects a right draft"
    if not record.draft_is_right and not DOUBT.search(record.reflect):
        return "the reflection finds nothing wrong in a wrong draft"
    if not _words(record.reflect) & _words(f"{prompts.facts(example)} {example.meta.get('key_object', '')}"):
        return "the reflection names no evidence"
    return ""


def _words(text: str) -> set[str]:
    """Words that mean something, in lower case."""
    return {word for word in re.findall(r"[a-z]{4,}", text.lower())} - COMMON


class Likeness:
    """Tells texts that share most of their five-word runs with an earlier one."""

    def __init__(self, most: float) -> None:
        self.most, self.count = most, 0
        self.texts_with: defaultdict[int, list[int]] = defaultdict(list)

    def is_duplicate(self, text: str) -> bool:
        """Whether the text is like one before; one that is not is remembered."""
        words = re.findall(r"\w+", text.lower())
        runs = {hash(tuple(words[i : i + 5])) for i in range(max(1, len(words) - 4))}
        shared = Counter(number for run in runs for number in self.texts_with.get(run, ()))
        if shared and max(shared.values()) >= self.most * len(runs):
            return True
        for run in runs:
            self.texts_with[run].append(self.count)
        self.count += 1
        return False


# --- The mix -------------------------------------------------------------------------------------------------------


def mix(records: list[tuple[Example, Reflection]], wrong_share: float, most: int, seed: int) -> list[int]:
    """Numbers of the records to keep: `wrong_share` of wrong drafts as nearly as there are enough of both kinds, taken
    from tasks, sources and classes in turn."""
    orders = {wrong: _in_turn(records, wrong, seed) for wrong in (True, False)}
    size = min(len(orders[True]) / wrong_share if wrong_share else np.inf, len(records))
    size = min(size, len(orders[False]) / (1 - wrong_share) if wrong_share < 1 else np.inf)
    size = int(min(size, most or np.inf))
    wrong = min(round(size * wrong_share), len(orders[True]))
    return sorted(orders[True][:wrong] + orders[False][: size - wrong])


def _in_turn(records: list[tuple[Example, Reflection]], wrong: bool, seed: int) -> list[int]:
    """Numbers of the records with wrong (or right) drafts, one of each group after the other."""
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for number in np.random.default_rng(seed).permutation(len(records)):
        example, record = records[number]
        if record.draft_is_right != wrong:
            groups[example.task, example.meta.get("source", ""), example.meta.get("anomaly_class") or ""].append(
                int(number)
            )
    ranked = [(rank, name, number) for name, members in groups.items() for rank, number in enumerate(members)]
    return [number for _, _, number in sorted(ranked)]


# --- The whole ----------------------------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Builds the records in `workdir` and returns the card."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config = config.copy_and_resolve_references()
    config.data.shuffle_options, config.data.reflection = False, ""
    verifiable = [name for name, task in TASKS.items() if task.verifiable]
    if unfit := [name for name in config.data.tasks if name not in verifiable]:
        raise InputError(
            f"data.tasks has {unfit[0]}: reflection needs tasks with an answer to check, expected some of "
            f"{', '.join(verifiable)}"
        )
    examples = _examples(config)
    drafted = drafts.make(config, workdir, examples)
    chosen = [_choose(config, example, result) for example, result, _ in drafted if result]
    if config.dry_run:
        for one in chosen[: config.dry_run]:
            print("\n".join(f"--- {m['role']}\n{m['content']}" for m in teacher.messages(*one, [])), flush=True)
        return {}
    written, teacher_card = teacher.reflect(config, workdir, chosen)
    accepted, likeness = [], {name: Likeness(config.keep.likeness) for name in verifiable}
    rejected = [(example, reason) for example, result, reason in drafted if not result]
    for (example, draft, right), (texts, error) in zip(chosen, written, strict=True):
        reason, record = error, None
        if texts:
            record = Reflection(draft.think, draft.value, right, *texts)
            reason = fault(example, record, config.keep)
        if not reason and likeness[example.task].is_duplicate(f"{record.reflect} {record.revise}"):
            reason = "nearly the same as an earlier one"
        if reason:
            rejected.append((example, reason))
        else:
            accepted.append((example, record))
    kept = [accepted[i] for i in mix(accepted, config.keep.wrong_share, config.keep.most, config.seed)]
    files.write_text(workdir / "reflection.jsonl", "".join(dump_json(_record(e, r)) + "\n" for e, r in kept))
    files.write_text(
        workdir / "rejected.jsonl", "".join(dump_json({"example": e.id, "reason": r}) + "\n" for e, r in rejected)
    )
    counts = {"questions": len(examples), "with_a_draft": len(chosen), "accepted": len(accepted)}
    card = counts | _card(config, counts, [reason for _, reason in rejected], kept, teacher_card)
    files.write_text(workdir / "card.json", dump_json(card, indent=1))
    print(dump_json(card, indent=1), flush=True)
    return card


def _examples(config: ConfigDict) -> list[Example]:
    """All usable questions; without a folder of videos, of the annotations alone, for those that need no video."""
    if config.data.videos:
        examples, audit = pipeline.load_examples(config.data)
    elif config.student.checkpoint or config.student.url or config.teacher.frames:
        raise InputError("a student, and a teacher with frames, must see the videos: set config.data.videos")
    else:
        rows, audit = vau_bench.load(config.data.csv, config.data.source, config.data.protocol)
        examples = vau_bench.examples_of(rows, config.data.tasks, Path(), audit)[: config.data.max_examples or None]
    print(audit.table(), flush=True)
    return examples


def _choose(config: ConfigDict, example: Example, found: list[Draft]) -> tuple[Example, Draft, bool]:
    """One of a question's drafts and whether it is right: a wrong one in about keep.wrong_share of the questions that
    have both kinds."""
    right_from = config.keep.tiou if TASKS[example.task].timed else 1.0
    rng = np.random.default_rng([config.seed, 1, *hashlib.sha256(example.id.encode()).digest()])
    draft = drafts.pick(found, right_from, bool(rng.random() < config.keep.wrong_share))
    return example, draft, draft.score >= right_from


def _record(example: Example, record: Reflection) -> dict[str, Any]:
    return {"example": example.id, "video": example.video, "task": example.task, **asdict(record)}


def _card(
    config: ConfigDict,
    counts: dict[str, int],
    rejected: list[str],
    kept: list[tuple[Example, Reflection]],
    teacher: dict[str, Any],
) -> dict[str, Any]:
    """What the records are and where they come from."""

    def lengths(name: str) -> dict[str, float]:
        words = [len(getattr(record, name).split()) for _, record in kept] or [0]
        return {"least": min(words), "mean": round(float(np.mean(words)), 1), "most": max(words)}

    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(Counter(values).most_common())

    return {
        "acceptance": round(counts["accepted"] / max(1, counts["with_a_draft"]), 4),
        "rejected": count(reason.split(":")[0] for reason in rejected),
        "records": len(kept),
        "wrong_drafts": sum(not record.draft_is_right for _, record in kept),
        "tasks": count(example.task for example, _ in kept),
        "sources": count(example.meta.get("source", "") for example, _ in kept),
        "classes": count(example.meta.get("anomaly_class") or "none" for example, _ in kept),
        "words": {name: lengths(name) for name in ("think", "reflect", "revise")},
        "student": config.student.checkpoint
        or config.student.model
        or "rules: drafts made from the annotation, no model",
        "teacher": teacher,
        "annotations": str(config.data.csv),
        "seed": config.seed,
    }


if __name__ == "__main__":
    cli.main(run)
