"""`python -m vau_jax.train`: see `vau_jax.train.loop`."""

from vau_jax import cli

if __name__ == "__main__":
    cli.main("train")
