"""The relays that tests put before a port do what their users count on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.cutting import CuttingRelay
from tests.support.delaying import DelayingRelay
from tests.support.server import free_port
from tests.support.severing import SeveringRelay

DEADLINE_S = 20.0
DELAY_S = 0.3


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of somebody who says back what he is told."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(one: socket.socket) -> None:
        with one, contextlib.suppress(OSError):
            while raw := one.recv(1 << 16):
                one.sendall(raw)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    for thread in (acceptor, *threads):
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "a connection outlives its relay"
    listener.close()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), DEADLINE_S)


def ask(one: socket.socket, size: int) -> bytes:
    """What comes back of `size` bytes, until the connection ends."""
    got = b""
    with contextlib.suppress(ConnectionError):
        one.sendall(b"x" * size)
        while len(got) < size and (raw := one.recv(1 << 16)):
            got += raw
    return got


def test_connections_are_cut_where_it_says_and_later_ones_are_whole(echo: str) -> None:
    with CuttingRelay(echo, [150, 50]) as relay:
        for passed in (50, 0, 100_000):  # 100 bytes go there before any comes back
            with connect(relay.address) as one:
                assert len(ask(one, max(100, passed))) == passed
        assert relay.cut == 2


def test_one_process_is_cut_off_and_comes_back(echo: str) -> None:
    with SeveringRelay(echo) as relay, connect(relay.address) as before:
        assert len(ask(before, 10)) == 10
        assert relay.sever(os.getpid()) == 1
        assert ask(before, 10) == b""
        with connect(relay.address) as refused:
            assert ask(refused, 10) == b""
        assert relay.refused == 1
        relay.mend()
        with connect(relay.address) as after:
            assert len(ask(after, 10)) == 10


def test_answers_come_late_and_in_order_and_a_change_holds_at_once(echo: str) -> None:
    with DelayingRelay(echo, DELAY_S) as relay, connect(relay.address) as one:
        began = time.monotonic()
        assert len(ask(one, 100_000)) == 100_000
        assert time.monotonic() - began >= DELAY_S
        relay.delay_s = 1e6
        one.sendall(b"yz")
        relay.delay_s = 0.0
        assert one.recv(2, socket.MSG_WAITALL) == b"yz"
        relay.delay_s = 1e6
        one.sendall(b"never")


def test_who_comes_while_the_target_is_away_is_told() -> None:
    with DelayingRelay(f"127.0.0.1:{free_port()}") as relay, connect(relay.address) as one:
        assert ask(one, 10) == b""
