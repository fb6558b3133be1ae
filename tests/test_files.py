"""Files are written whole, also by several threads at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vau_jax import files


def test_threads_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path, contents = tmp_path / "frame.npy", [bytes([n]) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: [files.write_bytes(path, data) for _ in range(20)], contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
