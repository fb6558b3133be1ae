"""`python -m vau_jax.evaluate`: see `vau_jax.eval.evaluate`."""

from vau_jax import cli

if __name__ == "__main__":
    cli.main("evaluate")
