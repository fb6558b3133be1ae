"""Compiled programs: the folder that keeps them for the next run, and counts of them.

JAX's persistent compilation cache, whose key names the program, the versions, XLA's flags and the devices (of CPUs
their instruction set), with what runs need that are killed and that share a folder. It holds executables: whoever can
write to the folder can run code as its readers, so that one which is found, not named, has to be the user's own.
"""

import errno
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache, compiler  # JAX has no public way to say how entries are written
from jax._src.lru_cache import LRUCache

from vau_jax.common import processes, remote
from vau_jax.common.files import short

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event after each program, also one from the cache
HIT = "/jax/compilation_cache/cache_hits"
AUTO = "auto"  # config.compilation_cache: beside the workdir
FOLDER = ".compilation_cache"
STALE = 600  # seconds after which a half-written program is one of a process that was killed


# --- The folder ---


def use(setting: str, workdir: Path | None = None) -> None:
    """Keeps the programs of this process in the folder that config.compilation_cache names; `auto` is one beside
    `workdir`, which the runs there share, or without a workdir the user's own.

    JAX_COMPILATION_CACHE_DIR, or an earlier call, goes before it. A folder that cannot be used is a warning, an address
    an InputError.
    """
    remote.refuse(setting, "compilation_cache")
    programs()
    _set("jax_persistent_cache_min_compile_time_secs", 0.0)
    _set("jax_persistent_cache_min_entry_size_bytes", -1)
    given = jax.config.jax_compilation_cache_dir or setting
    if not given or "://" in given:  # an object store, which has whole entries alone
        return
    try:
        folder = (_beside(workdir) if given == AUTO else Path(given)).resolve()
        _open(folder, given == AUTO)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        _warn(short(error))
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.get_file_cache = lambda path: (Store(path), path)
    compiler._cache_write = _add


def _set(option: str, value: float) -> None:
    """Sets an option of JAX that the environment does not."""
    if option.upper() not in os.environ:
        jax.config.update(option, value)


def _beside(workdir: Path | None) -> Path:
    """Beside `workdir`, or a level above where one is there: evaluations in runs/rft/eval share that of runs/rft."""
    if workdir is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vau_jax" / "compiled"
    near = [folder / FOLDER for folder in workdir.absolute().parents[:2]]
    return next((folder for folder in near if folder.is_dir() and _is_own(folder)), near[0])


def _is_own(folder: Path) -> bool:
    """Whether it is this user's, and not everybody can write to it."""
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o002


def _open(folder: Path, own: bool) -> None:
    """Makes the folder, for this user alone, and removes what killed processes left. Raises OSError where it cannot be
    read, and with `own` where another user could have written to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if own and not _is_own(folder):
        raise PermissionError(errno.EACCES, "it is another user's, or everybody can write to it", str(folder))
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "not readable", str(folder))
    for part in folder.glob("*.part"):
        with suppress(OSError):  # another process removes it too, or the folder is for reading alone
            if part.stat().st_mtime < time.time() - STALE:
                part.unlink()


def _warn(reason: str) -> None:
    if processes.is_first():
        print(f"warning: compiled programs are not kept: {reason}; set compilation_cache to a folder", flush=True)


class Store(LRUCache):
    """JAX's folder of programs, where an entry is complete or not there, and one that cannot be written is no error.

    Of several processes that compile a program at once, one writes it.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, max_size=jax.config.jax_compilation_cache_max_size)
        self.full = False

    def put(self, key: str, value: bytes) -> None:
        if self.eviction_enabled:
            super().put(key, value)
        elif not (self.full or (entry := Path(self.path) / f"{key}-cache").exists()):
            try:
                _write_once(entry, value)
            except OSError as error:
                self.full = True
                _warn(f"cannot write to {self.path} ({error.strerror})")


def _write_once(path: Path, value: bytes) -> None:
    """Writes a file, complete or not at all, unless another process is about to."""
    part = path.with_name(f"{path.name}.part")
    with suppress(FileExistsError), part.open("xb") as file:
        try:
            file.write(value)
            file.flush()
            os.fsync(file.fileno())
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _add(
    key: str, seconds: float, name: str, backend: Any, executable: Any, host_callbacks: Sequence[Any] = ()
) -> None:
    """Adds a program to the cache. JAX lets the first process alone do so, but a program on another's own devices, as
    in evaluation, has another key (on CPUs every program has)."""
    if host_callbacks or seconds < jax.config.jax_persistent_cache_min_compile_time_secs:
        return
    try:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
    except Exception as error:  # as in JAX: what cannot be kept is no reason to end
        _warn(f"{name}: {short(error)}")


# --- Counts ---


class Programs:
    """The programs that this process has compiled, or read from the compilation cache, since this object was made.

    Compilation should stop after the first steps: a run that continues to compile
    has arrays of ever new shapes, and slows down.
    """

    def __init__(self) -> None:
        self.count, self.seconds, self.misses = 0, 0.0, 0
        self._lock = threading.Lock()  # threads may compile at once
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        jax.monitoring.register_event_listener(self._hear_hit)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            with self._lock:
                self.count, self.seconds, self.misses = self.count + 1, self.seconds + seconds, self.misses + 1

    def _hear_hit(self, event: str, **_: Any) -> None:
        if event == HIT:  # before COMPILED of the same program
            with self._lock:
                self.misses -= 1

    def take(self) -> dict[str, float]:
        """The number of programs since the last call, and the seconds that they took; and how many the cache has lacked
        in all."""
        with self._lock:
            result = {"compile/programs": self.count, "compile/seconds": self.seconds}
            self.count, self.seconds = 0, 0.0
            return result | {"compile/cache_misses": self.misses}


programs = cache(Programs)  # one for all runs of the process: JAX's listeners stay
