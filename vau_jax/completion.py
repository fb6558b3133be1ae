"""Completion of the command `vau` for bash and zsh, with every option and every field of a config.

source <(vau completion bash)       # in ~/.bashrc
eval "$(vau completion zsh)"        # in ~/.zshrc, after compinit
"""

import argparse

import shtab

from vau_jax import cli


def main(args: argparse.Namespace) -> None:
    """Prints the script of a shell."""
    print(shtab.complete(cli.whole_parser(), args.shell))


if __name__ == "__main__":
    cli.main("completion")
