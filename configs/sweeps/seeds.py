"""The demo over seeds of weights, data order and sampling."""

from vau_jax.configs.sweeps import Trials, over, product

PROGRAM = "vau_jax.launch.demo"
CONFIG = "configs/demo.py"


def get_hyper() -> Trials:
    return product([{"shared": "{sweep}/shared"}], over("seed", range(3)))
