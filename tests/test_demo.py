"""The whole job, small, through the script a user calls: twice, then after a kill."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from vau_jax.common.compiled import FOLDER
from vau_jax.common.files import read_json
from vau_jax.common.metric_writer import read_metrics
from vau_jax.launch import sweep
from vau_jax.vlm import VideoLM

ROOT = Path(__file__).parents[1]
FAST_TO_COMPILE = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")  # of conftest.py


def environment() -> dict[str, str]:
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if flag not in FAST_TO_COMPILE]  # optimised, as for users
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "VENV": str(Path(sys.prefix))}


def demo(workdir: Path) -> subprocess.CompletedProcess:
    args = ["bash", "launch/demo.sh", "quick", str(workdir)]
    return subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo that was killed during SFT and called again."""
    workdir = tmp_path_factory.mktemp("demo") / "run"
    args = ["bash", "launch/demo.sh", "quick", str(workdir)]
    process = subprocess.Popen(args, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (workdir / "sft" / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = demo(workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_every_stage_leaves_its_result(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    for name in ("init", "sft", "sft_blind", "rft", "rft_blind"):
        result = read_json(workdir / "eval" / name / "metrics.json")
        counts = {task: next(iter(scores.values()))["n"] for task, scores in result["tasks"].items()}
        assert counts == {"qa": 24, "grounding": 19, "classification": 24}
        assert result["failed"] == 0
    assert set(result["tasks"]) == {"qa", "grounding", "classification"}
    assert len((workdir / "eval" / "rft" / "predictions.jsonl").read_text().splitlines()) == 24 * 3


def test_training_wrote_its_metrics(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    steps = read_metrics(workdir / "rft")
    wanted = {
        "reward",
        "rewards/format",
        "rewards/tiou_std",
        "kl",
        "entropy",
        "sampler_logp_gap/max",
        "length/truncated",
    }
    assert wanted <= set(steps[0])
    assert all(step["sampler_logp_gap/max"] < 1e-3 for step in steps)
    assert list((workdir / "rft" / "tensorboard").iterdir())


def test_sft_lowers_the_loss(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    losses = [step["loss"] for step in read_metrics(workdir / "sft")]
    assert losses[-1] < 0.7 * losses[0]


def test_the_report_shows_table_curves_and_examples(finished: tuple[Path, str]) -> None:
    workdir, out = finished
    text = (workdir / "report.html").read_text()
    assert re.search(r"QA accuracy +\| \d\.\d\d \[", out)
    assert "Grounding mIoU" in text and "constant guess" in text and "rft blind" in text
    assert all(f">{title}<" in text for title in ("Reward", "Loss", "Corrected by reflection", "Confusion matrices"))
    assert (
        text.count('<li class="card"') == 3 * 24
        and text.count('<div class="answer"') == 3 * 24 * 3
        and text.count("data:image/webp") == 24
    )


def test_the_trained_model_opens_and_saves(finished: tuple[Path, str], tmp_path: Path) -> None:
    workdir, _ = finished
    vlm = VideoLM.load(workdir / "rft")
    vlm.save(tmp_path / "hf")
    assert VideoLM.load(tmp_path / "hf").processor.config == vlm.processor.config


def test_progress_says_what_how_far_and_how_long(finished: tuple[Path, str]) -> None:
    _, out = finished
    assert re.search(r"^rft: \d+/\d+ +[\d.]+ \S+ +elapsed \d+:\d\d", out, re.MULTILINE)


def test_it_says_where_everything_is_and_what_to_type_next(finished: tuple[Path, str]) -> None:
    workdir, out = finished
    lines = out.splitlines()[-6:]
    assert lines[0] == "the demo is done" and f"report  {workdir}/report.html" in lines[1]
    following = shlex.split(lines[4].removeprefix("next: "))
    assert following[1:] == [
        "ask",
        f"--model={workdir}/rft",
        f"--video={workdir}/data/videos/test_00000.mp4",
        "--task=ground",
        "--verbose",
    ]
    done = subprocess.run(following, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_page_of_a_demo_in_progress_shows_each_checkpoint(finished: tuple[Path, str]) -> None:
    """With --watch: frames of test clips, the true interval and that of the last checkpoint of SFT and of RFT."""
    workdir, _ = finished
    before = sorted(workdir.rglob("*"))
    command = [sys.executable, "-m", "vau_jax.launch.watch_demo", f"--folder={workdir}", "--config=demo:quick"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        address, text = process.stdout.readline().removeprefix("watch: open ").strip(), ""
        deadline = time.monotonic() + 120
        while "rft, step 4" not in text and time.monotonic() < deadline:
            time.sleep(1)
            text = urllib.request.urlopen(address).read().decode()
    finally:
        process.terminate()
    assert process.wait(30) == 0
    assert "rft, step 4" in text and "sft, step 60" in text and text.count('<li class="card"') == 12
    assert text.count("data:image/webp") == 12 and 'class="bar true"' in text
    assert [path for path in sorted(workdir.rglob("*")) if path not in before and FOLDER not in path.parts] == []


def test_a_second_call_skips_what_is_done(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    began = time.monotonic()
    done = demo(workdir)
    assert done.returncode == 0
    assert time.monotonic() - began < 60
    for words in ("clips are there already", "sft: 60 steps are done already", "rft: evaluated already"):
        assert words in done.stdout


def test_the_readmes_python_runs(finished: tuple[Path, str]) -> None:
    """The block under "In Python", on this run's folder."""
    workdir, _ = finished
    block = re.search(
        r"## In Python\n\n```python\n(.*?)```", (ROOT / "vau_jax" / "README.md").read_text(), re.DOTALL
    ).group(1)
    code = block.replace("runs/demo/", f"{workdir}/")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_sweep_tabulates_it(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    table = sweep.table([("demo", workdir), ("demo", workdir)])
    assert re.search(r"\| demo +\| rft blind +\| 2 \| \d\.\d\d ± 0\.00 \|", table)
