"""The published experiments, a config a row: `vau train --config=reproduce/vau_r1:rft_qa`. `launch/reproduce.py` runs
whole rows, from the weights they begin with to the table.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vau_jax.configs import base


class Row(NamedTuple):
    """A training run of a paper."""

    stage: str  # sft or rft
    tasks: tuple[str, ...]
    begins: str = ""  # the row whose run it starts from; empty: the published Instruct weights
    changed: tuple[tuple[str, Any], ...] = ()  # fields of the config, by name
    teacher: str = ""  # whose reflection records it reads: rules or model; empty: none
    tested: tuple[str, ...] = ()  # rows of configs/reproduce/evaluate.py
    prompts: str = ""  # folder of VAU-R1's code with the prompts of the run; empty: it is not theirs


def config_of(rows: dict[str, Row], name: str, file: str) -> ConfigDict:
    """The config of a row. Raises ValueError for an unknown one."""
    if name not in rows:
        raise ValueError(f"--config={file}:{name}: expected {file}:ROW with ROW one of {', '.join(rows)}")
    row, c = rows[name], base.get_config()
    c.stage, c.data.tasks = row.stage, row.tasks
    for field, value in row.changed:
        c.update_from_flattened_dict({field: value})
    return c
