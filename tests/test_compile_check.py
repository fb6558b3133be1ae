"""Compilation for TPUs that are not there: a config's programs, what does not fit, and what is read off a program."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

from benchmarks import compile_table, efficiency
from tests.runs import TRAINING, WITH_LIBTPU, small
from tests.small_models import make_model
from vau_jax.common import sharding
from vau_jax.launch import hlo
from vau_jax.launch.compile_check import Programs, held
from vau_jax.models import config as model_config
from vau_jax.models import hf
from vau_jax.rl.rollout import Clock
from vau_jax.train import loop
from vau_jax.types import Features, Vision

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def call(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/compile_check.py", *args]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)


@WITH_LIBTPU
def test_a_small_config_compiles_for_two_slices_of_four_chips(tmp_path: Path) -> None:
    """Every program of GRPO with the kernel, on twice 2 x 2 chips of a v5e. Between the slices go the gradients alone,
    in an update, and each once: in float32, or in the dtype that they were computed in."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    model = make_model(tmp_path / "model", **sizes)
    options = {"config": "configs/vau_r1_qa_rft.py", "topology": "v5e:2x2", "prompt": 256, "visual": 224}
    options |= {"config.model": model, "config.mesh.fsdp": 2, "config.mesh.tensor": 2, "config.batch_size": 4}
    options |= {"slices": 2, "config.mesh.data": 2}
    options |= {"config.data.max_completion_tokens": 64, "json": tmp_path / "found.json"}
    done = call(*(f"--{name}={value}" for name, value in options.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    programs = {program["program"]: program for program in found["programs"]}
    assert list(programs) == ["vision tower", "prefill", "decode step", "score", "update"]
    for program in programs.values():
        assert 0 < program["peak"] <= program["needed"] < found["chip"]["memory"] and not program["problem"]
        assert program["flops"] > 0 and program["bytes"] > 0 and program["seconds"] > 0
    assert 3 < programs["update"]["flops"] / programs["score"]["flops"] < 5, "forward, again, and backward"
    assert 0.8 < programs["decode step"]["bytes"] / programs["decode step"]["least_bytes"] < 2.5
    sent = programs["update"]["collectives"]
    assert sent["all-gather"]["count"] > 2 and sent["all-reduce"]["bytes"] > 0
    assert "4 prompts of 256 tokens, 4 x 64 completion tokens" in done.stdout and "2 x v5e:2x2" in done.stdout
    assert [name for name, program in programs.items() if program["between"]] == ["update"]
    (kind, between), *more = programs["update"]["between"].items()
    gradients = 4 * sum(math.prod(shape) for shape in hf.parameter_shapes(model_config.load(model)).values()) / 4
    assert kind == "all-reduce" and not more and gradients / 2 < between["bytes"] < 1.1 * gradients
    assert 1.5 < programs["update"]["repeated"] < 4, "prompts are four times as long as completions"
    cells = compile_table.line("3b", "grpo", compile_table.PODS["v5e16"], found)
    assert len(cells) == len(compile_table.HEADS) and cells[1] == "GRPO" and all(cells)
    assert "GB" in compile_table.collectives(found)[0]
    hidden, plain = efficiency.seconds(found)
    assert programs["update"]["seconds"] + 512 * programs["decode step"]["seconds"] < hidden < plain


@WITH_LIBTPU
def test_what_does_not_fit_is_said_with_what_would_help() -> None:
    size = ("--size=qwen2.5-vl-72b", "--topology=v5e:2x2")
    done = call("--config=configs/vau_r1_qa_rft.py", *size, "--config.batch_size=8", "--only=update")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "GiB of 16 for its arguments alone" in done.stdout
    assert "micro_batches=2" in done.stderr and "lora.rank=16" in done.stderr


@WITH_LIBTPU
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--size=qwen", "--topology=v5e:2x2"), "--size=qwen is unknown"),
        (("--topology=v5e:2x2",), "which model?"),
        (("--size=qwen2.5-vl-3b", "--topology=v5e:2x2", "--visual=100"), "--visual=100: expected a multiple of 16"),
        (("--size=qwen2.5-vl-3b", "--topology=b42:8"), "--topology=b42:8 is unknown"),
        (("--size=qwen2.5-vl-3b", "--topology=v9:1x1"), "--topology=v9:1x1 is unknown"),
        (("--size=qwen2.5-vl-3b", "--topology=v5e:2x2", "--config.mesh.fsdp=3"), "can be one of"),
        (("--size=qwen2.5-vl-3b", "--topology=v5e:2x2", "--slices=2"), "mesh.data=1 over 2 slices"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(args: tuple[str, ...], words: str) -> None:
    done = call("--config=configs/vau_r1_qa_rft.py", *args)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_gpu_memory_is_estimated_without_a_gpu() -> None:
    common = ("--config=configs/vau_r1_qa_rft.py", "--topology=h100:8", "--config.batch_size=8")
    done = call(*common, "--size=qwen2.5-vl-3b")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "h100:8" in done.stdout and "optimiser" in done.stdout and "of 80 GiB" in done.stdout
    done = call(*common, "--size=qwen2.5-vl-72b")
    assert done.returncode == 1 and "does not fit" in done.stderr
    one = ("--topology=h100:1", "--size=qwen2.5-vl-3b", "--config.lora.rank=16", "--config.batch_size=32")
    done = call(common[0], *one, "--config.micro_batches=auto")
    assert done.returncode == 0 and "micro-batches 2\n" in done.stdout, "63 of 80 GiB, and in one part 119"


@pytest.mark.parametrize(
    ("size", "shape", "peak"),
    [("qwen2.5-vl-3b", (4, 4), 4.81), ("qwen2.5-vl-7b", (4, 4), 9.69), ("qwen2.5-vl-3b", (64, 1), 4.64)],
    ids=str,
)
def test_the_estimate_is_near_the_compilers_plan(size: str, shape: tuple[int, int], peak: float) -> None:
    """GiB of an update as it was compiled for TPUs (the table in launch/README.md)."""
    config = importlib.import_module("vau_jax.configs.vau_r1_qa_rft").get_config()
    config.batch_size, config.rollout.num_generations, config.data.max_completion_tokens = shape[0], 8, 512
    mesh = sharding.abstract_mesh({"fsdp": shape[0], "tensor": shape[1]}, shape[0] * shape[1])
    programs = Programs(config, model_config.from_hf(model_config.SIZES[size]), mesh, 4096, 3584)
    own = {name: value for name, value in programs.estimate()["update"].items() if name != "reference"}
    assert sum(own.values()) / 2**30 == pytest.approx(peak, rel=0.25)


TRAFFIC = """
import jax, jax.numpy as jnp, json
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vau_jax.launch import hlo
from vau_jax.launch.compile_check import Programs, held
chips = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu", chips_per_host_bounds=(2, 2, 1))
mesh = Mesh(chips.devices, ("x",))
def place(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
def layers(x, w):
    return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, w)[0]
def product(x, w):
    return jax.lax.with_sharding_constraint(x @ w[0], NamedSharding(mesh, P()))
found = []
flags = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
for function in (layers, product):
    args = place((65536, 4096), None, "x"), place((6, 4096, 4096), None, "x")
    program = jax.jit(function).lower(*args).compile(compiler_options=flags)
    traffic = hlo.read(program.as_text())
    found.append([traffic.bytes, traffic.collectives])
print(json.dumps(found))
"""


@WITH_LIBTPU
def test_traffic_counts_every_round_of_a_loop() -> None:
    """Six layers, whose weights lie on four chips by their rows: a sum over chips of 512 MiB of activations in each, of
    which each chip keeps its columns. That sends 3/4 of them, a sum that every chip gets twice as much; what a chip has
    of them is read and written at least once."""
    done = subprocess.run(
        [sys.executable, "-c", TRAFFIC], cwd=ROOT, env=ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (moved, split), (_, whole) = json.loads(done.stdout.splitlines()[-1])
    size = 512 * 2**20
    assert split == {"reduce-scatter": {"count": 6, "bytes": 6 * 0.75 * size}}
    assert whole == {"all-reduce": {"count": 1, "bytes": 2 * 0.75 * size}}
    assert 6 * 2 * size / 4 <= moved <= 6 * 6 * size


def test_sizes_of_shapes() -> None:
    assert hlo.whole_size("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}, pred[8]{0}, u32[]{:S(2)})") == 12 + 16 + 8 + 4
    assert hlo.size("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}, pred[8]{0}, u32[]{:S(2)})") == 16 + 8


@pytest.mark.parametrize("rank", [0, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize("size", ["qwen2.5-vl-3b", pytest.param("qwen3-vl-8b", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TRAINING)
def test_every_config_builds_its_state_and_batches_at_full_size(name: str, size: str, rank: int) -> None:
    """Shapes alone: model, optimiser, batch and sampling of a published model."""
    config = importlib.import_module(f"vau_jax.configs.{name}").get_config()
    config.lora.rank = rank
    if config.data.style == "reflection":
        config.data.reflection = "records.jsonl"
    sizes = model_config.from_hf(model_config.SIZES[size])
    for program in Programs(config, sizes, sharding.make_mesh({"fsdp": -1}), 4096, 3584).all():
        if program.name in ("prefill", "update"):
            out = jax.eval_shape(lambda *args, p=program: p.function(*args, **p.static), *program.args)
            assert jax.tree.leaves(out)


def test_with_lora_only_the_adapters_have_an_optimiser() -> None:
    config = importlib.import_module("vau_jax.configs.vau_r1_qa_rft").get_config()
    sizes, mesh = model_config.from_hf(model_config.SIZES["qwen2.5-vl-3b"]), sharding.make_mesh({"fsdp": -1})
    whole = Programs(config, sizes, mesh, 4096, 3584)
    config.lora.rank = 16
    adapted = Programs(config, sizes, mesh, 4096, 3584)
    state, base = adapted.learner.abstract_state, adapted.base
    adapters = held(adapted.trained)
    assert held(state) == pytest.approx(3 * adapters, rel=1e-3), "in float32, with two moments"
    assert held(base) == held(whole.trained) / 2, "in bfloat16"
    assert adapters < 0.05 * held(base)
    assert isinstance(adapted.encoded_batch.vision, Features) and isinstance(whole.encoded_batch.vision, Vision)
    ratio = adapted.operations(adapted.update()) / adapted.model_flops("update")
    assert 1.4 < ratio < 1.7, "forward, again, and backward to the adapters; the tower is not in it"


def test_larger_rollouts_sample_more_rows_for_more_updates_of_the_same_size() -> None:
    config = importlib.import_module("vau_jax.configs.vau_r1_qa_rft").get_config()
    config.batch_size = 4
    sizes, mesh = model_config.from_hf(model_config.SIZES["qwen2.5-vl-3b"]), sharding.make_mesh({"fsdp": -1})
    programs = []
    for rollout in (4, 8):
        config.rollout.batch_size = rollout
        found = Programs(config, sizes, mesh, 4096, 3584)
        programs.append({program.name: program for program in found.all()})
        assert len(found.batch.tokens) == rollout
    once, twice = programs
    assert twice["update"].calls == 2 * once["update"].calls
    given, larger = (Counter(x.shape for x in jax.tree.leaves(program["update"].args)) for program in programs)
    assert larger - given == Counter([(4, 4, 1024)]), "the log-probabilities of the policy that sampled"


DRIFTED = {
    "plain": {},
    "frozen tower": {"optim.freeze": ("visual/.*",)},
    "adapters": {"lora.rank": 2, "unroll": 2},
    "motion": {"motion.enabled": True, "motion.weight": 0.1},
    "adapters and motion": {"lora.rank": 2, "motion.enabled": True},
    "moving reference": {"grpo.reference_every": 2, "grpo.iterations": 2},
    "no reference": {"grpo.beta": 0.0},
}


@pytest.mark.parametrize("changed", DRIFTED.values(), ids=DRIFTED)
def test_what_is_compiled_ahead_is_what_a_run_has(
    changed: dict[str, object], model_folder: Path, dataset: Path
) -> None:
    """State, policies and the batch of an update: the same tree, dtypes and axes, and the state the same sizes."""
    config = small("vau_r1_multi_rft", model_folder, dataset)
    config.attention = "jnp"
    config.update_from_flattened_dict(changed)
    run = loop.Run(config)
    collected = run.worker.collect(run.learner, run.feed.next(), run.key, Clock())
    run.close()
    programs = Programs(config, model_config.load(model_folder), run.mesh, 128, 64)

    def shapes(tree: object) -> object:
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)

    def kinds(tree: object) -> object:
        return jax.tree.map(lambda x: (x.ndim, x.dtype), tree)

    learner, ahead = run.learner, programs.learner
    assert shapes(ahead.abstract_state) == shapes(learner.state)
    assert kinds(ahead.abstract_variables) == kinds(learner.variables)
    assert kinds(ahead.abstract_base) == kinds(learner.base)
    if learner.has_reference:
        assert kinds(ahead.abstract_reference) == kinds(learner.reference_variables)
    assert ahead.model.unroll == config.unroll and ahead.tower_is_frozen == learner.tower_is_frozen
    assert kinds(programs.train_batch()) == kinds(collected.train)
    assert [p.name for p in programs.all()].count("score") == bool(config.grpo.beta)
