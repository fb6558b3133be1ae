"""Programs of known shapes, compiled before the first step, several at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax

from vau_jax.common import processes
from vau_jax.common.progress import Progress
from vau_jax.data.processor import Shape
from vau_jax.rl.engine import Engine
from vau_jax.train import memory
from vau_jax.train.learner import Learner
from vau_jax.types import Batch

AT_ONCE = 4  # compilations, each of which has several threads, and a copy of the program

Task = tuple[str, Callable[[], Any]]  # phase of a step, and what compiles a program of it


def compile_ahead(learner: Learner, engine: Engine | None, shapes: Sequence[Shape], lengths: Sequence[int]) -> None:
    """Compiles what steps run whose prompts are padded to one of `shapes`, and completions to one of `lengths`.

    The learner has begun; `engine` is the rollout's, None in SFT. Left to the steps are the sampler's programs for
    batches in which most completions have ended, and with micro_batches=auto the update.
    """
    tasks = [task for shape in shapes for task in _tasks(learner, engine, learner.abstract_batch(shape), lengths)]
    shown = Progress("compile", len(tasks), "program") if processes.is_first() else None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(_run, learner, *task) for task in tasks]
        try:
            for number, task in enumerate(as_completed(running), start=1):
                task.result()
                if shown:
                    shown.show(number)
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(learner: Learner, engine: Engine | None, batch: Batch, lengths: Sequence[int]) -> Iterator[Task]:
    """What compiles the programs for a batch of prompts, the slowest first."""
    variables, encoded = learner.variables, learner.abstract_encoded(batch)
    if not (memory.is_auto(learner.config) and memory.limit()):
        for length in lengths:
            args = learner.state, learner.base, learner.abstract_train(encoded, length)
            yield "update", partial(_compile, learner.update_program, args, {})
    if engine:
        # Each of its programs takes what the one before returns, laid out as the compiler chose.
        yield "rollout", lambda: list(engine.programs(variables, encoded, _compile))
    for policy in _scored(learner) if engine else ():
        for length in lengths:
            args = policy, encoded, learner.abstract_completions(length)
            yield "score", partial(_compile, learner.logps_program, args, {})
    if encoded is not batch:
        yield "data", partial(_compile, learner.vision_program, (variables, batch), {})


def _scored(learner: Learner) -> Iterator[Any]:
    """The policies whose log-probabilities a rollout takes."""
    c = learner.config.grpo
    if learner.has_reference:
        yield learner.reference_variables
    if c.iterations > 1 or (c.kl_in == "reward" and c.beta):
        yield learner.variables


def _run(learner: Learner, phase: str, compiled: Callable[[], Any]) -> None:
    with memory.explained(learner.config, learner.mesh, learner.model.config.num_heads, lambda: phase):
        compiled()


def _compile(function: Any, args: tuple, static: dict[str, Any]) -> Any:
    """Compiles a program; what it returns, as shapes with shardings."""
    lowered = function.lower(*args, **static)
    places = lowered.compile().output_shardings
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), lowered.out_info, places
    )
