"""Video anomaly understanding with reinforcement fine-tuning, in JAX."""

import os
import sys
from glob import glob
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

# transformers is used for tokenizers alone; it would warn at every start that torch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")  # TPUs, GPUs, GPUs under WSL
if "JAX_PLATFORMS" not in os.environ and find_spec("libtpu") and not any(map(glob, ACCELERATORS)):
    # libtpu, where it is installed to compile for absent TPUs, would log errors when JAX looks for devices.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # imported before, it has read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")


class _Checkout:
    """Finds vau_jax.configs, vau_jax.data_prep and vau_jax.launch in a checkout, where they are beside this folder."""

    FOLDERS = {f"{__name__}.{name}": Path(__file__).parents[1] / name for name in ("configs", "data_prep", "launch")}  # noqa: RUF012

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if folder := cls.FOLDERS.get(name):
            return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        return None


if not (Path(__file__).parent / "configs").is_dir():  # a wheel has them inside
    sys.meta_path.insert(0, _Checkout)
