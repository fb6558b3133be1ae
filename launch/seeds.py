"""Mean and spread over seeds of the demo's results, as a Markdown table.

python -m launch.seeds runs/seed0 runs/seed1 runs/seed2
"""

import argparse
from pathlib import Path

import numpy as np

from vau_jax.files import InputError, exit_on_input_error, read_json
from vau_jax.report import ROWS, lookup, markdown

NAMES = ("init", "sft", "rft", "sft_blind", "rft_blind")


def table(folders: list[Path]) -> str:
    """A row a number: mean ± standard deviation (ddof 1) of each evaluation, and of the gain from SFT to RFT."""
    results = {name: [_read(folder / "eval" / name / "metrics.json") for folder in folders] for name in NAMES}
    lines = [["", *(name.replace("_", " ") for name in NAMES), "rft - sft", "constant guess"]]
    for title, path, guess in ROWS:
        values = {name: np.asarray([lookup(r, path)["value"] for r in found]) for name, found in results.items()}
        constant = f"{lookup(results['rft'][0], guess)['value']:.2f}" if guess else ""
        lines.append([title, *map(_cell, values.values()), _cell(values["rft"] - values["sft"]), constant])
    return markdown(lines)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path} does not exist: run bash launch/demo.sh {path.parents[2]} first")
    return read_json(path)


def _cell(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description="results of the demo over seeds")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    print(table(parser.parse_args().folders))


if __name__ == "__main__":
    exit_on_input_error(main)
