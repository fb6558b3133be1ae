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

from vau_jax import sharding
from vau_jax.files import InputError
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
from configs import demo
from vau_jax import sharding, train
from vau_jax.types import Completions, TrainBatch
folder, data, mesh = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
c = demo.stage(sys.argv[4])
c.model, c.mesh.data, c.mesh.fsdp, c.mesh.tensor = folder, *mesh
c.batch_size, c.steps, c.optim.lr, c.rollout.num_generations = 8, 4, 1e-3, 4
c.rewards.tiou, c.rewards.reflection = 1.0, 1.0
c.micro_batches, c.grpo.entropy_bonus = int(sys.argv[5]), 0.01
c.data.max_completion_tokens = 24 if c.stage == "rft" else 128
c.data.csv, c.data.videos, c.data.reflection = data + "/train.csv", data + "/videos", data + "/train_reflection.jsonl"
t = train.Trainer(c)
before = jax.tree.map(lambda x: x.sharding, t.state)
losses, tokens = [], []
for i in range(2):
    if c.stage == "sft":
        metrics, _ = t.step(i)
    else:  # rewards of a random model are all alike, so the advantages are given
        host = next(t.data)
        batch = jax.device_put(host.batch, sharding.examples(t.mesh))
        out = t.rollout.sample(t.variables, batch, jax.random.key(i))
        tokens.append(np.asarray(out.tokens).tolist())
        inputs = {"mask": out.mask, "advantages": np.cos(np.arange(32.0)).reshape(8, 4), "sampler_logps": out.logps}
        completions = Completions(out.tokens, out.mask)
        full = TrainBatch(batch, completions, {**inputs, **t._scored(batch, completions)})
        t.state, metrics = t.update(t.state, t.base, jax.device_put(full, sharding.examples(t.mesh)))
    losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
after = jax.tree.map(lambda x: x.sharding, t.state)
same = jax.tree.all(jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), before, after, t.state))
print(json.dumps({"losses": losses, "same": bool(same), "programs": t.update._cache_size(), "tokens": tokens}))
"""


@functools.cache
def run_on(model: Path, data: Path, mesh: tuple[int, int, int], stage: str, micro_batches: int = 1) -> dict:
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={int(np.prod(mesh))}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", SCRIPT, str(model), str(data), json.dumps(mesh), stage, str(micro_batches)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("stage", "mesh", "micro_batches"),
    [("sft", (2, 2, 2), 2), ("rft", (1, 4, 2), 1)],
    ids=str,
)
def test_devices_and_parts_of_a_batch_change_nothing(
    model_folder: Path, dataset: Path, stage: str, mesh: tuple[int, int, int], micro_batches: int
) -> None:
    """Losses and gradient norms of two updates of 8 prompts, beside one device that takes them at once: 1e-4 relative,
    from other orders of float32 sums."""
    alone = run_on(model_folder, dataset, (1, 1, 1), stage)
    spread = run_on(model_folder, dataset, mesh, stage, micro_batches)
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-4, atol=1e-5)
    assert spread["tokens"] == alone["tokens"], "the same key draws the same completions on any mesh"
    assert spread["same"], "a step changed how the state lies on the devices"
    assert spread["programs"] == 1


def test_batches_must_divide_by_the_mesh() -> None:
    mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)
    with pytest.raises(InputError, match="batch_size 6 is not divisible"):
        sharding.check_divisible(6, mesh)
