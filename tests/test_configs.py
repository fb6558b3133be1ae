"""Every config builds, each field is explained once, and a misspelt one fails naming the nearest."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vau_jax.configs import base

ROOT = Path(__file__).parents[1]
TRAINING = sorted(p.stem for p in (ROOT / "configs").glob("*vau_r1*.py"))


def fields(config: ConfigDict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in config.items():
        found |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name}
    return found


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_config_has_the_fields_of_base(name: str) -> None:
    assert fields(importlib.import_module(f"vau_jax.configs.{name}").get_config()) == fields(base.get_config())


def test_base_explains_every_field() -> None:
    """Each assignment has a comment on its line; a group's fields have theirs."""
    lines = (ROOT / "configs" / "base.py").read_text().splitlines()
    bare = [line for line in lines if re.match(r"    c\.\S+ = ", line) and "#" not in line]
    assert [line for line in bare if not line.endswith("ConfigDict()")] == []


@pytest.mark.parametrize("mode", ["", "quick"])
def test_the_demo_config_builds(mode: str) -> None:
    from vau_jax.configs import demo

    c = demo.get_config(mode)
    assert fields(c.sft) == fields(c.rft) == fields(base.get_config())


def test_a_misspelt_field_in_a_config_file_names_the_nearest() -> None:
    c = base.get_config()
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        c.optim.lrr = 1.0


def test_the_options_that_the_readme_names_exist() -> None:
    """Each `group.field=value` of the launch README is a field of base.py, of the value's type."""
    text = (ROOT / "launch" / "README.md").read_text()
    named = re.findall(r"`((?:grpo|rollout|data|optim)\.[a-z_.]+)(?:=([^`]+))?`", text)
    assert len(named) > 15
    config = base.get_config()
    for name, value in named:
        *groups, field = name.split(".")
        group = functools.reduce(getattr, groups, config)
        default = getattr(group, field)
        if value:
            literal = ast.literal_eval(value.strip('"')) if value[0] in '"0123456789TF' else value
            assert isinstance(literal, type(default)), name
