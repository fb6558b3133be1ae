"""LoRA: adapters equal to peft's on transformers' model, both ways; training changes and saves them alone."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft as peft_library
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from tests import oracle
from tests.oracle import ask, video
from tests.small_models import targets_of, with_adapters
from vau_jax.common.files import InputError
from vau_jax.configs import srvau_r1_rft, srvau_r1_sft
from vau_jax.models import checkpoint, hf, lora, peft
from vau_jax.models.lora import LoRA
from vau_jax.train import loop, update
from vau_jax.types import Completions, Params, State
from vau_jax.vlm import VideoLM


@pytest.fixture(scope="module")
def adapted(family_folder: Path) -> VideoLM:
    vlm = VideoLM.load(family_folder)
    return with_adapters(vlm, LoRA(rank=4, alpha=6.0, targets=targets_of(vlm)))


def clip(vlm: VideoLM) -> dict:
    n = vlm.processor.factor
    return video(np.random.default_rng(0), 4, 2 * n, 3 * n)


def test_fresh_adapters_change_nothing(vlm: VideoLM) -> None:
    kind = LoRA(rank=4, alpha=6.0)
    shapes = {path: leaf.shape for path, leaf in hf.flatten(vlm.params).items()}
    fresh = vlm._with_adapters(kind, lora.init(jax.random.key(0), shapes, kind), None)
    batch = vlm.encode([ask(clip(vlm))])
    np.testing.assert_array_equal(fresh.logits(batch), vlm.logits(batch))


def test_merged_adapters_give_the_same_logits(adapted: VideoLM) -> None:
    batch = adapted.encode([ask(clip(adapted))])
    real = np.asarray(batch.mask)
    gap = np.abs(np.asarray(adapted.logits(batch)) - np.asarray(adapted.merged().logits(batch)))[real]
    assert gap.max() <= 1e-4
    plain = np.asarray(VideoLM(adapted.processor, adapted.model, adapted.params).logits(batch))
    assert np.abs(plain - np.asarray(adapted.logits(batch)))[real].max() > 1e-2, "without them it is the base model"


def test_peft_opens_what_we_export(adapted: VideoLM, family_folder: Path, tmp_path: Path) -> None:
    adapted.save_adapter(tmp_path / "adapter")
    theirs = peft_library.PeftModel.from_pretrained(oracle.load(family_folder), tmp_path / "adapter").eval()
    assert oracle.difference(theirs, adapted, [ask(clip(adapted))]) <= 1e-4


@pytest.mark.parametrize("stabilised", [False, True])
def test_we_open_what_peft_exports(family_folder: Path, tmp_path: Path, stabilised: bool) -> None:
    torch.manual_seed(0)
    config = peft_library.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj", "qkv"], use_rslora=stabilised
    )
    theirs = peft_library.get_peft_model(oracle.load(family_folder), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = VideoLM.load(family_folder, adapter=tmp_path / "adapter")
    assert oracle.difference(theirs.eval(), ours, [ask(clip(ours))]) <= 1e-4


def test_an_exported_adapter_comes_back_bit_for_bit(adapted: VideoLM, family_folder: Path, tmp_path: Path) -> None:
    adapted.save_adapter(tmp_path / "adapter")
    again = VideoLM.load(family_folder, adapter=tmp_path / "adapter")
    assert again.model.lora.scale == adapted.model.lora.scale
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.adapters, adapted.adapters))


def test_saving_a_model_with_adapters_saves_the_merged_one(adapted: VideoLM, tmp_path: Path) -> None:
    adapted.save(tmp_path / "merged")
    expected, found = adapted.merged().params, VideoLM.load(tmp_path / "merged").params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, found))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"use_dora": True}, "use_dora=True"), ({"r": 7}, "expected"), ({"bias": "all"}, "bias='all'")],
    ids=["dora", "rank", "bias"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    model_folder: Path, vlm: VideoLM, tmp_path: Path, change: dict, words: str
) -> None:
    with_adapters(vlm, LoRA(rank=4, alpha=6.0)).save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=words):
        VideoLM.load(model_folder, adapter=tmp_path / "adapter")


def test_a_damaged_adapter_is_one_clear_error(model_folder: Path, vlm: VideoLM, tmp_path: Path) -> None:
    with_adapters(vlm, LoRA(rank=4, alpha=6.0)).save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / peft.WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"cannot read .*adapter_model.safetensors.*copy it again"):
        VideoLM.load(model_folder, adapter=tmp_path / "adapter")
    (tmp_path / "adapter" / peft.CONFIG).write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    with pytest.raises(InputError, match="lacks the field 'r'"):
        VideoLM.load(model_folder, adapter=tmp_path / "adapter")


def test_a_target_that_matches_nothing_lists_the_layers(vlm: VideoLM) -> None:
    with pytest.raises(InputError, match="decoder/layers/q_proj"):
        with_adapters(vlm, LoRA(rank=4, alpha=6.0, targets=("attention.*",)))


def test_dropout_acts_in_training_alone(vlm: VideoLM) -> None:
    """The same numbers without a key; with one, other numbers with the same mean."""
    plain = with_adapters(vlm, LoRA(rank=4, alpha=6.0))
    dropping = with_adapters(vlm, LoRA(rank=4, alpha=6.0, dropout=0.5))
    batch = vlm.encode([ask(clip(vlm))])
    np.testing.assert_array_equal(plain.logits(batch), dropping.logits(batch))
    completions = Completions(np.full((1, 1, 5), 7, np.int32), np.ones((1, 1, 5), bool))

    def logps(key: jax.Array | None) -> jax.Array:
        return update.logps_and_losses(dropping.variables, batch, completions, dropping.model, 1.0, dropout_key=key)[0]

    drawn = [np.asarray(logps(jax.random.key(i))) for i in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    np.testing.assert_array_equal(drawn[0], logps(jax.random.key(0)))


def run_config(stage: str, model_folder: Path, dataset: Path) -> ConfigDict:
    c = (srvau_r1_sft if stage == "sft" else srvau_r1_rft).get_config()
    c.model, c.dtype, c.batch_size, c.steps, c.optim.lr = str(model_folder), "float32", 2, 2, 1e-2
    c.data.csv, c.data.videos = str(dataset / "train.csv"), str(dataset / "videos")
    c.data.reflection, c.data.max_completion_tokens = str(dataset / "train_reflection.jsonl"), 24
    c.data.max_frames, c.rollout.num_generations = 4, 2
    c.lora.rank, c.lora.alpha = 4, 8.0
    return c


@pytest.fixture(scope="module")
def runs(model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `sft`, a run of adapters, and `rft`, one that begins with it."""
    folder = tmp_path_factory.mktemp("runs")
    loop.run(run_config("sft", model_folder, dataset), folder / "sft")
    loop.run(rft_config(model_folder, dataset, folder), folder / "rft")
    return folder


def rft_config(model_folder: Path, dataset: Path, runs: Path) -> ConfigDict:
    c = run_config("rft", model_folder, dataset)
    c.init_from = str(runs / "sft")
    return c


def equal(a: Params, b: Params) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_training_saves_adapters_alone_and_loads_whole(model_folder: Path, runs: Path, tmp_path: Path) -> None:
    trained, base = VideoLM.load(runs / "sft"), VideoLM.load(model_folder)
    assert equal(trained.params, base.params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(trained.adapters)), "b begins at zero"
    low = VideoLM.load(runs / "sft", "bfloat16", merge=True)
    assert low.model.dtype == jnp.bfloat16 and low.model.lora is None
    once = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained.merged().params)
    jax.tree.map(np.testing.assert_array_equal, low.params, once)  # rounded once
    stored = sum(p.stat().st_size for p in (runs / "sft" / "checkpoints").rglob("*") if p.is_file())
    assert stored < (model_folder / hf.SINGLE).stat().st_size / 2

    step = json.loads((runs / "rft" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(step["kl"]) < 1e-6, "the reference is the merged start"
    after = VideoLM.load(runs / "rft")
    assert equal(after.params, trained.merged().params)
    low = VideoLM.load(runs / "rft", "bfloat16", merge=True)  # through both runs
    once = jax.tree.map(lambda x: x.astype(jnp.bfloat16), after.merged().params)
    jax.tree.map(np.testing.assert_array_equal, low.params, once)
    after.save_adapter(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / peft.WEIGHTS)


@pytest.fixture
def moved(runs: Path, tmp_path: Path) -> Path:
    """A copy of `runs`; the notes of `rft` name the new place of what it began with."""
    shutil.copytree(runs, tmp_path / "runs")
    for note in (checkpoint.ADAPTER, checkpoint.INPUTS):
        path = tmp_path / "runs" / "rft" / note
        path.write_text(path.read_text().replace(str(runs), str(tmp_path / "runs")))
    return tmp_path / "runs"


def go_on(run: Path) -> None:
    """As if the run of adapters had trained for another step."""
    checkpoints = checkpoint.Checkpoints(run, keep=1)
    adapters = checkpoint.restore_params(run / "checkpoints" / "2")
    checkpoints.save(3, State(np.zeros((), np.int32), jax.tree.map(lambda x: x + 1, adapters), ()), {}, 1e9)
    checkpoints.close()


def test_a_run_stays_with_the_step_that_it_began_with(model_folder: Path, dataset: Path, moved: Path) -> None:
    """When the run behind it goes on: for whoever loads it, and where it goes on itself."""
    before = VideoLM.load(moved / "rft")
    checkpoint.need(checkpoint.source(moved / "sft", moved / "rft"), moved / "rft")
    (moved / "rft").rename(moved / "kept")  # it may have another name by then
    go_on(moved / "sft")
    (moved / "kept").rename(moved / "rft")
    assert checkpoint.steps(moved / "sft") == [2, 3], "a step that another run needs is not deleted"
    assert equal(VideoLM.load(moved / "rft").params, before.params)
    source = loop.inputs(rft_config(model_folder, dataset, moved), moved / "rft")["source"]
    assert source["path"] == str(moved / "sft" / "checkpoints" / "2")
    assert checkpoint.source(moved / "sft", moved).path == str(moved / "sft" / "checkpoints" / "3"), (
        "a new run takes the last"
    )


def test_runs_that_move_together_find_each_other(model_folder: Path, dataset: Path, runs: Path, tmp_path: Path) -> None:
    """A run of adapters, and one that goes on."""
    elsewhere, gone = tmp_path / "elsewhere", str(tmp_path / "gone")
    shutil.copytree(runs, elsewhere)
    for note in (checkpoint.ADAPTER, checkpoint.INPUTS):
        path = elsewhere / "rft" / note
        path.write_text(path.read_text().replace(str(runs.resolve()), gone))
    assert equal(VideoLM.load(elsewhere / "rft").params, VideoLM.load(runs / "rft").params)
    source = loop.inputs(rft_config(model_folder, dataset, runs), elsewhere / "rft")["source"]
    assert source["path"] == str(elsewhere / "sft" / "checkpoints" / "2")


def test_a_run_whose_start_is_another_by_now_is_refused(model_folder: Path, dataset: Path, moved: Path) -> None:
    go_on(moved / "sft")
    step = moved / "sft" / "checkpoints" / "2"
    shutil.rmtree(step, ignore_errors=True)
    shutil.copytree(step.parent / "3", step)
    changed = rf"{step}/state/.* has changed since {moved / 'rft'} began with it: put it back"
    with pytest.raises(InputError, match=changed):
        VideoLM.load(moved / "rft")
    with pytest.raises(InputError, match=changed):
        loop.inputs(rft_config(model_folder, dataset, moved), moved / "rft")


def test_a_changed_model_folder_or_annotation_file_is_named(dataset: Path, moved: Path, tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(moved / "rft" / "model", model)
    (model / hf.SINGLE).write_bytes(b"weights")
    data.mkdir()
    names = {"csv": "train.csv", "reflection": "train_reflection.jsonl"}
    c = run_config("rft", model, data)
    (data / "words.json").write_text("{}")
    c.data.templates = str(data / "words.json")
    for name in names.values():
        shutil.copy(dataset / name, data)
    run = tmp_path / "run"
    shutil.copytree(moved / "rft", run)
    (run / checkpoint.INPUTS).unlink()
    (run / checkpoint.INPUTS).write_text(json.dumps(loop.inputs(c, run)))
    files = [*(data / name for name in names.values()), data / "words.json", model / "config.json", model / hf.SINGLE]
    for file in files:
        was = file.read_bytes()
        file.write_bytes(was + b" ")
        with pytest.raises(InputError, match=rf"{file} .*has changed since .*{run} began"):
            loop.inputs(c, run)
        file.write_bytes(was)
    loop.inputs(c, run)


@pytest.mark.long
def test_a_killed_lora_run_resumes(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = run_config("sft", model_folder, dataset)
    c.lora.dropout, c.steps, c.optim.schedule = 0.1, 4, "constant"
    loop.run(c, tmp_path / "whole")
    c.steps = 2
    loop.run(c, tmp_path / "parts")
    c.steps = 4
    loop.run(c, tmp_path / "parts")
    a, b = (VideoLM.load(tmp_path / name).adapters for name in ("whole", "parts"))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_a_lora_run_whose_source_is_missing_names_it(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    c = run_config("sft", base, dataset)
    c.steps = 1
    loop.run(c, tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(InputError, match="which does not exist: restore it"):
        VideoLM.load(tmp_path / "run")


def test_dropout_with_rft_is_refused(model_folder: Path, dataset: Path) -> None:
    c = run_config("rft", model_folder, dataset)
    c.lora.dropout = 0.05
    with pytest.raises(InputError, match=r"lora\.dropout=0\.05 with stage=rft: .* set lora\.dropout=0"):
        loop.Run(c)
