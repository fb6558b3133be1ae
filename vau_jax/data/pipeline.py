"""Annotated videos to batches, by grain: shuffled, mixed by task, augmented, padded; the position can be saved.

The order and the randomness of example n depend on the seed and on n alone, never on the number of workers or
processes. Videos are decoded in separate processes (decode_worker.py), which threads of this one wait for.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import remote
from vau_jax.common.checks import COUNT, NOT_NEGATIVE, SHARE, check_choices, check_ranges
from vau_jax.common.files import InputError, check_range, content_hash
from vau_jax.data.loading import Loaded, Loader, rng_of
from vau_jax.data.processor import Processor
from vau_jax.data.shapes import Plan, Shape
from vau_jax.data.video import clips
from vau_jax.datasets import DATASETS, reflections, vau_bench, video_table
from vau_jax.datasets.audit import Audit
from vau_jax.tasks import TASKS, parsing, prompts
from vau_jax.tasks.columns import Columns
from vau_jax.tasks.example import Example
from vau_jax.types import Batch, Completions

EPOCHS = 10**9  # without end; grain fails on batches of one from a truly endless source


@dataclass(frozen=True)
class HostBatch:
    """A batch before it goes to the device; B examples."""

    batch: Batch
    completions: Completions  # the right answers, G = 1
    weights: np.ndarray  # float32 [B, 1, C]
    target: Columns  # [B]
    examples: list[Loaded]
    shape: Shape  # of the prompts


def load_examples(config: ConfigDict) -> tuple[list[Example], Audit]:
    """All usable examples of a config.data; what is left out is in the audit.

    Raises InputError for a missing file or folder, an unknown task, and when no example is left.
    """
    if not config.csv:
        raise InputError("data.csv is not set: expected an annotation file (`vau data check` says what it needs)")
    check(config)
    folder = Path(config.videos)
    if not folder.is_dir():
        raise InputError(f"video folder {folder} does not exist (config.data.videos)")
    examples, audit = DATASETS[config.dataset](config)
    examples = _chosen(examples, config, audit)
    remote.fetch_below(folder, (path for example in examples for path in example.media))
    examples = _with_media(examples, audit)
    if config.reflection:
        examples = reflections.attach(examples, reflections.load(config.reflection), audit)
    if not examples:
        why = "; ".join(f"{n} {reason}" for (action, reason), n in audit.counts().most_common() if action == "excluded")
        way_out = "; `vau data join` finds videos in other folders and under other names" * ("no such video" in why)
        raise InputError(
            f"no usable example is left for tasks {', '.join(config.tasks)} of {audit.path}, {audit.rows} rows: "
            f"{why}{way_out}"
        )
    return examples[: config.max_examples or None], audit


def _chosen(examples: Sequence[Example], config: ConfigDict, audit: Audit) -> list[Example]:
    """The examples of config.sources, and of these the share config.share. Which belong to a share depends on their ids
    alone, so that a larger share contains a smaller one."""
    known = [e for e in examples if not config.sources or e.meta.get("source") in config.sources]
    if len(known) < len(examples):
        reason = f"of another data set than data.sources={tuple(config.sources)}: {len(examples) - len(known)} examples"
        audit.note(0, "", "flagged", "row", reason)
    if config.share == 1:
        return known
    digests = [hashlib.sha256(example.id.encode()).digest() for example in known]
    return [e for e, digest in zip(known, digests, strict=True) if int.from_bytes(digest[:4]) < config.share * 2**32]


RANGES = {
    "fps": (1e-3, 1e3),
    "share": (1e-6, 1.0),
    "min_frames": COUNT,
    "max_frames": COUNT,
    "min_pixels": NOT_NEGATIVE,
    "max_pixels": NOT_NEGATIVE,
    "total_pixels": NOT_NEGATIVE,
    "max_examples": NOT_NEGATIVE,
    "length_window": COUNT,
    "shapes": NOT_NEGATIVE,
    "workers": COUNT,
    "video_seconds": (1e-6, 1e6),
}
DIFFICULTY_RANGES = {"memory": COUNT, "noise": NOT_NEGATIVE, "drop": SHARE}


def check(config: ConfigDict) -> None:
    """Raises InputError for the first invalid setting of config.data."""
    unknown = [task for task in config.tasks if task not in TASKS]
    if unknown or not config.tasks:
        raise InputError(f"data.tasks={tuple(config.tasks)}: expected some of {', '.join(TASKS)}")
    choices = {
        "dataset": tuple(DATASETS),
        "style": (*prompts.STYLES, ""),  # "" in evaluations, until the run's own is known
        "wording": (*prompts.WORDINGS, ""),
        "budget": tuple(clips.BUDGETS),
    }
    check_choices(config, "data.", choices)
    if unknown := [source for source in config.sources if source not in vau_bench.SOURCES]:
        raise InputError(f"data.sources has {unknown[0]!r}: expected some of {', '.join(vau_bench.SOURCES)}")
    check_ranges(config, "data.", RANGES)
    check_ranges(config.difficulty, "data.difficulty.", DIFFICULTY_RANGES)
    for task, weight in config.task_weights.items():
        check_range(f"data.task_weights.{task}", weight, 0)
    if not any(config.task_weights.get(task, 1.0) for task in config.tasks):
        raise InputError(f"data.task_weights is 0 for all of data.tasks={tuple(config.tasks)}: set one above 0")
    for share in config.completion_shares:
        check_range("data.completion_shares", share, 1e-6, 1.0)
    if len(config.bucket) != len(Shape._fields):
        raise InputError(f"data.bucket={tuple(config.bucket)}: expected 6 numbers, {', '.join(Shape._fields)}")


def _with_media(examples: Sequence[Example], audit: Audit) -> list[Example]:
    """The examples whose files exist; a row that lacks one is noted once."""
    usable, noted = [], set()
    paths = list(dict.fromkeys(path for example in examples for path in example.media))
    with ThreadPoolExecutor(16) as pool:  # a bucket takes its time for each
        there = dict(zip(paths, pool.map(os.path.isfile, paths), strict=True))
    for example in examples:
        missing = next((path for path in example.media if not there[path]), None)
        if missing is None:
            usable.append(example)
        elif (row := (example.meta.get("line"), example.video)) not in noted:
            noted.add(row)
            audit.note(example.meta.get("line", 0), example.video, "excluded", "row", f"no such video: {missing}")
    return usable


def input_hashes(config: ConfigDict) -> dict[str, str]:
    """Hashes of the files of text that a config.data names, by the field that names them; loading reports a missing
    one."""
    table = Path(config.videos) / video_table.TABLE
    named = {name: [Path(config[name])] for name in ("csv", "reflection") if config[name]}
    named |= {"templates": prompts.template_files(config.templates), "videos": [table]}
    hashes = {name: [content_hash(path) for path in paths if path.exists()] for name, paths in named.items()}
    return {f"data.{name}": " ".join(found) for name, found in hashes.items() if found}


# --- Batches ------------------------------------------------------------------------------------------------------


class Prompts:
    """The prompts of `examples` as a loader makes them: what is expected of each, and the shapes planned for all."""

    def __init__(self, examples: Sequence[Example], loader: Loader) -> None:
        self.examples, self.loader, config = examples, loader, loader.config
        self.sizes = {example.id: loader.size(example) for example in examples}
        known = [size for size in self.sizes.values() if size]
        floor = Shape(*config.bucket)
        self.plan = Plan.of(known, loader.processor.config.vision, config.shapes, floor)
        self.numbers = {name: self.plan.number(size) for name, size in self.sizes.items() if size}
        self.collate = Collator(loader.processor, config, self.plan)

    def tokens(self, example: Example) -> float:
        """The expected number of tokens of a prompt; where the length of its video is unknown, of its text alone: that
        of the annotation's question and options, which differs little between tasks."""
        size = self.sizes[example.id]
        text = len(example.question) + sum(map(len, example.meta.get("options", example.choices)))
        return size.tokens if size else text / 4

    def shape_number(self, examples: Iterable[Example]) -> int:
        """The planned shape that a batch of `examples` is expected to have."""
        numbers = (self.numbers.get(example.id, 0) for example in examples)
        return max((n for n in numbers if n < len(self.plan.shapes)), default=0)


@dataclass
class Collator:
    """Pads `Loaded` examples to a `HostBatch`, in one of the shapes of `plan` that holds them, if there is one."""

    processor: Processor
    config: ConfigDict
    plan: Plan | None = None  # None: shapes are rounded batch by batch

    def __post_init__(self) -> None:
        self.plan = self.plan or Plan((), self.processor.config.vision, Shape(*self.config.bucket))

    def shape(self, items: Sequence[Loaded]) -> Shape:
        """The shape that the prompts are padded to."""
        least = max(item.shape_number for item in items)
        return self.plan.shape([item.encoded.size for item in items], least)

    def __call__(self, items: Sequence[Loaded], shape: Shape | None = None) -> HostBatch:
        """Padded to `shape`, which is large enough; None: to `self.shape(items)`. Where `shape` has patches, so has the
        batch, also when none of its examples has a video."""
        pad, shape = self.processor.tokenizer.pad_token_id or 0, shape or self.shape(items)
        batch = self.processor.collate([i.encoded for i in items], shape, pad)
        length = self.config.max_completion_tokens
        tokens = np.full((len(items), 1, length), pad, np.int32)
        weights = np.zeros((len(items), 1, length), np.float32)
        for b, item in enumerate(items):
            count = min(length, len(item.target_tokens))
            tokens[b, 0, :count] = item.target_tokens[:count]
            weights[b, 0, :count] = item.target_weights[:count]
        mask = np.arange(length) < np.asarray([len(i.target_tokens) for i in items])[:, None, None]
        target = parsing.targets_of([item.example for item in items])
        return HostBatch(batch, Completions(tokens, mask), weights, target, list(items), shape)


def problem_counts(item: Loaded, config: ConfigDict) -> dict[str, int]:
    """The problems of an example as counts for the metrics; failed videos by reason too."""
    result = {
        "data/failed_videos": int(item.failure is not None),
        "data/damaged_videos": int(bool(item.damage)),
        "data/truncated_targets": int(len(item.target_tokens) > config.max_completion_tokens),
    }
    if item.failure:
        result[f"data/failed_videos/{item.reason}"] = 1
    if config.cache:
        result["data/not_cached"] = int(not item.cached and not item.failure)
    return result


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The counts of many examples, including zeros."""
    total: Counter[str] = Counter()
    for result in counts:
        total.update(result)
    return dict(total)


def excluded(audit: Audit) -> dict[str, int]:
    """How many rows `load_examples` left out of a task or of all, by reason, for the run's metrics."""
    results = {reason: n for (action, reason), n in audit.counts().items() if action == "excluded"}
    return {
        f"data/excluded/{re.sub(r'[^a-z0-9]+', '_', reason.lower()).strip('_')}": n for reason, n in results.items()
    }


# --- The order of examples ----------------------------------------------------------------------------------------


class BatchRows(grain.MapDataset):
    """Of every `batch_size` elements those at the positions `rows`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int]) -> None:
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        number, position = divmod(index, len(self._rows))
        return self._parent[number * self._batch_size + self._rows[position]]


class SimilarLengths(grain.MapDataset):
    """Puts examples of similar length into the same batch, so that less of it is padding.

    The examples of `window` batches are sorted by `length` and cut into batches, which are then shuffled. Which example
    comes n-th depends on the seed and on n alone.
    """

    def __init__(
        self, parent: grain.MapDataset, batch_size: int, window: int, length: Callable[[Example], float], seed: int
    ) -> None:
        super().__init__(parent)
        self._batch_size, self._size = batch_size, batch_size * window
        self._length, self._order_seed = length, seed
        self._order = lru_cache(maxsize=4)(self._sorted)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        number, position = divmod(index % len(self), self._size)
        return self._parent[number * self._size + int(self._order(number)[position])]

    def _sorted(self, number: int) -> np.ndarray:
        """The positions of a window's examples in their new order."""
        first = number * self._size
        count = min(self._size, len(self) - first)
        by_length = np.argsort([self._length(self._parent[first + i]) for i in range(count)], kind="stable")
        whole = by_length[: count - count % self._batch_size].reshape(-1, self._batch_size)
        shuffled = np.random.default_rng([self._order_seed, number]).permutation(whole)
        return np.concatenate([shuffled.reshape(-1), by_length[whole.size :]])


class WithShapes(grain.MapDataset):
    """Each example with the planned shape that its batch is expected to have, which every process knows of all rows."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, shape_number: Callable[..., int]) -> None:
        super().__init__(parent)
        self._size, self._shape_number = batch_size, shape_number
        self._of_batch = lru_cache(maxsize=4)(self._expected)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[index], self._of_batch(index % len(self) // self._size)

    def _expected(self, number: int) -> int:
        return self._shape_number([self._parent[number * self._size + row] for row in range(self._size)])


# --- Iterators ----------------------------------------------------------------------------------------------------


def train_iterator(
    prompts: Prompts,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    put: Callable[[HostBatch], HostBatch] | None = None,
) -> grain.DatasetIterator:
    """An endless iterator of `HostBatch`: of every batch of `batch_size` examples those at the positions `rows`, or
    all.

    Tasks are mixed by config.task_weights (default weight 1). `get_state` and `set_state` save and restore the
    position, which is the number of batches so far: it has the same meaning for any number of workers and processes.
    `put` puts a batch on the devices while the previous one is in use.
    """
    config, rows = prompts.loader.config, range(batch_size) if rows is None else rows

    def load(asked: tuple[Example, int], rng: np.random.Generator) -> Loaded:
        return replace(prompts.loader(asked[0], rng), shape_number=asked[1])

    # Randomness by the position in the whole order, before that is split among processes.
    loaded = in_batches(prompts, batch_size, seed).seed(seed).random_map(load)
    batches = BatchRows(loaded, batch_size, rows).batch(len(rows), batch_fn=prompts.collate)
    return iter(_ahead(batches, config, put))


def in_batches(prompts: Prompts, batch_size: int, seed: int) -> WithShapes:
    """The endless order of training: each example with the planned shape of its batch, `batch_size` after each other a
    batch."""
    config = prompts.loader.config
    by_task = {task: [e for e in prompts.examples if e.task == task] for task in config.tasks}
    by_task = {task: group for task, group in by_task.items() if group and config.task_weights.get(task, 1.0)}
    streams = [
        grain.MapDataset.source(group).seed(seed + number).shuffle().repeat(EPOCHS)
        for number, group in enumerate(by_task.values())
    ]
    weights = [float(config.task_weights.get(task, 1.0)) for task in by_task]
    ordered = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights=weights)
    window = min(config.length_window, len(prompts.examples) // batch_size)  # an example once, not beside itself
    if window > 1:
        ordered = SimilarLengths(ordered, batch_size, window, prompts.tokens, seed)
    return WithShapes(ordered, batch_size, prompts.shape_number)


def eval_batches(
    prompts: Prompts, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """All examples once, in order, the last batch filled up with its last example; of each batch these `rows` (None:
    all). The order of options depends on the seed and the example's id alone.
    """
    rows, examples = range(batch_size) if rows is None else rows, list(prompts.examples)
    padded = examples + examples[-1:] * (-len(examples) % batch_size)  # one shape, one program
    mine = []
    for begin in range(0, len(padded), batch_size):
        number = prompts.shape_number(padded[begin : begin + batch_size])
        mine += [(padded[begin + row], number) for row in rows]

    def load(asked: tuple[Example, int]) -> Loaded:
        return replace(prompts.loader(asked[0], rng_of(asked[0], seed)), shape_number=asked[1])

    batches = grain.MapDataset.source(mine).map(load).batch(len(rows), batch_fn=prompts.collate)
    return iter(_ahead(batches, prompts.loader.config))


def draw_numbers(items: Sequence[Loaded], repeats: Sequence[int] | None = None) -> np.ndarray:
    """uint32 [B]: a number for each example from its id and rotation alone; further occurrences in the same batch get
    numbers of their own.
    """
    repeats = [0] * len(items) if repeats is None else repeats
    names = [f"{item.example.id}/{item.example.rotation}" for item in items]
    names = [f"{name}/{repeat}" if repeat else name for name, repeat in zip(names, repeats, strict=True)]
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return np.asarray([int.from_bytes(digest[:4]) for digest in digests], np.uint32)


@jax.jit
def keys_of(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A key for each example [B], from `draw_numbers`: samples of an example do not depend on its batch or position."""
    return jax.vmap(partial(jax.random.fold_in, key))(numbers)


def sampling_keys(items: Sequence[Loaded], seed: int) -> jax.Array:
    """A key for each example [B], for sampling its completions in an evaluation."""
    return keys_of(jax.random.key(seed), draw_numbers(items))


def share(examples: Sequence[Example], number: int, count: int) -> list[Example]:
    """What process `number` of `count` of an evaluation decodes: every `count`-th video with all its questions."""
    videos = {media: i for i, media in enumerate(dict.fromkeys(example.media for example in examples))}
    return [example for example in examples if videos[example.media] % count == number]


def _ahead(
    batches: grain.MapDataset, config: ConfigDict, put: Callable[[HostBatch], HostBatch] | None = None
) -> grain.IterDataset:
    """Batches loaded ahead by threads, and put on the devices ahead by another thread."""
    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=2 * config.workers)
    loaded = batches.to_iter_dataset(options)
    if put is None:
        return loaded
    return grain.experimental.ThreadPrefetchIterDataset(loaded.map(put), prefetch_buffer_size=1)
