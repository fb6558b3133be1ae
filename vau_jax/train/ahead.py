"""Programs of known shapes, compiled before the first step, several at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax

from vau_jax.common import processes
from vau_jax.common.progress import Progress
from vau_jax.data.shapes import Shape
from vau_jax.rl.engine import Engine, prompts_at_once
from vau_jax.rl.rollout import has_old_logps
from vau_jax.train import memory
from vau_jax.train.learner import Learner

AT_ONCE = 4  # compilations, each of which has several threads, and a copy of the program

Task = tuple[str, Callable[[], Any]]  # phase of a step, and what compiles a program of it


def compile_ahead(learner: Learner, engine: Engine | None, shapes: Sequence[Shape], lengths: Sequence[int]) -> None:
    """Compiles what steps run whose prompts are padded to one of `shapes`, and completions packed into one of
    `lengths`.

    The learner has begun; `engine` is the rollout's, None in SFT. Left to the steps are the sampler's programs for
    batches in which most completions have ended, and with micro_batches=auto the update.
    """
    tasks = [task for shape in shapes for task in _tasks(learner, engine, shape, lengths)]
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


def _tasks(learner: Learner, engine: Engine | None, shape: Shape, lengths: Sequence[int]) -> Iterator[Task]:
    """What compiles the programs for prompts of a shape, the slowest first."""
    variables, c = learner.variables, learner.config
    batch = learner.abstract_batch(shape, prompts_at_once(c))
    encoded = learner.abstract_encoded(batch)
    if not (memory.is_auto(c) and memory.limit()):
        train = learner.abstract_train(learner.abstract_encoded(learner.abstract_batch(shape)))
        program, args, _ = learner.update_program(train, memory.candidates(c, learner.mesh)[0])
        yield from (("update", partial(_compile, program, args, {"length": length})) for length in lengths)
    if engine:
        # Each of its programs takes what the one before returns, laid out as the compiler chose.
        yield "rollout", lambda: list(engine.programs(variables, encoded, _compile))
    for policy in _scored(learner) if engine else ():
        program, args = learner.score_program(policy, encoded)
        yield from (("score", partial(_compile, program, args, {"length": length})) for length in lengths)
    if encoded is not batch:
        yield "data", partial(_compile, learner.vision_program, (variables, batch), {})


def _scored(learner: Learner) -> Iterator[Any]:
    """The policies whose log-probabilities a rollout takes."""
    c = learner.config
    if learner.has_reference:
        yield learner.reference_variables
    if has_old_logps(c) or (c.grpo.kl_in == "reward" and c.grpo.beta):
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
