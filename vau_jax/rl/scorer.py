"""Texts to rewards: built-in rewards on the device, user rewards, a judge's marks, and their metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common.checks import check_choices
from vau_jax.common.files import InputError, check_range
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Processor
from vau_jax.rl import grpo
from vau_jax.rl.outcome import Outcome, RolloutBatch, joined
from vau_jax.rl.user_rewards import UserRewards
from vau_jax.tasks import TASKS, parsing, prompts
from vau_jax.tasks.columns import Columns
from vau_jax.tasks.example import Example
from vau_jax.tasks.rewards import REWARDS, task_score, verifiable
from vau_jax.types import Sampled

if TYPE_CHECKING:
    from vau_jax.rl.judge import Judge


# config.rewards.gate -> the rule by which answers are read. Both say whether a completion keeps the strict grammar, so
# that the rewards for format and reflection are the same; leniently read, an answer counts without it.
GATES = {"form": "strict", "none": "lenient"}


def weights_of(rewards: Mapping[str, Any]) -> dict[str, float]:
    """The weights in config.rewards, by name."""
    return {name: weight for name, weight in rewards.items() if name != "gate"}


def check(config: ConfigDict) -> None:
    """Raises InputError for rewards that cannot be trained on."""
    check_choices(config.rewards, "rewards.", {"gate": tuple(GATES)})
    weights = weights_of(config.rewards)
    for name, weight in weights.items():
        check_range(f"rewards.{name}", weight)
    built_in = [name for name, weight in weights.items() if weight]
    if not (built_in or config.user_rewards or config.grpo.overlong_buffer):
        raise InputError("no reward has a weight: set one of config.rewards, or config.user_rewards")
    in_form = REWARDS if config.rewards.gate == "form" else ("format", "reflection")
    unearned = [f"rewards.{name}={config.rewards[name]}" for name in built_in if name in in_form]
    if config.data.style == "direct" and unearned:
        raise InputError(
            f"data.style=direct can earn none of {', '.join(unearned)}, which need reasoning before the answer: take "
            f"another style ({', '.join(style for style in prompts.STYLES if style != 'direct')}), or weights 0 and "
            "config.user_rewards"
        )


def _judge(config: ConfigDict, cache: Path | None) -> "Judge":
    from vau_jax.common.chat import Chat  # noqa: PLC0415 - slow to import: a mistake in a config is reported before
    from vau_jax.rl.judge import Judge  # noqa: PLC0415

    return Judge(Chat(config.judge, cache))


@dataclass
class Scorer:
    """Parses completions and rewards them, by config.rewards, config.user_rewards and config.judge."""

    config: ConfigDict
    processor: Processor
    judge_cache: Path | None = None  # JSONL of the judge's answers, so that none is paid for twice

    def __post_init__(self) -> None:
        c = self.config
        given = weights_of(c.rewards)
        unknown = [name for name in given if name not in (*REWARDS, "judge")]
        if unknown:
            raise InputError(
                f"rewards {', '.join(unknown)} are unknown: expected some of {', '.join(REWARDS)}, judge; a function "
                "of your own goes into config.user_rewards"
            )
        self.user = UserRewards(c.user_rewards, c.rollout.reward_workers, c.rollout.reward_seconds)
        self.built_in = tuple(name for name, weight in given.items() if weight and name in REWARDS)
        judged = [name for name, task in TASKS.items() if task.judged]
        if c.rewards.get("judge") and not set(judged) & set(c.data.tasks):
            raise InputError(
                f"rewards.judge={c.rewards.judge} has nothing to score: data.tasks={tuple(c.data.tasks)} lacks "
                f"{' or '.join(judged)}"
            )
        self.judge = _judge(c, self.judge_cache) if c.rewards.get("judge") else None
        weights = {name: c.rewards[name] for name in self.built_in}
        weights |= {"overlong": 1.0} if c.grpo.overlong_buffer else {}
        weights |= {"judge": c.rewards.judge} if self.judge else {}
        weights |= dict(zip(self.user.names, self.user.weights, strict=True))
        self.weights = weights  # name -> weight, in the order of the columns of RolloutBatch.rewards
        self.compute_rewards = jax.jit(self._compute_rewards)
        self.shown_errors = 0

    def read(self, host: HostBatch, sampled: Sampled) -> RolloutBatch:
        """Parses and scores the sampled completions (numpy)."""
        c, g = self.config, self.config.rollout.num_generations
        texts = [text for group in self.processor.decode_completions(sampled.tokens, sampled.mask) for text in group]
        examples = [item.example for item in host.examples for _ in range(g)]
        reflection = c.data.style in prompts.WITH_DRAFT
        choices = [example.choices for example in examples]
        tasks = [example.task for example in examples]
        parsed = parsing.parse(texts, tasks, GATES[c.rewards.gate], reflection, choices)
        target = jax.tree.map(lambda x: np.repeat(x, g, axis=0), host.target)
        readable = np.repeat([item.failure is None for item in host.examples], g)
        # The devices may be at work: what others say is asked for before they are waited for.
        own, errors = self.user(texts, examples)
        marks = np.zeros((len(texts), 0), np.float32)
        if self.judge:
            marks, errors = self._marks(texts, examples, readable, errors)
        columns, draft_score, final_score = jax.device_get(self.compute_rewards(parsed, target))
        if c.grpo.overlong_buffer:
            lengths = sampled.mask.sum(-1).reshape(-1)
            penalty = grpo.overlong_penalty(lengths, c.data.max_completion_tokens, c.grpo.overlong_buffer)
            columns = np.column_stack([columns, np.asarray(penalty)])
        rewards = np.column_stack([columns, marks, own]).astype(np.float32)
        rewards[~readable | np.asarray([error is not None for error in errors])] = np.nan
        total = np.nan_to_num(rewards) @ np.asarray(list(self.weights.values()), np.float32)
        self._show(errors, examples)
        return RolloutBatch(
            kinds=[item.example.kind for item in host.examples],
            host=host,
            sampled=sampled,
            texts=texts,
            rewards=rewards,
            total=np.where(np.isnan(rewards).all(1), np.nan, total),
            ended=(np.isin(sampled.tokens, self.processor.end_tokens) & sampled.mask).any(-1).reshape(-1),
            draft_score=draft_score,
            final_score=final_score,
            reflect_words=parsed.reflect_words,
            lengths=sampled.mask.sum(-1, dtype=np.int32).reshape(-1),
            failed=np.asarray([error is not None for error in errors]),
            errors=errors,
        )

    def _marks(
        self, texts: list[str], examples: list[Example], readable: np.ndarray, errors: list[str | None]
    ) -> tuple[np.ndarray, list[str | None]]:
        """The judge's marks float32 [N] in [0, 1], NaN for tasks that are not judged; and all failures so far."""
        marks, errors = np.full(len(texts), np.nan, np.float32), list(errors)
        asked = [i for i, example in enumerate(examples) if TASKS[example.task].judged and readable[i]]
        result = self.judge.totals([(examples[i], texts[i]) for i in asked])
        for i, (total, error) in zip(asked, result, strict=True):
            if total is None:
                errors[i] = errors[i] or f"judge: {error}"
            else:
                marks[i] = total
        return marks, errors

    def _compute_rewards(self, parsed: parsing.Parsed, target: Columns) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The built-in rewards [N, R], and the scores [N] of drafts and final answers."""
        rewards = [REWARDS[name](parsed, target) for name in self.built_in]
        columns = jnp.stack(rewards, axis=1) if rewards else jnp.zeros((len(parsed.task), 0))
        known = verifiable(target)
        scores = (jnp.where(known, task_score(a, target), jnp.nan) for a in (parsed.draft, parsed.final))
        return columns, *scores

    def _show(self, errors: Sequence[str | None], examples: Sequence[Any]) -> None:
        """Prints the first failures of rewards; all are counted in the metrics."""
        for error, example in zip(errors, examples, strict=True):
            if error is not None and self.shown_errors < 5:
                print(f"warning: a reward failed for {example.id}: {error}", flush=True)
                self.shown_errors += 1

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Metrics of the completions of a step, including those of replaced groups."""
        every = joined(outcomes)
        tasks = np.repeat([kind.split("/")[0] for kind in every.kinds], self.config.rollout.num_generations)
        ended, lengths = every.ended, every.lengths
        metrics = {
            "reward": _mean(every.total),
            "reward_std": _std(every.total),
            "groups_without_variance": 1 - every.varied.mean(),
            "length/mean": lengths.mean(),
            "length/min": lengths.min(),
            "length/max": lengths.max(),
            "length/truncated": 1 - ended.mean(),
            "length/ended_mean": _mean(lengths[ended]),
            "draft_score": _mean(every.draft_score),
            "final_score": _mean(every.final_score),
            "rewards/failed": every.failed.sum(),
        }
        for name, column in zip(self.weights, every.rewards.T, strict=True):
            metrics |= {f"rewards/{name}": _mean(column), f"rewards/{name}_std": _std(column)}
        if self.judge:
            metrics |= {"judge/tokens": self.judge.chat.tokens.total(), "judge/cost": self.judge.chat.cost}
        for task in sorted(name for name in set(tasks) if TASKS[name].verifiable):
            metrics[f"final_score/{task}"] = every.final_score[tasks == task].mean()
        if self.config.data.style in prompts.WITH_DRAFT:
            metrics |= _reflection(every, tasks)
        return metrics

    def records(self, draw: RolloutBatch, group: int) -> list[dict[str, Any]]:
        """One for each completion of a group, for people to read."""
        item, g = draw.host.examples[group], self.config.rollout.num_generations
        return [
            {
                "example": item.example.id,
                "task": item.example.task,
                "prompt": item.prompt,
                "completion": draw.texts[i],
                "rewards": {
                    name: None if np.isnan(value) else float(value)
                    for name, value in zip(self.weights, draw.rewards[i], strict=True)
                },
                "error": draw.errors[i],
            }
            for i in range(group * g, (group + 1) * g)
        ]


def _reflection(every: Outcome, tasks: np.ndarray) -> dict[str, float]:
    """How often the answer after reflection is better than, as good as, or worse than the draft, and its length."""
    known = np.asarray([TASKS[name].verifiable for name in tasks])
    gain, tasks = (every.final_score - every.draft_score)[known], tasks[known]
    if not len(gain):
        return {}
    result = {
        "reflection/corrected": (gain > 0).mean(),
        "reflection/kept": (gain == 0).mean(),
        "reflection/broken": (gain < 0).mean(),
        "reflection/words": every.reflect_words[known].mean(),
    }
    timed = np.asarray([TASKS[name].timed for name in tasks])
    if timed.any():
        result["reflection/tiou_gain"] = gain[timed].mean()
    return result


def _mean(values: np.ndarray) -> float:
    """Mean of the finite entries; 0 without any."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else 0.0


def _std(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.std()) if there.size else 0.0
