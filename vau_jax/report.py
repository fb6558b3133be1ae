"""`python -m vau_jax.report`: see `vau_jax.eval.report`."""

from vau_jax import cli

if __name__ == "__main__":
    cli.main("report")
