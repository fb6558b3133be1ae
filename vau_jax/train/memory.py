"""What would help where a program does not fit into a device's memory: said when a run meets it, and before one begins
(launch/compile_check.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from vau_jax.common import sharding
from vau_jax.common.files import InputError, short

EXHAUSTED = "RESOURCE_EXHAUSTED"  # XLA's status, of a compilation as of an allocation
PROGRAMS = {  # phase of a step -> the programs it runs, as `vau compile-check` names them
    "data": "vision tower",
    "rollout": "vision tower, prefill, decode step",
    "score": "score",
    "update": "update",
}


def advice(config: ConfigDict, mesh: Mesh | AbstractMesh, heads: int) -> str:
    """Ways to make an update smaller, in the order to try them; `heads` are the model's attention heads."""
    c, parts = config, sharding.example_parts(mesh)
    slices = 1 if isinstance(mesh, AbstractMesh) else sharding.slices(mesh.devices.flat)
    results = []
    if not c.remat:
        results.append("remat=True")
    if c.batch_size // c.micro_batches > parts:
        results.append(f"micro_batches={c.batch_size // parts} (now {c.micro_batches}: one prompt a chip at a time)")
    if mesh.shape["data"] > slices:
        results.append(f"mesh.data={slices} and a larger mesh.fsdp: parameters and optimiser split further")
    if mesh.shape["tensor"] < heads:
        results.append(f"a larger mesh.tensor (now {mesh.shape['tensor']})")
    if not c.lora.rank:
        results.append("lora.rank=16, or more chips")
    return "; ".join(results) or "more chips"


def sampling_advice(config: ConfigDict, mesh: Mesh, heads: int) -> str:
    """Likewise for sampling, whose memory is a copy of the weights and the caches of prompts and completions."""
    results = [
        f"a smaller batch_size (now {config.batch_size}), rollout.num_generations ({config.rollout.num_generations}) "
        f"or data.max_completion_tokens ({config.data.max_completion_tokens})"
    ]
    if mesh.shape["tensor"] < heads:
        results.append(f"a larger mesh.tensor (now {mesh.shape['tensor']})")
    return "; ".join(results)


@contextmanager
def explained(config: ConfigDict, mesh: Mesh, heads: int, phase: Callable[[], str]) -> Iterator[None]:
    """Turns XLA's error for exhausted device memory into an InputError that names the program and what would help;
    `phase` tells in which phase of a step it is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        help_for = sampling_advice if phase() == "rollout" else advice
        raise InputError(
            f"out of device memory in {PROGRAMS.get(phase(), phase())} ({short(error)}); what would help: "
            f"{help_for(config, mesh, heads)}. `vau compile-check` says what each program takes"
        ) from error
