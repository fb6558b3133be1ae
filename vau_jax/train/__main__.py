"""`python -m vau_jax.train`: see `vau_jax.train.loop`."""

from vau_jax.common import cli
from vau_jax.train.loop import run

if __name__ == "__main__":
    cli.main(run)
