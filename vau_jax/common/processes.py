"""Runs of several processes: their start, the rows of a batch that each holds, and their communication.

Every process runs the same program on the same steps. Each loads, parses and scores the rows of a batch that its own
devices hold; arrays on the devices are global batches, and the inputs of a decision are gathered first, so that all
decide alike. With one process everything here is the identity.
"""

import json
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # JAX has no public way to ask for a process's place
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vau_jax.common import rendezvous, sharding
from vau_jax.common.files import InputError, locked, write_bytes

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the others end
START = 1800  # seconds to wait for all processes at the start: hosts of a pod may be set up far apart
SHORTEST = 4096  # bytes of JSON that processes send to each other: more are padded to the next power of two


def start() -> None:
    """Joins this process to the others of the run.

    The cluster provides their addresses (TPU pod, GKE, SLURM, Open MPI), or JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do. Raises InputError where neither exists.
    """
    try:
        address, count, number, devices = _place()
        if address is None or count is None or number is None:
            raise ValueError("no cluster is known here.")
        rendezvous.meet(address, count, number, START)
        jax.distributed.initialize(
            address,
            count,
            number,
            devices,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
            cluster_detection_method="deactivate",
        )
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: the processes did not find each other: {error} Outside of a TPU pod, GKE, SLURM or Open "
            "MPI set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _place() -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """The coordinator's address, the number of processes, this one's, and its devices (None: all of the host): as the
    environment says, and what it leaves out as JAX finds it in a cluster."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number = (int(os.environ[n]) if os.environ.get(n) else None for n in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if count is not None:
        return address, count, number, None
    return ClusterEnv.auto_detect_unset_distributed_params(address, count, number, None, None, START)


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    return jax.process_index() == 0


def barrier(place: str) -> None:
    """Returns when all processes have reached it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def exchange(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order: the argument of each.

    Each length compiles another program: lengths are padded to powers of two, so that a run soon has compiled all. (The
    coordination service's store compiles nothing, but is not a public part of JAX, and one process's socket would carry
    the messages of all to all.)
    """
    if jax.process_count() == 1:
        return [value]
    # Python's own JSON on both sides: what is not finite here has to be the same there.
    text = np.frombuffer(json.dumps(value, allow_nan=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    length = max(SHORTEST, 1 << (int(sizes.max()) - 1).bit_length())
    padded = np.pad(text, (0, length - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:size])) for t, size in zip(texts, sizes, strict=True)]


def broadcast_from_first(find: Callable[[], Any]) -> Any:
    """The result of `find` in the first process, as a JSON value; the others wait for it. All raise its InputError."""
    if jax.process_count() == 1:
        return find()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said["found"] = find()
        except InputError as error:
            said["error"] = str(error)
    said, *_ = exchange(said)
    if "error" in said:
        raise InputError(said["error"])
    return said["found"]


def together(do: Callable[[], None]) -> None:
    """Calls `do` in every process and waits for all; the InputError of one is raised in all, with its number."""
    error = ""
    try:
        do()
    except InputError as raised:
        if jax.process_count() == 1:
            raise
        error = str(raised)
    for number, said in enumerate(exchange(error)):
        if said:
            raise InputError(f"process {number} of {jax.process_count()}: {said}")


def own_lines(path: Path) -> Path:
    """A JSONL file that this process alone appends to, and that begins with the complete lines of all processes so far:
    `path` for the first, with a number in its name for the others.
    """
    own = path if is_first() else path.with_stem(f"{path.stem}.{jax.process_index():05d}")
    files = sorted(path.parent.glob(f"{path.stem}*{path.suffix}"))
    lines = dict.fromkeys(line for file in files for line in file.read_bytes().split(b"\n")[:-1])
    barrier("lines are read")
    if lines:
        write_bytes(own, b"".join(line + b"\n" for line in lines))
    return own


def other_lines(path: Path) -> list[Path]:
    """The files of `own_lines` that the other processes have written, for the first to join."""
    return sorted(path.parent.glob(f"{path.stem}.{'[0-9]' * 5}{path.suffix}"))


@contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir` until the block ends: the first process holds the lock. Raises InputError."""
    with ExitStack() as held:
        broadcast_from_first(lambda: held.enter_context(locked(workdir)))
        yield


@dataclass(frozen=True)
class Rows:
    """The rows of a batch of `count` and the processes whose devices hold them (several, where the mesh's tensor axis
    goes over processes)."""

    count: int
    mesh: Mesh

    @cached_property
    def of_process(self) -> list[list[int]]:
        """The rows of each process, in order."""
        held: defaultdict[int, set[int]] = defaultdict(set)
        for device, (rows, *_) in sharding.examples(self.mesh).devices_indices_map((self.count,)).items():
            held[device.process_index] |= set(range(*rows.indices(self.count)))
        return [sorted(held[process]) for process in range(jax.process_count())]

    @property
    def mine(self) -> list[int]:
        """The rows of this process."""
        return self.of_process[jax.process_index()]

    def put(self, tree: Any) -> Any:
        """Host arrays of this process's rows [b, ...] to arrays of the whole batch [count, ...] on the devices."""
        layout = sharding.examples(self.mesh)
        if jax.process_count() == 1:
            return jax.device_put(tree, layout)
        place = {row: i for i, row in enumerate(self.mine)}

        def whole(x: np.ndarray) -> jax.Array:
            x = np.asarray(x)

            def part(index: tuple[slice, ...]) -> np.ndarray:
                return x[[place[row] for row in range(*index[0].indices(self.count))]]

            return jax.make_array_from_callback((self.count, *x.shape[1:]), layout, part)

        return jax.tree.map(whole, tree)

    def fetch(self, tree: Any) -> Any:
        """The inverse of `put`, also for arrays with another sharding."""
        if jax.process_count() == 1:
            return jax.device_get(tree)

        def own(x: jax.Array) -> np.ndarray:
            x = jax.device_put(x, sharding.examples(self.mesh))
            rows: dict[int, np.ndarray] = {}
            for shard in x.addressable_shards:
                rows |= dict(zip(range(*shard.index[0].indices(self.count)), np.asarray(shard.data), strict=True))
            return np.stack([rows[row] for row in self.mine])

        return jax.tree.map(own, tree)

    def take(self, pools: Sequence[Any], numbers: np.ndarray) -> Any:
        """Of several batches of host arrays of this process's rows, the rows with these `numbers`, `count` of them,
        counted through all the whole batches: on the devices."""
        if jax.process_count() == 1:
            return self.put(jax.tree.map(lambda *x: np.concatenate(x)[numbers], *pools))
        layout = sharding.examples(self.mesh)
        return jax.jit(_take, out_shardings=layout)([self.put(pool) for pool in pools], numbers)

    def own(self, x: np.ndarray) -> np.ndarray:
        """This process's rows of a host array of the whole batch."""
        return x if jax.process_count() == 1 else x[self.mine]

    def gather(self, values: list[Any]) -> list[Any]:
        """A JSON value for each of this process's rows to those of all rows."""
        if jax.process_count() == 1:
            return values
        result: list[Any] = [None] * self.count
        for rows, theirs in zip(self.of_process, exchange(values), strict=True):
            for row, value in zip(rows, theirs, strict=True):
                result[row] = value
        return result


def _take(pools: Sequence[Any], numbers: jax.Array) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x)[numbers], *pools)


class Preemption:
    """SIGTERM as a request: the run ends cleanly after a step, with a checkpoint.

    Several processes agree through JAX's coordination service on the moment, whichever of them received the signal: all
    ask as often as each other.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._times = 0  # that `due` was called
        self._before = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def due(self) -> bool:
        """Whether the run is to end now."""
        self._times += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._times):
            self._asked.set()
        return self._asked.is_set()

    def close(self) -> None:
        """Restores the signal's handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
