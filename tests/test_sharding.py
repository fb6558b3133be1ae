"""Rules for laying out parameters, and that a sharded run computes what one device computes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.small_models import FAMILIES
from vau_jax.common import sharding
from vau_jax.common.files import InputError
from vau_jax.models import config as model_config
from vau_jax.models import hf, lora
from vau_jax.models.lora import LoRA


def test_every_parameter_has_a_rule(family_folder: Path) -> None:
    """Adapters of every linear layer too."""
    mesh = sharding.make_mesh({"fsdp": -1})
    shapes = hf.parameter_shapes(model_config.load(family_folder))
    adapters = lora.init(jax.random.key(0), shapes, LoRA(rank=2, alpha=2.0, targets=(".*",)))
    for path, shape in {**shapes, **{path: leaf.shape for path, leaf in adapters.items()}}.items():
        sharding.param_spec(path, shape, mesh)


def test_a_parameter_without_a_rule_raises() -> None:
    with pytest.raises(ValueError, match="no rule"):
        sharding.param_spec("decoder/layers/new_thing/table", (4, 4), sharding.make_mesh({"fsdp": -1}))


def test_a_mesh_that_does_not_fit_lists_those_that_do() -> None:
    with pytest.raises(InputError, match=r"does not fit 1 device.*\(1, 1, 1\)"):
        sharding.make_mesh({"data": 3})


SCRIPT = """
import json, sys
import jax, numpy as np
from vau_jax.configs import demo
from tests.runs import IN_PROPORTION, first_gradient
from vau_jax.common import sharding
from vau_jax.rl import sampling
from vau_jax.train import loop
from vau_jax.types import Completions, TrainBatch
folder, data, mesh, micro_batches, out = sys.argv[1:6]
mesh, micro_batches = json.loads(mesh), int(micro_batches)
found = {}
for stage in ("sft", "rft"):
    c = demo.stage(stage)
    c.model, c.mesh.data, c.mesh.fsdp, c.mesh.tensor = folder, *mesh
    c.batch_size, c.steps, c.rollout.num_generations, c.unroll = 8, 4, 4, 1
    c.update_from_flattened_dict(IN_PROPORTION)
    c.rewards.tiou, c.rewards.reflection = 1.0, 1.0
    c.micro_batches, c.grpo.entropy_bonus = micro_batches, 0.01
    c.data.max_completion_tokens = 24 if stage == "rft" else 128
    c.data.csv, c.data.videos = data + "/train.csv", data + "/videos"
    c.data.reflection = data + "/train_reflection.jsonl"
    t = loop.Run(c)
    learner, feed = t.learner, t.feed
    before = jax.tree.map(lambda x: x.sharding, learner.state)
    first = jax.tree.leaves(learner.state.params)[0]
    for i in range(2):
        host = feed.next()
        if stage == "sft":
            given, tokens = t.supervised(host)
        else:  # rewards of a random model are all alike, so the advantages are given
            batch = learner.encode_vision(host.batch)
            out_ = t.worker.engine.sample(learner.variables, batch, jax.random.key(i))
            found |= {f"tokens{i}": np.asarray(out_.tokens), f"sampled{i}": np.asarray(out_.logps)}
            advantages = np.cos(np.arange(32.0)).reshape(8, 4).astype(np.float32)
            inputs = {"mask": out_.mask, "advantages": advantages, "sampler_logps": out_.logps}
            completions = Completions(out_.tokens, out_.mask)
            tokens = np.asarray(out_.mask).sum((1, 2))
            scored = {"ref_logps": learner.reference_logps(batch, completions, tokens)}
            if i == 0:
                programs = sampling.compiled_programs()
                t.worker.engine.sample(learner.variables, batch, jax.random.key(9))
                found["rft/new programs"] = np.asarray(sampling.compiled_programs() - programs)
                found["scored"] = np.where(out_.mask, scored["ref_logps"], 0)
            given = TrainBatch(batch, completions, {**inputs, **scored})
        given = jax.device_put(given, sharding.examples(t.mesh))
        metrics = learner.update(given, tokens)
        found |= {f"{stage}/{i}/{name}": np.asarray(metrics[name]) for name in ("loss", "grad_norm")}
        if i == 0:
            found |= {f"{stage}/gradient/{number}": leaf for number, leaf in enumerate(first_gradient(t))}
    after = jax.tree.map(lambda x: x.sharding, learner.state)
    same = jax.tree.all(jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), before, after, learner.state))
    updates = learner.updates.whole if micro_batches == 1 else learner.updates.apply
    found |= {f"{stage}/same": np.asarray(same), f"{stage}/programs": np.asarray(updates._cache_size())}
    found[f"{stage}/given up"] = np.asarray(first.is_deleted())
    t.close()
np.savez(out, **found)
"""


@functools.cache
def run_on(model: Path, data: Path, mesh: tuple[int, int, int], out: Path, micro_batches: int = 1) -> dict:
    # A simulated device waits in a thread for the others; more threads than devices, or two collectives at once hang.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    env["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={int(np.prod(mesh))}"
    command = [sys.executable, "-c", SCRIPT, str(model), str(data), json.dumps(mesh), str(micro_batches), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4))
CASES = [(family, mesh, 1) for family in FAMILIES for mesh in MESHES] + [("qwen3_vl", (2, 1, 2), 2)]
SHORT = [("qwen2_5_vl", (1, 2, 4), 1)]


@pytest.mark.parametrize(
    ("family", "mesh", "micro_batches"),
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.long, id=str(case)) for case in CASES],
)
def test_devices_and_parts_of_a_batch_change_nothing(
    family: str,
    mesh: tuple[int, int, int],
    micro_batches: int,
    family_folders: dict[str, Path],
    dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Two steps of SFT and GRPO of 8 prompts, beside one device that takes them at once. Losses, gradients and
    log-probabilities differ by the order of float32 sums: 1e-5, of gradients as a share of the largest. With 2 kv
    heads, a tensor axis of 4 has fewer."""
    folder = tmp_path_factory.getbasetemp()
    alone = run_on(family_folders[family], dataset, (1, 1, 1), folder / f"{family}.npz")
    name = "-".join(map(str, (family, *mesh, micro_batches)))
    spread = run_on(family_folders[family], dataset, mesh, folder / f"{name}.npz", micro_batches)
    for name, value in spread.items():
        if "gradient" in name:
            largest = max(np.abs(x).max() for other, x in alone.items() if other.startswith(name[:12]))
            np.testing.assert_allclose(value, alone[name], atol=1e-5 * largest, err_msg=name)
        elif name.startswith(("tokens", "sampled", "scored")) or "/0/" in name or "/1/" in name:
            np.testing.assert_allclose(value, alone[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for stage in ("sft", "rft"):
        assert spread[f"{stage}/same"], "a step changed how the state lies on the devices"
        assert spread[f"{stage}/programs"] == 1 and spread[f"{stage}/given up"]
    assert spread["rft/new programs"] == 0, "sampling was compiled twice"


SAMPLES = """
import json, sys
import jax, numpy as np
from vau_jax.configs import demo
from vau_jax.common import sharding
from vau_jax.data import pipeline
from vau_jax.train import loop
folder, data, mesh = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
c = demo.stage("rft")
c.model, c.mesh.data, c.mesh.fsdp, c.mesh.tensor = folder, *mesh
c.batch_size, c.rollout.num_generations, c.unroll, c.data.max_completion_tokens = 8, 4, 1, 12
c.data.csv, c.data.videos = data + "/train.csv", data + "/videos"
c.data.reflection = data + "/train_reflection.jsonl"
t = loop.Run(c)
items = t.feed.next().examples
key = jax.random.key(3)

def sampled(order):
    host = t.feed.collate([items[i] for i in order])
    batch = jax.device_put(host.batch, sharding.examples(t.mesh))
    whole = len(host.examples) == c.batch_size
    keys = t.worker.keys(host, key) if whole else pipeline.keys_of(key, pipeline.draw_numbers(host.examples))
    tokens = np.asarray(t.worker.engine.sample(t.learner.variables, batch, keys).tokens)
    return {item.example.id: tokens[i].tolist() for i, item in enumerate(host.examples)}

found = {"all": sampled(range(8)), "reversed": sampled(range(7, -1, -1)), "four": sampled(range(4))}
found["other four"] = sampled(range(4, 8))
t.close()
print(json.dumps(found))
"""


def samples_on(model: Path, data: Path, mesh: tuple[int, int, int]) -> dict[str, dict[str, list]]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    env["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={int(np.prod(mesh))}"
    command = [sys.executable, "-c", SAMPLES, str(model), str(data), json.dumps(mesh)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_example_has_the_same_completions_in_any_batch_and_on_any_devices(model_folder: Path, dataset: Path) -> None:
    """In another order, in a batch of another size, and on four devices."""
    alone = samples_on(model_folder, dataset, (1, 1, 1))
    expected = alone["all"]
    assert len(expected) == 8
    assert len({json.dumps(tokens) for group in expected.values() for tokens in group}) == 32, "none alike"
    for found in (alone, samples_on(model_folder, dataset, (1, 2, 2))):
        assert found["all"] == found["reversed"] == found["four"] | found["other four"] == expected


def test_batches_must_divide_by_the_mesh() -> None:
    mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)
    with pytest.raises(InputError, match="batch_size 6 is not divisible"):
        sharding.check_divisible(6, mesh)
