"""The host rim of RFT: sample on the device, read the texts, score them, and make the batch of one update."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vau_jax import grpo, judge, parsing, sampling
from vau_jax.chat import Chat
from vau_jax.data import prompts
from vau_jax.data.pipeline import Collator, Example, HostBatch
from vau_jax.data.processor import Processor
from vau_jax.files import InputError
from vau_jax.judge import Judge
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.processes import Rows
from vau_jax.rewards import REWARDS, task_score
from vau_jax.types import Batch, Completions, Sampled, Target, Variables
from vau_jax.user_rewards import UserRewards
from vau_jax.vlm import decode_text

LENGTHS = 4  # different lengths that completions are padded to: quarters of the limit


@dataclass(frozen=True)
class Outcome:
    """How the completions of B prompts did; N = B * G, a prompt's one after the other."""

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
        """bool [N]: completions that are compared and trained on: the video could be read, and no reward failed."""
        return ~np.isnan(self.total)

    @property
    def varied(self) -> np.ndarray:
        """bool [B]: groups whose rewards differ, which alone say anything about the policy."""
        groups = self.total.reshape(len(self.kinds), -1)
        return np.nan_to_num(np.nanmax(groups, 1, initial=-np.inf) - np.nanmin(groups, 1, initial=np.inf)) > 0

    def gathered(self, rows: Rows) -> "Outcome":
        """That of the whole batch, whose `rows` of this process this is."""
        if jax.process_count() == 1:
            return self
        b, arrays = len(self.kinds), {name: getattr(self, name) for name in _PER_COMPLETION}
        grouped = {name: x.reshape(b, -1, *x.shape[1:]) for name, x in arrays.items()}
        told = [[kind, *(x[i].tolist() for x in grouped.values())] for i, kind in enumerate(self.kinds)]
        kinds, *columns = zip(*rows.gather(told), strict=True)
        joined = {
            name: np.asarray(column, x.dtype).reshape(-1, *x.shape[1:])
            for (name, x), column in zip(arrays.items(), columns, strict=True)
        }
        return Outcome(list(kinds), **joined)


_PER_COMPLETION = ("rewards", "total", "ended", "draft_score", "final_score", "reflect_words", "lengths", "failed")


@dataclass(frozen=True)
class Draw(Outcome):
    """The completions themselves too, on the host."""

    host: HostBatch
    sampled: Sampled  # numpy; C is the limit
    texts: list[str]  # N
    errors: list[str | None]  # N: what failed in a user's reward, or in the judge's


@dataclass
class Rollout:
    """Draws completions and scores them."""

    config: ConfigDict
    model: QwenVL
    processor: Processor
    rows: Rows
    judge_cache: Path | None = None  # JSONL of the judge's answers, so that none is paid for twice

    def __post_init__(self) -> None:
        c = self.config
        unknown = [name for name in c.rewards if name not in (*REWARDS, "judge")]
        if unknown:
            raise InputError(
                f"rewards {', '.join(unknown)} are unknown: expected some of {', '.join(REWARDS)}, judge; a function "
                "of your own goes into config.user_rewards"
            )
        if c.rollout.num_generations < 2:
            raise InputError(
                f"rollout.num_generations={c.rollout.num_generations}: GRPO compares the completions of a prompt, so a "
                "group needs at least 2"
            )
        self.user = UserRewards(c.user_rewards, c.rollout.reward_threads)
        self.built_in = tuple(name for name, weight in c.rewards.items() if weight and name in REWARDS)
        if c.rewards.get("judge") and "description" not in c.data.tasks:
            raise InputError(
                f"rewards.judge={c.rewards.judge} has nothing to mark: data.tasks={tuple(c.data.tasks)} lacks "
                "description"
            )
        self.judge = Judge(Chat(c.judge, self.judge_cache)) if c.rewards.get("judge") else None
        weights = {name: c.rewards[name] for name in self.built_in}
        weights |= {"overlong": 1.0} if c.grpo.overlong_buffer else {}
        weights |= {"judge": c.rewards.judge} if self.judge else {}
        weights |= dict(zip(self.user.names, self.user.weights, strict=True))
        self.weights = weights  # name -> weight, in the order of the columns of Draw.rewards
        self.score = jax.jit(self._score)
        self.shown_errors = 0

    def sample(self, variables: Variables, batch: Batch, key: jax.Array) -> Sampled:
        """G completions of each prompt, on the device."""
        c = self.config.rollout
        return sampling.sample(
            variables,
            batch,
            key,
            c.temperature,
            c.min_new_tokens,
            model=self.model,
            num_generations=c.num_generations,
            max_new_tokens=self.config.data.max_completion_tokens,
            end_tokens=self.processor.end_tokens,
            top_p=c.top_p,
            top_k=c.top_k,
        )

    def read(self, host: HostBatch, sampled: Sampled) -> Draw:
        """Reads and scores what was sampled (numpy)."""
        c, g = self.config, self.config.rollout.num_generations
        texts = [text for group in decode_text(self.processor, sampled.tokens, sampled.mask) for text in group]
        examples = [item.example for item in host.examples for _ in range(g)]
        parsed = parsing.parse(texts, [e.task for e in examples], "strict", c.data.style in prompts.WITH_DRAFT)
        target = jax.tree.map(lambda x: np.repeat(x, g, axis=0), host.target)
        columns, draft_score, final_score = jax.device_get(self.score(parsed, target))
        if c.grpo.overlong_buffer:
            lengths = sampled.mask.sum(-1).reshape(-1)
            penalty = grpo.overlong_penalty(lengths, c.data.max_completion_tokens, c.grpo.overlong_buffer)
            columns = np.column_stack([columns, np.asarray(penalty)])
        readable = np.repeat([item.failure is None for item in host.examples], g)
        own, errors = self.user(texts, examples)
        if self.judge:
            marks, errors = self._marks(texts, examples, readable, errors)
            columns = np.column_stack([columns, marks])
        rewards = np.column_stack([columns, own]).astype(np.float32)
        rewards[~readable | np.asarray([error is not None for error in errors])] = np.nan
        total = np.nan_to_num(rewards) @ np.asarray(list(self.weights.values()), np.float32)
        self._show(errors, examples)
        return Draw(
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
        """The judge's marks float32 [N] in [0, 1], NaN for all but descriptions, and what failed so far and here."""
        marks, errors = np.full(len(texts), np.nan, np.float32), list(errors)
        asked = [i for i, example in enumerate(examples) if example.task == "description" and readable[i]]
        found = self.judge.marks([judge.Subject.of_row(examples[i].row, texts[i]) for i in asked])
        for i, (given, error) in zip(asked, found, strict=True):
            if given is None:
                errors[i] = errors[i] or f"judge: {error}"
            else:
                marks[i] = judge.total(given)
        return marks, errors

    def _score(self, parsed: parsing.Parsed, target: Target) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The built-in rewards [N, R], and the scores [N] of drafts and final answers."""
        rewards = [REWARDS[name](parsed, target) for name in self.built_in]
        columns = jnp.stack(rewards, axis=1) if rewards else jnp.zeros((len(parsed.task), 0))
        known = target.task < len(parsing.VERIFIABLE)
        scores = (jnp.where(known, task_score(a, target), jnp.nan) for a in (parsed.draft, parsed.final))
        return columns, *scores

    def _show(self, errors: Sequence[str | None], examples: Sequence[Any]) -> None:
        """Prints the first failures of rewards; all are counted in the metrics."""
        for error, example in zip(errors, examples, strict=True):
            if error is not None and self.shown_errors < 5:
                print(f"warning: a reward failed for {example.name}: {error}", flush=True)
                self.shown_errors += 1

    def completions(self, draw: Draw, longest: int) -> Completions:
        """What is trained on, padded to the least of LENGTHS lengths that holds `longest` tokens, the most that a
        completion of the whole batch has: few programs, little padding."""
        limit = draw.sampled.tokens.shape[2]
        step = -(-limit // LENGTHS)
        length = min(limit, -(-max(1, longest) // step) * step)
        return Completions(draw.sampled.tokens[..., :length], draw.sampled.mask[..., :length])

    def loss_inputs(self, draw: Draw, mask: np.ndarray, ref_logps: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """What grpo.loss reads, but for old and reference log-probabilities, for completions with `mask` [B, G, C].

        `ref_logps` [B, G, C] of the reference policy are given when the KL is part of the reward.
        """
        c, length = self.config, mask.shape[2]
        rewards, weights = draw.rewards, list(self.weights.values())
        if ref_logps is not None:
            kl = grpo.kl_divergence(draw.sampled.logps[..., :length], ref_logps, c.grpo.kl)
            kl = np.sum(np.where(mask, kl, 0.0), axis=-1).reshape(-1, 1)
            rewards = np.column_stack([rewards, np.where(draw.counts[:, None], kl, np.nan)]).astype(np.float32)
            weights = [*weights, -c.grpo.beta]
        advantages = grpo.group_advantages(
            replace(draw, rewards=rewards).gathered(self.rows).rewards,
            c.rollout.num_generations,
            c.grpo.scale,
            weights=weights,
            per_reward=c.grpo.per_reward,
        )
        advantages = np.asarray(advantages, np.float32).reshape(-1, c.rollout.num_generations)
        trained = draw.counts & draw.ended if c.grpo.mask_truncated else draw.counts
        return {
            "mask": mask & trained.reshape(mask.shape[:2])[..., None],
            "advantages": self.rows.own(advantages),
            "sampler_logps": draw.sampled.logps[..., :length],
        }

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """What the completions of a step were like, those of replaced groups among them."""
        joined = {name: np.concatenate([getattr(o, name) for o in outcomes]) for name in _PER_COMPLETION}
        tasks = [kind.split("/")[0] for outcome in outcomes for kind in outcome.kinds]
        tasks = np.repeat(tasks, self.config.rollout.num_generations)
        ended, lengths = joined["ended"], joined["lengths"]
        metrics = {
            "reward": _mean(joined["total"]),
            "reward_std": _std(joined["total"]),
            "groups_without_variance": 1 - np.concatenate([outcome.varied for outcome in outcomes]).mean(),
            "length/mean": lengths.mean(),
            "length/min": lengths.min(),
            "length/max": lengths.max(),
            "length/truncated": 1 - ended.mean(),
            "length/ended_mean": _mean(lengths[ended]),
            "draft_score": _mean(joined["draft_score"]),
            "final_score": _mean(joined["final_score"]),
            "rewards/failed": joined["failed"].sum(),
        }
        for name, column in zip(self.weights, joined["rewards"].T, strict=True):
            metrics |= {f"rewards/{name}": _mean(column), f"rewards/{name}_std": _std(column)}
        if self.judge:
            metrics |= {"judge/tokens": self.judge.chat.tokens.total(), "judge/cost": self.judge.chat.cost}
        for task in sorted(set(tasks) & set(parsing.VERIFIABLE)):
            metrics[f"final_score/{task}"] = joined["final_score"][tasks == task].mean()
        if self.config.data.style in prompts.WITH_DRAFT:
            metrics |= _reflection(joined, tasks)
        return metrics

    def samples(self, draw: Draw, advantages: np.ndarray) -> list[dict[str, Any]]:
        """One record for each completion of the first prompt, for people to read."""
        first = draw.host.examples[0]
        return [
            {
                "example": first.example.name,
                "task": first.example.task,
                "prompt": first.prompt,
                "completion": draw.texts[i],
                "rewards": {
                    name: None if np.isnan(value) else float(value)
                    for name, value in zip(self.weights, draw.rewards[i], strict=True)
                },
                "advantage": float(advantages.reshape(-1)[i]),
                "error": draw.errors[i],
            }
            for i in range(self.config.rollout.num_generations)
        ]


def _reflection(joined: dict[str, np.ndarray], tasks: np.ndarray) -> dict[str, float]:
    """How often the answer after reflection is better than, as good as, or worse than the draft, and its length."""
    known = np.isin(tasks, parsing.VERIFIABLE)
    gain, tasks = (joined["final_score"] - joined["draft_score"])[known], tasks[known]
    if not len(gain):
        return {}
    found = {
        "reflection/corrected": (gain > 0).mean(),
        "reflection/kept": (gain == 0).mean(),
        "reflection/broken": (gain < 0).mean(),
        "reflection/words": joined["reflect_words"][known].mean(),
    }
    if (tasks == "grounding").any():
        found["reflection/tiou_gain"] = gain[tasks == "grounding"].mean()
    return found


def _mean(values: np.ndarray) -> float:
    """Mean of the entries that are there; 0 when none is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else 0.0


def _std(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.std()) if there.size else 0.0


def gather(draws: Sequence[Draw], chosen: Sequence[tuple[int, int]], collate: Collator) -> Draw:
    """The groups `chosen`, (draw, prompt) pairs, as one draw."""
    b = len(draws[0].host.examples)

    def rows(arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Of arrays [B, ...] or [N, ...]."""
        grouped = [x.reshape(b, -1, *x.shape[1:]) for x in arrays]
        return np.concatenate([grouped[d][p] for d, p in chosen])

    def entries(lists: Sequence[list[Any]]) -> list[Any]:
        g = len(lists[0]) // b
        return [entry for d, p in chosen for entry in lists[d][p * g : (p + 1) * g]]

    sampled = [draw.sampled for draw in draws]
    return replace(
        draws[0],
        kinds=[draws[d].kinds[p] for d, p in chosen],
        host=collate([draws[d].host.examples[p] for d, p in chosen]),
        sampled=jax.tree.map(lambda *x: rows(x), *sampled),
        texts=entries([draw.texts for draw in draws]),
        errors=entries([draw.errors for draw in draws]),
        **{name: rows([getattr(draw, name) for draw in draws]) for name in _PER_COMPLETION},
    )
