"""Video anomaly understanding with reinforcement fine-tuning, in JAX."""

import os
from glob import glob
from importlib.util import find_spec
from pathlib import Path

if not (Path(__file__).parent / "configs").is_dir():
    # In a checkout configs/, data_prep/ and launch/ are beside this folder; a wheel has them inside it.
    __path__.append(str(Path(__file__).parents[1]))

# transformers is used for tokenizers alone; it would warn at every start that torch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")  # TPUs, GPUs, GPUs under WSL
if find_spec("libtpu") and not any(map(glob, ACCELERATORS)):
    # libtpu, where it is installed to compile for absent TPUs, would log errors when JAX looks for devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
