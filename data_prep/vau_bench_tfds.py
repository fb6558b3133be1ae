"""VAU-Bench as a TensorFlow Datasets builder, for pipelines that read `tfds.data_source`; no TensorFlow needed.

    import vau_jax.data_prep.vau_bench_tfds  # registers the builder
    import tensorflow_datasets as tfds

    builder = tfds.builder("vau_bench/ucf", imported="DIR")  # DIR: what `vau data import` wrote
    builder.download_and_prepare()
    for example in builder.as_data_source(split="test"):
        ...

One config a source (`msad`, `ucf`, `ecva`) and `all`; splits as imported. Texts that a row lacks are empty; `interval`
is [start, end] in seconds where `interval_kind` is "seconds"; numbers that were not read from a video are 0.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vau_jax.common.files import InputError
from vau_jax.data_prep.vau_bench import SPLITS
from vau_jax.datasets import vau_bench
from vau_jax.datasets.vau_bench import SOURCES
from vau_jax.datasets.vau_bench_tfds import features_of
from vau_jax.tasks.description import SECTIONS


class VauBench(tfds.core.GeneratorBasedBuilder):
    """Questions, intervals, classes and reasoning about surveillance videos (7xiang/VAU-Bench, MIT)."""

    pkg_dir_path = Path(__file__).parent  # a checkout has this folder beside the package of which it is a part
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - as TFDS declares it
        tfds.core.BuilderConfig(name="all", description="all sources"),
        *(tfds.core.BuilderConfig(name=source, description=f"the videos of {source}") for source in SOURCES),
    ]

    def __init__(self, imported: str | os.PathLike = "", **kwargs: Any) -> None:
        """`imported` is the folder that `vau data import` wrote; only preparing needs it."""
        self.imported = Path(imported) if imported else None
        super().__init__(file_format=kwargs.pop("file_format", None) or "array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "video": text,  # path, relative to the folder that the import named
            "source": text,
            "question": text,
            "options": tfds.features.Sequence(text),
            "answer": text,  # A to D
            "anomaly_class": text,
            "interval_kind": text,  # seconds, normal, unknown
            "interval": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "key_object": text,
            "description": text,
            "reasoning": {title: text for title in SECTIONS},
            "duration": np.float32,
            "fps": np.float32,
            "width": np.int32,
            "height": np.int32,
            "line": np.int32,  # of the file that the dataset was built from, 1 for the first
            "row": text,  # the whole row as JSON, with its exact numbers
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), homepage="https://huggingface.co/datasets/7xiang/VAU-Bench"
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        if self.imported is None or not self.imported.is_dir():
            raise InputError(f"imported={self.imported}: expected the folder that `vau data import` wrote")
        paths = {split: self.imported / f"{split}.jsonl" for split in SPLITS}
        return {split: self._generate_examples(path) for split, path in paths.items() if path.is_file()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        rows, _ = vau_bench.load(path)
        for row in rows:
            if self.builder_config.name in ("all", row.source):
                yield f"{row.source}/{row.video}/{row.line}", features_of(row)
