"""The fields of a config as it resolves, each beside what it changes.

    vau config CONFIG [--config.key=value] [--changed]

CONFIG is a path or a name, such as configs/vau_r1_qa_rft.py or vau_r1_qa_rft. A field that differs from
configs/base.py, or of an evaluation from configs/eval.py, has the value there in a comment; a config with other fields
(judge, reflection, demo) is compared with itself before the changes of the command line.
"""

import argparse
from collections.abc import Sequence

from vau_jax import cli
from vau_jax.common import config_flags


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Prints the config as lines of Python. Raises InputError."""
    config, _ = config_flags.read(["vau config", f"--config={args.name}", *rest])
    own = dict(config_flags.fields(config))
    base, name = {}, ""
    for name in ("base", "eval", args.name):
        base = dict(config_flags.fields(config_flags.read(["vau config", f"--config={name}"])[0]))
        if own.keys() == base.keys():
            break
    name = f"configs/{name}.py" if name != args.name else name
    changed = [field for field, value in own.items() if value != base[field]]
    for field, value in own.items():
        if field in changed:
            print(f"{field} = {value!r}  # {name}: {base[field]!r}")
        elif not args.changed:
            print(f"{field} = {value!r}")
    print(f"# {len(changed)} of {len(own)} fields differ from {name}")


if __name__ == "__main__":
    cli.main("config")
