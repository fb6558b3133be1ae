"""Inputs by gs:// addresses, from a stand-in for Cloud Storage on this machine."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import small
from vau_jax import cli
from vau_jax.common import config_flags, remote
from vau_jax.common.files import InputError
from vau_jax.common.metric_writer import read_metrics
from vau_jax.models import checkpoint
from vau_jax.train import loop

gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed: bash launch/venv.sh test")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="likewise gcp-storage-emulator")


@pytest.fixture(scope="module")
def bucket(model_folder: Path, dataset: Path) -> Iterator[gcsfs.GCSFileSystem]:
    """A bucket named `bucket` with a model, a table, videos, and other things that nobody asks for."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        fs = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
        for path in model_folder.iterdir():
            fs.put_file(str(path), f"bucket/small/{path.name}")
        fs.pipe_file("bucket/small/original/weights.pth", b"nobody's")
        for path in [dataset / "train.csv", *sorted((dataset / "videos").iterdir())]:
            fs.put_file(str(path), f"bucket/data/{path.relative_to(dataset)}")
        yield fs
    server.stop()


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies are."""
    monkeypatch.setenv("VAU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gs"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_fetched_once(bucket: gcsfs.GCSFileSystem, dataset: Path, copies: Path) -> None:
    path = Path(remote.fetch("gs://bucket/data/train.csv", "csv"))
    assert path == copies / "bucket" / "data" / "train.csv"
    assert path.read_bytes() == (dataset / "train.csv").read_bytes()
    first = path.stat().st_ino
    assert Path(remote.fetch("gs://bucket/data/train.csv", "csv")).stat().st_ino == first


def test_an_object_that_was_replaced_is_fetched_again(bucket: gcsfs.GCSFileSystem) -> None:
    for text in (b"as it was", b"as it is!"):  # of one size
        bucket.pipe_file("bucket/notes/a.csv", text)
        assert Path(remote.fetch("gs://bucket/notes/a.csv", "csv")).read_bytes() == text


def test_of_a_model_folder_its_own_files_are_fetched(
    bucket: gcsfs.GCSFileSystem, model_folder: Path, copies: Path
) -> None:
    remote.fetch("gs://bucket/small/", "model")
    assert names(copies / "bucket" / "small") == names(model_folder)


def test_of_videos_those_that_the_table_names_are_fetched(
    bucket: gcsfs.GCSFileSystem, model_folder: Path, dataset: Path, copies: Path
) -> None:
    c = small("vau_r1_sft", model_folder, dataset)
    c.data.csv, c.data.videos, c.data.share = "gs://bucket/data/train.csv", "gs://bucket/data/videos", 0.3
    remote.replace_addresses(c)
    examples, _ = loop.pipeline.load_examples(c.data)
    used = {path.name for example in examples for path in example.media}
    assert names(copies / "bucket" / "data" / "videos") == used and 0 < len(used) < 24


RUN = {"model/config.json", "config.json", "inputs.json", "checkpoints/20/checksums.json", "checkpoints/20/state/d/1"}
OTHERS = {"checkpoints/10/checksums.json", "checkpoints/10/state/d/1", "checkpoints/30/state/d/1", "metrics.jsonl"}


@pytest.fixture(scope="module")
def run(bucket: gcsfs.GCSFileSystem) -> str:
    """The address of a run's files; of its newest checkpoint one is missing."""
    for name in RUN | OTHERS:
        bucket.pipe_file(f"bucket/run/{name}", name.encode())
    return "gs://bucket/run"


def test_of_a_run_its_newest_complete_checkpoint_is_fetched(run: str) -> None:
    assert names(Path(remote.fetch(run, "init_from"))) == RUN


def test_of_a_named_checkpoint_its_run_is_fetched_too(run: str, copies: Path) -> None:
    step = Path(remote.fetch(f"{run}/checkpoints/10", "checkpoint"))
    assert step == copies / "bucket" / "run" / "checkpoints" / "10"
    assert names(step.parents[1]) == {name.replace("/20/", "/10/") for name in RUN}


@pytest.mark.long
def test_a_run_from_addresses_has_the_bits_of_one_from_folders(
    bucket: gcsfs.GCSFileSystem, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """And what is loaded from its copy is what it wrote."""
    c = small("vau_r1_sft", model_folder, dataset)
    c.steps, c.checkpoint.every, c.data.tasks = 2, 1, ("qa",)
    loop.run(c, tmp_path / "folders")
    c.model, c.data.csv, c.data.videos = "gs://bucket/small", "gs://bucket/data/train.csv", "gs://bucket/data/videos"
    remote.replace_addresses(c)
    run = loop.run(c, tmp_path / "addresses")
    assert [m["loss"] for m in read_metrics(run)] == [m["loss"] for m in read_metrics(tmp_path / "folders")]
    for path in run.rglob("*"):
        if path.is_file():
            bucket.put_file(str(path), f"bucket/trained/{path.relative_to(run)}")
    copy = Path(remote.fetch("gs://bucket/trained", "init_from"))
    assert checkpoint.contents(copy) == checkpoint.contents(run)


def test_what_is_not_there_is_one_line(bucket: gcsfs.GCSFileSystem) -> None:
    for address in ("gs://bucket/none.csv", "gs://other/none.csv", "gs://bucket/data/train"):
        with pytest.raises(InputError, match=f"^{address} does not exist"):
            remote.fetch(address, "csv")


def test_a_bucket_that_may_not_be_read_says_which_role_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise OSError("Forbidden: https://storage.googleapis.com/b/bucket/o")

    monkeypatch.setattr(gcsfs.GCSFileSystem, "find", forbidden)
    with pytest.raises(
        InputError, match=r"cannot read gs://bucket/a\.csv \(OSError: Forbidden: .*Storage Object Viewer"
    ):
        remote.fetch("gs://bucket/a.csv", "csv")


def test_without_gcsfs_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs://bucket/a\.csv needs the package: pip install gcsfs"):
        remote.fetch("gs://bucket/a.csv", "csv")


def test_a_download_that_breaks_off_leaves_nothing(
    bucket: gcsfs.GCSFileSystem, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(self: object, name: str, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(gcsfs.GCSFileSystem, "get_file", breaks_off)
    with pytest.raises(InputError, match="reset by peer"):
        remote.fetch("gs://bucket/data/train.csv", "csv")
    assert not (copies / "bucket" / "data" / "train.csv").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--config=vau_r1_sft", "--workdir=gs://my-runs/sft"),
        ("report", "gs://my-runs/eval"),
        ("ask", "--model=small", "--video=a.mp4", "--task=qa", "--out=gs://my-runs/out"),
    ],
)
def test_a_folder_that_is_written_to_has_to_be_mounted(words: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"a path of this machine\. Mount the bucket \(gcsfuse .* my-runs FOLDER"):
        cli.call(words)


def test_a_command_line_fetches_what_it_names(bucket: gcsfs.GCSFileSystem, copies: Path) -> None:
    words = ["vau train", "--config=vau_r1_sft", "--workdir=run", "--config.data.csv=gs://bucket/data/train.csv"]
    config, _ = config_flags.parse(words)
    assert config.data.csv == str(copies / "bucket" / "data" / "train.csv")
