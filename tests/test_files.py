"""Files are written whole, also by several threads at once."""

import ast
import hashlib
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from vau_jax.common import files

ROOT = Path(__file__).parents[1]


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


def test_numbers_that_json_has_not_are_null() -> None:
    found = {"a": math.nan, "b": (1.5, -math.inf, {"c": [np.float64("inf")]}), "d": np.float64(2.5), "e": "NaN"}
    assert files.dump_json(found) == '{"a": null, "b": [1.5, null, {"c": [null]}], "d": 2.5, "e": "NaN"}'


def test_no_other_json_is_written() -> None:
    """Python's own would write NaN and Infinity, which others cannot read."""
    calls = [
        (path.relative_to(ROOT).as_posix(), ast.unparse(node))
        for folder in ("vau_jax", "data_prep", "launch", "configs", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "peers" not in path.parts  # programs of their own, which print one line
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")
    ]
    assert calls and [call for call in calls if "allow_nan=" not in call[1]] == []
    between_processes = [path for path, call in calls if "allow_nan=True" in call]
    assert between_processes == ["vau_jax/common/processes.py"]


HOLD = """
import sys, time
from vau_jax.common.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_process_s_until_that_dies(tmp_path: Path) -> None:
    """The process is killed, so that nothing of its own can give the folder back."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(files.InputError, match=rf"{tmp_path} is in use by process {holder.pid} on .* since .*: wait"):
        files.locked(tmp_path).__enter__()
    holder.kill()
    holder.wait()
    for _ in range(2):  # and given back at the end of the block
        with files.locked(tmp_path):
            pass
