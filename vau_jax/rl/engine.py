"""The engine: it samples completions of a batch of prompts, and lists the programs it runs. Another engine provides the
same two methods.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vau_jax.common.checks import COUNT, NOT_NEGATIVE, check_ranges
from vau_jax.common.files import InputError
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import sampling
from vau_jax.types import Batch, Sampled, Variables


class Program(NamedTuple):
    """A compiled function with the shapes of its arguments."""

    name: str
    function: Any
    args: tuple
    static: dict[str, Any]


RANGES = {"batch_size": NOT_NEGATIVE, "max_draws": COUNT, "reward_workers": COUNT}
RANGES |= {"num_generations": (2, math.inf)}  # a group is compared


def check(config: ConfigDict, max_new_tokens: int, batch_size: int) -> None:
    """Raises InputError for the first invalid setting of config.rollout; `batch_size` is that of updates."""
    check_ranges(config, "rollout.", RANGES)
    if config.batch_size % batch_size:
        raise InputError(
            f"rollout.batch_size={config.batch_size}: expected a multiple of batch_size={batch_size}, or 0"
        )
    names = ("temperature", "top_p", "top_k", "min_new_tokens")
    sampling.check("rollout.", max_new_tokens=max_new_tokens, **{name: config[name] for name in names})


def prompts_at_once(config: ConfigDict) -> int:
    """Prompts that a step samples for, or in SFT learns; `config` is that of the run."""
    return (config.rollout.batch_size if config.stage == "rft" else 0) or config.batch_size


class Engine:
    """Samples on the devices of the mesh of the parameters, by `sampling.sample`."""

    def __init__(
        self,
        config: ConfigDict,
        model: QwenVL,
        end_tokens: tuple[int, ...],
        max_new_tokens: int,
        prompt_room: int = 0,
    ) -> None:
        """`config` is config.rollout; no prompt is expected to have more than `prompt_room` tokens."""
        self.temperature, self.min_new_tokens = config.temperature, config.min_new_tokens
        self.options: dict[str, Any] = {
            "model": model,
            "num_generations": config.num_generations - config.annotated,
            "max_new_tokens": max_new_tokens,
            "end_tokens": end_tokens,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "prompt_room": prompt_room,
        }

    def sample(self, variables: Variables, batch: Batch, keys: jax.Array) -> Sampled:
        """G completions of each prompt, on the devices. `keys` [B]: one for each prompt."""
        return sampling.sample(variables, batch, keys, self.temperature, self.min_new_tokens, **self.options)

    def programs(
        self, variables: Variables, batch: Batch, results: sampling.Results | None = None
    ) -> Iterator[Program]:
        """The programs that `sample` runs for such arguments, given as shapes with shardings: all that are known before
        completions end, where `results` says what each returns; without, those that take the most memory."""
        length, mesh = self.options["max_new_tokens"], self.options["model"].mesh
        rooms = sampling.cache_rooms(length) if results else [length]
        results = results or sampling.results_by_rule(mesh)
        for program in sampling.abstract_programs(variables, batch, results, rooms, **self.options):
            yield Program(*program)
