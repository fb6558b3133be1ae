"""The meeting of a run's processes at their start: who is missing, who is there twice, and what else listens."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from vau_jax.common import rendezvous
from vau_jax.common.files import InputError


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def start() -> Callable[..., Future]:
    """Starts the meeting of one process in a thread."""
    port = free_port()

    def one(number: int, count: int = 3, seconds: float = 20.0, every: float = 0.2) -> Future:
        return pool.submit(rendezvous.meet, f"localhost:{port}", count, number, seconds, every)

    one.port = port
    with ThreadPoolExecutor(8) as pool:
        yield one


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_all_go_on_when_the_last_has_come(order: tuple[int, ...], start: Any) -> None:
    *early, last = order
    waiting = [start(number) for number in early]
    time.sleep(0.3)
    assert not any(one.done() for one in waiting)
    for one in (*waiting, start(last)):
        assert one.result(timeout=20) is None
    socket.create_server(("", start.port)).close()  # JAX can take it at once


def test_lines_say_who_is_missing_and_what_cannot_be_reached(start: Any, capfd: pytest.CaptureFixture) -> None:
    alone = start(2)
    time.sleep(2)
    assert re.search(
        rf"process 2 of 3 waits, \d+ s: process 0 at localhost:{start.port} cannot be reached \(.*refused",
        capfd.readouterr().err,
    )
    first = start(0)
    time.sleep(3)
    assert f"missing are processes 1; there are 0 ({socket.gethostname()}), 2 (" in capfd.readouterr().err
    start(1).result(timeout=20)
    first.result(timeout=20), alone.result(timeout=20)


def test_after_the_deadline_all_say_who_never_came(start: Any) -> None:
    both = start(0, seconds=2.0), start(1)
    for one in both:
        with pytest.raises(InputError, match="waited 2 s for the others: missing are processes 2;"):
            one.result(timeout=20)


def test_two_processes_with_one_number_are_told(start: Any) -> None:
    every = [start(0), start(1), start(1)]
    for one in every:
        with pytest.raises(InputError, match="two processes have number 1, on"):
            one.result(timeout=20)


def test_different_counts_are_told(start: Any) -> None:
    every = [start(0), start(1, count=4)]
    for one in every:
        with pytest.raises(InputError, match=r"process 1 on .* was started as one of 4, process 0 on .* as one of 3"):
            one.result(timeout=20)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\n", b"x" * 5000, b"", b"[1]\n", b'{"process": "1", "of": 3}\n'])
def test_strangers_are_turned_away(said: bytes, start: Any) -> None:
    first = start(0)
    time.sleep(0.3)
    with socket.create_connection(("localhost", start.port)) as stranger:
        stranger.sendall(said)
        start(1), start(2)
        assert first.result(timeout=20) is None


def test_a_process_that_left_and_comes_again_is_counted_once(start: Any) -> None:
    first = start(0)
    time.sleep(0.3)
    with socket.create_connection(("localhost", start.port)) as lost:
        lost.sendall(json.dumps({"process": 1, "of": 3, "host": "h"}).encode() + b"\n")
    time.sleep(0.3)
    two = start(2)
    time.sleep(0.3)
    assert not first.done()
    for one in (start(1), two, first):
        assert one.result(timeout=20) is None


def test_a_taken_port_and_another_program_behind_it_are_named(start: Any) -> None:
    with socket.create_server(("", start.port)) as other:
        with pytest.raises(InputError, match=rf"cannot listen on port {start.port} .*JAX_COORDINATOR_PORT"):
            start(0).result(timeout=20)

        def answer() -> None:
            for _ in range(2):
                connection, _ = other.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"SSH-2.0\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(InputError, match=r"cannot be reached \(.*something else answers there"):
            start(1, seconds=0.5).result(timeout=20)


@pytest.mark.parametrize("address", ["host", ":8476", "host:x", "", "host:0", "host:65536"])
def test_an_address_without_a_port_is_named(address: str) -> None:
    with pytest.raises(InputError, match="expected host:port of process 0"):
        rendezvous.meet(address, 2, 1, 1.0)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_is_none_of_the_processes_is_named(number: int) -> None:
    with pytest.raises(InputError, match=rf"this is process {number} of 2: expected from 0 to 1 \(JAX_PROCESS_ID\)"):
        rendezvous.meet("localhost:8476", 2, number, 1.0)
