"""Peak rates of accelerators, from their makers' data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The peak rates of one chip."""

    flops: float  # bfloat16 operations a second, dense
    bandwidth: float  # bytes a second to and from its memory
    memory: float  # bytes
    links: float  # bytes a second to the other chips, one way, all links together
    network: float = 0.0  # bytes a second to other slices, its share of its host's network; 0: unknown


GIB = 2.0**30
CHIPS = {  # by the beginning of JAX's device kind
    "TPU v4": Chip(275e12, 1.228e12, 32 * GIB, 300e9, 6.25e9),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * GIB, 200e9, 3.125e9),
    "TPU v5": Chip(459e12, 2.765e12, 95 * GIB, 600e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 1.64e12, 32 * GIB, 448e9, 12.5e9),
    "NVIDIA A100": Chip(312e12, 2.04e12, 80 * GIB, 300e9),
    "NVIDIA H100": Chip(989e12, 3.35e12, 80 * GIB, 450e9),
    "NVIDIA H200": Chip(989e12, 4.8e12, 141 * GIB, 450e9),
}


def chip(device_kind: str) -> Chip | None:
    """The chip of a device by JAX's name; None for one that is not in the table, such as a CPU."""
    known = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(known, key=len)] if known else None
