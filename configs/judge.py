"""VAU-Eval of an evaluation's descriptions by a model behind an OpenAI-compatible endpoint."""

from ml_collections import ConfigDict

from vau_jax.configs import base


def get_config() -> ConfigDict:
    c = base.endpoint()
    c.temperature = 0.0  # the same marks each time
    c.name = "judge"  # name of the judge; several judges can mark the same evaluation
    return c
