"""The video files of a folder."""

from pathlib import Path

from vau_jax.common.files import InputError

ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".ts", ".flv", ".wmv", ".mpg")


def videos_below(folder: Path) -> list[Path]:
    """Whole paths of the video files in a folder and those below it, sorted. Raises InputError where there is no such
    folder, and for a name that no table can hold."""
    if not folder.is_dir():
        raise InputError(f"video folder {folder} does not exist")
    found = [path for path in sorted(folder.resolve().rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file()]
    for path in found:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the name of {str(path)!a} is not UTF-8, so that no table can hold it: rename it"
            ) from error
    return found
