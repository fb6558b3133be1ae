"""Command lines of the form `--config=configs/X.py[:arg] --workdir=DIR [--config.key=value]`.

A config is a path, or the name of one of the package's own (`vau_r1_qa_rft`, `sweeps/seeds`), wherever it is installed.
"""

import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, FieldReference
from ml_collections import config_flags as ml_config_flags

from vau_jax.common import remote
from vau_jax.common.config_help import CONFIGS, known
from vau_jax.common.files import InputError, exit_on_input_error

# XLA for TPU would cut products with split weights into pieces, one for each chip's part, and add each to a sum in
# memory. With a whole prompt on a chip that costs three times the traffic of gathering the weights first.
TPU_FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


class _NumberOrWord(flags.ArgumentParser):
    """The value of a field that is a number or a word, such as auto."""

    def parse(self, argument: str) -> int | str:
        return int(argument) if re.fullmatch(r"[-+]?\d+", str(argument)) else argument


ml_config_flags.register_flag_parser_for_type(object, _NumberOrWord())


def main(run: Callable[[ConfigDict, Path], Any]) -> None:
    """Reads the flags and calls run(config, workdir); a user's mistake is one line and exit code 2."""
    exit_on_input_error(lambda: run(*parse(sys.argv)))


def parse(arguments: Sequence[str], config: str = "", workdir: str = "") -> tuple[ConfigDict, Path]:
    """(config, workdir) of a program's command line, whose defaults are given; joins the other processes of the run,
    and fetches inputs that are named by gs:// addresses. Raises InputError."""
    read_config, values = read(arguments, config)
    folder = values["workdir"].value or workdir
    if not folder:
        raise InputError("--workdir=DIR is needed: where the run writes everything")
    if values["distributed"].value:
        from vau_jax.common import processes  # noqa: PLC0415 - imports JAX, and printing a config needs none

        processes.start()
    remote.refuse(folder, "--workdir")
    remote.replace_addresses(read_config)
    return read_config, Path(folder)


def read(arguments: Sequence[str], config: str = "") -> tuple[ConfigDict, flags.FlagValues]:
    """The config of a command line, by default the one named, and all its flags. Raises InputError."""
    os.environ.setdefault("LIBTPU_INIT_ARGS", TPU_FLAGS)  # must be set before a TPU, or its compiler, is first used
    logging.set_verbosity(logging.WARNING)
    sys.path.insert(0, "")  # config files may import modules of the current folder
    program, *given = arguments
    if not any(re.match(r"--?config(=|$)", argument) for argument in given):
        if not config:
            raise InputError(f"--config=CONFIG is needed: a file, or one of {', '.join(known())}")
        given = [f"--config={config}", *given]
    given = _located(given)
    overrides = [argument for argument in given if re.match(r"--?(no)?config\.", argument)]
    plain = [argument for argument in given if re.match(r"--?config=", argument)]
    _check_names(overrides, [name for name, _ in fields(_parsed([program, *plain])["config"].value)])
    values = _parsed([program, *given])
    result = values["config"].value
    _check_values(dict(fields(result)))
    return result, values


def find(name: str) -> Path:
    """The file of a config, by its path or its name. Raises InputError."""
    own = CONFIGS / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    for path in (Path(name), own):
        if path.is_file():
            return path
    raise InputError(f"--config={name} does not exist: expected a file, or one of {', '.join(known())}")


def _located(arguments: list[str]) -> list[str]:
    """Command-line arguments with the path of the config: `--config=PATH[:arg]`."""
    located, rest = [], iter(arguments)
    for argument in rest:
        if re.match(r"--?config(=|$)", argument):
            _, separator, value = argument.partition("=")
            name, colon, mode = (value if separator else next(rest, "")).partition(":")
            argument = f"--config={find(name)}{colon}{mode}"
        located.append(argument)
    return located


def _parsed(arguments: Sequence[str]) -> flags.FlagValues:
    """The flags of a command line. Raises InputError."""
    values = flags.FlagValues()
    argv = list(arguments)  # where ml_collections looks for the names of fields
    ml_config_flags.DEFINE_config_file("config", None, "a config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "where the run writes everything", flag_values=values)
    flags.DEFINE_bool("distributed", False, "one of several processes of this run", flag_values=values)
    try:
        rest = values(argv)
        _ = values["config"].value.keys()  # a file that could not be read fails only where it is used
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise InputError(_message(error)) from error
    if rest[1:]:
        raise InputError(f"unexpected argument(s) {' '.join(rest[1:])}: options have the form --name=value")
    return values


def _check_names(overrides: Sequence[str], names: Sequence[str]) -> None:
    """Raises InputError for `--config.NAME` whose name is no field."""
    for argument in overrides:
        name = re.sub(r"(=.*)|(\[\d+\])", "", argument.partition("config.")[2], flags=re.DOTALL)
        if name in names:
            continue
        inside = [field for field in names if field.startswith(f"{name}.")]
        if inside:
            raise InputError(f"config.{name} is a group: set its fields, such as --config.{inside[0]}=...")
        close = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise InputError(f"the config has no field {name}: did you mean {close[0]}? --help lists all fields")


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values at any depth: ("grpo.beta", 0.04)."""
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value.get() if isinstance(value, FieldReference) else value


def _check_values(values: dict[str, Any]) -> None:
    """Raises InputError for a value that must not be in saved configs: a secret, or a number that JSON lacks."""
    for name, value in values.items():
        if not _is_finite(value):
            raise InputError(f"{name}={value}: expected a finite number")
    urls = [
        value for name, value in values.items() if name.split(".")[-1] == "url" and isinstance(value, str) and value
    ]
    if urls:
        from vau_jax.common.endpoint import check_url  # noqa: PLC0415 - slow to import, and few configs name endpoints

        for url in filter(None, urls):
            check_url(url)


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _message(error: Exception) -> str:
    """A library's error as one line, without a traceback inside it."""
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return f"cannot read the config: {re.sub(r'^[A-Za-z_.]+: ', '', lines[-1])}"
    return " ".join(lines)
