"""The notebooks for a TPU v5e-8 and for one GPU run from first cell to last, at the size of a demo, on CPUs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import WITH_LIBTPU
from tests.small_models import make_model
from vau_jax import cli
from vau_jax.common import config_flags
from vau_jax.common.files import read_json
from vau_jax.common.metric_writer import read_metrics
from vau_jax.models import checkpoint
from vau_jax.train import loop

LAUNCH = Path(__file__).parents[1] / "launch"
NOTEBOOKS = ("tpu_v5e8", "single_gpu")
FLAGS = (
    "--config.data.wording=short",
    "--config.data.max_frames=8",
    "--config.data.bucket=(128,576,48,64,12,64)",
    "--config.data.max_examples=8",
    "--config.data.workers=1",
    "--config.dtype=float32",
)


def cells_of(notebook: str) -> list[str]:
    """Its code, by cells in their order."""
    cells = json.loads((LAUNCH / f"{notebook}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def code_of(notebook: str) -> str:
    """Its code, as a kernel would run it: it has no magics, and all names in one module."""
    code = "\n".join(cells_of(notebook))
    assert not [line for line in code.splitlines() if line.startswith(("%", "!"))]
    return code


def environment(model: Path, data: Path, devices: int = 1, **settings: object) -> dict[str, str]:
    """Of a notebook: a small model, rendered clips, two steps of each stage, and as many devices as it expects."""
    values = {
        "MODEL": model,
        "SIZE": "",
        "TRAIN": data / "train.csv",
        "TEST": data / "test.csv",
        "VIDEOS": data / "videos",
        "GENERATIONS": 2,
        "TOKENS": 16,
        "SFT_STEPS": 2,
        "GRPO_STEPS": 2,
        "FLAGS": shlex.join(FLAGS),
        **settings,
    }
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "NPROC": "32"}  # threads for simulated devices: see test_sharding.py
    return env | {f"VAU_{name}": str(value) for name, value in values.items()}


def start(notebook: str, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code_of(notebook)], cwd=folder, env=env, **pipes)


def execute(notebook: str, folder: Path, env: dict[str, str]) -> str:
    """What its cells print."""
    process = start(notebook, folder, env)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return said


def defined(notebook: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of its first two code cells, which start nothing: settings, and the options of its programs."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec("\n".join(cells_of(notebook)[:2]), names)
    return names


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_its_programs_know_all_options(notebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = defined(notebook, tmp_path, monkeypatch)
    for stage, name in (("sft", "SFT"), ("rft", "GRPO")):
        config, _ = config_flags.read(["vau train", *names[name]])
        loop.check(config)
        assert config.stage == stage and config.lora.rank == 16 and config.batch_size % config.micro_batches == 0
    config, _ = config_flags.read(["vau evaluate", *names["DATA"]], "eval")
    assert config.data.max_completion_tokens == names["TOKENS"] and config.mesh.fsdp == names.get("CHIPS", -1)


def test_the_memory_of_a_gpu_is_as_the_notebook_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = defined("single_gpu", tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.call(["compile-check", f"--topology={names['GPU']}:1", f"--size={names['SIZE']}", *names["GRPO"]])
    said = capsys.readouterr().out
    needed, parameters = re.search(r"update: ([\d.]+) of 80 GiB \(parameters ([\d.]+)", said).groups()
    assert ended.value.code == 0
    text = f"{float(needed):.1f} GiB with the\\nsettings above ({float(parameters):.1f} of it are the weights)"
    assert text in (LAUNCH / "single_gpu.ipynb").read_text().replace('\\n",\n    "', "\\n")


@pytest.mark.long
def test_on_one_gpu_from_weights_to_an_answer(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    video = dataset / "videos" / "test_00000.mp4"
    env = environment(model_folder, dataset, BATCH=2, VIDEO=video)
    said = execute("single_gpu", tmp_path, env)
    runs = tmp_path / "runs" / "single_gpu"
    assert said.count("of 80 GiB") == 2, "an update, and sampling"
    assert "SFT: 2 steps, loss" in said and "GRPO: 2 steps, reward" in said
    for name in ("sft", "grpo"):
        assert read_json(runs / "eval" / name / "metrics.json")["examples"] == 8
        assert read_json(runs / name / "adapter.json")["lora"]["rank"] == 16
    assert read_json(runs / "grpo" / "inputs.json")["source"]["beside"] == "../sft/checkpoints/2"
    assert (runs / "report.html").is_file()
    assert "no answer in the expected format" in said.split("$ vau ask")[1]


@WITH_LIBTPU
@pytest.mark.long
def test_on_a_tpu_a_session_that_is_over_goes_on_in_the_next(dataset: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=256, num_attention_heads=2, num_key_value_heads=1)
    env = environment(model, dataset, devices=8, SFT_STEPS=8, CHECK_FLAGS="--only=update --config.attention=jnp")
    runs = tmp_path / "runs" / "tpu_v5e8"
    first = start("tpu_v5e8", tmp_path, {**env, "VAU_TOPOLOGY": "h100:8"})  # memory by shapes alone, to be quick
    while first.poll() is None and not (runs / "sft" / "metrics.jsonl").exists():
        time.sleep(0.01)
    trainer = int((runs / "sft" / ".lock").read_text().split()[1])
    os.kill(trainer, signal.SIGTERM)
    said, _ = first.communicate(timeout=600)
    done = read_json(runs / "sft" / "preempted.json")["step"]
    assert first.returncode == 1 and "sft was asked to end before its last step: run all cells again" in said
    assert checkpoint.steps(runs / "sft") == [done] and 0 < done < 8 and not (runs / "grpo").exists()
    before = (runs / "sft" / "metrics.jsonl").read_text()
    said = execute("tpu_v5e8", tmp_path, env)
    assert (runs / "sft" / "metrics.jsonl").read_text().startswith(before), "no step is taken twice"
    assert [line["step"] for line in read_metrics(runs / "sft")] == list(range(1, 9))
    assert [line["step"] for line in read_metrics(runs / "grpo")] == [1, 2]
    assert "1 x v5e:2x4, mesh {'data': 1, 'fsdp': 8, 'tensor': 1}" in said
    assert read_json(runs / "eval" / "grpo" / "metrics.json")["examples"] == 8
    assert (runs / "report.html").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_they_are_stored_without_outputs(notebook: str) -> None:
    cells = json.loads((LAUNCH / f"{notebook}.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in cells}) == len(cells) > 10
