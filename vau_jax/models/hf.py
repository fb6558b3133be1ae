"""Parameters to and from Hugging Face safetensors, by one table of names."""

import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, dump_json, read_json, sync, write_text
from vau_jax.models import config as model_config
from vau_jax.models import qwen_vl
from vau_jax.models.config import QwenVLConfig
from vau_jax.types import Params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2 << 30  # of one file that `save_weights` writes; saving needs about three times that beside the model
STORED = {"BF16": jnp.bfloat16, "F16": jnp.float16}  # dtypes by safetensors' names; all others are read as float32
TRANSPOSE_ROWS = 256  # of a tensor transposed at a time: a block that fits the processor's cache, five times faster
FINITE_BLOCK = 1 << 16  # numbers checked together: they and intermediate results stay in the processor's cache
HEADER_BYTES = 1 << 24  # of a safetensors file; that of 72B parameters in one file has 120 kB
DTYPES = ("F32", "BF16", "F16", "F64")
Index = tuple[slice, ...]  # with start and stop
Layout = Callable[[str, tuple[int, ...]], Sharding]  # the sharding of a parameter of this path and shape


# --- Names --------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """One of our parameters and the tensor(s) it comes from; `{}` in `theirs` is the layer of a stacked parameter."""

    ours: str
    theirs: str
    transpose: bool = False  # Hugging Face keeps linear kernels as [out, in], we as [in, out]
    layers: int = 0  # 0: not stacked

    @property
    def tensors(self) -> list[str]:
        return [self.theirs.format(layer) for layer in range(self.layers)] if self.layers else [self.theirs]


def _linear(ours: str, theirs: str, bias: bool, layers: int = 0) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", f"{theirs}.weight", True, layers)
    if bias:
        yield Rule(f"{ours}/bias", f"{theirs}.bias", False, layers)


def _norm(ours: str, theirs: str, bias: bool, layers: int = 0) -> Iterator[Rule]:
    yield Rule(f"{ours}/weight", f"{theirs}.weight", False, layers)
    if bias:
        yield Rule(f"{ours}/bias", f"{theirs}.bias", False, layers)


# Names inside the vision tower that differ between families: first and second layer of a block's MLP, the merger's
# norm, first and second layer.
VISION_NAMES = {
    "qwen2_vl": ("fc1", "fc2", "ln_q", "mlp.0", "mlp.2"),
    "qwen2_5_vl": ("", "", "ln_q", "mlp.0", "mlp.2"),
    "qwen3_vl": ("linear_fc1", "linear_fc2", "norm", "linear_fc1", "linear_fc2"),
}


def _vision_rules(config: QwenVLConfig) -> Iterator[Rule]:
    v = config.vision
    if v is None:
        return
    fc1, fc2, norm, merger1, merger2 = VISION_NAMES[config.model_type]
    yield from _linear("visual/patch_embed", "visual.patch_embed.proj", v.patch_bias)
    if v.position_grid:
        yield Rule("visual/pos_embed", "visual.pos_embed.weight")
    ours, theirs = "visual/blocks", "visual.blocks.{}"
    for name in ("norm1", "norm2"):
        yield from _norm(f"{ours}/{name}", f"{theirs}.{name}", not v.gated, v.depth)
    mlp = {name: name for name in ("gate_proj", "up_proj", "down_proj")} if v.gated else {"fc1": fc1, "fc2": fc2}
    for our_name, name in {"attn/qkv": "attn.qkv", "attn/proj": "attn.proj"}.items():
        yield from _linear(f"{ours}/{our_name}", f"{theirs}.{name}", True, v.depth)
    for our_name, name in mlp.items():
        yield from _linear(f"{ours}/mlp/{our_name}", f"{theirs}.mlp.{name}", True, v.depth)
    mergers = [("visual/merger", "visual.merger", 0)]
    if v.deepstack_layers:
        mergers.append(("visual/deepstack", "visual.deepstack_merger_list.{}", len(v.deepstack_layers)))
    for ours, theirs, layers in mergers:
        yield from _norm(f"{ours}/norm", f"{theirs}.{norm}", not v.gated, layers)
        yield from _linear(f"{ours}/mlp/fc1", f"{theirs}.{merger1}", True, layers)
        yield from _linear(f"{ours}/mlp/fc2", f"{theirs}.{merger2}", True, layers)


def rules(config: QwenVLConfig) -> list[Rule]:
    """The table: every parameter of the model once."""
    table = [Rule("embed_tokens/embedding", "model.embed_tokens.weight"), *_vision_rules(config)]
    ours, theirs, depth = "decoder/layers", "model.layers.{}", config.num_layers
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table += _norm(f"{ours}/{norm}", f"{theirs}.{norm}", False, depth)
    for norm in ("q_norm", "k_norm") if config.qk_norm else ():
        table += _norm(f"{ours}/{norm}", f"{theirs}.self_attn.{norm}", False, depth)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = config.out_bias if name == "o_proj" else config.qkv_bias
        table += _linear(f"{ours}/{name}", f"{theirs}.self_attn.{name}", bias, depth)
    for name in ("gate_proj", "up_proj", "down_proj"):
        table += _linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}", False, depth)
    table.append(Rule("decoder/norm/weight", "model.norm.weight"))
    if not config.tie_word_embeddings:
        table.append(Rule("lm_head", "lm_head.weight"))
    return table


def plain_name(name: str) -> str:
    """The name of a tensor in the table, whatever version of transformers wrote the file."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


def module_name(plain: str, config: QwenVLConfig) -> str:
    """The inverse: the name of a tensor in transformers' own model (5.x), under which Qwen3-VL is published too."""
    if config.vision is None:
        return plain
    return re.sub(r"^(model|visual)\.", lambda m: {"model.": "model.language_model."}.get(m[0], "model.visual."), plain)


def published_name(plain: str, config: QwenVLConfig) -> str:
    """The name of a tensor in the family's published files."""
    return module_name(plain, config) if config.model_type == "qwen3_vl" else plain


def parameter_shapes(config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
    """Path ("decoder/norm/weight") -> shape of every parameter, without allocating any."""
    return dict(_parameter_shapes(config))


@lru_cache(16)  # tracing the model takes half a second
def _parameter_shapes(config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda: qwen_vl.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


def flatten(tree: Params) -> dict[str, Any]:
    """A nested dict as {"a/b/c": leaf}."""
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


# --- Reading ------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Location, shape and dtype of a tensor, from the file's header: its data is not read yet."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of the dtype


def headers(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by the table's names. Raises InputError for a damaged file, for two tensors of
    one name and for one of another dtype than DTYPES."""
    result: dict[str, Tensor] = {}
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")  # of the JSON that follows, which is read at once
        if size > HEADER_BYTES:
            raise OSError(f"its header has {size} bytes, expected at most {HEADER_BYTES}")
        with safe_open(path, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                part, plain = handle.get_slice(name), plain_name(name)
                tensor = Tensor(path, name, tuple(part.get_shape()), part.get_dtype())
                if tensor.dtype not in DTYPES:
                    raise InputError(f"{path}: {name!r} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
                if plain in result:
                    raise InputError(f"{path} holds {plain!r} twice, as {result[plain].name!r} and {name!r}")
                result[plain] = tensor
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}; download or copy it again") from error
    return result


class _Reader:
    """The tensors of a folder, under the table's names; any part of one can be read separately."""

    def __init__(self, folder: Path) -> None:
        """Reads headers only. Raises InputError for unreadable files and for a tensor in two files."""
        self.tensors: dict[str, Tensor] = {}
        for path in self._files(folder):
            for name, tensor in headers(path).items():
                if name in self.tensors:
                    raise InputError(
                        f"{folder} holds {name!r} twice, in {self.tensors[name].path.name} and {path.name}"
                    )
                self.tensors[name] = tensor

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        index = folder / INDEX
        if index.is_file():
            places = Fields(read_json(index, model_config.FILE_BYTES), str(index)).object("weight_map")
            names = sorted({places.text(name) for name in places.raw})
            for name in names:  # files of an index are in its folder: a path could name any file of this machine
                if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                    raise InputError(f"{index} names the file {name!r}: expected NAME.safetensors, in the same folder")
            absent = [name for name in names if not (folder / name).is_file()]
            if absent or not names:
                raise InputError(f"{folder} lacks {', '.join(absent[:5]) or 'every tensor'}, which {INDEX} lists")
            return [folder / name for name in names]
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        if list(folder.glob("*.bin")):
            raise InputError(
                f"{folder} has .bin weights only: those are pickles, which can run code; convert to safetensors"
            )
        raise InputError(f"{folder} has no {SINGLE} and no {INDEX}")

    def dtype(self, rule: Rule) -> Any:
        """The stored dtype of one of our parameters; float32 where its layers differ."""
        results = {self.tensors[name].dtype for name in rule.tensors}
        return STORED.get(results.pop(), np.float32) if len(results) == 1 else np.float32

    def read(self, rule: Rule, index: Index, dtype: Any) -> np.ndarray:
        """Part `index` of one of our parameters: of each tensor only the bytes that it needs."""
        layers = range(rule.layers)[index[0]] if rule.layers else range(1)
        rest = index[1:] if rule.layers else index
        out = np.empty((len(layers), *(part.stop - part.start for part in rest)), dtype)
        tensors = rule.tensors
        with ExitStack() as opened, ThreadPoolExecutor() as pool:  # files are mapped to memory while they are open
            paths = {self.tensors[tensors[layer]].path for layer in layers}
            handles = {path: opened.enter_context(safe_open(path, framework="numpy")) for path in paths}

            def copy(place: int) -> None:
                tensor = self.tensors[tensors[layers[place]]]
                _copy(handles[tensor.path].get_slice(tensor.name), rest, rule.transpose, out[place])
                check_finite(out[place], tensor)

            list(pool.map(copy, range(len(layers))))
        return out if rule.layers else out[0]


def _copy(tensor: Any, index: Index, transpose: bool, out: np.ndarray) -> None:
    """Puts part of a tensor, in our layout, into `out`; a kernel [out, in, t, h, w] counts as [out, rest]."""
    if not transpose:
        out[...] = tensor[index]
        return
    rows, columns = index[1], index[0]
    for first in range(rows.start, rows.stop, TRANSPOSE_ROWS):
        last = min(first + TRANSPOSE_ROWS, rows.stop)
        if len(tensor.get_shape()) == 2:
            block = tensor[first:last, columns]
        else:
            block = tensor[first:last].reshape(last - first, -1)[:, columns]
        target = out[:, first - rows.start : last - rows.start]
        if block.dtype == out.dtype:  # numpy copies integers faster than bfloat16
            bits = np.dtype(f"u{block.dtype.itemsize}")
            block, target = block.view(bits), target.view(bits)
        target[...] = block.T


def check_finite(values: np.ndarray, tensor: Tensor) -> None:
    """Raises InputError where part of a tensor holds NaN or infinity, which would give meaningless tokens.

    Only such numbers have an exponent of all ones. Checking the bits costs one more pass over memory at 3 to 6 GB/s
    (numpy's own test of bfloat16: 0.4), less than a tenth of the cost of transposing a kernel.
    """
    flat = values.reshape(-1)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    ones = np.asarray(np.inf, flat.dtype).view(bits.dtype)
    for first in range(0, len(bits), FINITE_BLOCK):
        if (bits[first : first + FINITE_BLOCK] & ones).max() == ones:
            raise InputError(f"{tensor.path}: {tensor.name} holds NaN or infinity: download or copy it again")


def _check(reader: _Reader, config: QwenVLConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises one InputError that lists every missing, unused and misshaped tensor."""
    problems, used = [], {"lm_head.weight"} if config.tie_word_embeddings else set()
    for rule in rules(config):
        want = shapes[rule.ours][1:] if rule.layers else shapes[rule.ours]
        want = want[::-1] if rule.transpose else want
        used.update(rule.tensors)
        for name in rule.tensors:
            if name not in reader.tensors:
                problems.append(f"missing {name} {list(want)}")
                continue
            got = reader.tensors[name].shape
            flat = (got[0], int(np.prod(got[1:]))) if rule.transpose else got
            if flat != want:
                problems.append(f"{name} has shape {list(got)}, expected {list(want)}")
    problems += [f"unused {name!r}" for name in sorted(set(reader.tensors) - used)]
    if problems:
        raise InputError(f"the weights do not fit config.json: {some(problems)}")


def some(problems: list[str]) -> str:
    """The number of problems, and the first of them, on one line."""
    left = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems[:10])}{left}"


def _check_memory(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype], layout: Layout) -> None:
    """Raises InputError where the parameters in host memory would not fit into it."""
    size = 0
    for path, shape in shapes.items():
        for device, index in layout(path, shape).addressable_devices_indices_map(shape).items():
            sides = [len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)]
            size += math.prod(sides) * dtypes[path].itemsize * (device.platform == "cpu")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        names = ", ".join(sorted({str(dtype) for dtype in dtypes.values()}))
        raise InputError(
            f"the parameters take {size / 2**30:.0f} GiB as {names}, this "
            f"machine has {memory / 2**30:.0f} GiB: load them as bfloat16, or on more machines"
        )


def load(
    folder: str | os.PathLike,
    config: QwenVLConfig,
    dtype: Any | None,
    layout: Layout,
) -> Params:
    """Reads a folder's safetensors into our parameters in `dtype` (None: the stored dtypes), sequentially,
    the largest first.

    `layout(path, shape)` is the sharding of a parameter (`sharding.layout`). A process reads only what its own
    devices hold. Beside the parameters themselves, memory holds one parameter's part for one device.
    Raises InputError for a folder without safetensors, for tensors that do not fit the config or the machine, before
    anything is read, and for a tensor that holds NaN or infinity.
    """
    reader, shapes = _Reader(Path(folder)), parameter_shapes(config)
    _check(reader, config, shapes)
    dtypes = {rule.ours: np.dtype(dtype or reader.dtype(rule)) for rule in rules(config)}
    _check_memory(shapes, dtypes, layout)
    flat = {}
    for rule in sorted(rules(config), key=lambda rule: -np.prod(shapes[rule.ours])):
        shape = shapes[rule.ours]
        flat[rule.ours] = _place(
            shape, layout(rule.ours, shape), lambda index, rule=rule: reader.read(rule, index, dtypes[rule.ours])
        )
    return unflatten(flat)


def _place(shape: tuple[int, ...], layout: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array on the devices of `layout`; this process reads each part that its devices hold once."""
    holders_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in layout.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders_of.setdefault(bounds, []).append(device)
    parts = []
    for bounds, holders in holders_of.items():
        host = read(tuple(slice(*ends) for ends in bounds))
        parts += [jax.block_until_ready(jax.device_put(host, device)) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, layout, parts)


# --- Writing ------------------------------------------------------------------------------------------------------


def _tensors(params: Params, config: QwenVLConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Published name and value of every tensor."""
    flat, v = flatten(params), config.vision
    for rule in rules(config):
        array = np.asarray(flat[rule.ours])
        for name, layer in zip(rule.tensors, array if rule.layers else [array], strict=True):
            layer = layer.T if rule.transpose else layer
            if rule.ours == "visual/patch_embed/kernel":
                layer = layer.reshape(len(layer), v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
            yield published_name(name, config), np.ascontiguousarray(layer)


def save_weights(folder: str | os.PathLike, params: Params, config: QwenVLConfig) -> None:
    """Writes model.safetensors, or several files of at most SHARD_BYTES and their index, under the published names.

    Files are on disk when this returns. A crash leaves some of them: write to a folder that is renamed when complete.
    """
    folder = Path(folder)
    shards, held, size = [], {}, 0

    def flush() -> None:
        path = folder / f"{len(shards)}.safetensors.part"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library writes files that only the owner can read
        sync(path)
        shards.append((path, list(held), size))

    for name, tensor in _tensors(params, config):
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            held, size = {}, 0
        held[name], size = tensor, size + tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for number, (path, names, _) in enumerate(shards, start=1):
        path.rename(folder / f"model-{number:05}-of-{len(shards):05}.safetensors")
        places |= dict.fromkeys(names, f"model-{number:05}-of-{len(shards):05}.safetensors")
    index = {"metadata": {"total_size": sum(shard[2] for shard in shards)}, "weight_map": places}
    write_text(folder / INDEX, dump_json(index, indent=1))
