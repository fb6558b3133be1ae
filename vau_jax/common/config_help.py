"""The package's configs, and the fields of one with their defaults and comments, read from the text of its file: it is
not imported, so that help is immediate. Each assignment of `configs/base.py` stands on one line, with its comment."""

import re
from pathlib import Path
from typing import NamedTuple

from vau_jax import configs

CONFIGS = Path(configs.__file__).parent
ASSIGNMENT = re.compile(r"    c(?:\.(\S+))? = (.*?)(?:  # (.*))?")
CALL = re.compile(r"(?:(\w+)\.)?(endpoint|get_config)\(\)")
OF_ANY_TYPE = re.compile(r"FieldReference\((.*), object\)")
INHERITED = re.compile(r"train\.(\S+)")  # `train` is base's config


class Field(NamedTuple):
    """A field of a config."""

    name: str  # such as optim.lr
    default: str  # as Python code
    comment: str  # empty: none


def known() -> list[str]:
    """The names of the package's configs."""
    paths = [*CONFIGS.glob("[a-z]*.py"), *CONFIGS.glob("*/[a-z]*.py")]
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in paths)


def fields(path: Path, function: str = "get_config") -> list[Field]:
    """The fields that a function of a config file sets, in order, with those that it takes over from base."""
    found: dict[str, Field] = {}
    text = path.read_text(encoding="utf-8")
    body = re.split(rf"^def {function}\b.*\n", text, flags=re.MULTILINE)[1]
    for line in re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
        if not (match := ASSIGNMENT.fullmatch(line)):
            continue
        name, value, comment = match.groups(default="")
        call, inherited = CALL.fullmatch(value), INHERITED.fullmatch(value)
        if value == "ConfigDict()":
            continue
        if inherited:
            taken = fields(path.with_name("base.py"))
            start = inherited.group(1)
            taken = [f for f in taken if f.name == start or f.name.startswith(f"{start}.")]
            taken = [f._replace(name=name + f.name.removeprefix(start)) for f in taken]
        elif call:
            source = path.with_name(f"{call.group(1)}.py") if call.group(1) else path
            taken = [f._replace(name=f"{name}.{f.name}".lstrip(".")) for f in fields(source, call.group(2))]
        else:
            value = OF_ANY_TYPE.sub(r"\1", value)
            taken = [Field(name, value, comment or (found[name].comment if name in found else ""))]
        found |= {field.name: field for field in taken}
    return list(found.values())
