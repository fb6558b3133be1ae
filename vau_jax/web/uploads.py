"""The files that browsers upload: in a folder of this process, of bounded size, removed at its end."""

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "vau_jax_app_"  # of the folders, in the system's folder for temporary files
KEPT = 3600.0  # seconds that a file stays
SWEEP = 60.0  # seconds between looks at what is too old


class Uploads:
    """The files in `folder`: at most `most` bytes together."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.lock = threading.Lock()
        self.coming = 0  # bytes of uploads that have begun
        self.answered: list[Path] = []  # files that may go when there is no room, the first ones first

    def holds(self, path: str) -> bool:
        """Whether a path is inside the folder, in normal form."""
        return path.startswith(f"{self.folder}/") and ".." not in Path(path).parts

    def reserve(self, size: int) -> bool:
        """Whether an upload of so many bytes may begin. Files whose questions were answered make room for it."""
        with self.lock:
            while self.used() + self.coming + size > self.most and self.answered:
                self.answered.pop(0).unlink(missing_ok=True)
            if self.used() + self.coming + size > self.most:
                return False
            self.coming += size
            return True

    def ended(self, size: int) -> None:
        """An upload that had begun has ended; what broken ones left goes when none is under way."""
        with self.lock:
            self.coming -= size
            if not self.coming:
                for path in self.folder.iterdir():  # whole ones lie in folders named by their content
                    if path.is_file():
                        path.unlink()

    def mark_answered(self, path: Path) -> None:
        with self.lock:
            self.answered = [p for p in self.answered if p != path] + [path]

    def expire(self) -> None:
        """Removes what is older than KEPT."""
        with self.lock:
            for path in self.files():
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > KEPT:
                        path.unlink()

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def used(self) -> int:
        """Bytes of all files."""
        used = 0
        for path in self.files():
            with suppress(FileNotFoundError):
                used += path.stat().st_size
        return used


@contextmanager
def open_folder(most: int) -> Iterator[Uploads]:
    """A new folder, which gradio uses too, until the block ends. Folders of processes that were killed are removed."""
    remove_leftovers()
    folder, handle = _locked_folder()
    before, ended = os.environ.get("GRADIO_TEMP_DIR"), threading.Event()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    uploads = Uploads(folder, most)

    def sweep() -> None:
        while not ended.wait(SWEEP):
            uploads.expire()

    threading.Thread(target=sweep, daemon=True).start()
    try:
        yield uploads
    finally:
        ended.set()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def remove_leftovers() -> None:
    """Removes folders of this user whose process has died. A living one holds a lock on its folder, which the system
    takes back at any death."""
    for folder in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        with suppress(OSError):  # a link, a file, another user's, or just removed by another process
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.getuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _locked_folder() -> tuple[Path, int]:
    """A new folder and the open file that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.is_dir():
                return folder, handle
        os.close(handle)  # another process took it for a leftover before it was locked
