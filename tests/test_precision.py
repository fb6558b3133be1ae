"""What is in float32 beside bfloat16: sums (of ones, one in bfloat16 ends at 256), optimiser arithmetic, weights."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import small
from tests.small_models import two_prompts
from vau_jax.common import sharding
from vau_jax.models import attention
from vau_jax.models.attention import Keys
from vau_jax.models.qwen_vl import Embedding
from vau_jax.rl import sampling
from vau_jax.train import loop, update
from vau_jax.types import Completions
from vau_jax.vlm import VideoLM

MANY = 4096


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_a_token_at_every_position_gets_its_full_gradient(held: str) -> None:
    layer, tokens = Embedding(3, 2, jnp.bfloat16), jnp.ones((1, MANY), jnp.int32)
    params = {"params": {"embedding": jnp.zeros((3, 2), held)}}
    ones = jnp.ones((1, MANY, 2), jnp.bfloat16)
    found = jax.jit(lambda p: jax.vjp(lambda p: layer.apply(p, tokens), p)[1](ones)[0])(params)["params"]["embedding"]
    assert found.dtype == held
    np.testing.assert_array_equal(np.asarray(found, np.float32), [[0, 0], [MANY, MANY], [0, 0]])


@pytest.mark.parametrize("shape", [(MANY, 1), (1, MANY)], ids=["groups", "queries"])
def test_keys_that_are_read_in_pieces_get_all_of_their_gradient(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece for each query; a value that alone is seen gets what every output got."""
    monkeypatch.setattr(attention, "MOST_SCORES", 1)
    q, kv = jnp.zeros((1, *shape, 1, 2), jnp.bfloat16), jnp.zeros((1, 1, 1, 2), jnp.bfloat16)

    def out(v: jax.Array) -> jax.Array:
        return attention.attend(q, [Keys(kv, v, jnp.ones((1, 1, 1), bool))])

    (found,) = jax.jit(lambda v: jax.vjp(out, v)[1](jnp.ones_like(q)))(kv)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32).reshape(-1), [MANY, MANY])


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_no_gradient_of_the_model_is_a_sum_in_bfloat16(family_folder: Path) -> None:
    """Of all sums but those of matrix products, which add up in float32 anyway: over tokens (biases, norms), over
    completions, over the places of a table's row."""
    vlm = VideoLM.load(family_folder, "bfloat16")
    batch = two_prompts(vlm)
    completions = Completions(np.ones((2, 3, 7), np.int32), np.ones((2, 3, 7), bool))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), vlm.params)

    def loss(params: dict) -> jax.Array:
        return update.policy_logps({"params": params}, batch, completions, vlm.model, 1.0)[0].sum()

    sums = {"float32": 0, "bfloat16": 0, "int32": 0}  # integers count tokens
    for equation in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr):
        if equation.primitive.name not in ("reduce_sum", "scatter-add"):
            continue
        given, result = equation.invars[0].aval, equation.outvars[0].aval
        if given.size > result.size or (equation.primitive.name == "scatter-add" and result.ndim == 2):
            sums[str(result.dtype)] += 1
    assert sums["float32"] > 20 and not sums["bfloat16"], sums


def test_a_state_in_bfloat16_stays_so_and_its_update_is_compiled_once(model_folder: Path, dataset: Path) -> None:
    """Whose gradients are added up over parts in float32."""
    c = small("vau_r1_sft", model_folder, dataset)
    c.param_dtype, c.dtype, c.micro_batches, c.remat = "bfloat16", "bfloat16", 2, False
    c.data.completion_shares = ()  # one length for all parts
    t = loop.Run(c)
    before = jax.tree.map(lambda x: x.dtype, t.learner.state)
    for number in range(2):
        t.step(number)
    t.close()
    assert jax.tree.map(lambda x: x.dtype, t.learner.state) == before
    assert jnp.bfloat16 in jax.tree.leaves(before.opt_state)
    assert t.learner.updates.part._cache_size() == 1


def test_sampling_reads_matrices_in_the_dtype_of_activations(vlm: VideoLM) -> None:
    """On one device too, and what has it already is not copied."""
    mesh = sharding.make_mesh({"fsdp": -1})
    params = jax.device_put(vlm.params, sharding.state_shardings(vlm.params, mesh))
    for where in (None, mesh):
        read = sampling.decode_weights({"params": params}, jnp.bfloat16, where)["params"]
        assert read["embed_tokens"]["embedding"].dtype == jnp.bfloat16
        assert read["decoder"]["layers"]["q_proj"]["kernel"].dtype == jnp.bfloat16
        assert read["decoder"]["norm"]["weight"] is params["decoder"]["norm"]["weight"]
        again = sampling.decode_weights({"params": read}, jnp.bfloat16, where)["params"]
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (read, again)), strict=True))
