"""LoRA adapters to and from the files of Hugging Face's peft library."""

import os
import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vau_jax.common import files
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, dump_json, read_json
from vau_jax.models import hf
from vau_jax.models.config import FILE_BYTES, MOST_UNITS, QwenVLConfig
from vau_jax.models.lora import LoRA, layer_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What we do not compute: options of peft's LoRA and the values that leave them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "fan_in_fan_out": (False, None),
}


def _linear_layers(config: QwenVLConfig) -> dict[str, tuple[str, int, hf.Rule]]:
    """Name of a linear layer in Hugging Face's table -> (our name, its number in the stack, the kernel's rule)."""
    return {
        name.removesuffix(".weight"): (ours, layer, rule)
        for rule in hf.rules(config)
        if (ours := layer_of(rule.ours)) is not None
        for layer, name in enumerate(rule.tensors)
    }


def load(folder: str | os.PathLike, config: QwenVLConfig) -> tuple[LoRA, dict[str, np.ndarray]]:
    """Reads a peft folder: the kind of adapters, and their factors, flat and stacked as ours are.

    Raises InputError for options that have no counterpart here, and one that lists every tensor that does not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"adapter folder {folder} has no {name}: give a folder that peft's save_pretrained wrote")
    options = Fields(read_json(folder / CONFIG, FILE_BYTES), str(folder / CONFIG))
    raw = options.raw
    unknown = [f"{key}={reprlib.repr(raw[key])}" for key, off in _OFF.items() if key in raw and raw[key] not in off]
    if unknown:
        raise InputError(f"{folder / CONFIG} asks for {', '.join(unknown)}, which is not supported")
    rank = options.integer("r", 1, MOST_UNITS)
    factors = _read_factors(folder / WEIGHTS, config, rank)
    lora = LoRA(
        rank=rank,
        alpha=float(options.number("lora_alpha", 1e-6, 1e6)),
        dropout=float(options.number("lora_dropout", 0, 0.999, 0.0)),
        targets=tuple(sorted({re.escape(path.rpartition("/")[0]) for path in factors})),
        rank_stabilised=options.flag("use_rslora", False),
    )
    return lora, factors


def _read_factors(path: Path, config: QwenVLConfig, rank: int) -> dict[str, np.ndarray]:
    """The factors, when the headers of all of them fit the model."""
    layers, shapes, tensors = _linear_layers(config), hf.parameter_shapes(config), hf.headers(path)
    result: dict[str, dict[int, hf.Tensor]] = {}
    problems = []
    for tensor in tensors.values():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", tensor.name)
        module = hf.plain_name(match[1]) if match else ""
        if module not in layers:
            problems.append(f"{tensor.name!r} belongs to no linear layer")
            continue
        ours, layer, rule = layers[module]
        *_, inputs, outputs = shapes[rule.ours]
        want = (rank, inputs) if match[2] == "A" else (outputs, rank)
        if tensor.shape != want:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, expected {list(want)}")
        result.setdefault(f"{ours}/{match[2].lower()}", {})[layer] = tensor
    rule_of = {ours: rule for ours, _, rule in layers.values()}
    for factor, parts in result.items():
        missing = sorted(set(range(max(1, rule_of[factor[:-2]].layers))) - set(parts))
        if missing:
            problems.append(f"{factor} lacks layers {missing}: every layer of a stack needs an adapter")
        other = f"{factor[:-1]}{'b' if factor.endswith('/a') else 'a'}"
        if other not in result:
            problems.append(f"{factor} has no {other} beside it")
    if problems or not result:
        raise InputError(f"{path} does not fit the model: {hf.some(problems or ['it holds no adapter'])}")
    with safe_open(path, framework="numpy") as handle:
        return {factor: _stack(handle, parts, rule_of[factor[:-2]].layers) for factor, parts in result.items()}


def _stack(handle: safe_open, parts: dict[int, hf.Tensor], layers: int) -> np.ndarray:
    """One factor of our own: the layers' one above the other, or the only one."""
    values = []
    for i in sorted(parts):
        values.append(handle.get_tensor(parts[i].name))
        hf.check_finite(values[-1], parts[i])
    return np.stack([value.T for value in values]) if layers else values[0].T


def save(folder: str | os.PathLike, lora: LoRA, adapters: dict[str, Any], config: QwenVLConfig, base: str) -> None:
    """Writes adapters (flat) as a peft folder for the model folder `base`, complete or not at all."""
    tensors, patterns = {}, set()
    for module, (ours, layer, rule) in _linear_layers(config).items():
        if f"{ours}/a" not in adapters:
            continue
        name = hf.module_name(module, config)
        theirs = hf.module_name(rule.theirs.removesuffix(".weight"), config)
        patterns.add(re.escape(theirs).replace(r"\{\}", r"\d+"))
        for letter in "ab":
            factor = np.asarray(adapters[f"{ours}/{letter}"])
            factor = factor[layer] if rule.layers else factor
            tensors[f"base_model.model.{name}.lora_{letter.upper()}.weight"] = np.ascontiguousarray(factor.T)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": "|".join(sorted(patterns)),
        "bias": "none",
        "inference_mode": True,
    }
    with files.new_folder(folder) as part:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        files.sync(part / WEIGHTS)
        files.write_text(part / CONFIG, dump_json(raw, indent=2))
