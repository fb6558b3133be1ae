"""`python -m vau_jax.evaluate`: see `vau_jax.eval.evaluate`."""

from vau_jax.common import cli
from vau_jax.eval.evaluate import run

if __name__ == "__main__":
    cli.main(run)
