"""What a run writes and reads on a mounted bucket, which lacks locks, hard links, and more: see bucket.c."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import bucket_program
from tests.bucket_program import EVERY, STEPS
from vau_jax.common import files
from vau_jax.common.metric_writer import MetricWriter, read_metrics
from vau_jax.eval.records import load
from vau_jax.models import checkpoint
from vau_jax.train import loop

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bucket.c, compiled. A file system of that kind would need root to be mounted."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler (cc) on PATH")
    library = tmp_path_factory.mktemp("shim") / "bucket.so"
    source = Path(__file__).with_name("bucket.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def start(shim: Path, bucket: Path, *args: object, **variables: str) -> subprocess.Popen:
    """A Python program for which `bucket` is a mounted bucket."""
    environment = os.environ | {"LD_PRELOAD": str(shim), "BUCKET": str(bucket), "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def bucket(shim: Path, model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that was killed between two checkpoints and began again."""
    folder = tmp_path_factory.mktemp("bucket")
    program = ("-m", "tests.bucket_program", model_folder, dataset, folder)
    process, metrics = start(shim, folder, *program), folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > EVERY) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()[-3000:]
    again = start(shim, folder, *program)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said[-3000:]
    return folder


def test_a_run_that_is_killed_on_a_bucket_ends_with_the_bits_of_one_on_a_disk(
    bucket: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """The one on a bucket reads frames from a cache there."""
    loop.run(bucket_program.config(model_folder, dataset), tmp_path / "straight")
    expected, found = (
        checkpoint.restore_params(workdir / "checkpoints" / str(STEPS))
        for workdir in (tmp_path / "straight", bucket / "run")
    )
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
    losses = [[line["loss"] for line in read_metrics(w)] for w in (tmp_path / "straight", bucket / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_frames_on_a_bucket_are_read_from_there(bucket: Path) -> None:
    assert {line["data/not_cached"] for line in read_metrics(bucket / "run")} == {0.0}


def test_an_evaluation_writes_to_a_bucket(bucket: Path) -> None:
    assert len(load(bucket / "eval")) == 4


def test_a_bucket_without_hierarchical_namespace_is_one_line_before_the_run_begins(
    shim: Path, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    args = ("--config=configs/vau_r1_sft.py", f"--workdir={tmp_path / 'run'}", f"--config.model={model_folder}")
    data = (f"--config.data.csv={dataset / 'train.csv'}", f"--config.data.videos={dataset / 'videos'}")
    process = start(shim, tmp_path, "-m", "vau_jax.train", *args, *data, BUCKET_FLAT="1")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "cannot rename folders" in error and "hierarchical namespace" in error


def test_what_a_bucket_lacks_is_found_and_nothing_left_behind(shim: Path, tmp_path: Path) -> None:
    program = "import sys; from vau_jax.common import files; print(sorted(files.missing_features(sys.argv[1])))"
    said, _ = start(shim, tmp_path, "-c", program, tmp_path).communicate(timeout=60)
    assert said == "['locks', 'sync']\n" and not list(tmp_path.iterdir())
    assert files.missing_features(tmp_path) == set()


def test_the_metrics_of_a_checkpoint_are_uploaded_before_it(tmp_path: Path) -> None:
    """A mounted bucket uploads a file when it is closed."""
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0}, [])
    uploaded = writer.metrics.file
    writer.save()
    writer.write(2, {"loss": 2.0}, [])
    writer.close()
    assert uploaded.closed and [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0]
