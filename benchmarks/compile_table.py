"""The table of launch/README.md: what an update and a decoding step need on TPU pods, by launch/compile_check.py.

    python benchmarks/compile_table.py --folder=DIR [--only=grpo-3b-v5e16 ...]

Writes a JSON file and the printed report for each row into DIR, leaves out rows that are there already, and prints the
rows as Markdown: memory and time, then the collectives of an update. A row takes one to five minutes and 4 GiB.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vau_jax.common.chips import GIB
from vau_jax.launch.hlo import COLLECTIVES

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("3b", "7b")
TRAINING = {  # config and options
    "grpo": ("vau_r1_qa_rft", ["--config.rollout.num_generations=8", "--only=decode step"]),
    "grpo-lora": (
        "vau_r1_qa_rft",
        ["--config.rollout.num_generations=8", "--only=decode step", "--config.lora.rank=16"],
    ),
    "sft": ("vau_r1_sft", []),
    "sft-lora": ("vau_r1_sft", ["--config.lora.rank=16"]),
}


class Pod(NamedTuple):
    topology: str
    fsdp: int
    tensor: int
    slices: int = 1  # each holds a whole row of data

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(int(side) for side in self.topology.partition(":")[2].split("x"))

    @property
    def prompts(self) -> int:
        """Of a batch: one for each part of data x fsdp."""
        return self.slices * self.fsdp

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"{self.slices} x " * (self.slices > 1) + self.topology.replace(":", " ")


PODS = {
    "v5e16": Pod("v5e:4x4", 4, 4),
    "v5e64": Pod("v5e:8x8", 16, 4),
    "v5e256": Pod("v5e:16x16", 64, 4),
    "2xv5e16": Pod("v5e:4x4", 4, 4, 2),
    "4xv5e64": Pod("v5e:8x8", 16, 4, 4),
    "2xv5e256": Pod("v5e:16x16", 64, 4, 2),
    "4xv5e256": Pod("v5e:16x16", 64, 4, 4),
    "v5p64": Pod("v5p:4x4x4", 64, 1),
    "v6e64": Pod("v6e:8x8", 32, 2),
}
HEADS = ["model", "training", "chips", "mesh (fsdp, tensor)", "update: peak", "with the rest of the state", "of"]
HEADS += ["at least", "bound by", "MFU at most", "decoding step: at least", "reads"]


def rows() -> Iterator[tuple[str, str, str, Pod]]:
    """(name, model, training, pod), in the table's order."""
    for training, model, (name, pod) in itertools.product(TRAINING, MODELS, PODS.items()):
        yield f"{training}-{model}-{name}", model, training, pod


def compile_row(model: str, training: str, pod: Pod, file: Path) -> None:
    """Runs compile_check; the printed report stays beside the JSON file."""
    config, options = TRAINING[training]
    command = [sys.executable, "launch/compile_check.py", f"--config=configs/{config}.py", f"--json={file}"]
    command += [f"--topology={pod.topology}", f"--size=qwen2.5-vl-{model}", "--only=update", *options]
    command += [f"--config.mesh.fsdp={pod.fsdp}", f"--config.mesh.tensor={pod.tensor}"]
    command += [f"--slices={pod.slices}", f"--config.mesh.data={pod.slices}"]
    command += [f"--config.batch_size={pod.prompts}", "--config.data.max_completion_tokens=512"]
    with file.with_suffix(".log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)  # noqa: S603


def line(model: str, training: str, pod: Pod, report: dict[str, Any]) -> list[str]:
    """A row of the first table."""
    programs = {program["program"]: program for program in report["programs"]}
    update, decode = programs["update"], programs.get("decode step")
    kind, _, lora = training.partition("-")
    cells = [model.upper(), kind.upper() + (", LoRA 16" if lora else ""), pod.label, f"{pod.fsdp}, {pod.tensor}"]
    if not update["seconds"]:
        return [*cells, update["problem"], *[""] * 7]
    cells += [f"{update[name] / GIB:.2f} GiB" for name in ("peak", "needed")]
    cells += [f"{report['chip']['memory'] / GIB:.0f}", f"{update['seconds'] * 1e3:.0f} ms", update["bound"]]
    cells.append(f"{update['mfu_cap']:.0%}")
    if not decode:
        return [*cells, "", ""]
    return [*cells, f"{decode['seconds'] * 1e3:.1f} ms", f"{decode['bytes'] / decode['least_bytes']:.2f}"]


def collectives(report: dict[str, Any]) -> list[str]:
    """Of an update: number and GB of each kind."""
    sent = next(program for program in report["programs"] if program["program"] == "update")["collectives"]
    none = {"count": 0, "bytes": 0}
    cells = [sent.get(kind, none) for kind in COLLECTIVES]
    return [f"{cell['count']:,.0f}: {cell['bytes'] / 1e9:.1f} GB" if cell["count"] else "" for cell in cells]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, with a blank line after it."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (heads, ["---"] * len(heads), *rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    names = [name for name, *_ in rows()]
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="ROW", help=", ".join(names))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cells, sent = [], []
    for name, model, training, pod in rows():
        file = args.folder / f"{name}.json"
        if name not in args.only:
            continue
        if not file.exists():
            compile_row(model, training, pod, file.resolve())
        if not file.exists():
            print(f"{name}: no result, see {file.with_suffix('.log')}", file=sys.stderr, flush=True)
            continue
        result = json.loads(file.read_text())
        cells.append(line(model, training, pod, result))
        sent.append([*cells[-1][:4], *collectives(result)])
        print(" | ".join(cells[-1]), file=sys.stderr, flush=True)  # how far it is
    print(markdown(HEADS, cells) + markdown([*HEADS[:4], *COLLECTIVES], sent), end="")


if __name__ == "__main__":
    main()
