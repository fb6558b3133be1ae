"""A program that a test's sweep calls: scores config.skill by luck of config.seed, and fails where it is told to."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from vau_jax.common import config_flags
from vau_jax.common.files import InputError, write_text


def get_config() -> ConfigDict:
    return ConfigDict({"seed": 0, "skill": 0.0, "broken": "", "options": (1, 2)})


def run(config: ConfigDict, workdir: Path) -> None:
    if config.broken and Path(config.broken).exists():
        raise InputError(f"broken={config.broken}: it is")
    value = {"value": config.skill + 0.1 * config.seed, "n": 1, "low": 0.0, "high": 1.0}
    folder = workdir / "eval" / "only"
    folder.mkdir(parents=True)
    write_text(folder / "metrics.json", json.dumps({"name": "only", "tasks": {"qa": {"accuracy": value}}}))


if __name__ == "__main__":
    config_flags.main(run)
