"""The rollout: sample on the device, parse and reward the texts, select groups, and build the batch of one update."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.data import pipeline
from vau_jax.data.feed import Feed
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.shapes import Shape
from vau_jax.rl import grpo
from vau_jax.rl.difficulty import Difficulty
from vau_jax.rl.engine import Engine, prompts_at_once
from vau_jax.rl.outcome import Outcome, RolloutBatch, Scored, SelectedGroups, joined
from vau_jax.rl.scorer import Scorer
from vau_jax.types import Batch, Completions, Sampled, TrainBatch, Variables


class Policy(Protocol):
    """The interface of the learner that a rollout uses."""

    variables: Variables

    def encode_vision(self, batch: Batch) -> Batch: ...
    def policy_logps(self, batch: Batch, completions: Completions, tokens: np.ndarray) -> jax.Array: ...
    def reference_logps(self, batch: Batch, completions: Completions, tokens: np.ndarray) -> jax.Array: ...


class Collected(NamedTuple):
    """The by-products of a rollout: metrics of all completions, and one group's records to read."""

    train: TrainBatch
    tokens: np.ndarray  # int [B]: of the completions of each prompt
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]


class Clock:
    """Seconds spent in each phase of a step, and the phase that it is in, or was in last."""

    def __init__(self) -> None:
        self.began, self.spent, self.phase = time.monotonic(), {}, ""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began, self.phase = time.monotonic(), phase
        yield
        self.spent[phase] = self.spent.get(phase, 0.0) + time.monotonic() - began

    def seconds(self) -> dict[str, float]:
        whole = {"seconds/step": time.monotonic() - self.began}
        return whole | {f"seconds/{phase}": value for phase, value in self.spent.items()}


@dataclass
class RolloutWorker:
    """Collects batches of completions with all inputs of the loss, from batches of prompts."""

    config: ConfigDict
    engine: Engine
    scorer: Scorer
    feed: Feed
    difficulty: Difficulty

    def collect(self, policy: Policy, batch: HostBatch, key: jax.Array, clock: Clock) -> Collected:
        """One update's batch from the prompts of `batch` and, with rollout.max_draws, of further batches."""
        chosen, outcomes, levels = self.select(policy, batch, key, clock)
        metrics: dict[str, Any] = {**levels, **self.scorer.metrics(outcomes)}
        if self.config.rollout.max_draws > 1:
            alike = int((~chosen.outcome.varied).sum())
            metrics |= {"dynamic/draws": len(outcomes), "dynamic/left_without_variance": alike}
            metrics["dynamic/replaced"] = int((~outcomes[0].varied).sum()) - alike
        with clock("score"):
            scored = chosen.scored or self.score(policy, chosen.batch, chosen.sampled, chosen.outcome.lengths)
            kl = self._kl_in_reward(policy, chosen.batch, scored)
            inputs, advantages = self.loss_inputs(chosen, kl)
            inputs = self.feed.rows.put(inputs)
            if self.config.rollout.annotated:  # nobody has sampled it: as if the policy had
                inputs["sampler_logps"] = _last_replaced(inputs["sampler_logps"], scored.logps["old_logps"])
                last = chosen.outcome.total.reshape(len(chosen.outcome.kinds), -1)[:, -1]
                metrics["annotated/reward"] = float(np.nanmean(last)) if np.isfinite(last).any() else 0.0
                metrics["annotated/completions"] = int(np.isfinite(last).sum())
        samples = [{**record, "advantage": float(a)} for record, a in zip(chosen.first, advantages[0], strict=True)]
        train = TrainBatch(chosen.batch, scored.completions, {**inputs, **scored.logps})
        return Collected(train, scored.tokens, metrics, samples)

    # --- Groups ---

    def select(
        self, policy: Policy, host: HostBatch, key: jax.Array, clock: Clock
    ) -> tuple[SelectedGroups, list[Outcome], dict[str, int]]:
        """The groups to train on, the outcomes of all that were sampled, and the number of prompts of each level of
        difficulty.

        With rollout.max_draws, groups with equal rewards are replaced by groups of further prompts until the limit is
        reached (DAPO's dynamic sampling, arXiv 2503.14476); those that remain have advantage 0.
        """
        draws: list[RolloutBatch] = []
        outcomes: list[Outcome] = []
        levels: list[dict[str, int]] = []
        while True:
            if self.config.data.difficulty.enabled:
                with clock("data"):
                    host, own_levels = self.difficulty.choose(host, self.feed.collate)
                    host = self.feed.placed(host)
                levels += self.feed.rows.gather(own_levels)
            with clock("rollout"):
                batch = policy.encode_vision(host.batch)
                keys = self.keys(host, jax.random.fold_in(key, len(draws)))
                sampled = self.engine.sample(policy.variables, batch, keys)
                sampled = self.feed.rows.fetch(sampled)
                sampled = with_annotated(sampled, host) if self.config.rollout.annotated else sampled
            draw, scored = self._read(policy, host, batch, sampled, clock)
            with clock("reward"):
                draws.append(draw)
                outcomes.append(draw.gathered(self.feed.rows))
                self.difficulty.learn(outcomes[-1])
            enough = sum(outcome.varied.sum() for outcome in outcomes) >= self.feed.rows.count
            if enough or len(draws) >= self.config.rollout.max_draws:
                break
            with clock("data"):
                host = self.feed.next()
        if len(draws) == 1:
            chosen = SelectedGroups(outcomes[0], batch, draws[0].sampled, self._first(draws, 0), scored)
        else:
            chosen = self._of_several(policy, draws, outcomes)
        return chosen, outcomes, pipeline.summed(levels)

    def _read(
        self, policy: Policy, host: HostBatch, batch: Batch, sampled: Sampled, clock: Clock
    ) -> tuple[RolloutBatch, Scored | None]:
        """The rewards of a draw and, where all its groups are trained on, what the devices compute of it meanwhile: the
        clock's "reward" is what they wait for after that.
        """
        with ThreadPoolExecutor(1, "rewards") as thread:
            reading, scored = thread.submit(self.scorer.read, host, sampled), None
            if self.config.rollout.max_draws == 1:
                with clock("score"):
                    lengths = np.asarray(self.feed.rows.gather(sampled.mask.sum(-1).tolist()))
                    scored = self.score(policy, batch, sampled, lengths)
                    jax.block_until_ready(scored.logps)
            with clock("reward"):
                return reading.result(), scored

    def keys(self, host: HostBatch, key: jax.Array) -> jax.Array:
        """A key for each prompt of the global batch [B], derived only from its example: token t of its completion g is
        sampled with fold_in(fold_in(keys[b], g), t). So the sample depends neither on the position in the batch nor on
        the number of devices or processes.
        """
        ids = self.feed.rows.gather([item.example.id for item in host.examples])
        repeats = [ids[:row].count(ids[row]) for row in self.feed.rows.mine]
        numbers = self.feed.rows.put(pipeline.draw_numbers(host.examples, repeats))
        return pipeline.keys_of(key, numbers)

    def _of_several(self, policy: Policy, draws: list[RolloutBatch], outcomes: list[Outcome]) -> SelectedGroups:
        """Selects from several batches; a group may go to the devices of another process than the one that has parsed
        it.
        """
        every = joined(outcomes)
        numbers = np.argsort(~every.varied, kind="stable")[: self.feed.rows.count]
        shape = Shape(*map(max, *(self.feed.shape(draw.host) for draw in draws)))
        pools = [(self.feed.collate(draw.host.examples, shape).batch, draw.sampled) for draw in draws]
        batch, sampled = self.feed.rows.take(pools, numbers)
        first = self._first(draws, int(numbers[0]))
        return SelectedGroups(every.groups(numbers), policy.encode_vision(batch), self.feed.rows.fetch(sampled), first)

    def _first(self, draws: list[RolloutBatch], number: int) -> list[dict[str, Any]]:
        """Records of the group `number`, counted over all batches, from the process that has parsed it."""
        draw, row = divmod(number, self.feed.rows.count)
        mine = [self.scorer.records(draws[draw], i) if r == row else None for i, r in enumerate(self.feed.rows.mine)]
        return self.feed.rows.gather(mine)[row]

    # --- What the loss reads ---

    def score(self, policy: Policy, batch: Batch, sampled: Sampled, lengths: np.ndarray) -> Scored:
        """What the loss reads of policies; `lengths` int [N] are those of the whole batch's completions.

        That is the log-probabilities of the reference policy, where there is a KL term, and of the policy that sampled,
        where one rollout serves several updates or has completions that nobody sampled.
        """
        tokens = lengths.reshape(len(batch.tokens), -1).sum(1)
        completions, logps = self.feed.rows.put(Completions(sampled.tokens, sampled.mask)), {}
        if self.config.grpo.beta:
            logps["ref_logps"] = policy.reference_logps(batch, completions, tokens)
        if has_old_logps(self.config):
            logps["old_logps"] = policy.policy_logps(batch, completions, tokens)
        return Scored(completions, tokens, logps)

    def _kl_in_reward(self, policy: Policy, batch: Batch, scored: Scored) -> np.ndarray | None:
        """Where the KL is part of the reward, the KL of each token, float32 [b, G, C] of this process's rows.

        Both sides are scored by the same program: the sampler's log-probabilities can be those of another distribution
        (see sampling.py), and are rounded differently.
        """
        c = self.config.grpo
        if c.kl_in != "reward" or not c.beta:
            return None
        own = scored.logps.get("old_logps")
        if own is None:
            own = policy.policy_logps(batch, scored.completions, scored.tokens)
        own, reference = self.feed.rows.fetch(own), self.feed.rows.fetch(scored.logps["ref_logps"])
        return np.asarray(grpo.kl_divergence(own, reference, c.kl))

    def advantages(self, outcome: Outcome, kl: np.ndarray | None = None) -> np.ndarray:
        """float32 [B, G]; `kl` [B, G], summed over each completion, where it is part of the reward."""
        c, rewards, weights = self.config, outcome.rewards, list(self.scorer.weights.values())
        if kl is not None:
            kl = np.where(outcome.counts, kl.reshape(-1), np.nan)
            rewards = np.column_stack([rewards, kl]).astype(np.float32)
            weights = [*weights, -c.grpo.beta]
        g = c.rollout.num_generations
        result = grpo.group_advantages(rewards, g, c.grpo.scale, weights=weights, per_reward=c.grpo.per_reward)
        return np.asarray(result, np.float32).reshape(-1, g)

    def loss_inputs(
        self, chosen: SelectedGroups, kl: np.ndarray | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs of grpo.loss, except old and reference log-probabilities, for the completions in this process's rows;
        and the advantages of the whole batch [B, G].

        `kl` [b, G, C] of each token is given when it is part of the reward.
        """
        outcome, mask = chosen.outcome, chosen.sampled.mask
        if kl is not None:
            kl = np.asarray(self.feed.rows.gather(np.where(mask, kl, 0.0).sum(-1).tolist()))
        advantages = self.advantages(outcome, kl)
        trained = outcome.counts & outcome.ended if self.config.grpo.mask_truncated else outcome.counts
        trained = self.feed.rows.own(trained.reshape(advantages.shape))
        inputs = {
            "mask": mask & trained[..., None],
            "advantages": self.feed.rows.own(advantages),
            "sampler_logps": chosen.sampled.logps,
        }
        return inputs, advantages


def has_old_logps(config: ConfigDict) -> bool:
    """Whether updates read the log-probabilities of the policy before the first of them."""
    several = config.grpo.iterations > 1 or prompts_at_once(config) > config.batch_size
    return several or config.rollout.annotated


def with_annotated(sampled: Sampled, host: HostBatch) -> Sampled:
    """The sampled completions of each prompt and after them the annotated one; an empty one where the video failed."""
    readable = np.asarray([item.failure is None for item in host.examples])[:, None, None]
    mask = host.completions.mask & readable
    added = Sampled(np.where(mask, host.completions.tokens, 0), np.zeros(mask.shape, np.float32), mask)
    return jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), sampled, added)


@jax.jit
def _last_replaced(x: jax.Array, other: jax.Array) -> jax.Array:
    """x [B, G, C] with the last of the G from `other`."""
    return x.at[:, -1].set(other[:, -1])


def abstract_inputs(
    config: ConfigDict, length: int, rows: Callable[..., jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `collect` gives the loss for completions of `length` tokens; `rows(*shape, dtype)` is an array
    with a row for each prompt."""
    g = config.rollout.num_generations
    per_token = {"mask": bool, "sampler_logps": np.float32}
    per_token |= {"ref_logps": np.float32} if config.grpo.beta else {}
    per_token |= {"old_logps": np.float32} if has_old_logps(config) else {}
    inputs = {name: rows(g, length, dtype=dtype) for name, dtype in per_token.items()}
    return inputs | {"advantages": rows(g, dtype=np.float32)}
