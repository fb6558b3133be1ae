"""The demo over seeds of weights, data order and sampling."""

from configs.sweeps import Trials, over, product

PROGRAM = "launch.demo"
CONFIG = "configs/demo.py"


def get_hyper() -> Trials:
    return product([{"shared": "{sweep}/shared"}], over("seed", range(3)))
