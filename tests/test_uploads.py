"""The folder of uploaded files: whose it is, and when it goes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vau_jax.web import uploads

ROOT = Path(__file__).parents[1]
OWNER = """
import pathlib, sys
from vau_jax.web import uploads
with uploads.open_folder(10) as found:
    (found.folder / "video").write_text("x")
    print(found.folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process with a folder of its own."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, env=env, text=True, **pipes) as process:
        process.folder = Path(process.stdout.readline().strip())
        yield process
        process.kill()


def test_the_folder_of_a_killed_process_goes_at_the_next_start_and_that_of_a_living_one_stays(
    owner: subprocess.Popen,
) -> None:
    with uploads.open_folder(10):
        assert (owner.folder / "video").exists()
    owner.kill()
    owner.wait()
    assert (owner.folder / "video").exists()
    with uploads.open_folder(10):
        assert not owner.folder.exists()


def test_the_folder_goes_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError), uploads.open_folder(10) as found:
        (found.folder / "video").write_text("x")
        assert os.environ["GRADIO_TEMP_DIR"] == str(found.folder)
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "video").write_text("x")
    (tmp_path / f"{uploads.PREFIX}link").symlink_to(tmp_path / "other")
    (tmp_path / f"{uploads.PREFIX}file").write_text("x")
    uploads.remove_leftovers()
    assert (tmp_path / "other" / "video").exists() and (tmp_path / f"{uploads.PREFIX}file").exists()


def test_files_go_when_they_are_old(tmp_path: Path) -> None:
    found = uploads.Uploads(tmp_path, 10)
    for name, age in (("old", uploads.KEPT + 60), ("new", 60)):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    found.expire()
    assert [path.name for path in found.files()] == ["new"]


def test_uploads_under_way_count(tmp_path: Path) -> None:
    found = uploads.Uploads(tmp_path, 10)
    assert found.reserve(6) and not found.reserve(5)
    found.ended(6)
    assert found.reserve(5)
