"""Files are written whole, also by several threads at once."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vau_jax import files


def test_threads_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path, contents = tmp_path / "frame.npy", [bytes([n]) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: [files.write_bytes(path, data) for _ in range(20)], contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_s_hash_is_that_of_its_contents_as_they_are_now(tmp_path: Path) -> None:
    for text in (b"as it was", b"as it is now"):
        (tmp_path / "a.csv").write_bytes(text)
        assert files.content_hash(tmp_path / "a.csv") == hashlib.sha256(text).hexdigest()
    with pytest.raises(files.InputError, match=r"cannot read .*b\.csv: No such file"):
        files.content_hash(tmp_path / "b.csv")
