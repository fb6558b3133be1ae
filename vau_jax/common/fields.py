"""Fields of a JSON object from an external file, read with their type and range checked.

No value of such a file is used unchecked: a size of 10^9, a negative, NaN, true in place of a number and a list in
place of a string each end in one InputError that names the file and the field.
"""

import math
import reprlib
from collections.abc import Callable, Collection
from typing import Any

from vau_jax.common.files import InputError

REQUIRED = object()  # the default of a field that must be there


class Fields:
    """The fields of one object. A field that is null counts as absent: it takes its default.

    Raises InputError where `raw` is no object, and from every method where the field is absent without a default, of
    another type, or out of range.
    """

    def __init__(self, raw: Any, where: str) -> None:
        """`where` names the object in messages: a path, with the names of the fields that lead to it."""
        if not isinstance(raw, dict):
            raise InputError(f"{where} is {reprlib.repr(raw)}: expected a JSON object")
        self.raw, self.where = raw, where

    def _read(self, name: str, default: Any, expected: str, valid: Callable[[Any], bool]) -> Any:
        value = self.raw.get(name)
        if value is None:
            if default is REQUIRED:
                raise InputError(f"{self.where} lacks the field {name!r}: expected {expected}")
            return default
        if not valid(value):
            raise InputError(f"{self.where}: {name}={reprlib.repr(value)}: expected {expected}")
        return value

    def integer(self, name: str, least: int, most: int, default: Any = REQUIRED) -> int:
        return self._read(name, default, f"an integer from {least} to {most}", lambda x: _integer(x, least, most))

    def integers(
        self, name: str, least: int, most: int, lengths: Collection[int], default: Any = REQUIRED
    ) -> tuple[int, ...]:
        """A list of integers, as many as one of `lengths`."""
        wanted = f"{_span(lengths)} integers from {least} to {most}"
        return tuple(self._read(name, default, wanted, lambda x: _list(x, lengths, lambda y: _integer(y, least, most))))

    def number(self, name: str, least: float, most: float, default: Any = REQUIRED) -> float:
        return self._read(name, default, f"a number from {least:g} to {most:g}", lambda x: _number(x, least, most))

    def numbers(
        self, name: str, least: float, most: float, lengths: Collection[int], default: Any = REQUIRED
    ) -> tuple[float, ...]:
        """A list of numbers, as many as one of `lengths`."""
        wanted = f"{_span(lengths)} numbers from {least:g} to {most:g}"
        return tuple(self._read(name, default, wanted, lambda x: _list(x, lengths, lambda y: _number(y, least, most))))

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        return self._read(name, default, "true or false", lambda x: isinstance(x, bool))

    def word(self, name: str, known: Collection[str], default: Any = REQUIRED) -> str:
        """One of `known`."""
        return self._read(name, default, f"one of {', '.join(known)}", lambda x: isinstance(x, str) and x in known)

    def text(self, name: str, default: Any = REQUIRED) -> str:
        return self._read(name, default, "a string", lambda x: isinstance(x, str))

    def object(self, name: str, default: Any = REQUIRED) -> "Fields":
        """The object inside this one, empty by default where `default` is {}."""
        return Fields(self._read(name, default, "an object", lambda x: isinstance(x, dict)), f"{self.where}: {name}")


def _integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any, least: float, most: float) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and least <= value <= most and math.isfinite(value)  # NaN is in no range


def _list(value: Any, lengths: Collection[int], valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(valid, value))


def _span(lengths: Collection[int]) -> str:
    return str(min(lengths)) if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)}"
