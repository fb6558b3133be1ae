"""A program for a test: `vau train` on a disk that takes some seconds for each checkpoint, and, once the path
HELD_AFTER exists, never ends one."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

from vau_jax import cli

SECONDS, NEVER = 4.0, 3600.0
WRITE = "_async_serialize_replica_slices"  # orbax's, which writes arrays that are on the host


def patch(patches: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Has orbax call `before` in the background before it writes arrays."""
    write = getattr(jax_array_handlers, WRITE)

    async def later(*args: Any, **options: Any) -> Any:
        before()
        return await write(*args, **options)

    patches.setattr(jax_array_handlers, WRITE, later)


def delay() -> None:
    held_after = os.environ.get("HELD_AFTER")
    time.sleep(NEVER if held_after and Path(held_after).exists() else SECONDS)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patches:
        patch(patches, delay)
        cli.main("train")
