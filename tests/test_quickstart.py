"""The notebook runs from its first cell to its last, in an empty folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "quickstart.ipynb"


@pytest.mark.long
def test_the_notebook_runs_from_an_empty_folder(tmp_path: Path) -> None:
    """Its code, as a kernel would run it: it has no magics, and all names in one module."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not [line for line in code.splitlines() if line.startswith(("%", "!"))]
    code += "\nnp.testing.assert_allclose(gradient.sum(axis=1), -advantages / 4, rtol=1e-5)"  # rounding of float32 sums
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = (float(word) for word in done.stdout.split("loss ")[-1].split("\n")[0].split(" to "))
    assert last < first
    assert "gradient, summed over tokens" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in cells}) == len(cells) > 15
