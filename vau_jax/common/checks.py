"""Checks of settings, used by each module for its own part of a config."""

import math
import re
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from vau_jax.common.files import InputError, check_range

Range = tuple[float, float]  # least and most
COUNT: Range = (1, math.inf)
NOT_NEGATIVE: Range = (0, math.inf)
SHARE: Range = (0, 1)


def check_ranges(config: ConfigDict, prefix: str, ranges: Mapping[str, Range]) -> None:
    """Raises InputError for the first number of `config` that is not finite or outside of its range; errors name it
    after `prefix`."""
    for name, (least, most) in ranges.items():
        check_range(prefix + name, config[name], least, most)


def check_choices(config: ConfigDict, prefix: str, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises InputError for the first value of `config` that is none of its choices."""
    for name, known in choices.items():
        if config[name] not in known:
            raise InputError(f"{prefix}{name}={config[name]!r} is unknown: expected one of {', '.join(known)}")


def check_patterns(config: ConfigDict, prefix: str, names: Sequence[str]) -> None:
    """Raises InputError for an invalid regular expression."""
    for name in names:
        for pattern in config[name]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"{prefix}{name} has {pattern!r}, which is not a valid regular expression: {error}"
                ) from error
