"""The ways to compute attention give the same numbers, in pieces or whole; kernels compile without their hardware."""

import os
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import WITH_LIBTPU
from vau_jax.common.files import InputError
from vau_jax.models import attention, flash
from vau_jax.models.attention import Keys, Layout

B, T, G, C, N, K, H = 2, 40, 3, 9, 4, 2, 16


def arrays(rng: np.random.Generator, length: int, dim: int = H) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(jnp.asarray(rng.normal(size=(B, length, n, dim)), jnp.float32) for n in (N, K, K))


def prompt_mask(left: bool) -> np.ndarray:
    lengths = np.asarray([T, T - 11])[:, None]
    return np.arange(T) >= T - lengths if left else np.arange(T) < lengths


def layout(kind: str) -> Layout | None:
    """G completions in C places each; or of unequal length one after the other, shorter and longer than a block."""
    if kind == "prompt":
        return None
    if kind == "fixed":
        return Layout(jnp.tile(jnp.repeat(jnp.arange(G) * C, C), (B, 1)), C, fixed=True)
    sizes = {"packed": ([5, C, 3], [2, 6, 8]), "short": ([1, 2, 1], [2, 1, 3])}[kind]
    length = {"packed": 2 * C, "short": 6}[kind]
    starts = np.tile(np.arange(length), (B, 1))
    for row, of_row in zip(starts, sizes, strict=True):
        for first, size in zip(np.cumsum([0, *of_row]), of_row, strict=False):
            row[first : first + size] = first
    return Layout(jnp.asarray(starts), C, fixed=False)


LAYOUTS = pytest.mark.parametrize("kind", ["prompt", "fixed", "packed", "short"])


def size_of(layout: Layout | None) -> int:
    return T + (0 if layout is None else layout.starts.shape[1])


def naive(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray, layout: Layout | None) -> np.ndarray:
    """numpy in float64, with the mask written out."""
    length = q.shape[1]
    row, starts = np.arange(length), np.zeros((B, length), int)
    if layout is not None:
        starts[:, T:] = T + layout.starts
    seen = (row[:, None] >= row) & ((row < T) | (row >= starts[..., None]))
    seen = seen & np.concatenate([mask, np.ones((B, length - T), bool)], axis=1)[:, None]
    k, v = (np.repeat(np.asarray(x, np.float64), N // K, axis=2) for x in (k, v))
    scores = np.einsum("bqnh,bsnh->bnqs", np.asarray(q, np.float64), k) / np.sqrt(q.shape[-1])
    scores = np.where(seen[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqs,bsnh->bqnh", weights / weights.sum(-1, keepdims=True), v)


def real(mask: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([mask, np.ones((B, length - T), bool)], axis=1)


@pytest.mark.parametrize("name", ["jnp", "xla"])
@LAYOUTS
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_prompts_and_completions(rng: np.random.Generator, name: str, kind: str, left: bool) -> None:
    q, k, v = arrays(rng, size_of(layout(kind)))
    mask = prompt_mask(left)
    ours = attention.prefix_attention(q, k, v, jnp.asarray(mask), layout(kind), name)
    keep = real(mask, q.shape[1])
    np.testing.assert_allclose(np.asarray(ours)[keep], naive(q, k, v, mask, layout(kind))[keep], atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("prompt", False),
        ("packed", False),
        ("packed", True),
        *(pytest.param(kind, left, marks=pytest.mark.long) for kind in ("fixed", "short") for left in (False, True)),
    ],
)
def test_the_tpu_kernel_interpreted(rng: np.random.Generator, kind: str, left: bool) -> None:
    """Values and gradients of real tokens; its heads are 128 wide, as in every published model."""
    q, k, v = arrays(rng, size_of(layout(kind)), 128)
    mask = prompt_mask(left)
    keep = real(mask, q.shape[1])
    weights = jnp.asarray(rng.normal(size=q.shape) * keep[..., None, None], jnp.float32)

    def total(implementation: object, *x: jax.Array) -> jax.Array:
        return jnp.sum(implementation(*x, jnp.asarray(mask), layout(kind)) * weights)

    kernel = jax.tree_util.Partial(attention._splash, interpret=True)
    ours = kernel(q, k, v, jnp.asarray(mask), layout(kind))
    np.testing.assert_allclose(np.asarray(ours)[keep], naive(q, k, v, mask, layout(kind))[keep], atol=2e-6)
    grads = jax.grad(total, argnums=(1, 2, 3))(kernel, q, k, v)
    expected = jax.grad(total, argnums=(1, 2, 3))(attention.IMPLEMENTATIONS["jnp"], q, k, v)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a)[keep], np.asarray(b)[keep], atol=1e-5)


def interpreted_gpu(x: tuple[jax.Array, ...], mask: np.ndarray, layout: Layout) -> jax.Array:
    """As on a GPU, but for cuDNN."""
    prompt = attention._library(*x, jnp.asarray(mask), "xla")
    return jnp.concatenate([prompt, attention._flash(*x, jnp.asarray(mask), layout, interpret=True)], axis=1)


def gradients(
    implementation: Callable[..., jax.Array], x: tuple[jax.Array, ...], mask: np.ndarray, layout: Layout
) -> tuple[jax.Array, ...]:
    """Of a weighted sum over all real tokens, by q, k and v."""

    def total(*x: jax.Array) -> jax.Array:
        out = implementation(x, mask, layout)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape) * real(mask, out.shape[1])[..., None, None]
        return jnp.sum(out.astype(jnp.float32) * weights)

    return jax.grad(total, argnums=(0, 1, 2))(*x)


def plain(x: tuple[jax.Array, ...], mask: np.ndarray, layout: Layout) -> jax.Array:
    return attention.prefix_attention(*x, jnp.asarray(mask), layout, "jnp")


@pytest.mark.parametrize("block", [16, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["fixed", "packed", "short"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_gpu_kernel_gives_the_reference_values(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int, kind: str, left: bool
) -> None:
    """Interpreted, completions over several blocks and within one."""
    monkeypatch.setattr(flash, "BLOCK", block)
    x, mask = arrays(rng, size_of(layout(kind)), 128), prompt_mask(left)
    keep = real(mask, x[0].shape[1])
    ours = interpreted_gpu(x, mask, layout(kind))
    np.testing.assert_allclose(np.asarray(ours)[keep], naive(*x, mask, layout(kind))[keep], atol=2e-6)


@pytest.mark.parametrize("block", [16, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["fixed", "packed", "short"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_gpu_kernel_gives_the_reference_gradients(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int, kind: str, left: bool
) -> None:
    monkeypatch.setattr(flash, "BLOCK", block)
    x, mask = arrays(rng, size_of(layout(kind)), 128), prompt_mask(left)
    ours = gradients(interpreted_gpu, x, mask, layout(kind))
    for a, b in zip(ours, gradients(plain, x, mask, layout(kind)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dim", [16, 64, 80])
def test_the_gpu_kernel_takes_heads_of_any_width(rng: np.random.Generator, dim: int) -> None:
    x, mask = arrays(rng, size_of(layout("packed")), dim), prompt_mask(False)
    ours = gradients(interpreted_gpu, x, mask, layout("packed"))
    for a, b in zip(ours, gradients(plain, x, mask, layout("packed")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_the_gpu_kernel_rounds_no_more_than_the_reference(rng: np.random.Generator, dtype: object) -> None:
    """Gradients in 16 bits: no further from those in float32 than the reference's, but for a little."""
    exact, mask = arrays(rng, size_of(layout("packed")), 128), prompt_mask(True)
    x = tuple(one.astype(dtype) for one in exact)
    right = gradients(plain, tuple(one.astype(jnp.float32) for one in x), mask, layout("packed"))
    ours, theirs = (gradients(way, x, mask, layout("packed")) for way in (interpreted_gpu, plain))
    for a, b, c in zip(ours, theirs, right, strict=True):
        assert a.dtype == dtype
        off = [float(jnp.linalg.norm((one.astype(jnp.float32) - c).ravel())) for one in (a, b)]
        assert off[0] < 1.5 * off[1]


@pytest.mark.skipif(jax.__version_info__ > (0, 10, 2), reason="compiles, with a library that JAX for GPUs alone has")
def test_the_gpu_kernel_lowers_for_a_gpu() -> None:
    """Without one: forward, and two kernels backward, as Triton programs."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, starts: jax.Array) -> jax.Array:
        return jnp.sum(attention._flash(q, k, v, mask, Layout(starts, 128, False)).astype(jnp.float32))

    t, n = 1000, 500
    q, k = (jax.ShapeDtypeStruct((2, t + n, heads, 128), jnp.bfloat16) for heads in (16, 2))
    rows = jax.ShapeDtypeStruct((2, t), bool), jax.ShapeDtypeStruct((2, n), jnp.int32)
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, *rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3


@pytest.mark.parametrize(("prompt", "length", "longest"), [(4096, 40960, 1024), (4096, 0, 0), (300, 500, 100)], ids=str)
def test_the_tpu_kernels_mask_of_a_long_sequence(prompt: int, length: int, longest: int) -> None:
    """Of its first, middle and last rows: all that completions of that length can need; sequences are padded to the
    kernel's blocks."""
    size = -(-(prompt + length) // 128) * 128
    mask, row = attention.PackedMask(size, prompt, longest), np.arange(size)
    for first in (0, size // 2, size - 256):
        some = slice(first, first + 256)
        own = (row >= prompt) & (row[some, None] - row < max(1, longest))
        expected = (row[some, None] >= row) & ((row < prompt) | own)
        np.testing.assert_array_equal(mask[some, :], expected)


@pytest.mark.parametrize(("length", "longest"), [(65664, 1), (65536, 32769)], ids=str)
def test_a_sequence_that_the_tpu_kernel_cannot_number_is_refused(length: int, longest: int) -> None:
    with pytest.raises(InputError, match="at most 65536 and 32768"):
        attention.PackedMask(length, 1024, longest)


@pytest.mark.parametrize("kind", ["fixed", "packed"])
@pytest.mark.parametrize("most", [T * 7, 2 * C * (T + 2 * C), 50], ids=["queries", "groups", "one by one"])
def test_pieces_equal_the_whole(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, most: int, kind: str
) -> None:
    """Values and gradients, however few scores may exist at a time."""
    x, mask = arrays(rng, size_of(layout(kind))), jnp.asarray(prompt_mask(False))

    def total(*x: jax.Array) -> jax.Array:
        out = attention.prefix_attention(*x, mask, layout(kind), "jnp")
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    whole = jax.value_and_grad(total, argnums=(0, 1, 2))(*x)
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    pieces = jax.value_and_grad(total, argnums=(0, 1, 2))(*x)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def temporary_bytes(q: jax.ShapeDtypeStruct, seen: jax.ShapeDtypeStruct) -> int:
    """What the compiled attention of these groups needs beside its inputs and outputs."""
    compiled = (
        jax.jit(lambda q, seen: attention.attend(q, [Keys(*[jnp.swapaxes(q, 2, 3)] * 2, seen)]))
        .lower(q, seen)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("most", [attention.MOST_SCORES, 5000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("length", [255, 256, 301, 700])
def test_a_long_prompt_in_blocks_equals_the_whole(
    length: int, most: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, with padding before the second prompt. Rounding in float32: differences are at most 1.1e-6
    and 5.7e-6, with AVX2 and with SSE4.2."""
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    q, k, v = arrays(rng, length)
    there = jnp.asarray(np.arange(length) >= np.asarray([[0], [37]]))
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32) * there[:, :, None, None]

    def by(name: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention.prefix_attention(q, k, v, there, None, name)
            return (out * weight).sum(), out * there[:, :, None, None]

        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    (blocks, blocks_grads), (whole, whole_grads) = by("jnp"), by("xla")
    np.testing.assert_allclose(blocks, whole, atol=1e-5)
    for mine, theirs in zip(blocks_grads, whole_grads, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_no_score_matrix_over_a_long_clip() -> None:
    """256 temporal patches of 64 patches, and as many patches in one group: scores of all pairs would be 17 GB."""
    frames, size, heads = 256, 64, 16
    shapes = {"in frames": (frames, size), "together": (1, frames * size)}
    needed = {
        name: temporary_bytes(
            jax.ShapeDtypeStruct((1, *shape, heads, 16), jnp.float32), jax.ShapeDtypeStruct((1, *shape), bool)
        )
        for name, shape in shapes.items()
    }
    assert needed["in frames"] < 4 * 3 * heads * frames * size**2
    assert needed["together"] < 4 * 3 * heads * attention.MOST_SCORES < 17e9 / 20


def test_an_unknown_way_lists_the_known(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="auto, jnp, xla, cudnn, splash"):
        attention.prefix_attention(*arrays(rng, T), jnp.ones((B, T), bool), None, "flash")


SPREAD = """
import numpy as np
import jax, jax.numpy as jnp
from functools import partial
from vau_jax.common import sharding
from vau_jax.models import attention
mesh = sharding.make_mesh({{"data": 2, "tensor": 4}})
rng = np.random.default_rng(0)
t, g, c = 40, 2, 9
layout = attention.Layout(jnp.tile(jnp.repeat(jnp.arange(g) * c, c), (2, 1)), c, True)
q, k, v = (jnp.asarray(rng.normal(size=(2, t + g * c, n, 128)), jnp.float32) for n in (8, 2, 2))
mask = jnp.asarray(np.arange(t) < np.asarray([[40], [29]]))
real = np.concatenate([mask, np.ones((2, g * c), bool)], 1)[..., None, None]
q, k, v, mask = jax.device_put((q, k, v, mask), sharding.replicated(mesh))
def total(how, *x):
    return jnp.sum(how(*x, mask, layout) * jnp.cos(jnp.arange(q.size)).reshape(q.shape) * real)
def kernel(*x):
    with sharding.on(mesh):
        {kernel}
for a, b in zip(
    jax.value_and_grad(partial(total, kernel), (0, 1, 2))(q, k, v)[1],
    jax.value_and_grad(partial(total, attention.IMPLEMENTATIONS["jnp"]), (0, 1, 2))(q, k, v)[1],
):
    np.testing.assert_allclose(np.asarray(a) * real, np.asarray(b) * real, atol=2e-5)
"""


def run_script(script: str, **env: str) -> None:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


KERNELS = {
    "tpu": "return attention._splash(*x, interpret=True)",
    "gpu": """prompt = attention._library(*x[:4], "xla")
        return jnp.concatenate([prompt, attention._flash(*x, interpret=True)], axis=1)""",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_on_a_mesh(kernel: str) -> None:
    """Interpreted on 8 devices, two for the examples, four for 8 heads that share 2 kv heads: gradients as on one."""
    eight = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    run_script(SPREAD.format(kernel=KERNELS[kernel]), XLA_FLAGS=eight)


TPU = """
import numpy as np
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vau_jax.common import sharding
from vau_jax.models import attention
name, bounds, shape = {topology}
chips = topologies.get_topology_desc(topology_name=name, platform="tpu", chips_per_host_bounds=bounds)
mesh = Mesh(np.array(chips.devices).reshape(shape), sharding.AXES)
place = NamedSharding(mesh, P(sharding.EXAMPLES, None, "tensor"))
t, g, c = 1000, 4, 128
def total(q, k, v, mask, starts):
    with sharding.on(mesh):
        layout = attention.Layout(starts, c, False)
        return jnp.sum(attention.prefix_attention(q, k, v, mask, layout, "splash").astype(jnp.float32))
def array(heads):
    return jax.ShapeDtypeStruct((2, t + g * c, heads, 128), jnp.bfloat16, sharding=place)
rows = NamedSharding(mesh, P(sharding.EXAMPLES))
mask = jax.ShapeDtypeStruct((2, t), bool, sharding=rows)
starts = jax.ShapeDtypeStruct((2, g * c), jnp.int32, sharding=rows)
program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(array(16), array(2), array(2), mask, starts)
text = program.compile().as_text()
assert text.count("tpu_custom_call") >= 2, "forward and backward are kernels"
"""


@WITH_LIBTPU
@pytest.mark.parametrize(
    "topology", [("v5e:1x1", (1, 1, 1), (1, 1, 1)), ("v5e:2x2", (2, 2, 1), (1, 2, 2))], ids=["one chip", "four chips"]
)
def test_the_tpu_kernel_compiles_for_a_tpu(topology: tuple) -> None:
    """Ahead of time with libtpu, forward and backward, a packed length that is not a multiple of the block."""
    run_script(TPU.format(topology=topology), TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
