"""Provenance of a result, for metrics.json, about.json and reports."""

import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def about() -> dict[str, Any]:
    """Time, commit (None outside a git checkout), versions and devices of this process."""
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("vau_jax", "jax", "flax", "transformers")},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The commit of the checkout that contains this code; with "+" where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
