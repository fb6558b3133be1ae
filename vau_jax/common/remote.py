"""Inputs by gs:// addresses: fetched to a folder of this machine, and read there as if they had been given so.

The copy of gs://BUCKET/OBJECT is VAU_CACHE/gs/BUCKET/OBJECT (VAU_CACHE: ~/.cache/vau_jax by default), with the time at
which the object was made. It is fetched again when the bucket has an object of another time or size. Of a folder only
what the program reads is fetched. Programs write to folders alone: a bucket for workdirs has to be mounted.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vau_jax.common.files import InputError, check_space, short

SCHEME = "gs://"
STEP = re.compile(r"(.*)/checkpoints/(\d+)/?")
THREADS = 16  # downloads at once
# gcsfs would ask another service for each bucket's kind, which needs a permission that reading does not.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


class Object(NamedTuple):
    """An object of a bucket."""

    name: str  # BUCKET/KEY
    size: int  # bytes
    made: int  # nanoseconds since 1970

    @property
    def copy(self) -> Path:
        """The path of its copy."""
        return _root() / self.name

    def is_here(self) -> bool:
        """Whether the copy is this object."""
        try:
            stat = os.stat(self.copy)
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.made)


def replace_addresses(config: ConfigDict) -> None:
    """Fetches every input that a config names by its address, and has the config name the copy. Raises InputError."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            replace_addresses(value)
        elif is_address(value):
            config[name] = fetch(value, name)


def is_address(value: Any) -> bool:
    """Whether a value is the address of an object, or of a folder of them."""
    return isinstance(value, str) and re.match("gs:", value, re.IGNORECASE) is not None


def fetch(address: str, field: str) -> str:
    """The path of the copy of what `field`, the name of a config's field or of an option, says is at `address`.

    Of a run its newest checkpoint, or the one named, is fetched; of a folder of videos its tables, and videos by
    `fetch_below`. Raises InputError.
    """
    address, wanted = SCHEME + _key(re.sub("(?<=[^/])/+$", "", address)), KINDS.get(field, _all)
    step = STEP.fullmatch(address)
    found = {o.name.removeprefix(f"{_key(step[1])}/"): o for o in _objects(step[1])} if step else None
    if found is None:
        found = {o.name.removeprefix(f"{_key(address)}/"): o for o in _objects(address)}
    names = _of_run(found, step[2]) if step else wanted(found)
    _download(address, [found[name] for name in names])
    copy = _root() / _key(address)
    if field == "videos":
        copy.mkdir(parents=True, exist_ok=True)
    return str(copy)


def fetch_below(folder: str | os.PathLike, paths: Iterable[Path]) -> None:
    """Where `folder` is a copy made by `fetch`: fetches those of `paths` that are objects below. Raises InputError."""
    if not Path(folder).is_relative_to(_root()):
        return
    address, wanted = SCHEME + Path(folder).relative_to(_root()).as_posix(), set(paths)
    _download(address, [o for o in _objects(address) if o.copy in wanted])


def refuse(folder: str | os.PathLike, option: str) -> None:
    """Raises InputError where an option that takes folders has an address."""
    if is_address(str(folder)):
        bucket = str(folder)[len("gs:") :].strip("/").split("/")[0]
        raise InputError(
            f"{option}={folder}: expected a path of this machine. Mount the bucket (gcsfuse --implicit-dirs {bucket} "
            "FOLDER, as launch/tpu_vm.sh does), and name what is below FOLDER"
        )


# --- Which objects of a folder are read: functions of their names below it ---


def _all(names: Iterable[str]) -> list[str]:
    return list(names)


def _of_model(names: Iterable[str]) -> list[str]:
    """A Hugging Face folder's own files, or what a run is loaded from."""
    names = list(names)
    if "model/config.json" not in names:
        return [
            name for name in names if "/" not in name and name.endswith((".json", ".jinja", ".txt", ".safetensors"))
        ]
    steps = [int(m[1]) for name in names if (m := re.fullmatch(r"checkpoints/(\d+)/checksums\.json", name))]
    return _of_run(names, str(max(steps, default="")))


def _of_run(names: Iterable[str], step: str) -> list[str]:
    """A run's notes and model files, and one of its checkpoints."""
    below = ("model/", f"checkpoints/{step}/")
    return [name for name in names if name.startswith(below) or ("/" not in name and name.endswith(".json"))]


def _tables(names: Iterable[str]) -> list[str]:
    return [name for name in names if "/" not in name and name.endswith((".csv", ".json", ".jsonl"))]


KINDS: dict[str, Callable[[Iterable[str]], list[str]]] = {
    "model": _of_model,
    "init_from": _of_model,
    "checkpoint": _of_model,
    "videos": _tables,
}

# --- The bucket ---


def _root() -> Path:
    return Path(os.environ.get("VAU_CACHE") or "~/.cache/vau_jax").expanduser().resolve() / "gs"


def _key(address: str) -> str:
    """BUCKET/KEY. Raises InputError for what is no address of a file."""
    key = address.removeprefix(SCHEME)
    if not (address.startswith(SCHEME) and _is_path(key)):
        raise InputError(f"{address}: expected gs://BUCKET/NAME")
    return key


def _is_path(key: str) -> bool:
    """Whether a file can have this name: an object may be called a//b, or ../b, or a folder's a/."""
    return not any(part in ("", ".", "..") for part in key.split("/"))


def _bucket(address: str) -> Any:
    try:
        import gcsfs  # noqa: PLC0415 - slow, and needed for addresses alone
    except ImportError as error:
        raise InputError(f"{address} needs the package: pip install gcsfs") from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs each attempt's traceback, and raises the last
    token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
    return gcsfs.GCSFileSystem(token=token, skip_instance_cache=True)


def _objects(address: str) -> list[Object]:
    """What is at an address, or below it. Raises InputError where there is nothing."""
    key = _key(address)
    with _explained(address):
        found = _bucket(address).find(key, detail=True)
    inside = {name: o for name, o in found.items() if name == key or name.startswith(f"{key}/")}
    result = [
        Object(name, int(o["size"]), round(o["ctime"].timestamp() * 10**6) * 1000)
        for name, o in inside.items()
        if _is_path(name)
    ]
    if not result:
        raise InputError(f"{address} does not exist: expected an object, or a folder of objects")
    return result


def _download(address: str, objects: Iterable[Object]) -> None:
    """Fetches the objects whose copies are missing or another's; each appears when it is complete."""
    todo = [o for o in objects if not o.is_here()]
    if not todo:
        return
    root, size = _root(), sum(o.size for o in todo)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {root} ({short(error)}): set VAU_CACHE to another folder") from error
    check_space(f"{len(todo)} objects of {address}", root, size, size, "set VAU_CACHE to a folder with more free space")
    bucket = _bucket(address)

    def one(o: Object) -> None:
        part = o.copy.with_name(f"{o.copy.name}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        bucket.get_file(o.name, str(part))
        if part.stat().st_size != o.size:
            raise ValueError(f"{o.name} has changed meanwhile")
        os.utime(part, ns=(o.made, o.made))
        os.replace(part, o.copy)

    with _explained(address), ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, todo))


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns any error of a bucket into an InputError that says what to look at."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{address} does not exist") from error
    except Exception as error:  # gcsfs, google.auth and aiohttp raise types of their own
        raise InputError(
            f"cannot read {address} ({short(error)}): is there a connection, and has this machine's "
            "account the role Storage Object Viewer? On a machine of your own: gcloud auth application-default login"
        ) from error
