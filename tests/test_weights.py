"""Weights to and from Hugging Face folders: bit for bit, in parts, whole or not at all."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from tests import oracle
from tests.oracle import ask, video
from vau_jax.common import sharding
from vau_jax.common.files import InputError
from vau_jax.configs.reproduce import vau_r1
from vau_jax.data_prep import random_model
from vau_jax.launch.compile_check import Programs
from vau_jax.models import config as model_config
from vau_jax.models import hf
from vau_jax.vlm import VideoLM

CONFIGS = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}


def same(a: dict, b: dict) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def test_a_saved_folder_has_the_same_bits(family_folder: Path, tmp_path: Path) -> None:
    """Every tensor under its own name, and every other file but for formatting."""
    vlm = VideoLM.load(family_folder)
    vlm.save(tmp_path / "copy")
    before, after = (load_file(folder / hf.SINGLE) for folder in (family_folder, tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {p.name for p in family_folder.iterdir()} == {p.name for p in (tmp_path / "copy").iterdir()}
    assert same(vlm.params, VideoLM.load(tmp_path / "copy").params)


def test_bfloat16_is_kept_bit_for_bit(family_folder: Path, tmp_path: Path) -> None:
    VideoLM.load(family_folder, dtype="bfloat16").save(tmp_path / "half")
    VideoLM.load(tmp_path / "half", dtype="bfloat16").save(tmp_path / "again")
    first, second = (load_file(tmp_path / name / hf.SINGLE) for name in ("half", "again"))
    assert all(x.dtype == ml_dtypes.bfloat16 for x in first.values())
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_transformers_opens_what_save_wrote(family_folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    vlm = VideoLM.load(family_folder)
    vlm.save(tmp_path / "copy")
    n = vlm.processor.factor
    assert oracle.difference(oracle.load(tmp_path / "copy"), vlm, [ask(video(rng, 4, 2 * n, 3 * n))]) <= 1e-4


def test_transformers_finds_every_tensor(family_folder: Path, tmp_path: Path) -> None:
    VideoLM.load(family_folder).save(tmp_path / "copy")
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_we_open_what_transformers_wrote(family_folder: Path, tmp_path: Path) -> None:
    """Its own names (nested under model.) and its own split into files."""
    oracle.load(family_folder).save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    for file in family_folder.glob("*token*"):
        shutil.copy(file, tmp_path / "theirs")
    assert (tmp_path / "theirs" / hf.INDEX).is_file()
    assert same(VideoLM.load(family_folder).params, VideoLM.load(tmp_path / "theirs").params)


def test_large_models_are_saved_in_several_files(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 200_000)
    vlm = VideoLM.load(model_folder)
    vlm.save(tmp_path / "split")
    files = sorted(tmp_path.glob("split/*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 300_000 for file in files)
    assert same(vlm.params, VideoLM.load(tmp_path / "split").params)
    oracle.load(tmp_path / "split")


def test_a_crash_leaves_the_old_folder_and_no_half_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = VideoLM.load(model_folder)
    vlm.save(tmp_path / "copy")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        vlm.save(tmp_path / "copy")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert same(vlm.params, VideoLM.load(tmp_path / "copy").params)


def test_every_misfit_is_reported_at_once(family_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family_folder, tmp_path / "model"))
    tensors = load_file(folder / hf.SINGLE)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = np.zeros((3, 5), np.float32)
    tensors["model.layers.77.self_attn.q_proj.weight"] = np.zeros((4, 4), np.float32)
    save_file(tensors, folder / hf.SINGLE)
    with pytest.raises(InputError) as caught:
        VideoLM.load(folder)
    message = str(caught.value)
    assert "3 problems" in message
    assert f"missing {hf.plain_name(names[0])}" in message
    assert f"{hf.plain_name(names[1])} has shape [3, 5]" in message
    assert "unused 'model.layers.77.self_attn.q_proj.weight'" in message


def test_any_part_of_a_parameter_is_read_alone(family_folder: Path) -> None:
    config = model_config.load(family_folder)
    reader, rng, shapes = hf._Reader(family_folder), np.random.default_rng(0), hf.parameter_shapes(config)
    for rule in hf.rules(config):
        shape = shapes[rule.ours]
        whole = reader.read(rule, tuple(slice(0, n) for n in shape), np.float32)
        assert whole.shape == shape
        for _ in range(3):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(reader.read(rule, index, np.float32), whole[index])


SHARDED = """
import sys
import jax, numpy as np
from vau_jax.common import sharding
from vau_jax.models import hf
from vau_jax.vlm import VideoLM
read = []
original = hf._Reader.read
def counting(self, rule, index, dtype):
    part = original(self, rule, index, dtype)
    read.append(part.size)
    return part
hf._Reader.read = counting
mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
split = VideoLM.load(sys.argv[1], mesh=mesh)
held = sum(sum(s.data.size for s in {str(s.index): s for s in x.addressable_shards}.values())
           for x in jax.tree.leaves(split.params))
assert sum(read) == held, (sum(read), held)
assert max(read) < max(x.size for x in jax.tree.leaves(split.params))
whole = VideoLM.load(sys.argv[1])
assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), split.params, whole.params))
"""


def test_a_mesh_reads_each_part_once(family_folder: Path) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(family_folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("size", model_config.SIZES)
def test_a_named_size_has_transformers_parameters(size: str) -> None:
    raw = json.loads(json.dumps(model_config.SIZES[size]))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIGS[raw["model_type"]].from_dict(raw))
    expected = sum(p.numel() for p in model.parameters())
    assert sum(int(np.prod(s)) for s in hf.parameter_shapes(model_config.named(size)).values()) == expected


@pytest.mark.parametrize("size", model_config.SIZES)
def test_a_random_model_of_a_named_size_has_its_config(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the weights, which are gigabytes."""
    monkeypatch.setattr(random_model, "initial_weights", lambda *args: {})
    monkeypatch.setattr(hf, "save_weights", lambda *args: None)
    found = model_config.load(random_model.write_published(tmp_path / "model", size))
    ids = [f.name for f in dataclasses.fields(found) if f.name.endswith("_token_id")]
    expected = dataclasses.replace(model_config.named(size), **{name: getattr(found, name) for name in ids})
    assert found == expected


def test_an_unknown_size_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"qwen2\.5-vl-3b"):
        model_config.named("qwen9")


@pytest.mark.long
@pytest.mark.parametrize("size", ["qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b"])
def test_a_published_layout_is_loaded_trained_by_shapes_and_saved_bit_for_bit(size: str, tmp_path: Path) -> None:
    """Gigabytes in several files with their index, the head tied to the embedding, a generation config and a chat
    template; an RFT step of a published row is traced at its sizes."""
    folder = random_model.write_published(tmp_path / "published", size)
    ends = json.loads((folder / "generation_config.json").read_text())
    own = ends | {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(own))
    places = json.loads((folder / hf.INDEX).read_text())["weight_map"]
    assert len(set(places.values())) > 1 and "lm_head.weight" not in places
    vlm = VideoLM.load(folder, "bfloat16")
    assert vlm.processor.repetition_penalty == 1.05
    assert "assistant" in vlm.processor.chat_text([{"role": "user", "content": "What happens?"}])
    programs = Programs(vau_r1.get_config("rft_qa"), vlm.processor.config, sharding.make_mesh({"fsdp": -1}), 4096, 3584)
    for program in programs.all():
        if program.name in ("prefill", "update"):
            assert jax.tree.leaves(jax.eval_shape(lambda *a, p=program: p.function(*a, **p.static), *program.args))
    vlm.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / hf.INDEX).read_text())["weight_map"]
    assert saved.keys() == places.keys()
    for name, file in places.items():
        with safe_open(folder / file, "np") as a, safe_open(tmp_path / "saved" / saved[name], "np") as b:
            assert np.array_equal(a.get_tensor(name).view(np.uint16), b.get_tensor(name).view(np.uint16)), name
