"""The host rim of RFT: sample on the device, read the texts, score them, and make the batch of one update."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vau_jax import grpo, parsing, sampling
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Processor
from vau_jax.files import InputError
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rewards import REWARDS, task_score
from vau_jax.types import Batch, Completions, Sampled, Target, TrainBatch, Variables
from vau_jax.vlm import decode_text


@dataclass
class Rollout:
    """Turns prompts into a scored batch of G completions each."""

    config: ConfigDict
    model: QwenVL
    processor: Processor

    def __post_init__(self) -> None:
        unknown = [name for name in self.config.rewards if name not in REWARDS]
        if unknown:
            raise InputError(f"rewards {', '.join(unknown)} are unknown: expected some of {', '.join(REWARDS)}")
        if self.config.rollout.num_generations < 2:
            raise InputError(
                f"rollout.num_generations={self.config.rollout.num_generations}: GRPO compares the completions of a "
                "prompt, so a group needs at least 2"
            )
        self.names = tuple(name for name, weight in self.config.rewards.items() if weight)
        self.score = jax.jit(self._score)

    def sample(self, variables: Variables, batch: Batch, key: jax.Array) -> Sampled:
        """G completions of each prompt, on the device."""
        c = self.config.rollout
        return sampling.sample(
            variables,
            batch,
            key,
            jnp.float32(c.temperature),
            model=self.model,
            num_generations=c.num_generations,
            max_new_tokens=self.config.data.max_completion_tokens,
            end_tokens=self.processor.end_tokens,
            top_p=c.top_p,
            top_k=c.top_k,
        )

    def _score(self, parsed: parsing.Parsed, target: Target, usable: jax.Array) -> dict[str, jax.Array]:
        """Rewards [N, R], advantages [N] and the mean scores of drafts and final answers."""
        rewards = jnp.stack([REWARDS[name](parsed, target) for name in self.names], axis=1)
        weights = [self.config.rewards[name] for name in self.names]
        advantages = grpo.group_advantages(
            rewards, self.config.rollout.num_generations, self.config.grpo.scale, weights=weights
        )
        return {
            "rewards": rewards,
            "total": rewards @ jnp.asarray(weights, jnp.float32),
            "advantages": advantages * usable,
            "draft_score": task_score(parsed.draft, target),
            "final_score": task_score(parsed.final, target),
        }

    def __call__(self, variables: Variables, host: HostBatch, batch: Batch, key: jax.Array) -> "Scored":
        """Samples, parses and scores; `batch` is host.batch on the device."""
        out = jax.device_get(self.sample(variables, batch, key))
        texts = decode_text(self.processor, out.tokens, out.mask)
        g = self.config.rollout.num_generations
        tasks = [item.example.task for item in host.examples for _ in range(g)]
        parsed = parsing.parse(
            [text for group in texts for text in group], tasks, "strict", self.config.data.style == "reflection"
        )
        target = jax.tree.map(lambda x: np.repeat(x, g, axis=0), host.target)
        usable = np.repeat([item.failure is None for item in host.examples], g).astype(np.float32)
        scores = jax.device_get(self.score(parsed, target, usable))
        shape = out.tokens.shape[:2]
        # The advantage is 0 for a video that failed; its tokens leave the loss (and its normaliser) too.
        mask = out.mask & (usable.reshape(shape) > 0)[..., None]
        train = TrainBatch(
            batch=batch,
            completions=Completions(out.tokens, out.mask),
            loss_inputs={
                "mask": mask,
                "advantages": scores["advantages"].reshape(shape),
                "sampler_logps": out.logps,
            },
        )
        return Scored(train, self._metrics(out, scores, tasks), self._samples(host, texts, scores))

    def _metrics(self, out: Sampled, scores: dict[str, np.ndarray], tasks: list[str]) -> dict[str, float]:
        g = self.config.rollout.num_generations
        lengths = out.mask.sum(-1)
        ended = np.isin(out.tokens, self.processor.end_tokens) & out.mask
        groups = scores["total"].reshape(-1, g)
        metrics = {
            "reward": scores["total"].mean(),
            "reward_std": scores["total"].std(),
            "groups_without_variance": (groups.std(axis=1) == 0).mean(),
            "length/mean": lengths.mean(),
            "length/min": lengths.min(),
            "length/max": lengths.max(),
            "length/truncated": 1 - ended.any(-1).mean(),
            "draft_score": scores["draft_score"].mean(),
            "final_score": scores["final_score"].mean(),
        }
        for name, column in zip(self.names, scores["rewards"].T, strict=True):
            metrics[f"rewards/{name}"] = column.mean()
            metrics[f"rewards/{name}_std"] = column.std()
        for task in sorted(set(tasks)):
            metrics[f"final_score/{task}"] = scores["final_score"][np.asarray(tasks) == task].mean()
        return metrics

    def _samples(self, host: HostBatch, texts: list[list[str]], scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """One record for each completion of the first prompt, for people to read."""
        g = self.config.rollout.num_generations
        return [
            {
                "example": host.examples[0].example.name,
                "completion": texts[0][i],
                "rewards": dict(zip(self.names, scores["rewards"][i].tolist(), strict=True)),
                "advantage": float(scores["advantages"][i]),
            }
            for i in range(g)
        ]


@dataclass
class Scored:
    train: TrainBatch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
