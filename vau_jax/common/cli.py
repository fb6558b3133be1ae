"""Command lines of the form `--config=configs/X.py[:arg] --workdir=DIR [--config.key=value]`."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vau_jax.common import processes
from vau_jax.common.files import InputError, exit_on_input_error


def main(run: Callable[[ConfigDict, Path], Any]) -> None:
    """Reads the flags and calls run(config, workdir); a user's mistake is one line and exit code 2."""
    exit_on_input_error(lambda: run(*parse()))


def parse() -> tuple[ConfigDict, Path]:
    """(config, workdir) of this program's command line; joins the other processes of the run. Raises InputError."""
    config, values = read(sys.argv)
    if values["workdir"].value is None:
        raise InputError("--workdir=DIR is needed: where the run writes everything")
    if values["distributed"].value:
        processes.start()
    return config, Path(values["workdir"].value)


# XLA for TPU would cut products with split weights into pieces, one for each chip's part, and add each to a sum in
# memory. With a whole prompt on a chip that costs three times the traffic of gathering the weights first.
TPU_FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


def read(arguments: list[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The config of a command line, and all its flags. Raises InputError."""
    os.environ.setdefault("LIBTPU_INIT_ARGS", TPU_FLAGS)  # must be set before a TPU, or its compiler, is first used
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a config file, see configs/", flag_values=values, lock_config=True)
    flags.DEFINE_string("workdir", None, "where the run writes everything", flag_values=values)
    flags.DEFINE_bool("distributed", False, "one of several processes of this run", flag_values=values)
    logging.set_verbosity(logging.WARNING)
    sys.path.insert(0, "")  # config files import configs.base from the current folder
    try:
        rest = values(arguments)
        config = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise InputError(_last_line(error)) from error
    if rest[1:]:
        raise InputError(f"unexpected argument(s) {' '.join(rest[1:])}: options have the form --name=value")
    if config is None:
        raise InputError("--config=configs/X.py is needed")
    _check_fields(dict(_fields(config)))
    return config, values


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values at any depth: ("grpo.beta", 0.04)."""
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _check_fields(fields: dict[str, Any]) -> None:
    """Raises InputError for a value that must not be in saved configs: a secret, or a number that JSON lacks."""
    for name, value in fields.items():
        if not _is_finite(value):
            raise InputError(f"{name}={value}: expected a finite number")
    urls = [
        value for name, value in fields.items() if name.split(".")[-1] == "url" and isinstance(value, str) and value
    ]
    if urls:
        from vau_jax.common.endpoint import check_url  # noqa: PLC0415 - slow to import, and few configs name endpoints

        for url in filter(None, urls):
            check_url(url)


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _last_line(error: Exception) -> str:
    """The message without a traceback inside it; for an unknown field it names the nearest known one."""
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return f"cannot read the config: {lines[-1]}"
    return f"the config has no field {' '.join(lines)}" if "Did you mean" in text else " ".join(lines)
