"""A program for a test: `vau train` on a disk that takes WRITE_SECONDS, 4 by default, for each checkpoint."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

from vau_jax import cli

SECONDS = float(os.environ.get("WRITE_SECONDS", "4"))
WRITE = "_async_serialize_replica_slices"  # orbax's, which writes arrays that are on the host


def patch(patches: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Has orbax call `before` in the background before it writes arrays."""
    write = getattr(jax_array_handlers, WRITE)

    async def later(*args: Any, **options: Any) -> Any:
        before()
        return await write(*args, **options)

    patches.setattr(jax_array_handlers, WRITE, later)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patches:
        patch(patches, lambda: time.sleep(SECONDS))
        cli.main("train")
