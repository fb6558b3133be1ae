"""`python -m vau_jax.report`: see `vau_jax.eval.report`."""

from vau_jax.common.files import exit_on_input_error
from vau_jax.eval.report import main

if __name__ == "__main__":
    exit_on_input_error(main)
