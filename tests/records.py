"""Examples and evaluated records of VAU-Bench's rows, as tests of metrics and reports need them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vau_jax.datasets import vau_bench
from vau_jax.datasets.vau_bench import Row
from vau_jax.eval import records
from vau_jax.tasks.example import Example
from vau_jax.tasks.record import Record

ROW = Row(
    video="a.mp4",
    source="msad",
    question="What happens?",
    options=("a flood", "a fire", "a fall", "nothing"),
    answer="B",
    anomaly_class="Fire",
    interval=(2.0, 6.0),
    key_object="flames",
    description="A shed burns.",
    reasoning={"Key Evidence": "Smoke rises."},
    duration=10.0,
)


def example(task: str, **changed: Any) -> Example:
    """The example of a row, whose fields are `changed`."""
    return vau_bench.example_of(replace(ROW, **changed), task)


def record(
    task: str, completions: str | Sequence[str], style: str = "think", failure: str | None = None, **changed: Any
) -> Record:
    """What an evaluation writes of such an example."""
    texts = [completions] if isinstance(completions, str) else completions
    return records.make(example(task, **changed), texts, style, failure=failure)
