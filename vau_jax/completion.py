"""Completion of the command `vau` in bash and zsh, with every option and every field of a config.

In ~/.bashrc: `source <(vau completion bash)`. In ~/.zshrc, after compinit: `eval "$(vau completion zsh)"`.
"""

import argparse

import shtab

from vau_jax import cli


def main(args: argparse.Namespace) -> None:
    """Prints the script of a shell."""
    print(shtab.complete(cli.whole_parser(), args.shell))


if __name__ == "__main__":
    cli.main("completion")
