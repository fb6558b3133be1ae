"""Compiles a config's programs for a TPU pod, on a machine without one, and says whether and how fast they could run.

    vau compile-check --config=configs/vau_r1_qa_rft.py --topology=v5e:4x4 --size=qwen2.5-vl-3b \
        [--slices=2 --config.mesh.data=2] [--config.mesh.tensor=4] [--prompt=4096] [--visual=3584] [--json=FILE]
        [--only=update]
    vau compile-check --config=configs/vau_r1_qa_rft.py --topology=h100:8 --size=qwen2.5-vl-3b

For each program: seconds to compile, bytes a chip (arguments, temporary, peak) against the chip's memory, operations,
bytes to and from memory, collectives, what goes to other slices, the time that the slowest of them takes at least, and
the MFU that this allows.
Exit code 1 when one does not fit. `--size` is a published model; without it config.model is a folder. Needs libtpu.
For GPUs (a100, h100, h200 and their number) nothing is compiled: memory is added up from shapes.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # read when libtpu is loaded: there is no TPU to be asked
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

if not __package__:  # called by its path, sys.path has this file's folder instead of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vau_jax import cli
from vau_jax.common import config_flags, sharding
from vau_jax.common.chips import GIB, Chip, chip
from vau_jax.common.files import InputError, dump_json, write_text
from vau_jax.common.progress import Progress
from vau_jax.data.shapes import Shape
from vau_jax.launch import hlo
from vau_jax.models import config as model_config
from vau_jax.models import flops, hf, motion_prompt
from vau_jax.models.config import Motion, QwenVLConfig
from vau_jax.rl import logprobs, sampling
from vau_jax.rl.engine import Engine, prompts_at_once
from vau_jax.train import loop, memory
from vau_jax.train.learner import Learner
from vau_jax.train.memory import held
from vau_jax.types import Params, TrainBatch

GPUS = {"a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}
Shapes = Any  # a pytree of jax.ShapeDtypeStruct with shardings


@dataclass
class Report:
    """The measurements of a program; numbers are of one chip."""

    program: str
    compile_seconds: float = 0.0
    arguments: float = 0.0  # bytes
    temporary: float = 0.0
    peak: float = 0.0
    resident: float = 0.0  # of the run's state that the program does not use, but that occupies memory
    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)  # kind -> count, bytes
    between: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, to other slices
    seconds: float = 0.0  # roofline: the slowest of operations, memory, links and network
    bound: str = ""  # which of them it is
    mfu_cap: float = 0.0  # of the operations that the model needs
    least_bytes: float = 0.0  # of a decoding step: the weights and caches, each read once
    repeated: float = 0.0  # of an update: operations of a form that repeats prompts for each completion, as a multiple
    micro_batches: int = 0  # of an update
    problem: str = ""

    def fits(self, limit: float) -> bool:
        """Whether it was compiled and takes at most `limit` bytes."""
        return bool(self.seconds) and self.needed <= limit

    @property
    def needed(self) -> float:
        """Bytes of the chip's memory."""
        return self.peak + self.resident


def chips_of(name: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices of a topology such as v5e:4x4. Raises InputError."""
    sides = [int(side) for side in re.findall(r"\d+", name.partition(":")[2])]
    bounds = tuple(min(side, most) for side, most in zip([*sides, 1, 1], (2, 2, 1), strict=False))
    try:
        result = topologies.get_topology_desc(
            topology_name=name, platform="tpu", chips_per_host_bounds=bounds, num_slices=slices
        )
    except Exception as error:
        raise InputError(
            f"--topology={name} is unknown to libtpu ({str(error).splitlines()[0][:200]}): expected one such as "
            "v5e:4x4, v5e:8x8, v5p:2x2x4, v6e:8x8; with the package libtpu installed"
        ) from error
    return list(result.devices)


class Programs:
    """The programs of a config on a mesh of absent chips; all arguments are shapes."""

    def __init__(self, config: ConfigDict, model: QwenVLConfig, mesh: Mesh, prompt: int, visual: int) -> None:
        if visual % 16 or not 0 < visual < prompt:
            raise InputError(f"--visual={visual}: expected a multiple of 16 below --prompt={prompt}")
        sharding.check_divisible(memory.largest_part(config), mesh)
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.attention = "splash" if config.attention == "auto" else config.attention
        if config.motion.enabled and not model.motion:
            model = model_config.with_motion(model, Motion(config.motion.signed, config.motion.order))
        self.config, self.mesh = config, mesh
        self.learner = Learner(config, model, self._params(model), mesh)
        self.model, self.base = self.learner.model, self.learner.abstract_base
        self.shape = self._shape(prompt, visual)
        self.batch = self.learner.abstract_batch(self.shape, prompts_at_once(config))
        self.encoded_batch = self.learner.abstract_encoded(self.batch)
        self.c = config.data.max_completion_tokens
        self.g = config.rollout.num_generations if config.stage == "rft" else 1
        self.engine = Engine(config.rollout, self.learner.sampler, (0,), self.c)

    @property
    def trained(self) -> Params:
        return self.learner.abstract_state.params

    @property
    def tower_is_frozen(self) -> bool:
        return self.learner.tower_is_frozen

    def _params(self, model: QwenVLConfig) -> Params:
        """What training begins with: what is not trained is held in the dtype that it is used in."""
        layout = sharding.layout(self.mesh)
        dtype = jnp.dtype(self.config.dtype if self.config.lora.rank else self.config.param_dtype)
        shapes = {path: (shape, dtype) for path, shape in hf.parameter_shapes(model).items()}
        if model.motion:
            shapes |= {name: ((), jnp.dtype(jnp.float32)) for name in motion_prompt.NAMES}
        flat = {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=layout(path, shape))
            for path, (shape, dtype) in shapes.items()
        }
        return hf.unflatten(flat)

    def _shape(self, tokens: int, visual: int) -> Shape:
        """Prompts of `tokens` tokens, of which `visual` come from one clip of 16 rows of merged patches a frame."""
        v = self.model.config.vision
        unit, rows = v.spatial_merge_size**2, 16
        cols = next(c for c in (14, 16, 12, 8, 4, 2, 1) if visual % (rows * c) == 0)
        frames = visual // (rows * cols)
        side = v.window_size // (v.spatial_merge_size * v.patch_size) if v.window_size else 0
        windows = frames * -(-rows // side) * -(-cols // side) if side else 0
        return Shape(tokens, visual * unit, windows, side * side * unit, frames, rows * cols * unit)

    def train_batch(self) -> TrainBatch:
        """Shapes of the batch of one update."""
        return self.learner.abstract_train(self.learner.abstract_encoded(self.learner.abstract_batch(self.shape)))

    # --- The programs ---

    def all(self) -> Iterator["Program"]:
        """What a step runs, in order; sampling and scoring for RFT alone."""
        learner, variables = self.learner, self.learner.abstract_variables
        state, base = learner.abstract_state, learner.abstract_base
        reference = learner.abstract_state.params if learner.copies_reference else None
        weights, everything = held(variables), held((state, base, reference))
        yield Program("vision tower", learner.vision_program, (variables, self.batch), {}, everything - weights)
        if self.config.stage == "rft":
            for program in self.engine.programs(variables, self.encoded_batch):
                used = 0.0 if held(program.args[0]) != weights else weights  # gathered ones come on top
                yield Program(*program, resident=everything - used)
            if learner.has_reference:
                function, args = learner.score_program(learner.abstract_reference, self.encoded_batch)
                calls = learner.score_parts(len(self.batch.tokens))
                yield Program("score", function, args, {"length": self.g * self.c}, everything - weights, calls)
        yield self.update()

    def update(self) -> "Program":
        """The largest program of an update; completions have all their places."""
        parts = self.config.batch_size // memory.largest_part(self.config)
        program, arguments, beside = self.learner.update_program(self.train_batch(), parts)
        resident = beside + self.learner.beside_update
        calls = parts * prompts_at_once(self.config) // self.config.batch_size
        return Program("update", program, arguments, {"length": self.g * self.c}, resident, calls)

    @property
    def _copies_weights(self) -> bool:
        return sampling.copies_weights(self.learner.abstract_variables, self.model.dtype, self.mesh)

    # --- Memory by arithmetic ---

    def estimate(self) -> dict[str, dict[str, float]]:
        """Bytes a chip by what they hold, of an update and, in RFT, of sampling; not what XLA keeps besides."""
        state = self.learner.abstract_state
        fixed = self.trained if self.learner.copies_reference else None
        run = {
            "parameters": held((self.trained, self.base)),
            "optimiser": held(state.opt_state),
            "reference": held((fixed, state.reference)),
        }
        result = {"update": {**run, "gradients": held(self.trained), **self._activations()}}
        if self.config.stage == "rft":
            weights = 0.0
            if self._copies_weights:
                count = sum(x.size for x in jax.tree.leaves(self.learner.abstract_variables))
                weights = count * self.model.dtype(0).itemsize
                weights /= self.mesh.shape["tensor"]
            c = self.model.config
            tokens = (
                prompts_at_once(self.config)
                / sharding.example_parts(self.mesh)
                * (self.batch.tokens.shape[1] + self.g * self.c)
            )
            heads = max(1, c.num_kv_heads // self.mesh.shape["tensor"])
            caches = 2 * c.num_layers * tokens * heads * c.head_dim * self.model.dtype(0).itemsize
            result["sampling"] = {**run, "weights for reading": weights, "caches": caches}
        return result

    def _activations(self) -> dict[str, float]:
        """Of an update with remat: each layer's input, and one layer at work with its gradients."""
        c, v, width = self.model.config, self.model.config.vision, self.model.dtype(0).itemsize
        tensor = self.mesh.shape["tensor"]
        rows = memory.largest_part(self.config) / sharding.example_parts(self.mesh)
        tokens = rows * (self.batch.tokens.shape[1] + self.g * self.c)
        patches = rows * self.batch.vision.patches.shape[1]
        inside = tokens * (4 * c.hidden_size + 3 * c.intermediate_size) / tensor
        inside_tower = patches * (4 * v.hidden_size + 3 * v.intermediate_size) / tensor
        kept = tokens * c.hidden_size * c.num_layers / tensor + patches * v.hidden_size * v.depth
        if not self.config.remat:
            kept += inside * c.num_layers + inside_tower * v.depth
        logits = 3 * 4 * rows * logprobs.TOKENS * min(c.vocab_size, logprobs.VOCABULARY) / tensor
        return {"kept activations": kept * width, "at work": max(2 * width * inside, 2 * width * inside_tower, logits)}

    # --- What the model needs ---

    def operations(self, program: "Program") -> float:
        """Of all chips, as the program does them."""
        counted = flops.count(partial(program.function, **program.static), *program.args)
        return counted * program.calls + self.kernel_flops(program.name)

    def repeated(self) -> "Programs":
        """The same with each prompt repeated for each of its completions."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.batch_size, config.rollout.num_generations = config.batch_size * self.g, 1
            config.rollout.batch_size *= self.g
        return Programs(config, self.model.config, self.mesh, *self.sizes_of_prompt)

    def in_parts(self) -> Iterator["Programs"]:
        """The same for each number of micro-batches to choose from, the least first."""
        for parts in memory.candidates(self.config, self.mesh):
            config = self.config.copy_and_resolve_references()
            with config.unlocked(), config.ignore_type():
                config.micro_batches = parts
            yield Programs(config, self.model.config, self.mesh, *self.sizes_of_prompt)

    @property
    def sizes_of_prompt(self) -> tuple[int, int]:
        """Tokens of a prompt, and those of them that come from the video."""
        patches, merged = self.batch.vision.patches.shape[1], self.model.config.vision.spatial_merge_size**2
        return self.batch.tokens.shape[1], patches // merged

    def advice(self) -> str:
        """What would help where one does not fit."""
        return memory.advice(self.config, self.mesh, self.model.config.num_heads)

    def sizes(self, program: str) -> dict[str, float]:
        """Of a batch, as flops.forward takes them: those of this program."""
        b, t = self.batch.tokens.shape
        drawn = b * self.g * self.c
        frames = self.batch.vision.frames.members.shape
        windows = (self.batch.vision.windows or self.batch.vision.frames).members.shape
        size = {
            "prompt": float(b * t),
            "drawn": float(drawn),
            "pairs": b * t * (t + 1) / 2 + drawn * t + b * self.g * self.c * (self.c + 1) / 2,
            "patches": float(b * self.batch.vision.patches.shape[1]),
            "frame_pairs": float(math.prod(frames) * frames[2]),
            "window_pairs": float(math.prod(windows) * windows[2]),
        }
        if self.tower_is_frozen and program != "vision tower":
            size = {name: value for name, value in size.items() if name in ("prompt", "drawn", "pairs")}
        if program == "prefill":
            return size | {"drawn": b * self.g, "pairs": b * t * (t + 1) / 2}
        if program == "decode step":  # in the middle of a completion
            size |= {"prompt": 0.0, "drawn": b * self.g, "pairs": b * self.g * (t + self.c / 2)}
            return {name: value for name, value in size.items() if name in ("prompt", "drawn", "pairs")}
        return size

    def model_flops(self, program: str) -> float:
        """Of all chips, without what is computed again."""
        parts = flops.forward(self.model.config, self.sizes(program))
        if program == "vision tower":
            return parts["tower"]
        trained = 2 if self.base else 3
        return sum(parts.values()) * (trained if program == "update" else 1)

    def read_at_least(self, decode: "Program") -> float:
        """Bytes a chip that a decoding step has to read: the decoder, the head, the prompts' and its own caches."""
        variables, prompts, loop = decode.args[:3]
        params = variables["params"]
        head = params.get("lm_head", params["embed_tokens"]["embedding"])
        return held((params["decoder"], head, variables.get("lora"), prompts.cache, loop.own))

    def kernel_flops(self, program: str) -> float:
        """Of the attention kernel, which counts as nothing elsewhere: two products forward, and in the update two more
        where they are computed again, and five backward."""
        if self.model.attention != "splash" or program in ("vision tower", "decode step"):
            return 0.0
        products = (9 if self.model.remat else 7) if program == "update" else 2
        c = self.model.config
        return 2.0 * products * c.num_layers * c.num_heads * c.head_dim * self.sizes(program)["pairs"]


@dataclass
class Program:
    """A function with the shapes of its arguments."""

    name: str
    function: Any
    args: tuple
    static: dict[str, Any] = field(default_factory=dict)
    resident: float = 0.0  # bytes a chip of the run's state that it does not use
    calls: int = 1  # of a step


def check_update(programs: Programs, known: Chip) -> Report:
    """The update in as few micro-batches as fit, where their number is to be found."""
    for programs_in_parts in programs.in_parts():
        report = check(programs_in_parts, programs_in_parts.update(), known)
        report.micro_batches = programs_in_parts.config.micro_batches
        if report.fits(memory.USABLE * known.memory):
            break
    return report


def check(programs: Programs, program: Program, known: Chip) -> Report:
    """Compiles a program and reads its requirements."""
    report, began = Report(program.name, resident=program.resident), time.monotonic()
    least = held(program.args) + program.resident
    if least > known.memory:
        report.problem = f"needs {least / GIB:.2f} GiB of {known.memory / GIB:.0f} for its arguments alone"
        return report
    try:
        compiled = program.function.lower(*program.args, **program.static).compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        report.compile_seconds = time.monotonic() - began
        report.problem = re.sub(r"\s+", " ", str(error))[:400]
        return report
    report.compile_seconds = time.monotonic() - began
    planned = compiled.memory_analysis()
    report.arguments, report.temporary = planned.argument_size_in_bytes, planned.temp_size_in_bytes
    report.peak = memory.planned(compiled)
    chips = programs.mesh.size
    whole = programs.operations(program)
    report.flops = whole / chips
    slices = sharding.slices(programs.mesh.devices.flat)
    traffic = hlo.read(compiled.as_text(), program.name == "decode step", slices).times(program.calls)
    report.bytes, report.collectives, report.between = traffic.bytes, traffic.collectives, traffic.between
    if program.name == "decode step":
        report.least_bytes = programs.read_at_least(program)
    if program.name == "update" and programs.g > 1:
        other = programs.repeated()
        report.repeated = other.operations(other.update()) / whole
    limits = {
        "operations": report.flops / known.flops,
        "memory": report.bytes / known.bandwidth,
        "links": hlo.total(traffic.collectives) / known.links,
        "network": hlo.total(traffic.between) / known.network if traffic.between else 0.0,
    }
    report.bound = max(limits, key=limits.get)
    report.seconds = limits[report.bound]
    report.mfu_cap = programs.model_flops(program.name) / chips / known.flops / report.seconds
    if report.needed > known.memory:
        report.problem = f"needs {report.needed / GIB:.2f} GiB of {known.memory / GIB:.0f}"
    return report


# --- The command --------------------------------------------------------------------------------------------------


def table(reports: list[Report], known: Chip) -> str:
    """One line a program."""
    lines = [
        f"{'program':14}{'compile':>9}{'peak':>8}{'+ state':>9}{'TFLOP':>9}{'GB':>8}{'sent GB':>9}{'ms':>8}"
        "  bound by    MFU cap"
    ]
    for r in reports:
        if not r.seconds:
            lines.append(f"{r.program:14}{r.compile_seconds:8.1f}s  {r.problem}")
            continue
        sent = hlo.total(r.collectives) / 1e9
        lines.append(
            f"{r.program:14}{r.compile_seconds:8.1f}s{r.peak / GIB:8.2f}{r.needed / GIB:9.2f}{r.flops / 1e12:9.3f}"
            f"{r.bytes / 1e9:8.1f}{sent:9.2f}{r.seconds * 1e3:8.1f}  {r.bound:11}{r.mfu_cap:8.0%}"
            + (f"  reads {r.bytes / r.least_bytes:.2f} x the least" if r.least_bytes else "")
            + (f"  {r.repeated:.2f} x as many operations with repeated prompts" if r.repeated else "")
            + "".join(
                f"  to other slices: {kind} {one['count']:,.0f}, {one['bytes'] / 1e9:.3f} GB"
                for kind, one in r.between.items()
            )
            + (f"  in {r.micro_batches} micro-batches" if r.micro_batches > 1 else "")
            + (f"  DOES NOT FIT: {r.problem}" if r.problem else "")
        )
    return "\n".join(lines) + f"\npeak and state in GiB of {known.memory / GIB:.0f}; all numbers are of one chip"


def run(args: argparse.Namespace, config: ConfigDict) -> int:
    """Prints the table; the exit code."""
    loop.check(config)
    if args.size and args.size not in model_config.SIZES:
        raise InputError(f"--size={args.size} is unknown: expected one of {', '.join(model_config.SIZES)}")
    if not args.size and not config.model:
        raise InputError("which model? Give --size, or --config.model=FOLDER")
    sizes = model_config.from_hf(model_config.SIZES[args.size]) if args.size else model_config.load(config.model)
    kind, _, count = args.topology.partition(":")
    if kind in GPUS and count.isdigit():
        mesh = sharding.abstract_mesh(config.mesh, int(count))
        return estimate(args, Programs(config, sizes, mesh, args.prompt, args.visual), chip(GPUS[kind]))
    devices = chips_of(args.topology, args.slices)
    known = chip(devices[0].device_kind)
    programs = Programs(config, sizes, sharding.make_mesh(config.mesh, devices), args.prompt, args.visual)
    wanted = [program for program in programs.all() if not args.only or program.name in args.only]
    reports, shown = [], Progress("compile", len(wanted), "program")
    for program in wanted:
        is_update = program.name == "update"
        reports.append(check_update(programs, known) if is_update else check(programs, program, known))
        shown.show(len(reports), program.name)
    print(
        f"{args.size or config.model}, {config.stage}, {args.slices} x {args.topology}, "
        f"mesh {dict(programs.mesh.shape)}, "
        f"{config.batch_size} prompts of {args.prompt} tokens, {programs.g} x {programs.c} completion tokens"
    )
    print(table(reports, known), flush=True)
    if args.json:
        given = {name: value for name, value in vars(args).items() if name != "json"}
        results = [asdict(report) | {"needed": report.needed} for report in reports]
        about = {"settings": given, "mesh": dict(programs.mesh.shape), "chip": known._asdict()}
        write_text(args.json, dump_json({**about, "programs": results}, indent=1))
    if any(report.problem for report in reports):
        print(f"does not fit; what would help: {programs.advice()}", file=sys.stderr)
        return 1
    return 0


def estimate(args: argparse.Namespace, programs: Programs, known: Chip) -> int:
    """Prints the memory of a run on GPUs by what holds it; the exit code."""
    for programs_in_parts in programs.in_parts():
        result = programs_in_parts.estimate()
        fits = max(sum(parts.values()) for parts in result.values()) <= 0.9 * known.memory  # XLA needs some too
        if fits:
            break
    model, mesh = args.size or programs.config.model, dict(programs.mesh.shape)
    micro_batches = programs_in_parts.config.micro_batches
    print(f"{model}, {programs.config.stage}, {args.topology}, mesh {mesh}, micro-batches {micro_batches}")
    for name, parts in result.items():
        shares = ", ".join(f"{part} {value / GIB:.2f}" for part, value in parts.items())
        print(f"{name}: {sum(parts.values()) / GIB:.2f} of {known.memory / GIB:.0f} GiB ({shares})", flush=True)
    if args.json:
        write_text(args.json, dump_json({"chip": known._asdict(), "bytes": result}, indent=1))
    if not fits:
        print(f"does not fit; what would help: {programs.advice()}", file=sys.stderr)
        return 1
    return 0


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """The program: see its options in `vau_jax.cli`."""
    config, _ = config_flags.read(["vau compile-check", *rest])
    sys.exit(run(args, config))


if __name__ == "__main__":
    cli.main("compile-check")
