"""The engine: it samples completions of a batch of prompts, and lists the programs it runs. Another engine provides the
same two methods.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vau_jax.common.checks import COUNT, check_ranges
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import sampling
from vau_jax.types import Batch, Sampled, Variables


class Program(NamedTuple):
    """A compiled function with the shapes of its arguments."""

    name: str
    function: Any
    args: tuple
    static: dict[str, Any]


RANGES = {"max_draws": COUNT, "reward_workers": COUNT, "num_generations": (2, math.inf)}  # a group is compared


def check(config: ConfigDict, max_new_tokens: int) -> None:
    """Raises InputError for the first invalid setting of config.rollout."""
    check_ranges(config, "rollout.", RANGES)
    names = ("temperature", "top_p", "top_k", "min_new_tokens")
    sampling.check("rollout.", max_new_tokens=max_new_tokens, **{name: config[name] for name in names})


class Engine:
    """Samples on the devices of the mesh of the parameters, by `sampling.sample`."""

    def __init__(self, config: ConfigDict, model: QwenVL, end_tokens: tuple[int, ...], max_new_tokens: int) -> None:
        """`config` is config.rollout."""
        self.temperature, self.min_new_tokens = config.temperature, config.min_new_tokens
        self.options: dict[str, Any] = {
            "model": model,
            "num_generations": config.num_generations,
            "max_new_tokens": max_new_tokens,
            "end_tokens": end_tokens,
            "top_p": config.top_p,
            "top_k": config.top_k,
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
