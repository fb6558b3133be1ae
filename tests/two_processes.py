"""A program for a test: what the processes of a run tell each other; each prints what it was told."""

import json
import sys
from pathlib import Path

import jax

from vau_jax.common import checksums, processes
from vau_jax.common.compiled import Programs
from vau_jax.common.files import InputError


def refuse() -> None:
    raise InputError("the first says no")


def damaged(folder: Path) -> list[str]:
    """What both find wrong with a folder of seven files, three of them the second's: before and after two change."""
    second = folder / "state" / "ocdbt.process_1"
    if processes.is_first():
        second.mkdir(parents=True)
        for number in range(7):
            ((second if number % 2 else folder) / str(number)).write_text("as it was" * number)
    processes.barrier("written")
    checksums.write(folder)
    processes.barrier("noted")
    found = [checksums.damage(folder, together=True)]
    if processes.is_first():
        (folder / "4").write_text("otherwise")
        (second / "5").unlink()
    processes.barrier("changed")
    return [*found, checksums.damage(folder, together=True)]


def main() -> None:
    processes.start()
    folder, number = Path(sys.argv[1]), jax.process_index()
    told = {"found": processes.broadcast_from_first(lambda: {"process": number})}
    try:
        processes.broadcast_from_first(refuse if number == 0 else dict)
    except InputError as error:
        told["error"] = str(error)
    with processes.exclusive(folder):
        try:
            with processes.exclusive(folder):
                raise AssertionError("two runs are in the folder")
        except InputError as error:
            told["held"] = str(error)
    with processes.own_lines(folder / "answers.jsonl").open("a") as file:
        file.write(json.dumps({"paid": number}) + "\n")
    told["damage"] = damaged(folder / "checkpoint")
    programs = Programs()
    for length in range(0, 100_000, 1_700):
        texts = processes.exchange("x" * (length + number))
        assert [len(text) for text in texts] == [length, length + 1]
    print("told", json.dumps(told | {"programs": programs.count}), flush=True)


if __name__ == "__main__":
    main()
