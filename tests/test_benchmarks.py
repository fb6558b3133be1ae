"""The benchmarks run from the command line and end with one JSON object; how fast is not tested."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import efficiency, gpu

ROOT = Path(__file__).parents[1]


def last_line(*command: str) -> dict:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_grpo_step(model_folder: Path) -> None:
    sizes = ["--frames=4", "--side=56", "--group=2", "--new=4", "--steps=2", "--warmup=1"]
    result = last_line("benchmarks/grpo_step.py", f"--model={model_folder}", "--exact", "--reward-seconds=1", *sizes)
    assert result["visual_tokens"] == 2 * 2 * 2
    assert result["padded"] == result["shape"]
    assert (result["shape"]["frames"], result["shape"]["windows"]) == (2, 1), (
        "a group of windows holds two small frames"
    )
    assert 0 < sum(result["split"].values()) <= result["sec_per_step"]
    assert result["completion_tokens_per_s"] > 0
    assert result["split"]["score"] + result["split"]["reward"] >= 1.0, "the reward takes a second, beside scoring"
    assert result["split"]["reward"] / result["sec_per_step"] <= result["host_share"] < 1


def test_an_epoch_of_vau_bench_has_few_programs_and_little_padding() -> None:
    """The default table: 2,939 prompts, 8 a batch, 8 completions each, of at most 1,024 tokens."""
    result = last_line("benchmarks/epoch.py")
    assert result["steps"] == 367
    assert result["prompt_shapes"] <= 4 and result["completion_lengths"] <= 4 and result["programs"] <= 40
    assert result["real_prompt_share"] >= 0.88 and result["real_window_share"] >= 0.88
    assert result["real_completion_share"] >= 0.70


def test_an_epoch_of_other_clips_and_lengths(tmp_path: Path) -> None:
    """Few clips, alike, and completions all of one length: nearly nothing is padding."""
    rows = [f"{number}.mp4,{20 + number / 100},25,640,360" for number in range(32)]
    (tmp_path / "clips.csv").write_text("\n".join(["video,seconds,fps,width,height", *rows]))
    (tmp_path / "lengths").write_text("128\n")
    sizes = ["--batch_size=4", "--group=4", "--new=128", "--micro_batches=1"]
    files = [f"--table={tmp_path / 'clips.csv'}", f"--lengths={tmp_path / 'lengths'}"]
    result = last_line("benchmarks/epoch.py", *sizes, *files)
    assert (result["steps"], result["real_completion_share"], result["completion_lengths"]) == (8, 1.0, 1)
    assert result["real_prompt_share"] > 0.95


def test_video_pipeline(tmp_path: Path) -> None:
    sizes = ["--sizes", "96x64", "--seconds", "4", "--rounds=1", "--workers", "1"]
    result = last_line("benchmarks/video_pipeline.py", *sizes, f"--clips={tmp_path}")
    assert result["frames_per_s"] > 0
    assert result["clips"]["96x64_4s"]["frames"] == {"ours": 8, "reference": 8, "cached": 8}


def test_goodput_is_what_saves_restarts_and_lost_steps_leave() -> None:
    """A checkpoint every hundred steps of 2 s; of six hours, ten minutes are spent in a restart."""
    hours = partial(efficiency.goodput, 6, 2.0)
    assert hours(copy=0.0, write=0.0, restart=0.0, notice=True) == 1
    assert hours(copy=0.0, write=0.0, restart=600.0, notice=True) == pytest.approx(35 / 36)
    assert hours(copy=10.0, write=50.0, restart=600.0, notice=True) == pytest.approx(200 / 210 * (1 - 660 / 21600))
    assert hours(copy=10.0, write=50.0, restart=600.0, notice=False) == pytest.approx(200 / 210 * (1 - 750 / 21600))
    assert hours(copy=0.0, write=400.0, restart=0.0, notice=True) == pytest.approx(0.5 * (1 - 400 / 21600))
    assert efficiency.goodput(0.1, 2.0, copy=1.0, write=10.0, restart=600.0, notice=True) == 0


def test_a_save_and_a_restart_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    costs = efficiency.measured(gb=0.02)
    assert 0.1 < costs.start < 120 and 1e6 < costs.save < 1e11 and 1e6 < costs.read < 1e11
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_what_a_gpu_would_tell_is_measured_on_small_models(tmp_path: Path) -> None:
    """All measurements from end to end; without a GPU the shares of its peak rates are unknown."""
    result = last_line("benchmarks/gpu.py", "--tiny", "--seconds=900", f"--out={tmp_path}")
    assert list(result) == list(gpu.MEASUREMENTS) and not any("problem" in one for one in result.values())
    assert all(result["parity"][family]["as_close"] for family in gpu.VISIONS)
    for name in gpu.STEPS:
        step = result[name]
        assert step["update"]["seconds"] > 0 and step["update"]["planned_gib"] > 0 and step["update"]["mfu"] is None
        assert step["decode"]["gb_per_step"] > 0 and step["decode"]["bandwidth"] is None
    assert json.loads((tmp_path / "host.json").read_text()) == result["host"]
    assert "| the host's share of a step |" in (tmp_path / "table.md").read_text()


def test_a_measurement_out_of_time_loses_nothing_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "host.json").write_text('{"seconds": 1.5}')
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--only=parity", "--seconds=0", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and "not done" in result["parity"]["problem"]
    assert result["host"] == {"seconds": 1.5}


def test_the_table_of_a_gpu_has_what_is_there() -> None:
    step = {"decode": {"bandwidth": 0.625, "seconds_per_step": 0.01}, "sizes": {"new": 101}}
    parts = {part: {"seconds": 0.5} for part in ("tower", "prefill", "score", "update")}
    lines = gpu.table(
        {"7b-lora": step | parts, "host": {"seconds": 1.0}, "parity": {"problem": "not done"}}
    ).splitlines()
    assert "| decoding, share of the bandwidth |  | 62% |  | 60% |" in lines
    assert "| the host's share of a step |  | 25% |  |  |" in lines
    assert lines[-1] == "parity: not done"


def test_the_gpu_script_takes_an_interpreter_that_has_all_packages(tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", "--table"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {} and (tmp_path / "table.md").exists()
