"""`python -m vau_jax.judge`: see `vau_jax.eval.judge`."""

from vau_jax import cli

if __name__ == "__main__":
    cli.main("judge")
