"""What tests/data/recorded_behaviour.json.xz holds, computed by the present code.

The file was recorded from the code at commit 7886da3, before tasks and datasets had packages of their own. Where
behaviour changes on purpose, that part is recorded again: write({**read(), "readings": readings(read()["texts"])}).
"""

import hashlib
import json
import lzma
import re
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.runs import IN_PROPORTION, prompts_of, small
from vau_jax import parsing, rewards
from vau_jax.common.metric_writer import read_metrics
from vau_jax.data import pipeline
from vau_jax.datasets import vau_bench
from vau_jax.eval import records, scores
from vau_jax.rl.rollout import RolloutWorker
from vau_jax.tasks import TASKS, prompts
from vau_jax.train import loop
from vau_jax.vlm import VideoLM

PATH = Path(__file__).parent / "data" / "recorded_behaviour.json.xz"
CLASSES = ("Fire", "Normal", "Arson")
INTERVALS = (None, "normal", (2.0, 6.0), (1.0, 65.0))
BATCHES = {
    "srvau_r1_sft": {},
    "vau_r1_sft": {"augment": True, "tasks": ("qa", "grounding", "classification", "description")},
    "srvau_r1_rft": {"wording": "full"},
    "vau_r1_multi_rft": {"length_window": 1},
}
TRAINING = {
    "sft": ("srvau_r1_sft", {}),
    "rft": ("srvau_r1_rft", {"rewards.tiou": 1.0, "rollout.num_generations": 4, "data.difficulty.enabled": True}),
}
MEASURED = ("loss", "grad_norm", "reward", "reward_std", "length/mean", "tokens_seen", "kl", "entropy", "final_score")


def read() -> dict[str, Any]:
    """The parts of the file, by name."""
    return json.loads(lzma.decompress(PATH.read_bytes()))


def write(parts: dict[str, Any]) -> None:
    """Replaces the file."""
    PATH.write_bytes(lzma.compress(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()))


def digest(value: Any) -> str:
    """Of the bytes of an array, or of anything else as JSON."""
    data = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, ensure_ascii=False).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def readings(texts: list[str]) -> dict[str, Any]:
    """What is read from completions and what they earn: each text with a task, a truth, a rule and a style in turn."""
    tasks = [parsing.TASKS[i % 4] for i in range(len(texts))]
    truth = [(t, "ABCD"[i % 4], CLASSES[i % 3], INTERVALS[i // 4 % 4]) for i, t in enumerate(tasks)]
    target, result = parsing.targets(truth), {}
    for rule in ("strict", "lenient"):
        for reflection in (False, True):
            parsed = parsing.parse(texts, tasks, rule, reflection)
            columns = {"format_ok": parsed.format_ok, "contradicted": parsed.contradicted}
            columns |= {name: getattr(parsed, name) for name in ("reflect_words", "reflect_copied", "think_words")}
            for part in ("final", "draft"):
                answers = getattr(parsed, part)
                for name in ("choice", "label", "anomaly", "swapped"):
                    columns[f"{part} {name}"] = answers[name]
                columns[f"{part} kind"] = np.asarray(answers.interval_count) + 1
                columns[f"{part} interval"] = np.asarray(answers.intervals)[:, 0]
            columns |= {f"reward {name}": reward(parsed, target) for name, reward in rewards.REWARDS.items()}
            result[f"{rule} {reflection}"] = {name: np.asarray(x).tolist() for name, x in columns.items()}
    return result


def examples_of(path: Path, protocol: str) -> dict[str, Any]:
    """The examples of an annotation file, what was wrong with it, and every text that is made of them."""
    rows, audit = vau_bench.load(path, "auto", protocol)
    examples = vau_bench.examples_of(rows, parsing.TASKS, Path("videos"), audit)
    result: dict[str, Any] = {"ids": [e.id for e in examples], "audit": [list(astuple(x)) for x in audit.entries]}
    for name, task in TASKS.items():
        own = [task.shuffled(e, (2, 0, 3, 1)) for e in examples if e.task == name]
        for style in prompts.STYLES:
            for wording in prompts.WORDINGS:
                result[f"{name} {style} {wording}"] = [prompts.question(e, style, wording) for e in own]
            result[f"{name} {style} completion"] = [[astuple(x) for x in prompts.completion(e, style)] for e in own]
        result[f"{name} target"] = [[task.target(e), task.answer(e), task.hint(e), prompts.facts(e)] for e in own]
    return {name: digest(value) for name, value in result.items()}


def batches(name: str, model: Path, data: Path) -> list[dict[str, Any]]:
    """The first batches of training: exactly, but for pixels, whose arithmetic differs between processors."""
    c = small(name, model, data)
    c.data.update_from_flattened_dict(BATCHES[name])
    c.data.difficulty.enabled = c.stage == "rft"
    examples, _ = pipeline.load_examples(c.data)
    iterator = pipeline.train_iterator(prompts_of(examples, VideoLM.load(model).processor, c.data), 4, seed=3)
    result = []
    for _ in range(3):
        host = next(iterator)
        leaves, _ = jax.tree_util.tree_flatten_with_path((host.batch, host.completions, host.weights))
        flat = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
        result.append(
            {
                "ids": [item.example.id for item in host.examples],
                "prompts": digest([item.prompt for item in host.examples]),
                "variants": digest([{k: v.prompt for k, v in item.variants.items()} for item in host.examples]),
                "arrays": {k: digest(x) for k, x in flat.items() if not re.search("patches|frames|windows", k)},
                "pixels": [float(np.abs(x).mean(dtype=np.float64)) for k, x in flat.items() if "patches" in k],
            }
        )
    iterator.close()
    return result


def evaluation(texts: list[str], path: Path, style: str) -> dict[str, Any]:
    """The numbers of metrics.json for three completions of each of the first examples of an annotation file."""
    rows, audit = vau_bench.load(path, "auto", "clean")
    examples = vau_bench.examples_of(rows[:40], parsing.TASKS, Path("videos"), audit)
    found = []
    for i, example in enumerate(examples):
        for rotation in range(2 if example.task == "qa" else 1):
            order = (0, 1, 2, 3)[rotation:] + (0, 1, 2, 3)[:rotation]
            shown = replace(TASKS[example.task].shuffled(example, order), rotation=rotation)
            same = texts[parsing.TASKS.index(example.task) :: 4]
            own = [same[(5 * i + 3 * rotation + k) % len(same)] for k in range(3)]
            found.append(records.make(shown, own, style, seconds=60.0))
    return scores.score(found, weights={"accuracy": 1.0, "format": 0.5})


def training(stage: str, model: Path, data: Path, workdir: Path) -> dict[str, list[float]]:
    """Metrics of six steps. Completions are drawn by place in the batch, as the recorded code did."""
    name, changed = TRAINING[stage]
    c = small(name, model, data)
    c.steps = 6
    c.update_from_flattened_dict({**IN_PROPORTION, **changed})
    if stage == "rft":
        c.user_rewards = (("tests.reward_functions:vowels", 1.0),)  # which random completions earn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutWorker, "keys", lambda self, host, key: key)
        loop.run(c, workdir)
    steps = read_metrics(workdir)
    return {name: [step[name] for step in steps] for name in MEASURED if name in steps[0]}
