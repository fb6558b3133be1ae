"""Difficulty-aware augmentation: easy examples get degraded frames, failed ones a hint.

The idea is DeepVideo-R1's (arXiv 2506.07464): groups with equal rewards give no gradient. The form is ours: the running
accuracy is kept for each kind of example, a task and an anomaly class, since most examples occur once or twice; kinds
above `easy` get noisy or dropped frames, kinds below `hard` a line from the annotation.
"""

from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from vau_jax.data.loading import EASY, HARD
from vau_jax.data.pipeline import Collator, HostBatch
from vau_jax.rl.outcome import Outcome
from vau_jax.tasks.example import Example


class Difficulty:
    """The running accuracy of each kind of example; `config` is config.data.difficulty."""

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        self.accuracy: dict[str, float] = {}  # kind -> mean score, 1 / memory of each new group's

    def level(self, example: Example) -> str | None:
        """EASY, HARD or None; None for kinds without a score yet."""
        accuracy = self.accuracy.get(example.kind)
        if accuracy is None or self.config.hard <= accuracy <= self.config.easy:
            return None
        return EASY if accuracy > self.config.easy else HARD

    def choose(self, host: HostBatch, collate: Collator) -> tuple[HostBatch, list[dict[str, int]]]:
        """The batch with each example in the variant of its kind's level, and the number of examples of each level."""
        levels = [self.level(item.example) for item in host.examples]
        counts = [{f"difficulty/{name}": int(level == name) for name in (EASY, HARD)} for level in levels]
        if not any(levels):
            return host, counts
        items = [
            item if level is None else replace(item, **item.variants[level]._asdict())
            for item, level in zip(host.examples, levels, strict=True)
        ]
        return collate(items), counts

    def learn(self, outcome: Outcome) -> None:
        """Updates with the mean score of each group."""
        scores, counts = (x.reshape(len(outcome.kinds), -1) for x in (outcome.final_score, outcome.counts))
        for kind, score, known in zip(outcome.kinds, scores.mean(1), counts.any(1), strict=True):
            if known and np.isfinite(score):  # descriptions have no score
                before = self.accuracy.get(kind, float(score))
                self.accuracy[kind] = before + (float(score) - before) / self.config.memory
