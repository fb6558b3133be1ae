"""The feed of a run: its batches in order, this process's rows of each, checked, counted and put on the devices."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
from ml_collections import ConfigDict

from vau_jax.common.processes import Rows
from vau_jax.data import loading, pipeline
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Processor
from vau_jax.data.shapes import Shape
from vau_jax.datasets.audit import Audit
from vau_jax.tasks.example import Example


class Placer:
    """Puts batches on the devices, of which each process loads its own `rows`."""

    def __init__(self, rows: Rows, collate: pipeline.Collator) -> None:
        self.rows, self.collate = rows, collate

    def shape(self, host: HostBatch) -> Shape:
        """The shape that every process pads its rows of a batch to: the maximum over all."""
        return Shape(*map(max, zip(*self.rows.gather([host.shape] * len(host.examples)), strict=True)))

    def placed(self, host: HostBatch) -> HostBatch:
        """The whole batch's prompts on the devices, from this process's rows, in the shape that fits all of them; as
        they are where they have it and are there."""
        shape = self.shape(host)
        if shape != host.shape:
            host = self.collate(host.examples, shape)
        return host if isinstance(host.batch.tokens, jax.Array) else self.on_devices(host)

    def on_devices(self, host: HostBatch) -> HostBatch:
        """The same in this process's own shape."""
        return replace(host, batch=self.rows.put(host.batch))


class Feed(Placer):
    """The batches of config.data for `rows`; `counts` are the data problems since the run began."""

    def __init__(
        self, config: ConfigDict, examples: list[Example], audit: Audit, processor: Processor, rows: Rows
    ) -> None:
        prompts = pipeline.Prompts(examples, loading.make_loader(processor, config.data, config.data.augment))
        super().__init__(rows, prompts.collate)
        self.config = config
        # Every process expects the same shape of a batch, so that it can be put on the devices before they agree on it.
        self.iterator = pipeline.train_iterator(prompts, rows.count, config.seed, rows.mine, put=self.on_devices)
        self.counts = Counter(pipeline.excluded(audit))

    def next(self) -> HostBatch:
        """This process's rows of the next batch, its prompts on the devices; problems of the whole batch are
        counted."""
        host = next(self.iterator)
        troubles = [pipeline.problem_counts(item, self.config.data) for item in host.examples]
        self.counts.update(pipeline.summed(self.rows.gather(troubles)))
        return self.placed(host)

    def state(self) -> Any:
        """The position in the data, in grain's format."""
        return self.iterator.get_state()

    def resume(self, state: Any) -> None:
        """Continues from the position `state`."""
        self.iterator.set_state(state)

    def close(self) -> None:
        """Ends the threads that load data ahead."""
        self.iterator.close()
