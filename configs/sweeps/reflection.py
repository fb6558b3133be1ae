"""What reflection is worth, on the demo's videos: each way of training with the same facts and the same budget.

Completions in one pass, in two passes without reflection, and with reflection; the last also without SFT, and its
first stage alone is SFT without RFT. launch/README.md has the table, and the plan for a model of 3 billion weights.
"""

from vau_jax.configs.sweeps import Trials, over, product

PROGRAM = "vau_jax.launch.demo"
CONFIG = "configs/demo.py"


def get_hyper() -> Trials:
    same = [{"shared": "{sweep}/shared", "rft.steps": 150}]
    ways = [*over("style", ("think", "two_pass", "reflection")), {"style": "reflection", "stages": ("rft",)}]
    return product(same, over("seed", range(3)), ways)
