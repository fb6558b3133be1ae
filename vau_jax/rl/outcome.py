"""Outcomes of completions: the arrays that rewards, group selection and metrics are computed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vau_jax.common.processes import Rows
from vau_jax.data.pipeline import HostBatch
from vau_jax.types import Batch, Completions, Sampled


@dataclass(frozen=True)
class Outcome:
    """Scores of the completions of B prompts; N = B * G, grouped by prompt."""

    kinds: list[str]  # B: task and class
    rewards: np.ndarray  # float32 [N, R]; NaN where a reward is absent, or the completion does not count
    total: np.ndarray  # float32 [N]: weighted sum, NaN where the completion does not count
    ended: np.ndarray  # bool [N]: with an end token, not at the limit
    draft_score: np.ndarray  # float32 [N]; NaN for descriptions, which are neither right nor wrong
    final_score: np.ndarray  # float32 [N], likewise
    reflect_words: np.ndarray  # int32 [N]: words of the reflection
    lengths: np.ndarray  # int32 [N]: tokens
    failed: np.ndarray  # bool [N]: a user's reward, or the judge's

    @property
    def counts(self) -> np.ndarray:
        """bool [N]: completions that are compared and trained on: the video was readable, and no reward failed."""
        return ~np.isnan(self.total)

    @property
    def varied(self) -> np.ndarray:
        """bool [B]: groups with different rewards; others give no gradient."""
        groups = self.total.reshape(len(self.kinds), -1)
        return np.nan_to_num(np.nanmax(groups, 1, initial=-np.inf) - np.nanmin(groups, 1, initial=np.inf)) > 0

    @property
    def _by_group(self) -> dict[str, np.ndarray]:
        """The arrays with leading axes [B, G]."""
        arrays = {name: getattr(self, name) for name in _PER_COMPLETION}
        return {name: x.reshape(len(self.kinds), -1, *x.shape[1:]) for name, x in arrays.items()}

    def groups(self, numbers: np.ndarray) -> "Outcome":
        """The groups with these indices."""
        arrays = {name: x[numbers].reshape(-1, *x.shape[2:]) for name, x in self._by_group.items()}
        return Outcome([self.kinds[i] for i in numbers], **arrays)

    def gathered(self, rows: Rows) -> "Outcome":
        """The outcome of the global batch, given this process's `rows` of it."""
        grouped = self._by_group
        rows_of = [[kind, *(x[i].tolist() for x in grouped.values())] for i, kind in enumerate(self.kinds)]
        kinds, *columns = zip(*rows.gather(rows_of), strict=True)
        arrays = {
            name: np.asarray(column, x.dtype).reshape(-1, *x.shape[2:])
            for (name, x), column in zip(grouped.items(), columns, strict=True)
        }
        return Outcome(list(kinds), **arrays)


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Concatenated."""
    arrays = {name: np.concatenate([getattr(outcome, name) for outcome in outcomes]) for name in _PER_COMPLETION}
    return Outcome([kind for outcome in outcomes for kind in outcome.kinds], **arrays)


_PER_COMPLETION = ("rewards", "total", "ended", "draft_score", "final_score", "reflect_words", "lengths", "failed")


@dataclass(frozen=True)
class RolloutBatch(Outcome):
    """The outcome together with the completions themselves, on the host: of this process's prompts."""

    host: HostBatch
    sampled: Sampled  # numpy; C is the limit
    texts: list[str]  # N
    errors: list[str | None]  # N: what failed in a user's reward, or in the judge's


@dataclass(frozen=True)
class Scored:
    """What the loss reads of the policies, for the groups that are trained on."""

    completions: Completions  # of the global batch, on the devices
    tokens: np.ndarray  # int [B]: of the completions of each prompt
    logps: dict[str, jax.Array]  # float32 [B, G, C] by the names of the loss's inputs


@dataclass(frozen=True)
class SelectedGroups:
    """The groups of a step's batch that are trained on."""

    outcome: Outcome  # of the global batch
    batch: Batch  # prompts of the global batch, on the devices
    sampled: Sampled  # numpy, of this process's rows
    first: list[dict[str, Any]]  # a record for each completion of the first group, for people to read
    scored: Scored | None = None  # where it was known before the rewards that these groups are trained on
