"""Every training config runs on a real model folder and real videos, and learning lowers the loss."""

import importlib
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import ROOT, TRAINING, small
from vau_jax.common.chips import Chip
from vau_jax.common.files import LOCK, InputError, locked, read_json
from vau_jax.common.metric_writer import MetricWriter, RunLog, read_metrics
from vau_jax.configs import base
from vau_jax.eval import evaluate
from vau_jax.launch import sweep
from vau_jax.models import checkpoint, hf
from vau_jax.train import loop
from vau_jax.types import State
from vau_jax.vlm import VideoLM

ALIKE = ("vau_r1_qa_rft", "vau_r1_tag_rft", "vau_r1_cls_rft")  # vau_r1_multi_rft with one task
ALIKE += ("vau_r1_multi_rft", "srvau_r1_sft")  # the other stage of a paper whose first or second stage is trained here


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in ALIKE else ()) for name in TRAINING]
)
def test_a_config_trains(name: str, model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    loop.run(small(name, model_folder, dataset), tmp_path)
    step = read_metrics(tmp_path)[0]
    assert np.isfinite([step["loss"], step["grad_norm"]]).all()
    assert read_json(tmp_path / "config.json")["stage"] == name.rpartition("_")[2]


def test_a_second_run_in_the_same_workdir_is_refused(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """Of training, of an evaluation, and of a sweep; before anything is written."""
    nothing = small("vau_r1_sft", tmp_path / "no model", dataset)
    calls = [
        lambda: loop.run(nothing, tmp_path),
        lambda: evaluate.run(small("eval", model_folder, dataset), tmp_path),
        lambda: sweep.run(ROOT / "configs" / "sweeps" / "seeds.py", tmp_path, "slurm", 1, dry_run=False),
    ]
    with locked(tmp_path):
        for call in calls:
            with pytest.raises(InputError, match=rf"{tmp_path} is in use by process {os.getpid()} on "):
                call()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_frozen_parameters_stay_and_the_others_move(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = small("srvau_r1_sft", model_folder, dataset)
    c.optim.freeze, c.optim.lr = ("visual/.*",), 1e-3
    loop.run(c, tmp_path)
    before, after = (hf.flatten(VideoLM.load(path).params) for path in (model_folder, tmp_path))
    for name, value in before.items():
        moved = not np.array_equal(np.asarray(value), np.asarray(after[name]))
        assert moved == (not name.startswith("visual/")), name


def test_bfloat16_activations_keep_small_updates(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """With lr 1e-6, float32 parameters move under bfloat16 activations; bfloat16 ones would stay where they are."""
    c = small("vau_r1_multi_rft", model_folder, dataset)
    c.stage, c.dtype, c.data.max_completion_tokens = "sft", "bfloat16", 160
    loop.run(c, tmp_path)
    before, after = (hf.flatten(VideoLM.load(path).params) for path in (model_folder, tmp_path))
    assert all(not np.array_equal(before[name], after[name]) for name in before)


def test_rft_begins_at_its_reference(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """At the first step policy and reference are one: KL 0, and the sampler's log-probabilities are the trainer's."""
    loop.run(small("srvau_r1_rft", model_folder, dataset), tmp_path)
    step = read_metrics(tmp_path)[0]
    assert abs(step["kl"]) < 1e-6
    assert step["sampler_logp_gap/max"] < 1e-4


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step() -> None:
    with pytest.raises(InputError, match="loss is nan at step 7; the last good checkpoint is of step 5"):
        loop.check_finite({"loss": float("nan"), "grad_norm": 1.0}, 7, lambda: 5)


TOO_MUCH = jax.jit(lambda x: jnp.zeros(2**46) + x)  # 256 TiB


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("update", r"in update \(.*Out of memory.*micro_batches=4 \(now 1.*lora.rank=16"),
        ("rollout", r"in vision tower, prefill, decode step \(.*Out of memory.*smaller batch_size \(now 4\)"),
    ],
)
def test_exhausted_memory_names_the_program_and_what_would_help(
    phase: str, words: str, model_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop.Run(small("vau_r1_multi_rft", model_folder, dataset))
    owner, name = (run.learner, "update") if phase == "update" else (run.worker.engine, "sample")
    monkeypatch.setattr(owner, name, lambda *_: TOO_MUCH(1.0))
    with pytest.raises(InputError, match=words):
        run.step(0)
    run.close()


def test_a_run_tells_where_its_time_goes(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a chip of 1 TFLOP/s: the parts of a step, speed, share of the peak, memory; and a trace of the steps that were
    asked for."""
    monkeypatch.setattr(loop, "chip", lambda kind: Chip(1e12, 1e11, 2.0**34, 1e10))
    c = small("vau_r1_sft", model_folder, dataset)
    c.steps, c.profile_steps = 3, (2, 3)
    loop.run(c, tmp_path)
    for step in read_metrics(tmp_path):
        parts = step["seconds/data"] + step["seconds/update"]
        assert 0 < parts <= step["seconds/step"]
        tokens = step["tokens_per_s"] * step["seconds/step"]
        assert 0 < step["mfu"] < 1 and step["memory/host_gib"] > 0.1 and tokens > c.batch_size
    assert step["tokens_seen"] == pytest.approx(tokens + read_metrics(tmp_path)[1]["tokens_seen"])
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_run_that_resumes_within_the_steps_of_a_trace_writes_its_part(tmp_path: Path) -> None:
    """And one that is asked to end among them."""
    c = small("vau_r1_sft", tmp_path, tmp_path)
    c.steps, c.profile_steps = 9, (2, 5)
    for name, steps in (("asked to end", (1, 2, 3)), ("goes on", (4, 5, 6))):
        log = RunLog(c, tmp_path / name, steps[0] - 1)
        for step in steps:
            log.begin(step)
            np.asarray(jax.numpy.ones(3) + step)
            log.end(step, {"seconds/step": 0.1}, [], "")
        log.close()
        (trace,) = (tmp_path / name).glob("profile/plugins/profile/*/*.xplane.pb")
        assert trace.stat().st_size > 1000


def test_weights_and_biases_gets_what_the_metrics_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what the package knows of the run, whose file lies in the workdir."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = MetricWriter(tmp_path, 0, "some-project")
    writer.write(1, {"loss": 2.375}, [])
    writer.write(2, {"loss": 1.625}, [])
    run = writer.wandb  # a step is told when the next one begins
    assert (run.project, run.name, run.step, run.summary["loss"]) == ("some-project", tmp_path.name, 2, 2.375)
    writer.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run.id in file.name and file.stat().st_size > 0
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.375, 1.625]


def test_weights_and_biases_without_its_package_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        MetricWriter(tmp_path, 0, "project")


def test_a_run_from_before_a_field_resumes_where_that_has_its_default(tmp_path: Path) -> None:
    """Its config lacks new fields, has a removed one that never changed a result, and one under its earlier name."""
    c = importlib.import_module("vau_jax.configs.vau_r1_sft").get_config()
    before = json.loads(c.to_json_best_effort())
    del before["optim"]["eps"], before["rollout"]["reward_seconds"]
    before["rollout"]["reward_threads"] = 8
    before["data"]["source"] = before["data"].pop("time_rules")
    del before["data"]["sources"], before["epochs"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, State(jnp.int32(1), {}, {}), {}, 0.0)
    checkpoints.wait()
    loop.check_same_run(c, tmp_path)
    c.optim.eps = 1.0
    with pytest.raises(InputError, match=r"other settings: optim\.eps \(was 1e-08, is 1\.0\); choose"):
        loop.check_same_run(c, tmp_path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"rewards": {"of_yesterday": 1.0}}, r"lacks: rewards\.of_yesterday=1\.0; choose another --workdir"),
        ({"format": 99}, "has format 99, of a later version: this one resumes runs up to"),
        ({"format": "two"}, "format='two': expected an integer"),
        ([], "expected a JSON object"),
    ],
    ids=str,
)
def test_a_run_whose_config_is_not_understood_is_refused_in_one_line(
    stored: object, message: str, tmp_path: Path
) -> None:
    c = importlib.import_module("vau_jax.configs.vau_r1_sft").get_config()
    (tmp_path / "config.json").write_text(json.dumps(stored))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, State(jnp.int32(1), {}, {}), {}, 0.0)
    checkpoints.wait()
    with pytest.raises(InputError, match=message):
        loop.check_same_run(c, tmp_path)


def test_a_score_that_is_no_number_is_the_worst_and_null_in_json(tmp_path: Path) -> None:
    score = checkpoint.BestMetric(base.get_config())
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for step, loss in enumerate((float("nan"), 1e9, float("inf")), start=1):
        score.add({"loss": loss})
        score.add({"loss": 0.5})
        json.dumps(score.values, allow_nan=False)  # is kept with the run's place
        checkpoints.save(step, State(jnp.int32(step), {}, {}), {}, score.take())
    assert checkpoints.best() == 2
    written = [file.read_text() for file in (tmp_path / "checkpoints").glob("*/metrics/metrics")]
    assert len(written) == 3 and not any("Inf" in text or "NaN" in text for text in written)


def test_a_metric_for_the_best_checkpoint_that_is_none_is_refused() -> None:
    c = base.get_config()
    c.stage, c.checkpoint.best = "rft", "rewards/none"
    with pytest.raises(
        InputError, match=r"checkpoint\.best='rewards/none' is not a metric: expected one of kl, reward"
    ):
        checkpoint.BestMetric(c).add({"reward": 1.0, "kl": 0.0})
