"""The count of operations: by formula, by counting a program's matrix products, and XLA's own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import small
from vau_jax.common import chips
from vau_jax.models import flops
from vau_jax.train import loop, update


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_formula_is_what_the_program_computes(family: str, family_folders: dict[str, Path], dataset: Path) -> None:
    """Forward pass at the padded sizes, with all pairs, which plain attention computes; 1% are other small products."""
    config = small("vau_r1_sft", family_folders[family], dataset)
    config.attention = "jnp"
    trainer = loop.Run(config)
    host = trainer.feed.next()
    (b, t), c = host.batch.tokens.shape, host.completions.tokens.shape[2]
    size = {k: float(v) for k, v in flops.sizes(host.batch, host.completions).items()}
    model, given = trainer.learner.model, (host.batch, host.completions)
    counted = flops.count(lambda: update.policy_logps(trainer.learner.variables, *given, model, 1.0))
    padded = {
        "prompt": host.batch.tokens.size,
        "drawn": host.completions.tokens.size,
        "pairs": b * (t * t + c * (t + c)),
        "patches": np.prod(host.batch.vision.patches.shape[:2]),
        "frame_pairs": np.prod(host.batch.vision.frames.members.shape) * host.batch.vision.frames.members.shape[2],
        "window_pairs": 0,
    }
    assert counted == pytest.approx(sum(flops.forward(model.config, padded).values()), rel=0.01)
    assert size["prompt"] == host.batch.mask.sum() and size["drawn"] == host.completions.mask.sum()
    assert size["patches"] == sum(len(v.patches) for i in host.examples for v in i.encoded.visuals)


def test_scans_count_by_their_length_and_branches_by_the_larger() -> None:
    w = jnp.ones((8, 8))

    def layers(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (h @ w, None), x, length=5)[0]

    x = jnp.ones((4, 8))
    assert flops.count(layers, x) == 5 * 2 * 4 * 8 * 8
    assert flops.count(jax.grad(lambda x: layers(x).sum()), x) == 2 * 5 * 2 * 4 * 8 * 8
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)  # noqa: E731
    assert flops.count(branches, x) == 2 * 2 * 4 * 8 * 8
    whole = jax.jit(lambda a, b: a @ b).lower(x, w).compile().cost_analysis()["flops"]
    assert flops.count(lambda a, b: a @ b, x, w) == whole


def test_chips_are_known_by_the_names_that_jax_gives_them() -> None:
    assert chips.chip("TPU v5 lite").flops == 197e12 and chips.chip("TPU v5p").flops == 459e12
    assert chips.chip("NVIDIA H100 80GB HBM3").memory == 80 * chips.GIB
    assert chips.chip("cpu") is None
