"""Data-parallel efficiency and goodput on paper: of programs compiled for pods, with saves and restarts measured here.

    python benchmarks/compile_table.py --folder=DIR --only grpo-3b-v5e16 grpo-3b-2xv5e16 grpo-3b-4xv5e256 ...
    python benchmarks/efficiency.py --folder=DIR [--gb=2] [--restart=60] [--copy=5]

Prints two Markdown tables over the rows of DIR, and one JSON object last.

Efficiency: prompts per chip and second, relative to the fewest chips. A step is the update, 512 steps of decoding, and
two forward passes (the prompts before sampling, the reference's scores), each a quarter of the update, which computes
forward twice and backward. Once with all communication hidden behind the work, once with none.

Goodput: the share of the time that goes into steps, where a preemption comes every so many hours. Steps wait for a
checkpoint until the hosts have the state (--copy), and for the rest of it where it is not written by the next one. A
preemption costs the save that SIGTERM asks for and a restart: the slice again and the programs compiled (--restart),
the process started, the checkpoint read. One without notice costs, instead of the save, half the steps between two
checkpoints, and those that were done while the last one was written.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

if not __package__:  # called by its path, sys.path has this file's folder instead of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compile_table import MODELS, PODS, Pod, markdown
from vau_jax.common.files import dump_json
from vau_jax.launch import hlo
from vau_jax.models import checkpoint, hf
from vau_jax.models import config as model_config
from vau_jax.types import State

HOURS = (1, 6, 24)
CHIPS_A_HOST = 4
NEW_TOKENS = 512  # of compile_table's rows
EVERY = 100  # steps between checkpoints, the default


class Costs(NamedTuple):
    """What was measured on this machine."""

    start: float  # seconds of a process until it could read a checkpoint
    save: float  # bytes a second of a host, with hashes and fsync
    read: float


def measured(gb: float) -> Costs:
    """Starts a process, and writes and reads a checkpoint of so many GB."""
    began = time.monotonic()
    program = "import jax; from vau_jax.train import loop; jax.devices()"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)  # noqa: S603
    start = time.monotonic() - began
    rows = int(gb * 1e9 / 12) // 2**20  # float32 parameters and two moments, in blocks of 4 MiB
    state = State(jnp.int32(0), *(_blocks(rows, n) for n in (1, 2)), None)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = checkpoint.Checkpoints(folder)
        began = time.monotonic()
        checkpoints.save(1, state, {}, 0.0)
        checkpoints.wait()
        saved = time.monotonic()
        checkpoints.restore(1, state)
        done = time.monotonic()
        checkpoints.close()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return Costs(start, size / (saved - began), size / (done - saved))


def _blocks(rows: int, copies: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(copies), copies * rows)
    return {str(i): jax.random.normal(key, (2**20,), jnp.float32) for i, key in enumerate(keys)}


def seconds(report: dict[str, Any]) -> tuple[float, float]:
    """Of a step: with all communication hidden behind the work, and with none."""
    programs = {program["program"]: program for program in report["programs"]}
    chip, update, decode = report["chip"], programs["update"], programs["decode step"]
    work = {name: max(p["flops"] / chip["flops"], p["bytes"] / chip["bandwidth"]) for name, p in programs.items()}
    sent = {
        name: hlo.total(p["collectives"]) / chip["links"] + hlo.total(p["between"]) / chip["network"]
        for name, p in programs.items()
    }
    passes = 1 + 2 / 4
    hidden = passes * update["seconds"] + NEW_TOKENS * decode["seconds"]
    plain = passes * (work["update"] + sent["update"]) + NEW_TOKENS * (work["decode step"] + sent["decode step"])
    return hidden, plain


def goodput(hours: float, step: float, copy: float, write: float, restart: float, notice: bool) -> float:
    """Share of the time in steps. A save takes the seconds of `copy`, in which steps wait, and `write`."""
    steps = EVERY * step
    steady = steps / (copy + max(steps, write))
    lost = restart + write + (copy if notice else steps / 2)
    return steady * max(0.0, 1 - lost / (hours * 3600))


def compiled(folder: Path, model: str) -> dict[str, tuple[Pod, dict[str, Any]]]:
    """The rows of a folder of compile_table.py for one kind of chip, the fewest chips first."""
    files = {name: folder / f"grpo-{model}-{name}.json" for name in PODS}
    found = {n: (PODS[n], json.loads(f.read_text())) for n, f in files.items() if n.count("v5e") and f.exists()}
    return dict(sorted(found.items(), key=lambda item: (item[1][0].chips, item[1][0].slices)))


def row(pod: Pod, report: dict[str, Any], state: int, costs: Costs, restart: float, rate: float) -> dict[str, Any]:
    """What is known of a run with a state of so many bytes on these chips; `restart` are the seconds that a restart
    takes besides those of the process and the checkpoint, and `rate` the bytes a second that a host copies."""
    hidden, plain = seconds(report)
    host = state / (pod.chips / CHIPS_A_HOST)  # bytes that a host writes and reads
    copy, write, restart = host / rate, host / costs.save, restart + costs.start + host / costs.read
    shares = {h: [goodput(h, plain, copy, write, restart, notice) for notice in (True, False)] for h in HOURS}
    rates = [pod.prompts / pod.chips / s for s in (hidden, plain)]
    known = {"label": pod.label, "chips": pod.chips, "prompts": pod.prompts, "seconds": (hidden, plain), "rates": rates}
    return known | {"copy": copy, "write": write, "restart": restart, "goodput": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of compile_table.py's results")
    parser.add_argument("--model", default="3b", choices=MODELS)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint that is written and read here")
    parser.add_argument("--restart", type=float, default=60.0, help="seconds for the slice, and to compile")
    parser.add_argument("--copy", type=float, default=5.0, help="GB a second that a host copies from its chips")
    args = parser.parse_args()
    found = compiled(args.folder, args.model)
    if not found:
        parser.error(f"--folder={args.folder} has no row such as grpo-{args.model}-v5e16.json")
    costs = measured(args.gb)
    sizes = hf.parameter_shapes(model_config.from_hf(model_config.SIZES[f"qwen2.5-vl-{args.model}"]))
    state = 12 * sum(map(math.prod, sizes.values()))  # float32 parameters and AdamW's two moments
    given = (state, costs, args.restart, args.copy * 1e9)
    results = {name: row(pod, report, *given) for name, (pod, report) in found.items()}
    steps, lost = [], []
    first = next(iter(results.values()))["rates"]
    for r in results.values():
        r["efficiency"] = [rate / base for rate, base in zip(r["rates"], first, strict=True)]
        steps.append([r["label"], str(r["chips"]), str(r["prompts"]), *(f"{s:.2f} s" for s in r["seconds"])])
        steps[-1] += [f"{share:.0%}" for share in r["efficiency"]]
        lost.append([r["label"], *(f"{r[name]:.1f} s" for name in ("copy", "write")), f"{r['restart']:.0f} s"])
        lost[-1] += [" / ".join(f"{share:.1%}" for share in shares) for shares in r["goodput"].values()]
    heads = ["slices", "chips", "prompts", "step, communication hidden", "not hidden"]
    print(markdown([*heads, "efficiency, hidden", "not hidden"], steps), end="")
    print(markdown(["slices", "copy", "write", "restart", *(f"every {h} h" for h in HOURS)], lost), end="")
    print(dump_json({"costs": costs._asdict(), "rows": results}))


if __name__ == "__main__":
    main()
