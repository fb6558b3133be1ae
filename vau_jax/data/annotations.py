"""Public names of the VAU-Bench reader; the reader itself is `vau_jax.datasets.vau_bench`."""

from vau_jax.datasets.vau_bench import Audit, Row, load

__all__ = ["Audit", "Row", "load"]
