"""Evaluation during training: every `config.eval.every` steps the policy answers held-out examples, greedily, on the
devices and in the style of the run.

The training itself is the same bits with and without it: an evaluation reads the parameters and draws nothing. Its
numbers are those of `vau evaluate` on a checkpoint of that step.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import processes
from vau_jax.common.checks import COUNT, NOT_NEGATIVE, check_ranges
from vau_jax.common.files import InputError
from vau_jax.common.processes import Rows
from vau_jax.data import loading, pipeline
from vau_jax.data.feed import Placer
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Processor
from vau_jax.eval import records, scores
from vau_jax.models.checkpoint import EVALUATED, SCORE
from vau_jax.rl import sampling
from vau_jax.tasks import TASKS, prompts
from vau_jax.tasks.example import Example
from vau_jax.tasks.record import Record
from vau_jax.train.learner import Learner

SEED = 0  # of the order of options: that of configs/eval.py, so that runs of all seeds are asked alike
RANGES = {"every": COUNT, "max_examples": NOT_NEGATIVE, "share": (1e-6, 1), "patience": NOT_NEGATIVE}


def check(config: ConfigDict) -> None:
    """Raises InputError for invalid settings of config.eval, where it is active."""
    e = config.eval
    check_ranges(e, "eval.", RANGES)
    by_evaluation = config.checkpoint.best.removeprefix("-").startswith(EVALUATED)
    if not e.csv and (e.patience or by_evaluation):
        raise InputError(
            f"eval.patience={e.patience}, checkpoint.best={config.checkpoint.best!r} without evaluations: set eval.csv"
        )
    if not e.csv:
        return
    data = data_of(config)
    with _of_evaluations():
        pipeline.check(data)
    if not any(TASKS[task].verifiable for task in data.tasks):
        raise InputError(f"eval.tasks={tuple(data.tasks)} have no score to compare checkpoints by: expected another")


@contextmanager
def _of_evaluations() -> Iterator[None]:
    """Says in an InputError about `data` that it is about the evaluations'."""
    try:
        yield
    except InputError as error:
        raise InputError(f"evaluations during training (config.eval stands in for config.data): {error}") from error


def data_of(config: ConfigDict) -> ConfigDict:
    """config.data of the examples that config.eval names: asked as in training, without augmentation and hints."""
    e, data = config.eval, ConfigDict(config.data.to_dict())
    data.csv, data.videos, data.split = e.csv, e.videos or data.videos, e.split or data.split
    data.tasks = e.tasks or data.tasks
    data.reflection, data.share, data.max_examples = "", 1.0, 0
    data.difficulty.enabled = False
    return data


def input_hashes(config: ConfigDict) -> dict[str, str]:
    """Hashes of the evaluation's own files, by the field that names them."""
    if not config.eval.csv:
        return {}
    found = pipeline.input_hashes(data_of(config))
    return {name.replace("data.", "eval."): x for name, x in found.items() if name in ("data.csv", "data.videos")}


def chosen(examples: Sequence[Example], most: int) -> list[Example]:
    """At most `most` examples (0: all), which their ids alone decide: a table's first rows are often of one source."""
    digests = [hashlib.sha256(example.id.encode()).digest() for example in examples]
    kept = sorted(range(len(examples)), key=digests.__getitem__)[: most or None]
    return [examples[i] for i in sorted(kept)]


class Evaluation:
    """The evaluations of a run. `state` is the part of a checkpoint that they go on from."""

    def __init__(self, config: ConfigDict, processor: Processor, mesh: jax.sharding.Mesh) -> None:
        """Raises InputError where the examples cannot be read."""
        self.config, self.data = config.eval, data_of(config)
        self.processor, self.last_step = processor, config.steps
        with _of_evaluations():
            found, audit = pipeline.load_examples(self.data)
        self.examples = chosen(found, config.eval.max_examples)
        self.prompts = pipeline.Prompts(self.examples, loading.make_loader(processor, self.data, augment=False))
        self.placer = Placer(Rows(config.batch_size, mesh), self.prompts.collate)
        best = config.checkpoint.best
        self.metric = best if best.removeprefix("-").startswith(EVALUATED) else SCORE
        self._sign = -1 if self.metric.startswith("-") else 1
        self._check_metric()
        self.history: list[tuple[int, float | None]] = []  # (step, value, higher is better; None: it has none)
        self.spent = self.trained = 0.0  # seconds in evaluations, and in steps
        if processes.is_first():
            asked = Counter(example.task for example in self.examples)
            tasks = ", ".join(f"{n} {task}" for task, n in asked.items())
            left_out = audit.counts().total()
            print(
                f"evaluated every {self.config.every} steps: {tasks} of {self.data.csv}"
                + (f" ({left_out} findings in it: `vau data check` lists them)" if left_out else ""),
                flush=True,
            )

    def _check_metric(self) -> None:
        """Raises InputError for a metric that the right answers do not have."""
        if self.metric == SCORE or self.data.style in prompts.WITH_DRAFT:  # with drafts, there are more metrics
            return
        answers = [(e, prompts.completion(e, "direct")) for e in self.examples if TASKS[e.task].verifiable]
        right = [records.make(e, ["".join(span.text for span in spans)], "direct") for e, spans in answers]
        known = [name for name in scalars(right, self.data.protocol) if name.startswith(EVALUATED)]
        if self.metric.removeprefix("-") not in known:
            raise InputError(
                f"checkpoint.best={self.metric!r} is no metric of these examples: expected one of {', '.join(known)}"
            )

    # --- Where the evaluations stand ---

    @property
    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"history": self.history, "spent": self.spent, "trained": self.trained}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.history = [(int(step), value) for step, value in state["history"]]
        self.spent, self.trained = state["spent"], state["trained"]

    @property
    def last(self) -> dict[str, float]:
        """The metric that checkpoints are compared by, of the last evaluation; empty before."""
        value = self.history[-1][1] if self.history else None
        return {} if value is None else {self.metric.removeprefix("-"): value * self._sign}

    @property
    def without_improvement(self) -> int:
        """The number of evaluations since the best one."""
        values = [-np.inf if value is None else value for _, value in self.history]
        return len(values) - 1 - int(np.argmax(values)) if values else 0

    def improved_at(self, step: int) -> bool:
        """Whether `step` was evaluated, and is the best so far."""
        at, value = self.history[-1] if self.history else (None, None)
        return at == step and value is not None and not self.without_improvement

    @property
    def ends_run(self) -> bool:
        """Whether so many evaluations brought no improvement that the run stops early."""
        return 0 < self.config.patience <= self.without_improvement

    # --- An evaluation ---

    def after(self, step: int, seconds: float, learner: Learner, asked_to_end: Callable[[], bool]) -> dict[str, float]:
        """Metrics after `step`, which took `seconds`; empty where none is due, or it was given up because the run is
        asked to end."""
        self.trained += seconds
        if step % self.config.every and step != self.last_step:
            return {}
        if not processes.broadcast_from_first(lambda: self._affordable(step)):
            return {}
        began = time.monotonic()
        answered = self._answers(learner, asked_to_end)
        took = time.monotonic() - began
        self.spent += took
        if answered is None:
            if processes.is_first():
                print(f"the evaluation at step {step} is left out: the run is asked to end", flush=True)
            return {}
        metrics = scalars(answered, self.data.protocol)
        metrics["seconds/eval"] = took
        value = metrics.get(self.metric.removeprefix("-"))  # a mean of errors, say, where no answer could be read
        self.history.append((step, None if value is None else value * self._sign))
        return metrics

    def _affordable(self, step: int) -> bool:
        """Whether another evaluation, taken to cost the mean so far, stays within the share of the run's time."""
        if not self.history:  # what one costs is not known yet
            return True
        share = share_with_another(self.spent, len(self.history), self.trained)
        if share > self.config.share:
            print(
                f"the evaluation at step {step} is left out: evaluations would take {share:.0%} of the run's time, "
                f"above eval.share={self.config.share:g}",
                flush=True,
            )
        return share <= self.config.share

    def _answers(self, learner: Learner, asked_to_end: Callable[[], bool]) -> list[Record] | None:
        """The records of all examples, in every process; None where the run is asked to end."""
        found: dict[str, Record] = {}
        for host in self._batches():
            if asked_to_end():
                return None
            texts = self._decoded(learner, host)
            own = [records.of_loaded(*pair, self.data.style) for pair in zip(host.examples, texts, strict=True)]
            lines = self.placer.rows.gather([records.to_line(record, "") for record in own])
            found |= {record.example: record for record in map(records.of_line, lines)}  # the last fills up its batch
        return [found[example.id] for example in self.examples]

    def _batches(self) -> Iterator[HostBatch]:
        rows = self.placer.rows
        batches = pipeline.eval_batches(self.prompts, rows.count, SEED, rows.mine)
        yield from map(self.placer.placed, batches)

    def _decoded(self, learner: Learner, host: HostBatch) -> list[list[str]]:
        """One text for each of this process's prompts."""
        sampled = sampling.sample(
            learner.variables,
            learner.encode_vision(host.batch),
            jax.random.key(SEED),
            model=learner.sampler,
            num_generations=1,
            max_new_tokens=self.data.max_completion_tokens,
            end_tokens=self.processor.end_tokens,
            greedy=True,
        )
        sampled = self.placer.rows.fetch(sampled)
        return self.processor.decode_completions(sampled.tokens, sampled.mask)


def share_with_another(spent: float, count: int, trained: float) -> float:
    """The share of a run's time that evaluations take with one more, after `count` took `spent` seconds and steps
    `trained` seconds."""
    expected = spent + spent / count
    return expected / (trained + expected)


def scalars(answered: Sequence[Record], protocol: str) -> dict[str, float]:
    """The numbers of metrics.json as curves: `eval/TASK/METRIC`, `eval/rewards/NAME`, and `eval/score`, the mean over
    tasks of the mean score (accuracy; temporal IoU for grounding), which checkpoints are compared by."""
    result = scores.score(answered, protocol)
    found = {name: values["value"] for name, values in result["rewards"].items()}
    metrics = {f"{EVALUATED}rewards/{name}": value for name, value in found.items()}
    for task, numbers in result["tasks"].items():
        for name, number in numbers.items():
            value = number.get("value") if isinstance(number, dict) else number
            if isinstance(value, int | float):
                metrics[f"{EVALUATED}{task}/{name}"] = float(value)
    by_task = [np.mean([r.scores[0] for r in answered if r.task == task]) for task in result["by_class"]]
    metrics[SCORE] = float(np.mean(by_task))
    metrics[f"{EVALUATED}examples"] = len(answered)
    metrics[f"{EVALUATED}failed"] = sum(record.failure is not None for record in answered)
    return metrics
