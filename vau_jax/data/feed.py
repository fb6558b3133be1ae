"""The feed of a run: its batches in order, this process's rows of each, checked, counted and put on the devices."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
from ml_collections import ConfigDict

from vau_jax.common.processes import Rows
from vau_jax.data import pipeline
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Processor, Shape
from vau_jax.datasets.audit import Audit
from vau_jax.tasks.example import Example


class Placer:
    """Puts batches on the devices, of which each process loads its own `rows`."""

    def __init__(self, rows: Rows, collate: pipeline.Collator) -> None:
        self.rows, self.collate = rows, collate

    def shape(self, host: HostBatch) -> Shape:
        """The shape that every process pads its rows of a batch to: the maximum over all."""
        own = self.collate.shape(host.examples)
        return Shape(*map(max, *self.rows.gather([own] * len(host.examples)), own))

    def agreed(self, host: HostBatch) -> HostBatch:
        """The same rows padded to the shape agreed by all processes."""
        return host if jax.process_count() == 1 else self.collate(host.examples, self.shape(host))

    def on_devices(self, host: HostBatch) -> HostBatch:
        """The whole batch's prompts on the devices, from this process's rows."""
        return replace(host, batch=self.rows.put(host.batch))


class Feed(Placer):
    """The batches of config.data for `rows`; `counts` are the data problems since the run began."""

    def __init__(
        self, config: ConfigDict, examples: list[Example], audit: Audit, processor: Processor, rows: Rows
    ) -> None:
        super().__init__(rows, pipeline.Collator(processor, config.data))
        self.config = config
        self.iterator = pipeline.train_iterator(
            examples,
            processor,
            config.data,
            config.batch_size,
            seed=config.seed,
            rows=rows.mine,
            # Several processes first agree on the size.
            put=self.on_devices if jax.process_count() == 1 else None,
        )
        self.counts = Counter(pipeline.excluded(audit))

    def next(self) -> HostBatch:
        """This process's rows of the next batch; problems of the whole batch are counted."""
        host = next(self.iterator)
        troubles = [pipeline.problem_counts(item, self.config.data) for item in host.examples]
        self.counts.update(pipeline.summed(self.rows.gather(troubles)))
        return host

    def state(self) -> Any:
        """The position in the data, in grain's format."""
        return self.iterator.get_state()

    def resume(self, state: Any) -> None:
        """Continues from the position `state`."""
        self.iterator.set_state(state)

    def close(self) -> None:
        """Ends the threads that load data ahead."""
        self.iterator.close()
