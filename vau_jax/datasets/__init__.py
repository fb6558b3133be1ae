"""Readers of datasets, one file each: annotation files to examples."""

from collections.abc import Callable

from ml_collections import ConfigDict

from vau_jax.datasets import array_record, vau_bench, vau_bench_tfds, video_qa
from vau_jax.datasets.audit import Audit
from vau_jax.tasks.example import Example

Reader = Callable[[ConfigDict], tuple[list[Example], Audit]]  # config.data to examples with unique ids, and an audit

DATASETS: dict[str, Reader] = {  # by config.data.dataset
    "vau_bench": vau_bench.read,
    "vau_bench_tfds": vau_bench_tfds.read,
    "array_record": array_record.read,
    "video_qa": video_qa.read,
}
