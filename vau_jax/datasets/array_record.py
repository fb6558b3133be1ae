"""VAU-Bench's rows in ArrayRecord files: each record is a row as JSON, as `vau data import` writes it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from ml_collections import ConfigDict

from vau_jax.common import files
from vau_jax.common.files import InputError, dump_json
from vau_jax.datasets import vau_bench
from vau_jax.datasets.audit import Audit
from vau_jax.datasets.vau_bench import Row
from vau_jax.tasks.example import Example


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows to a file, complete or not at all."""
    part = path.with_suffix(".part")
    writer = ArrayRecordWriter(str(part), "group_size:64")
    for row in rows:
        writer.write(dump_json(vau_bench.to_json(row)).encode())
    writer.close()
    files.sync(part)
    os.replace(part, path)


def read(config: ConfigDict) -> tuple[list[Example], Audit]:
    """The examples of a config.data whose `csv` is such a file. Raises InputError for another file."""
    path = Path(config.csv)
    if not path.is_file():
        raise InputError(f"ArrayRecord file {path} does not exist (config.data.csv)")
    try:
        reader = ArrayRecordReader(str(path))
        texts = reader.read_all()
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:  # what ArrayRecord raises for damaged files
        raise InputError(f"{path} is not a complete ArrayRecord file ({str(error)[:200]}): import it again") from error
    try:
        records = [(number, json.loads(text)) for number, text in enumerate(texts, start=1)]
    except ValueError as error:
        raise InputError(f"{path} has records that are not JSON ({str(error)[:100]}): import it again") from error
    rows, audit = vau_bench.imported(path, records, config.protocol)
    return vau_bench.examples_of(rows, config.tasks, Path(config.videos), audit), audit
