"""Difficulty-aware augmentation: what the policy does well is made harder to see, what it fails at comes with a hint.

The idea is DeepVideo-R1's (arXiv 2506.07464): groups whose rewards are all alike teach nothing. The form is ours: the
running accuracy is kept for each kind of example, a task and an anomaly class, since most examples are met once or
twice; kinds above `easy` get noisy or dropped frames, kinds below `hard` a line from the annotation.
"""

from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from vau_jax.data.pipeline import EASY, HARD, Collator, Example, HostBatch
from vau_jax.rollout import Draw


class Difficulty:
    """The running accuracy of each kind of example; `config` is config.data.difficulty."""

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        self.accuracy: dict[str, float] = {}  # kind -> mean score, 1 / memory of each new group's

    def level(self, example: Example) -> str | None:
        """EASY, HARD or None; None for kinds that have not been met."""
        accuracy = self.accuracy.get(kind(example))
        if accuracy is None or self.config.hard <= accuracy <= self.config.easy:
            return None
        return EASY if accuracy > self.config.easy else HARD

    def choose(self, host: HostBatch, collate: Collator) -> tuple[HostBatch, dict[str, float]]:
        """The batch with each example in the variant of its kind's level; and how many there are of each."""
        levels = [self.level(item.example) for item in host.examples]
        metrics = {f"difficulty/{level}": float(levels.count(level)) for level in (EASY, HARD)}
        if not any(levels):
            return host, metrics
        items = [
            item if level is None else replace(item, **item.variants[level]._asdict())
            for item, level in zip(host.examples, levels, strict=True)
        ]
        return collate(items), metrics

    def learn(self, draw: Draw) -> None:
        """Takes in the mean score of each group."""
        scores = draw.final_score.reshape(len(draw.host.examples), -1).mean(1)
        for item, score in zip(draw.host.examples, scores, strict=True):
            if item.failure is None and np.isfinite(score):  # descriptions have no score
                name = kind(item.example)
                before = self.accuracy.get(name, float(score))
                self.accuracy[name] = before + (float(score) - before) / self.config.memory


def kind(example: Example) -> str:
    return f"{example.task}/{example.row.anomaly_class}"
