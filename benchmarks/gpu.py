"""All that a GPU can tell and a CPU cannot, in one command: see gpu.sh beside this file, which finds the packages.

    python benchmarks/gpu.py --out=DIR           on a machine with one NVIDIA GPU, under nine minutes
    python benchmarks/gpu.py --out=DIR --tiny    every line of it but the GPU's kernels, on any machine
    python benchmarks/gpu.py --out=DIR --table   the table of what is in DIR, and nothing else

Each measurement is a process of its own with a time limit, and adds to its JSON file in DIR whatever it knows, so that
a failure loses what comes after it in that process alone. Weights are random, of published sizes, and drawn on the
device:

    parity       values and gradients by the GPU's attention and by plain jnp, both in bfloat16, from float32: three
                 families, small models, unequal completions packed behind a padded prompt
    attention    of one layer of a 3B: seconds, and bytes beside the arguments as planned, forward and backward
    3b-lora      one GRPO step in its parts: vision tower, prefill, decoding, scores, update; seconds to compile;
    7b-lora      memory of the update as measured, as planned by the compiler, and by compile_check's arithmetic
    3b-full
    host         seconds of a step that the GPU waits for the host: video, prompt, rewards

`decode_bandwidth` is bytes of weights and caches that a step must read, over its time and the memory's peak rate; MFU
is of operations that the model needs, without what is computed again. The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "")  # compile_check, which has no device, would set cpu
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # by default a quarter of the memory stays unused

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # called by its path, sys.path has this file's folder instead of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vau_jax.common import sharding
from vau_jax.common.chips import GIB, chip
from vau_jax.common.files import InputError, dump_json, exit_on_input_error, write_text
from vau_jax.configs import vau_r1_multi_rft
from vau_jax.data_prep import random_model
from vau_jax.launch.compile_check import Programs
from vau_jax.models import attention, hf
from vau_jax.models import config as model_config
from vau_jax.models.attention import Layout
from vau_jax.models.config import QwenVLConfig
from vau_jax.rl.engine import Engine
from vau_jax.train import memory, update
from vau_jax.types import Batch, Completions, Groups, Params, TrainBatch, Vision

TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
VISION = {"depth": 2, "num_heads": 4, "hidden_size": 128, "intermediate_size": 256}
VISIONS = {
    "qwen2_vl": {"depth": 2, "num_heads": 4, "embed_dim": 128, "hidden_size": TEXT["hidden_size"]},
    "qwen2_5_vl": {**VISION, "fullatt_block_indexes": (1,)},
    "qwen3_vl": {**VISION, "num_position_embeddings": 256, "deepstack_visual_indexes": (0,)},
}
STEPS = {  # measurement -> model, rank of adapters (0: all parameters are trained)
    "3b-lora": ("qwen2.5-vl-3b", 16),
    "7b-lora": ("qwen2.5-vl-7b", 16),
    "3b-full": ("qwen2.5-vl-3b", 0),
}


class Sizes(NamedTuple):
    """Of a step."""

    prompt: int  # tokens, of which `visual` come from the clip
    visual: int
    group: int
    new: int  # tokens of each completion in an update
    decoded: int  # the same in sampling: one chunk of the decoding loop
    rounds: int  # of which medians are taken


USUAL = Sizes(4096, 3584, 8, 512, 256, 5)
SMALL = Sizes(96, 64, 2, 8, 32, 2)
Results = dict[str, Any]


# --- Models, batches and time ---


def small_model(family: str) -> QwenVLConfig:
    tokenizer = random_model.train_tokenizer(["What happens?"], 512)
    return model_config.from_hf(random_model.hf_config(tokenizer, TEXT, VISIONS[family], family))


def programs_of(model: QwenVLConfig, sizes: Sizes, rank: int, attention: str, dtype: str = "bfloat16") -> Programs:
    """The programs of a GRPO step with one prompt."""
    c = vau_r1_multi_rft.get_config()
    c.attention, c.dtype, c.batch_size, c.lora.rank = attention, dtype, 1, rank
    c.rollout.num_generations, c.data.max_completion_tokens = sizes.group, sizes.new
    return Programs(c, model, sharding.make_mesh(c.mesh, jax.devices()[:1]), sizes.prompt, sizes.visual)


def gpu_attention() -> str:
    """The implementation to measure: on a CPU the one that differs from jnp."""
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def weights(programs: Programs) -> Params:
    """Random ones, on the device, one parameter at a time."""
    layout, c = sharding.layout(programs.mesh), programs.config
    dtype = c.dtype if c.lora.rank else c.param_dtype
    flat = hf.flatten(random_model.initial_weights(programs.model.config, 0, "bfloat16"))
    return hf.unflatten({path: jax.device_put(x.astype(dtype), layout(path, x.shape)) for path, x in flat.items()})


def batch_of(programs: Programs) -> Batch:
    """A clip of noise, then text; every token is real."""
    rng, shape = np.random.default_rng(0), programs.batch.vision
    b, t = programs.batch.tokens.shape
    place = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    _, visual = programs.sizes_of_prompt
    vision = Vision(
        patches=rng.integers(0, 256, shape.patches.shape, dtype=np.uint8),
        positions=rng.integers(0, 16, shape.positions.shape, dtype=np.int32),
        frames=_groups(shape.frames),
        windows=shape.windows and _groups(shape.windows),
        corners=shape.corners and np.zeros(shape.corners.shape, np.int32),
        corner_weights=shape.corner_weights and np.full(shape.corner_weights.shape, 0.25, np.float32),
    )
    batch = Batch(
        tokens=rng.integers(0, 256, (b, t), dtype=np.int32),
        mask=np.ones((b, t), bool),
        positions=np.broadcast_to(place[:, None], (b, 3, t)),
        visual_index=np.where(place < visual, place, -1),
        next_position=np.full(b, t, np.int32),
        vision=vision,
    )
    return jax.device_put(batch, sharding.examples(programs.mesh))


def _groups(shape: Groups) -> Groups:
    """All patches in order, one segment a group."""
    b, patches = shape.slots.shape
    count = shape.members.shape[1] * shape.members.shape[2]
    members = np.minimum(np.arange(count, dtype=np.int32), patches)
    members = np.broadcast_to(members.reshape(shape.members.shape[1:]), shape.members.shape)
    slots = np.broadcast_to(np.arange(patches, dtype=np.int32), (b, patches))
    return Groups(members, np.where(members < patches, 0, -1).astype(np.int32), slots)


def completions_of(programs: Programs, lengths: np.ndarray) -> Completions:
    """Random tokens; `lengths` int [B, G]."""
    shape = programs.config.batch_size, programs.g, programs.c
    tokens = np.random.default_rng(1).integers(1, 256, shape, dtype=np.int32)
    completions = Completions(tokens, np.arange(programs.c) < lengths[..., None])
    return jax.device_put(completions, sharding.examples(programs.mesh))


def timed(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, without those of another; and the median of the others."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    median = float(np.median(times[1:]))
    return times[0] - median, median


def mfu(operations: float, seconds: float) -> float | None:
    """Share of the device's peak; None where that is unknown."""
    known = chip(jax.devices()[0].device_kind)
    return known and operations / seconds / known.flops


# --- The measurements ---


def measure_parity(tiny: bool) -> Iterator[Results]:
    """Distances from float32, relative to its norm, of what the GPU's attention and jnp give in bfloat16."""
    sizes = SMALL if tiny else Sizes(512, 256, 4, 64, 64, 1)
    for family in VISIONS:
        model = small_model(family)
        with jax.default_matmul_precision("highest"):  # GPUs multiply float32 in fewer bits by default
            exact = values_and_gradients(model, sizes, "jnp", "float32")
        result = {}
        for name, way in (("gpu", gpu_attention()), ("jnp", "jnp")):
            own = values_and_gradients(model, sizes, way, "bfloat16")
            result[name] = {part: distance(own[part], exact[part]) for part in exact}
        result["as_close"] = all(result["gpu"][part] <= 2 * result["jnp"][part] for part in exact)
        yield {family: result}


def values_and_gradients(model: QwenVLConfig, sizes: Sizes, way: str, dtype: str) -> dict[str, Any]:
    """Log-probabilities of completions of unequal length behind a prompt with padding; gradients by all weights."""
    programs = programs_of(model, sizes, 0, way, dtype)
    lengths = np.linspace(1, sizes.new, sizes.group).astype(int)[None]
    batch, completions = batch_of(programs), completions_of(programs, lengths)
    batch = replace(batch, mask=batch.mask.at[:, -sizes.prompt // 16 :].set(False))

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        length = -(-int(lengths.sum()) // 8) * 8
        logps, _ = update.policy_logps({"params": params}, batch, completions, programs.model, 1.0, length)
        return jnp.mean(logps), logps

    gradients, logps = jax.jit(jax.grad(total, has_aux=True))(weights(programs))
    return {"values": logps, "gradients": gradients}


def distance(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of `b`."""
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure_attention(tiny: bool) -> Iterator[Results]:
    """Prompt and completions through one layer's attention of a 3B, by each implementation that may be chosen."""
    sizes = SMALL if tiny else USUAL
    drawn = sizes.group * sizes.new
    dtype, rng = jnp.bfloat16, jax.random.key(0)
    q, k, v = (jax.random.normal(rng, (1, sizes.prompt + drawn, heads, 128), dtype) for heads in (16, 2, 2))
    mask = jnp.ones((1, sizes.prompt), bool)
    starts = jnp.arange(drawn, dtype=jnp.int32)[None] // sizes.new * sizes.new

    def total(q: jax.Array, k: jax.Array, v: jax.Array, way: str) -> jax.Array:
        out = attention.prefix_attention(q, k, v, mask, Layout(starts, sizes.new, True), way)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    for name, way in (("gpu", gpu_attention()), ("jnp", "jnp")):
        program = jax.jit(jax.grad(partial(total, way=way), argnums=(0, 1, 2))).lower(q, k, v).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        yield {name: {"seconds": timed(partial(program, q, k, v), sizes.rounds)[1], "temporary_gib": temporary / GIB}}


def measure_step(tiny: bool, name: str) -> Iterator[Results]:
    """The parts of a GRPO step with one prompt."""
    size, rank = STEPS[name]
    sizes = SMALL if tiny else USUAL
    model = small_model("qwen2_5_vl") if tiny else model_config.named(size)
    programs = programs_of(model, sizes, rank, gpu_attention())
    programs.learner.begin(weights(programs))
    yield {"sizes": sizes._asdict(), "parameters": sum(x.size for x in jax.tree.leaves(programs._params(model)))}
    batch = batch_of(programs)
    encode = partial(programs.learner.vision_program, programs.learner.variables, batch)
    compiling, seconds = timed(encode, sizes.rounds)
    operations = programs.model_flops("vision tower")
    yield {"tower": {"compile_s": compiling, "seconds": seconds, "mfu": mfu(operations, seconds)}}
    batch = programs.learner.encode_vision(batch)
    yield sampling_of(programs, batch, sizes)
    completions = completions_of(programs, np.full((1, sizes.group), sizes.new))
    score = partial(programs.learner.reference_logps, batch, completions)
    compiling, seconds = timed(score, sizes.rounds)
    yield {"score": {"compile_s": compiling, "seconds": seconds}, **memory_now("before_update")}
    yield update_of(programs, TrainBatch(batch, completions, loss_inputs(programs, completions, score())), sizes)


def sampling_of(programs: Programs, batch: Batch, sizes: Sizes) -> Results:
    """Prefill and decoding of completions that all have their full length."""
    keys = jax.device_put(jax.random.split(jax.random.key(0), 1), sharding.examples(programs.mesh))

    def engine(new: int) -> Engine:
        rollout = programs.config.rollout.copy_and_resolve_references()
        rollout.min_new_tokens = new
        return Engine(rollout, programs.learner.sampler, (0,), new)

    def draw(new: int) -> tuple[float, float]:
        sampler = engine(new)
        return timed(lambda: sampler.sample(programs.learner.variables, batch, keys).tokens, sizes.rounds)

    (compiling, first), (more, whole) = draw(1), draw(sizes.decoded)
    *_, step = engine(sizes.decoded).programs(programs.learner.abstract_variables, programs.encoded_batch)
    seconds, read = (whole - first) / (sizes.decoded - 1), programs.read_at_least(step)
    known = chip(jax.devices()[0].device_kind)
    mfu_prefill = mfu(programs.model_flops("prefill"), first)
    return {
        "prefill": {"compile_s": compiling, "seconds": first, "mfu": mfu_prefill},
        "decode": {
            "compile_s": more,
            "seconds_per_step": seconds,
            "tokens_per_s": sizes.group / seconds,
            "gb_per_step": read / 1e9,
            "bandwidth": known and read / seconds / known.bandwidth,
        },
        **memory_now("after_sampling"),
    }


def loss_inputs(programs: Programs, completions: Completions, logps: jax.Array) -> dict[str, jax.Array]:
    """Those of a policy that is its own reference, all tokens counted."""
    advantages = jax.device_put(np.linspace(-1, 1, programs.g, dtype=np.float32)[None], logps.sharding)
    known = {"mask": completions.mask, "sampler_logps": logps, "ref_logps": logps, "advantages": advantages}
    return {name: known[name] for name in programs.train_batch().loss_inputs}


def update_of(programs: Programs, train: TrainBatch, sizes: Sizes) -> Results:
    """The update in one part, and the memory that it takes by measurement, plan and arithmetic."""
    program, began = programs.update(), time.perf_counter()
    compiled = program.function.lower(*program.args, **program.static).compile()
    compiling = time.perf_counter() - began

    def step() -> jax.Array:
        learner = programs.learner
        learner.state, metrics = compiled(learner.state, learner.base, train)
        return metrics

    _, seconds = timed(step, sizes.rounds)
    return {
        "update": {
            "compile_s": compiling,
            "seconds": seconds,
            "mfu": mfu(programs.model_flops("update"), seconds),
            "planned_gib": (memory.planned(compiled) + program.resident) / GIB,
            "arithmetic_gib": sum(programs.estimate()["update"].values()) / GIB,
        },
        **memory_now("after_update"),
    }


def memory_now(when: str) -> Results:
    """The device's memory: held now, and the most since the process began. Empty where it is not told, as on CPUs."""
    stats = jax.devices()[0].memory_stats()
    held = stats and {"held_gib": stats["bytes_in_use"] / GIB, "peak_gib": stats["peak_bytes_in_use"] / GIB}
    return {when: held} if held else {}


def measure_host(tiny: bool) -> Iterator[Results]:
    """By grpo_step.py with a small model, and a clip with as many visual tokens as in the other measurements."""
    clip = ["--frames=4", "--side=56", "--group=2", "--new=4"] if tiny else ["--frames=28", "--side=448", "--new=16"]
    command = [sys.executable, str(Path(__file__).with_name("grpo_step.py")), "--exact", *clip]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own script
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    step = json.loads(done.stdout.splitlines()[-1])
    waits = {part: step["split"][part] for part in ("data", "reward")}
    yield {"seconds": sum(waits.values()), "split": waits, "visual_tokens": step["visual_tokens"]}


class Measurement(NamedTuple):
    measure: Callable[[bool], Iterator[Results]]
    limit: float  # seconds


MEASUREMENTS = {  # what matters most comes first: the last ones get the time that is left
    "parity": Measurement(measure_parity, 90),
    "3b-lora": Measurement(partial(measure_step, name="3b-lora"), 150),
    "attention": Measurement(measure_attention, 60),
    "7b-lora": Measurement(partial(measure_step, name="7b-lora"), 150),
    "3b-full": Measurement(partial(measure_step, name="3b-full"), 150),
    "host": Measurement(measure_host, 90),
}


# --- The table ---


def found(results: Results, *path: str) -> float | None:
    """The number at a path; None where a measurement has not come so far."""
    for name in path:
        results = (results or {}).get(name)
    return results


def host_share(results: Results, name: str) -> float | None:
    """Of a step with the completions of an update: what the GPU waits for the host."""
    step, host = results.get(name, {}), found(results, "host", "seconds")
    parts = [found(step, part, "seconds") for part in ("tower", "prefill", "score", "update")]
    each = found(step, "decode", "seconds_per_step")
    if host is None or each is None or None in parts:
        return None
    return host / (host + sum(parts) + each * (step["sizes"]["new"] - 1))


ROWS: list[
    tuple[str, Callable[[Results, str], float | None], str, str]
] = [  # label, value, format, aim for the 3B LoRA
    ("decoding, share of the bandwidth", lambda r, n: found(r, n, "decode", "bandwidth"), ".0%", "60%"),
    ("decoding, tokens/s", lambda r, n: found(r, n, "decode", "tokens_per_s"), ",.0f", ""),
    ("prefill, MFU", lambda r, n: found(r, n, "prefill", "mfu"), ".0%", "50%"),
    ("vision tower, MFU", lambda r, n: found(r, n, "tower", "mfu"), ".0%", ""),
    ("update, MFU", lambda r, n: found(r, n, "update", "mfu"), ".0%", "45%"),
    ("update, s", lambda r, n: found(r, n, "update", "seconds"), ".3f", ""),
    ("update, s to compile", lambda r, n: found(r, n, "update", "compile_s"), ".0f", ""),
    ("update, GiB at most", lambda r, n: found(r, n, "after_update", "peak_gib"), ".1f", ""),
    ("update, GiB as planned", lambda r, n: found(r, n, "update", "planned_gib"), ".1f", ""),
    ("update, GiB by arithmetic", lambda r, n: found(r, n, "update", "arithmetic_gib"), ".1f", ""),
    ("the host's share of a step", host_share, ".0%", ""),
]


def table(results: dict[str, Results]) -> str:
    """Markdown of the results that are there."""
    lines = [f"| | {' | '.join(STEPS)} | aim |", "| --- |" + " --- |" * (len(STEPS) + 1)]
    for label, value, form, aim in ROWS:
        cells = [value(results, name) for name in STEPS]
        lines.append(f"| {label} | {' | '.join('' if x is None else format(x, form) for x in cells)} | {aim} |")
    lines += ["", "| from float32, relative | GPU, values | jnp, values | GPU, gradients | jnp, gradients |"]
    lines.append("| --- |" + " --- |" * 4)
    for family in VISIONS:
        cells = [
            found(results, "parity", family, way, part) for part in ("values", "gradients") for way in ("gpu", "jnp")
        ]
        lines.append(f"| {family} | {' | '.join('' if x is None else f'{x:.1e}' for x in cells)} |")
    lines += ["", "| attention of a layer, forward and backward | s | GiB |", "| --- | --- | --- |"]
    for way in ("gpu", "jnp"):
        cells = [found(results, "attention", way, part) for part in ("seconds", "temporary_gib")]
        lines.append(f"| {way} | {' | '.join('' if x is None else f'{x:.4f}' for x in cells)} |")
    problems = [f"{name}: {of['problem']}" for name, of in results.items() if of.get("problem")]
    return "\n".join([*lines, "", *problems]).rstrip() + "\n"


# --- The command ---


def measure_here(name: str, out: Path, tiny: bool) -> None:
    """One measurement in this process; its file has what is known so far."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not tiny:
        raise InputError(
            f"no GPU: JAX found {device.device_kind}; bash launch/venv.sh cuda12 installs JAX for GPUs; --tiny runs "
            "anywhere"
        )
    results: Results = {"device": device.device_kind, "jax": jax.__version__}
    for part in MEASUREMENTS[name].measure(tiny):
        results |= part
        write_text(out / f"{name}.json", dump_json(results, indent=1))


def measure_apart(name: str, args: argparse.Namespace, limit: float) -> Results:
    """One measurement in a process of its own: its results, with what went wrong under `problem`."""
    path, log, began = args.out / f"{name}.json", args.out / f"{name}.log", time.monotonic()
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, f"--out={args.out}", f"--measure={name}", *["--tiny"] * args.tiny]
    with open(log, "w") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, start_new_session=True)  # noqa: S603
        try:
            code = process.wait(max(1.0, limit))
            problem = code and (log.read_text().strip().splitlines() or [f"exit code {code}"])[-1][:300]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            problem = f"not done after {limit:.0f} s"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {"took_s": time.monotonic() - began} | ({"problem": problem} if problem else {})
    write_text(path, dump_json(results, indent=1))
    return results


def run(args: argparse.Namespace) -> int:
    """Prints the results as JSON; the exit code."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        measure_here(args.measure, args.out, args.tiny)
        return 0
    if not args.table:
        end = time.monotonic() + args.seconds
        for name in args.only or MEASUREMENTS:
            left = end - time.monotonic()
            results = measure_apart(name, args, left if args.tiny else min(MEASUREMENTS[name].limit, left))
            print(f"{name}: {results.get('problem', 'done')} ({results['took_s']:.0f} s)", file=sys.stderr, flush=True)
    paths = {name: args.out / f"{name}.json" for name in MEASUREMENTS}
    every = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    write_text(args.out / "table.md", table(every))
    print(table(every), file=sys.stderr)
    print(dump_json(every))
    return int(any("problem" in results for results in every.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small models, on any machine")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="this measurement; may be repeated")
    parser.add_argument("--seconds", type=float, default=480, help="of all measurements together")
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of what is in --out")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    exit_on_input_error(lambda: sys.exit(run(args)))


if __name__ == "__main__":
    main()
