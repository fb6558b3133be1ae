"""Calls of the launchers for their tests, and what a shell makes of the commands that they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = (
    "vau_jax.train",
    "--config=configs/vau_r1_sft.py",
    "--workdir=runs/sft",
    "--config.data.tasks=('qa', 'grounding')",
)
POD = {"PROJECT": "lab", "ZONE": "us-west4-a", "NAME": "pod", "TYPE": "v5litepod-16", "BUCKET": "lab-runs"}
GKE = {
    "PROJECT": "lab",
    "ZONE": "us-west4-a",
    "NAME": "sft",
    "CLUSTER": "c",
    "TYPE": "v5litepod-16",
    "IMAGE": "image:1",
}
JOBSET = {"TOPOLOGY": "4x4", "ACCELERATOR": "tpu-v5-lite-podslice", "HOSTS": "4", "CHIPS": "4", "BUCKET": "lab-runs"}


def call(settings: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **settings}
    run = ["bash", f"launch/{command[0]}", *command[1:]]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def read_by(shell: str, words: str) -> list[str]:
    """The arguments that a shell makes of a command's text."""
    show = "import json, sys; print(json.dumps([a.encode(errors='surrogateescape').decode() for a in sys.argv[1:]]))"
    done = subprocess.run([shell, "-c", f'"$0" -c "$1" {words}', sys.executable, show], capture_output=True, check=True)
    return json.loads(done.stdout)
