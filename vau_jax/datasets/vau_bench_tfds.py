"""VAU-Bench's rows as TensorFlow Datasets keeps them; data_prep/vau_bench_tfds.py builds such datasets."""

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vau_jax.common.files import InputError, dump_json
from vau_jax.datasets import vau_bench
from vau_jax.datasets.audit import Audit
from vau_jax.datasets.vau_bench import Row
from vau_jax.tasks.description import SECTIONS
from vau_jax.tasks.example import Example

TEXTS = ("video", "source", "question", "answer", "anomaly_class", "key_object", "description")
NUMBERS = ("duration", "fps", "width", "height")


def features_of(row: Row) -> dict[str, Any]:
    """A row as the builder's features: texts that it lacks are empty, numbers 0; and the whole row as JSON, since TFDS
    keeps numbers in float32."""
    interval = row.interval if isinstance(row.interval, tuple) else (0.0, 0.0)
    kind = "seconds" if isinstance(row.interval, tuple) else row.interval or "unknown"
    return {
        **{name: getattr(row, name) or "" for name in TEXTS},
        **{name: getattr(row, name) or 0 for name in NUMBERS},
        "options": list(row.options),
        "interval_kind": kind,
        "interval": np.asarray(interval, np.float32),
        "reasoning": {title: row.reasoning.get(title, "") for title in SECTIONS},
        "line": row.line,
        "row": dump_json(vau_bench.to_json(row)),
    }


def read(config: ConfigDict) -> tuple[list[Example], Audit]:
    """The examples of a config.data whose `csv` is a prepared dataset's folder (DIR/vau_bench/ucf/1.1.0), in the order
    of the file that it was built from; `split` names its split. Raises InputError for another folder or split."""
    import tensorflow_datasets as tfds  # noqa: PLC0415 - slow to import

    folder = Path(config.csv)
    if not (folder / "features.json").is_file():
        raise InputError(
            f"{folder} is not a prepared TFDS dataset (config.data.csv): give the folder of a version, such as "
            "DIR/vau_bench/ucf/1.1.0"
        )
    builder = tfds.builder_from_directory(str(folder))
    if config.split not in builder.info.splits:
        raise InputError(f"data.split={config.split!r}: {folder} has {', '.join(builder.info.splits)}")
    source = builder.as_data_source(split=config.split)
    records = sorted(((int(features["line"]), json.loads(features["row"])) for features in source), key=itemgetter(0))
    rows, audit = vau_bench.imported(folder, records, config.protocol)
    return vau_bench.examples_of(rows, config.tasks, Path(config.videos), audit), audit
