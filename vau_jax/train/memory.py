"""The devices' memory: what fits into it by the compiler's figures, and what would help where a program does not, said
when a run meets it and before one begins (launch/compile_check.py)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from vau_jax.common import processes, sharding
from vau_jax.common.chips import GIB, chip
from vau_jax.common.files import InputError, check_range, short

AUTO = "auto"  # micro_batches: as few as fit
USABLE = 0.95  # share of a device's memory that a program may plan with: the next batch and fragmentation need the rest
EXHAUSTED = "RESOURCE_EXHAUSTED"  # XLA's status, of a compilation as of an allocation
PROGRAMS = {  # phase of a step -> the programs it runs, as `vau compile-check` names them
    "data": "vision tower",
    "rollout": "vision tower, prefill, decode step",
    "score": "score",
    "update": "update",
}


# --- What fits ---


def is_auto(config: ConfigDict) -> bool:
    """Whether the number of micro-batches follows from the devices' memory."""
    return config.micro_batches == AUTO


def check(config: ConfigDict) -> None:
    """Raises InputError for invalid micro_batches."""
    if is_auto(config):
        return
    if not isinstance(config.micro_batches, int):
        raise InputError(f"micro_batches={config.micro_batches!r}: expected a number or {AUTO}")
    check_range("micro_batches", config.micro_batches, 1)
    if config.batch_size % config.micro_batches:
        raise InputError(f"micro_batches={config.micro_batches} does not divide batch_size={config.batch_size}")


def largest_part(config: ConfigDict) -> int:
    """Prompts of the largest part that a batch is computed in."""
    return config.batch_size // (1 if is_auto(config) else config.micro_batches)


def candidates(config: ConfigDict, mesh: Mesh | AbstractMesh) -> list[int]:
    """The numbers of micro-batches to choose from, the least first: parts of which each device has whole prompts."""
    if not is_auto(config):
        return [config.micro_batches]
    each = config.batch_size // sharding.example_parts(mesh)
    return [parts for parts in range(1, each + 1) if each % parts == 0]


def limit() -> float | None:
    """Bytes that a program may take of each device; None where that is unknown, as on CPUs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    known = chip(jax.devices()[0].device_kind)
    least = min(limits) if all(limits) else known and known.memory
    return least and USABLE * least


def held(tree: Any) -> float:
    """Bytes a device of arrays, or of shapes with shardings; what has none is whole on each."""
    shapes = ((x.sharding.shard_shape(x.shape) if x.sharding else x.shape, x.dtype) for x in jax.tree.leaves(tree))
    return float(sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes))


def planned(program: jax.stages.Compiled) -> float:
    """Bytes a device that a program takes at its peak by the compiler's plan."""
    found = program.memory_analysis()
    return float(max(found.peak_memory_in_bytes, found.temp_size_in_bytes))  # on CPUs, the peak is without temporaries


def fitting(config: ConfigDict, mesh: Mesh, heads: int, planned: Callable[[int], float], limit: float) -> int:
    """The fewest parts of an update for which `planned` gives at most `limit` bytes a device; the same in all
    processes. Raises InputError where none does."""
    needed = 0.0
    for count in candidates(config, mesh):
        try:
            needed = planned(count)
        except jax.errors.JaxRuntimeError as error:  # some compilers refuse what does not fit
            if EXHAUSTED not in str(error):
                raise
            needed = math.inf
        if all(processes.exchange(needed <= limit)):  # their devices may differ in what is free
            if processes.is_first():
                print(f"micro_batches={count}: an update takes {needed / GIB:.2f} of {limit / GIB:.2f} GiB", flush=True)
            return count
    raise InputError(
        f"micro_batches={AUTO}: with one prompt a device at a time an update takes {needed / GIB:.2f} of "
        f"{limit / GIB:.2f} GiB; what would help: {advice(config, mesh, heads)}"
    )


# --- What would help ---


def advice(config: ConfigDict, mesh: Mesh | AbstractMesh, heads: int) -> str:
    """Ways to make an update smaller, in the order to try them; `heads` are the model's attention heads."""
    c, parts = config, sharding.example_parts(mesh)
    slices = 1 if isinstance(mesh, AbstractMesh) else sharding.slices(mesh.devices.flat)
    results = []
    if not c.remat:
        results.append("remat=True")
    if not is_auto(c) and c.batch_size // c.micro_batches > parts:
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
