"""A user's mistake gives one clear line and exit code 2, from the real command line; no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(module: str, *args: str) -> tuple[int, str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-m", module, *args]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


@pytest.fixture
def good(dataset: Path, model_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Flags of a training call that would run."""
    return {
        "config": "configs/srvau_r1_sft.py",
        "workdir": str(tmp_path / "run"),
        "config.model": str(model_folder),
        "config.data.csv": str(dataset / "train.csv"),
        "config.data.videos": str(dataset / "videos"),
        "config.data.reflection": str(dataset / "train_reflection.jsonl"),
        "config.dtype": "float32",
        "config.steps": "1",
    }


def bad_csv(dataset: Path, folder: Path, change: str) -> str:
    path = folder / "bad.csv"
    lines = (dataset / "train.csv").read_text().splitlines()
    path.write_text(change if change.startswith("Video") else lines[0] + change)
    return str(path)


CASES = {
    "missing video folder": ({"config.data.videos": "/no/such"}, "video folder /no/such does not exist"),
    "missing csv": ({"config.data.csv": "/no/such.csv"}, "annotation file /no/such.csv does not exist"),
    "missing model": ({"config.model": "/no/such"}, "model folder /no/such does not exist"),
    "unknown task": ({"config.data.tasks": "('describe',)"}, "describe"),
    "unknown style": ({"config.data.style": "poem"}, "data.style='poem' is unknown"),
    "unknown stage": ({"config.stage": "dpo"}, "stage='dpo' is unknown"),
    "one completion a group": ({"config.stage": "rft", "config.rollout.num_generations": "1"}, "at least 2"),
    "mesh too large": ({"config.mesh.data": "3"}, "does not fit 1 device"),
    "misspelt field": ({"config.optim.lrr": "1"}, "has no field optim.lrr: did you mean optim.lr?"),
    "group of fields": ({"config.optim": "1"}, "config.optim is a group"),
    "no number": ({"config.optim.lr": "fast"}, "could not convert string to float"),
    "no finite weight": ({"config.user_rewards": "(('math:sqrt', 1e400),)"}, "expected a finite number"),
    "no finite number": ({"config.optim.lr": "inf"}, "optim.lr=inf: expected a finite number"),
    "missing config": ({"config": "configs/none.py"}, "none.py"),
    "no reflection file": ({"config.data.reflection": ""}, "needs the records to learn from"),
    "missing reflection file": (
        {"config.data.reflection": "/no/such"},
        "(config.data.reflection) /no/such does not exist",
    ),
    "unknown dtype": ({"config.dtype": "float8"}, "dtype='float8' is unknown"),
    "unknown parameter dtype": ({"config.param_dtype": "float8"}, "dtype='float8' is unknown"),
    "freeze that matches nothing": ({"config.optim.freeze": "('vision.*',)"}, "matches no parameter"),
    "unknown schedule": ({"config.optim.schedule": "step"}, "optim.schedule='step' is unknown"),
}


@pytest.mark.parametrize("name", CASES)
def test_training(good: dict[str, str], name: str) -> None:
    change, words = CASES[name]
    code, error = command("vau_jax.train", *(f"--{key}={value}" for key, value in {**good, **change}.items()))
    assert code == 2, error
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "words"),
    [("Video Name,Question\nx.mp4,why\n", "lacks the column"), ("\n", "has no rows")],
    ids=["no column", "empty split"],
)
def test_annotation_files(good: dict[str, str], dataset: Path, tmp_path: Path, content: str, words: str) -> None:
    good["config.data.csv"] = bad_csv(dataset, tmp_path, content)
    code, error = command("vau_jax.train", *(f"--{key}={value}" for key, value in good.items()))
    assert code == 2
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").write_text("{"), "as JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot read"),
    ],
    ids=["config", "weights"],
)
def test_model_folders(good: dict[str, str], model_folder: Path, tmp_path: Path, damage: object, words: str) -> None:
    """test_model_folders.py has the others."""
    import shutil

    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    damage(folder)
    good["config.model"] = str(folder)
    code, error = command("vau_jax.train", *(f"--{key}={value}" for key, value in good.items()))
    assert code == 2
    assert words in error
    assert "Traceback" not in error


def test_evaluation_of_a_run_without_a_checkpoint(dataset: Path, model_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model_folder, tmp_path / "run" / "model")
    args = {"config": "configs/eval.py", "workdir": str(tmp_path / "e"), "config.checkpoint": str(tmp_path / "run")}
    args |= {"config.data.csv": str(dataset / "test.csv"), "config.data.videos": str(dataset / "videos")}
    code, error = command("vau_jax.evaluate", *(f"--{key}={value}" for key, value in args.items()))
    assert code == 2
    assert "without a finished checkpoint" in error


def test_a_report_of_nothing(tmp_path: Path) -> None:
    code, error = command("vau_jax.report", str(tmp_path), f"--out={tmp_path / 'r.html'}")
    assert code == 2
    assert "nothing to report" in error


def test_an_unknown_demo_mode(tmp_path: Path) -> None:
    code, error = command("vau_jax.launch.demo", "--config=configs/demo.py:fast", f"--workdir={tmp_path}")
    assert code == 2
    assert "expected configs/demo.py or configs/demo.py:quick" in error
    assert "Traceback" not in error


def test_a_missing_workdir_flag() -> None:
    code, error = command("vau_jax.train", "--config=configs/base.py")
    assert code == 2
    assert "--workdir=DIR" in error
