"""The first meeting of a run's processes, before JAX connects them: JAX waits for all in silence, and here each process
says which ones are missing.

Process 0 listens at the coordinator's port and the others report there, a line of JSON each way. When all are there the
port is free again, and JAX takes it.
"""

import json
import selectors
import socket
import sys
import time
from typing import Any

from vau_jax.common.files import InputError, dump_json, short

LONGEST = 1024  # bytes of a line; whatever else connects is turned away
ALIVE = 5.0  # seconds between process 0's lines to those that wait


def meet(address: str, count: int, number: int, seconds: float, every: float = 30.0) -> None:
    """Returns when all `count` processes are at `address`, host:port of process 0; this is process `number`.

    Every `every` seconds a line on stderr says who is missing. Raises InputError after `seconds`, for a number that two
    processes have, for processes that were told different counts, and where the port is taken.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(f"coordinator address {address!r}: expected host:port of process 0 (JAX_COORDINATOR_ADDRESS)")
    if not 0 <= number < count:
        raise InputError(f"this is process {number} of {count}: expected from 0 to {count - 1} (JAX_PROCESS_ID)")
    if count == 1:
        return
    if number == 0:
        _Host(int(port), count, seconds, every).gather()
    else:
        _join((host.strip("[]"), int(port)), count, number, seconds, every)


class _Lines:
    """Says a line at most every so many seconds, until a deadline."""

    def __init__(self, title: str, seconds: float, every: float) -> None:
        self.title, self.began, self.seconds, self.every = title, time.monotonic(), seconds, every
        self.last = self.began

    def say(self, text: str) -> None:
        """Raises InputError with `text` after the deadline."""
        now = time.monotonic()
        if now - self.began > self.seconds:
            raise InputError(f"{self.title} waited {self.seconds:.0f} s for the others: {text}")
        if now - self.last >= self.every:
            self.last = now
            print(f"{self.title} waits, {now - self.began:.0f} s: {text}", file=sys.stderr, flush=True)


# --- Process 0 ---


class _Host:
    """Process 0: it collects the others."""

    def __init__(self, port: int, count: int, seconds: float, every: float) -> None:
        self.port, self.count = port, count
        self.lines = _Lines(f"process 0 of {count}", seconds, every)
        self.present: dict[int, tuple[socket.socket | None, str]] = {0: (None, socket.gethostname())}
        self.selector = selectors.DefaultSelector()

    def gather(self) -> None:
        """Returns when all are there, and know it."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server(("", self.port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise InputError(
                f"process 0 of {self.count} cannot listen on port {self.port} ({short(error)}): choose another one for "
                "all processes (JAX_COORDINATOR_PORT, or JAX_COORDINATOR_ADDRESS)"
            ) from error
        with server, self.selector:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ)
            try:
                self._until_complete(server)
                self._tell({"go": True})
                self._until_closed()
            except InputError as error:
                self._tell({"error": str(error)})
                raise
            finally:
                for key in list(self.selector.get_map().values()):
                    key.fileobj.close()

    def _until_complete(self, server: socket.socket) -> None:
        told = time.monotonic()
        while len(self.present) < self.count:
            for key, _ in self.selector.select(timeout=0.5):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    self.selector.register(connection, selectors.EVENT_READ, bytearray())
                else:
                    self._read(key.fileobj, key.data)
            if time.monotonic() - told > ALIVE:
                told = time.monotonic()
                self._tell({"missing": self._missing()})
            self.lines.say(self._missing())

    def _missing(self) -> str:
        absent = [number for number in range(self.count) if number not in self.present]
        there = ", ".join(f"{number} ({host})" for number, (_, host) in sorted(self.present.items())[:8])
        more = f" and {len(absent) - 16} more" * (len(absent) > 16)
        return f"missing are processes {', '.join(map(str, absent[:16]))}{more}; there are {there}"

    def _read(self, connection: socket.socket, buffer: bytearray) -> None:
        try:
            data = connection.recv(LONGEST)
        except OSError:
            data = b""
        buffer += data
        if not data or len(buffer) > LONGEST:
            self._forget(connection)
        elif b"\n" in buffer:
            self._enter(connection, bytes(buffer))
            buffer.clear()

    def _enter(self, connection: socket.socket, line: bytes) -> None:
        told = _parsed(line)
        number, count, host = told.get("process"), told.get("of"), str(told.get("host", ""))[:100]
        if not isinstance(number, int) or not isinstance(count, int):
            self._forget(connection)
        elif count != self.count or not 0 <= number < count:
            self.present[-1] = connection, host
            raise InputError(
                f"process {number} on {host} was started as one of {count}, process 0 on {self.present[0][1]} as one "
                f"of {self.count}: start all with the same number"
            )
        elif number in self.present:
            other = self.present[number][1]
            self.present[-1] = connection, host
            raise InputError(f"two processes have number {number}, on {other} and on {host}: each needs its own")
        else:
            self.present[number] = connection, host

    def _forget(self, connection: socket.socket) -> None:
        self.present = {number: (c, host) for number, (c, host) in self.present.items() if c is not connection}
        self.selector.unregister(connection)
        connection.close()

    def _tell(self, message: dict[str, Any]) -> None:
        line = dump_json(message).encode() + b"\n"
        for connection, _ in list(self.present.values()):
            try:
                if connection:
                    connection.send(line)
            except OSError:
                self._forget(connection)

    def _until_closed(self, seconds: float = 5.0) -> None:
        """The others close first: the port would stay taken for a minute by the side that does."""
        deadline = time.monotonic() + seconds
        while len(self.present) > 1 and time.monotonic() < deadline:
            for key, _ in self.selector.select(timeout=0.2):
                if key.data is not None:
                    self._read(key.fileobj, key.data)


# --- The others ---


def _join(place: tuple[str, int], count: int, number: int, seconds: float, every: float) -> None:
    lines = _Lines(f"process {number} of {count}", seconds, every)
    hello = dump_json({"process": number, "of": count, "host": socket.gethostname()}).encode() + b"\n"
    where = f"process 0 at {place[0]}:{place[1]}"
    while True:
        try:
            with socket.create_connection(place, timeout=ALIVE) as connection:
                connection.settimeout(4 * ALIVE)
                connection.sendall(hello)
                if _told_to_go(connection, lines):
                    return
                reason = "it closed the connection"
        except OSError as error:
            reason = short(error)
        lines.say(f"{where} cannot be reached ({reason})")
        time.sleep(1)


def _told_to_go(connection: socket.socket, lines: _Lines) -> bool:
    """Whether all are there; False where the connection ended before. Raises InputError for what process 0 found."""
    with connection.makefile("rb") as file:
        while line := file.readline(16 * LONGEST):
            told = _parsed(line)
            if told.get("go"):
                return True
            if "error" in told:
                raise InputError(str(told["error"])[:LONGEST])
            if "missing" not in told:
                raise OSError("something else answers there")
            lines.say(str(told["missing"])[:LONGEST])
    return False


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a line; empty for anything else."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
