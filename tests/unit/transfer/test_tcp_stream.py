"""A data worker's stream: what it waits for, and that it never waits for more than can come."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from kvserver.transfer.tcp.stream import Ended, Stalled, Stream

STALL_S = 0.3
MANY = 256 << 10


@pytest.fixture
def ends() -> Iterator[tuple[Stream, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        taken, _ = listener.accept()
    stream = Stream(taken, stall_s=STALL_S)
    yield stream, peer
    stream.close()
    peer.close()


def take(stream: Stream) -> int:
    return stream.receive_some([memoryview(bytearray(4 * MANY))])


def test_many_bytes_are_waited_for_together(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    peer.sendall(bytes(1000))
    later = threading.Timer(0.001, peer.sendall, [bytes(MANY - 1000)])
    later.start()
    while (peeked := len(stream.sock.recv(2 * MANY, socket.MSG_PEEK))) < MANY:
        stream.wait_more(MANY)  # more than once where the machine is so busy that it gives up
    assert peeked == take(stream) == MANY
    later.join()


def test_fewer_bytes_are_taken_when_no_more_come(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    peer.sendall(bytes(1000))
    stream.wait_more(MANY)
    assert take(stream) == 1000


def test_one_byte_is_enough_for_what_waits_after_it(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    peer.sendall(b"1")
    stream.wait_more(MANY)
    assert take(stream) == 1
    peer.sendall(b"2")
    stream.wait_read()
    assert take(stream) == 1
    peer.sendall(b"3")
    stream.wait_more(MANY)
    stream.wait_idle()
    assert take(stream) == 1


def test_a_peer_that_sends_nothing_stalls(ends: tuple[Stream, socket.socket]) -> None:
    stream, _peer = ends
    with pytest.raises(Stalled):
        stream.wait_more(MANY)


def test_a_peer_that_leaves_ends_the_wait(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    threading.Timer(0.001, peer.close).start()
    stream.wait_more(MANY)
    with pytest.raises(Ended):
        take(stream)
