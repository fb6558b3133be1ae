"""The notebooks for a TPU v5e-8 and for one GPU run from first cell to last, at the size of a demo, on CPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_models import make_model
from vau_jax.common.files import read_json
from vau_jax.common.metric_writer import read_metrics
from vau_jax.models import checkpoint

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


def code_of(notebook: str) -> str:
    """Its code cells in order, as a kernel would run them: they have no magics, and all names in one module."""
    cells = json.loads((LAUNCH / f"{notebook}.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
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
        "FLAGS": " ".join(FLAGS),
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


def test_on_a_tpu_a_session_that_is_over_goes_on_in_the_next(dataset: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=256, num_attention_heads=2, num_key_value_heads=1)
    env = environment(model, dataset, devices=8, SFT_STEPS=8, CHECK_FLAGS="--only=update --config.attention=jnp")
    runs = tmp_path / "runs" / "tpu_v5e8"
    first = start("tpu_v5e8", tmp_path, env)
    while first.poll() is None and not (runs / "sft" / "metrics.jsonl").exists():
        time.sleep(0.01)
    trainer = int((runs / "sft" / ".lock").read_text().split()[1])
    os.kill(trainer, signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    done = read_json(runs / "sft" / "preempted.json")["step"]
    assert first.returncode == 1 and "sft was asked to end before its last step: run all cells again" in said
    assert checkpoint.steps(runs / "sft") == [done] and 0 < done < 8 and not (runs / "grpo").exists()
    before = (runs / "sft" / "metrics.jsonl").read_text()
    said = execute("tpu_v5e8", tmp_path, env)
    assert (runs / "sft" / "metrics.jsonl").read_text().startswith(before), "no step is taken twice"
    assert [line["step"] for line in read_metrics(runs / "sft")] == list(range(1, 9))
    assert [line["step"] for line in read_metrics(runs / "grpo")] == [1, 2]
    assert "mesh {'data': 1, 'fsdp': 8, 'tensor': 1}" in said
    assert read_json(runs / "eval" / "grpo" / "metrics.json")["examples"] == 8
    assert (runs / "report.html").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_they_are_stored_without_outputs(notebook: str) -> None:
    cells = json.loads((LAUNCH / f"{notebook}.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in cells}) == len(cells) > 10
