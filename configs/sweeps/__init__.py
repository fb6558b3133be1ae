"""Sweeps: a module names PROGRAM, CONFIG, and `get_hyper() -> Trials`; `launch/sweep.py` runs its trials.

A trial is {config field: value}. `over` gives trials that differ in one field, `product` combines lists of trials in
all ways, `zipped` one by one. `{sweep}` in a text stands for the sweep's own folder.
"""

import itertools
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any

Trials = list[dict[str, Any]]


def over(field: str, values: Iterable[Any]) -> Trials:
    """A trial for each value of one field."""
    return [{field: value} for value in values]


def product(*parts: Trials) -> Trials:
    """Every choice of one trial of each part, joined; the last part varies fastest."""
    return [reduce(or_, trials, {}) for trials in itertools.product(*parts)]


def zipped(*parts: Trials) -> Trials:
    """The first trials of all parts joined, the second ones, and so on. Parts of unequal length raise ValueError."""
    return [reduce(or_, trials, {}) for trials in zip(*parts, strict=True)]
