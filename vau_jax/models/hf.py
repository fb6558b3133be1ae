"""Parameters to and from Hugging Face safetensors, by one table of names."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from vau_jax.files import InputError, read_json, write_bytes
from vau_jax.models import qwen_vl
from vau_jax.models.config import QwenVLConfig
from vau_jax.types import Params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Rule(NamedTuple):
    """One of our parameters and the tensor(s) it comes from; `{}` in `theirs` is the layer of a stacked parameter."""

    ours: str
    theirs: str
    transpose: bool = False  # Hugging Face keeps linear kernels as [out, in], we as [in, out]


def _linear(ours: str, theirs: str, bias: bool) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", f"{theirs}.weight", transpose=True)
    if bias:
        yield Rule(f"{ours}/bias", f"{theirs}.bias")


def rules(config: QwenVLConfig) -> list[Rule]:
    """The table: every parameter of the model once."""
    table = [Rule("embed_tokens/embedding", "model.embed_tokens.weight")]
    table += _linear("visual/patch_embed", "visual.patch_embed.proj", bias=False)
    block = "visual/blocks", "visual.blocks.{}"
    for norm in ("norm1", "norm2"):
        table.append(Rule(f"{block[0]}/{norm}/weight", f"{block[1]}.{norm}.weight"))
    for name in ("attn/qkv", "attn/proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"):
        table += _linear(f"{block[0]}/{name}", f"{block[1]}.{name.replace('/', '.')}", bias=True)
    table.append(Rule("visual/merger_ln_q/weight", "visual.merger.ln_q.weight"))
    table += _linear("visual/merger_in", "visual.merger.mlp.0", bias=True)
    table += _linear("visual/merger_out", "visual.merger.mlp.2", bias=True)
    layer = "decoder/layers", "model.layers.{}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table.append(Rule(f"{layer[0]}/{norm}/weight", f"{layer[1]}.{norm}.weight"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        table += _linear(f"{layer[0]}/{name}", f"{layer[1]}.self_attn.{name}", bias=name != "o_proj")
    for name in ("gate_proj", "up_proj", "down_proj"):
        table += _linear(f"{layer[0]}/mlp/{name}", f"{layer[1]}.mlp.{name}", bias=False)
    table.append(Rule("decoder/norm/weight", "model.norm.weight"))
    if not config.tie_word_embeddings:
        table.append(Rule("lm_head", "lm_head.weight", transpose=True))
    return table


def published_name(name: str) -> str:
    """The published name of a tensor, whatever version of transformers wrote the file."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


def parameter_shapes(config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
    """Path ("decoder/norm/weight") -> shape of every parameter, without making any."""
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


class _Reader:
    """The tensors of a folder, under published names, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = self._files(folder)
        self.where = {}
        for path in self.files:
            try:
                with safe_open(path, framework="numpy") as handle:
                    names = list(handle.keys())
                self.where.update({published_name(name): (path, name) for name in names})
            except Exception as error:  # safetensors raises its own type for a damaged header
                raise InputError(f"cannot read {path}: {error}; download or copy it again") from error

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        if (folder / INDEX).is_file():
            names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                raise InputError(f"{folder} lacks {', '.join(absent)}, which {INDEX} lists")
            return [folder / name for name in names]
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        if list(folder.glob("*.bin")):
            raise InputError(
                f"{folder} has .bin weights only: those are pickles, which can run code; convert to safetensors"
            )
        raise InputError(f"{folder} has no {SINGLE} and no {INDEX}")

    def shape(self, name: str) -> tuple[int, ...]:
        path, stored = self.where[name]
        with safe_open(path, framework="numpy") as handle:
            return tuple(handle.get_slice(stored).get_shape())

    def __call__(self, name: str) -> np.ndarray:
        path, stored = self.where[name]
        with safe_open(path, framework="numpy") as handle:
            return handle.get_tensor(stored)


def _names(rule: Rule, config: QwenVLConfig) -> list[str]:
    if "{}" not in rule.theirs:
        return [rule.theirs]
    depth = config.vision.depth if rule.ours.startswith("visual/") else config.num_layers
    return [rule.theirs.format(layer) for layer in range(depth)]


def _ours_from(tensor: np.ndarray, rule: Rule) -> np.ndarray:
    """A tensor in our layout; a convolution kernel [out, in, t, h, w] is a linear one over flattened patches."""
    return tensor.reshape(tensor.shape[0], -1).T if rule.transpose else tensor


def _check(reader: _Reader, config: QwenVLConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises one InputError that lists every missing, unused and misshaped tensor."""
    problems, used = [], {"lm_head.weight"} if config.tie_word_embeddings else set()
    for rule in rules(config):
        names = _names(rule, config)
        want = shapes[rule.ours][1:] if "{}" in rule.theirs else shapes[rule.ours]
        want = want[::-1] if rule.transpose else want
        used.update(names)
        for name in names:
            if name not in reader.where:
                problems.append(f"missing {name} {list(want)}")
                continue
            got = reader.shape(name)
            flat = (got[0], int(np.prod(got[1:]))) if rule.transpose else got
            if flat != want:
                problems.append(f"{name} has shape {list(got)}, expected {list(want)}")
    problems += [f"unused {name}" for name in sorted(set(reader.where) - used)]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"the weights do not fit config.json ({len(problems)} problems):\n  {shown}")


def load(
    folder: str | os.PathLike,
    config: QwenVLConfig,
    dtype: Any = jnp.float32,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Params:
    """Reads a folder's safetensors into our parameters, one parameter at a time.

    `place(path, array)` puts a parameter on devices (with its sharding); the default puts it on the first device.
    Raises InputError for a folder without safetensors, and one that lists all tensors that do not fit.
    """
    reader = _Reader(Path(folder))
    _check(reader, config, parameter_shapes(config))
    place = place or (lambda _, array: jnp.asarray(array))
    flat = {}
    for rule in rules(config):
        tensors = [_ours_from(reader(name), rule) for name in _names(rule, config)]
        array = np.stack(tensors) if "{}" in rule.theirs else tensors[0]
        flat[rule.ours] = place(rule.ours, array.astype(dtype))
    return unflatten(flat)


def save_weights(folder: str | os.PathLike, params: Params, config: QwenVLConfig) -> None:
    """Writes model.safetensors under the published names, complete or not at all."""
    flat, tensors = flatten(params), {}
    patch = config.vision.in_channels, config.vision.temporal_patch_size, *2 * (config.vision.patch_size,)
    for rule in rules(config):
        array = np.asarray(flat[rule.ours])
        layers = list(array) if "{}" in rule.theirs else [array]
        for name, layer in zip(_names(rule, config), layers, strict=True):
            layer = layer.T if rule.transpose else layer
            if rule.ours == "visual/patch_embed/kernel":
                layer = layer.reshape(layer.shape[0], *patch)
            tensors[name] = np.ascontiguousarray(layer)
    write_bytes(Path(folder) / SINGLE, save(tensors, metadata={"format": "pt"}))
