"""Sharding of arrays: one mesh, and regexes on parameter names.

Mesh axes: `data` (copies of the model, different examples), `fsdp` (examples too, parameters split), `tensor`
(heads and hidden units split). Between TPU slices, which only the datacenter's network connects, lies `data` alone:
what goes over it is the gradients' sum, once for each micro-batch of an update.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from vau_jax.common.files import InputError

AXES = ("data", "fsdp", "tensor")
EXAMPLES = ("data", "fsdp")  # the mesh axes that the leading axis of a batch is split over

# The first rule whose regex matches the end of the name, from a slash on, decides. Stacked layers have a leading axis
# that is never split.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head", P("tensor", "fsdp")),
    (r"decoder/layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", P(None, "fsdp", "tensor")),
    (r"decoder/layers/.*(o_proj|down_proj)/kernel", P(None, "tensor", "fsdp")),
    (r"visual/(blocks|deepstack)/.*(qkv|gate_proj|up_proj|fc1)/kernel", P(None, "fsdp", "tensor")),
    (r"visual/(blocks|deepstack)/.*(proj|down_proj|fc2)/kernel", P(None, "tensor", "fsdp")),
    (r"visual/(patch_embed|merger/mlp/fc1)/kernel", P("fsdp", "tensor")),
    (r"visual/merger/mlp/fc2/kernel", P("tensor", "fsdp")),
    (r"visual/pos_embed", P(None, "fsdp")),
    (r".*(/bias|norm/weight|norm1/weight|norm2/weight|layernorm/weight)", P()),
    (r"decoder/layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/a", P(None, "fsdp")),  # LoRA's factors
    (r"decoder/layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/b", P(None, None, "tensor")),
    (r"decoder/layers/.*(o_proj|down_proj)/a", P(None, "tensor")),
    (r"decoder/layers/.*(o_proj|down_proj)/b", P(None, None, "fsdp")),
    (r"visual/.*/[ab]", P()),
    (r"visual/motion_prompt/[mn]", P()),
)


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all there are); one axis may be -1, which takes what the others leave.

    Of several TPU slices each holds whole rows of the `data` axis. Raises InputError when the axes do not multiply to
    the number of devices, with the factorings that would, or when `data` cannot be split over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = _sizes(shape, len(devices)), slices(devices)
    if count == 1:
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)
    data, *inside = sizes
    if data % count:
        raise InputError(
            f"mesh.data={data} over {count} slices: expected a multiple of {count}, such as {count}, so that "
            f"parameters are split inside a slice alone (mesh.fsdp x mesh.tensor: {len(devices) // count} or a part)"
        )
    layout = mesh_utils.create_hybrid_device_mesh(
        (data // count, *inside), (count, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(layout, AXES)


def slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices that `devices` are of. (A GPU's `slice_index` is its host; of a single slice that is not
    there devices have none.)"""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def abstract_mesh(shape: Mapping[str, int], count: int) -> AbstractMesh:
    """The same over `count` absent devices. Raises InputError likewise."""
    return AbstractMesh(_sizes(shape, count), AXES)


def _sizes(shape: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Devices along each axis. Raises InputError."""
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // rest if rest > 0 else 0
    if any(size < 1 for size in sizes) or math.prod(sizes) != count:
        asked = ", ".join(f"{axis}={shape.get(axis, 1)}" for axis in AXES)
        valid = [
            (d, f, count // d // f) for d in range(1, count + 1) if count % d == 0 for f in range(1, count // d + 1)
        ]
        valid = [v for v in valid if math.prod(v) == count]
        raise InputError(f"mesh {asked} does not fit {count} device(s); (data, fsdp, tensor) can be one of {valid}")
    return tuple(sizes)


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError when a batch cannot be split evenly over the mesh."""
    parts = example_parts(mesh)
    if batch_size % parts:
        raise InputError(
            f"batch_size {batch_size} is not divisible by data x fsdp = {parts} of the mesh {dict(mesh.shape)}: "
            f"use a multiple of {parts}, or another config.mesh"
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition spec of one parameter by its rule; axes that do not divide the shape are not split.

    Raises ValueError for a name that no rule covers.
    """
    for pattern, spec in PARAM_RULES:
        if re.fullmatch(rf"(?:.*/)?(?:{pattern})", path):
            axes = (
                axis if size % mesh.shape[axis or AXES[0]] == 0 or axis is None else None
                for axis, size in zip(spec, shape, strict=False)
            )
            return P(*axes)
    raise ValueError(f"no rule in sharding.PARAM_RULES covers the parameter {path!r} of shape {shape}")


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a pytree of arrays or shapes: parameters, and optimiser slots that mirror them, by rule.

    A leaf belongs to the parameter whose path its own path ends with; a leaf of no axes is whole everywhere.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """The same as `state_shardings`, but not split over the fsdp axis: for parameters that are read repeatedly."""

    def whole(place: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in place.spec)))

    return jax.tree.map(whole, state_shardings(tree, mesh))


def layout(mesh: Mesh | None) -> Callable[[str, tuple[int, ...]], Sharding]:
    """`layout(mesh)(path, shape)`: the sharding of a parameter by PARAM_RULES; without a mesh, this process's first
    device."""
    if mesh is None:
        alone = SingleDeviceSharding(jax.local_devices()[0])
        return lambda path, shape: alone
    return lambda path, shape: NamedSharding(mesh, param_spec(path, shape, mesh))


def examples(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the axes that carry examples."""
    return NamedSharding(mesh, P(EXAMPLES))


def on(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Context in which traced code shards its arrays over `mesh`; None: no constraint."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def ambient() -> AbstractMesh | None:
    """The mesh of `on`, or of `jax.set_mesh`; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _split(x: jax.Array, *spec: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P(*spec))


def tensor_parts() -> int:
    """The size of the ambient mesh's tensor axis, over which heads and hidden units are split: 1 without a mesh."""
    mesh = ambient()
    return mesh.shape["tensor"] if mesh else 1


def between_layers(x: jax.Array) -> jax.Array:
    """Splits the tokens of x [B, S, D] over the tensor axis too (sequence parallelism, arXiv 2205.05198).

    The activations kept for the backward pass shrink accordingly. Communication does not grow if an all-reduce becomes
    its two halves; XLA for TPU keeps most all-reduces, and a fifth more is sent.
    """
    parts = tensor_parts()
    return x if parts == 1 or x.shape[1] % parts else _split(x, _examples_of(x), "tensor")


@jax.custom_vjp
def whole_tokens(x: jax.Array) -> jax.Array:
    """The inverse of `between_layers`, before a layer's products: each device of the tensor axis gets all tokens. The
    gradient's sum over these devices is split by tokens again.
    """
    return x if tensor_parts() == 1 else _split(x, _examples_of(x))


whole_tokens.defvjp(lambda x: (whole_tokens(x), None), lambda _, grad: (between_layers(grad),))


def by_heads(x: jax.Array) -> jax.Array:
    """Splits the heads of x [B, ..., heads, H] over the tensor axis; where there are too few, each device has all."""
    parts = tensor_parts()
    if parts == 1:
        return x
    return _split(x, _examples_of(x), *(None,) * (x.ndim - 3), "tensor" if x.shape[-2] % parts == 0 else None, None)


def by_hidden(x: jax.Array) -> jax.Array:
    """Splits the hidden units of x [B, ..., F] over the tensor axis. Left to the compiler, tokens may stay split there
    instead, and every weight is sent to every device."""
    parts = tensor_parts()
    if parts == 1:
        return x
    return _split(x, _examples_of(x), *(None,) * (x.ndim - 2), "tensor" if x.shape[-1] % parts == 0 else None)


def kernel_by_heads(kernel: jax.Array) -> jax.Array:
    """The same for a kernel [in, ..., heads, H]; the sharding of `in` is left to the compiler."""
    parts = tensor_parts()
    if parts == 1:
        return kernel
    heads = "tensor" if kernel.shape[-2] % parts == 0 else None
    return _split(kernel, P.UNCONSTRAINED, *(None,) * (kernel.ndim - 3), heads, None)


def _examples_of(x: jax.Array) -> tuple[str, ...] | None:
    return EXAMPLES if x.shape[0] % example_parts(ambient()) == 0 else None


def example_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in EXAMPLES)


def cache(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of keys or values: prompts [L, B, K, T, H] or completions [L, B, G, K, C, H], by example and by kv head."""
    heads = len(shape) - 3
    examples = EXAMPLES if shape[1] % example_parts(mesh) == 0 else None
    tensor = "tensor" if shape[heads] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, P(None, examples, *(None,) * (heads - 2), tensor))


def mesh_of(array: Any) -> Mesh | None:
    """The mesh of an array's sharding; None for an array on a single device or on the host."""
    where = getattr(array, "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) else None


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, P())
