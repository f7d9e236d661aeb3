"""The server's handshake: who is let in, what is refused, and that nothing stays open behind it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kvproto.handshake import (
    ANSWER_BYTES_MAX,
    Answer,
    Mode,
    Request,
    Status,
    decode_answer,
    encode_request,
)
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.base import TransferError
from kvserver.transfer.shm import ShmServer
from tests.unit.transfer.conftest import SESSION, TOKEN


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def exchange(path: str, raw: bytes, *, shut: bool = False) -> tuple[bytes, list[int]]:
    """Send `raw`, optionally end our side, read until the server closes."""

    def work() -> tuple[bytes, list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            connection.connect(path)
            with suppress(BrokenPipeError):  # it may answer and close before it is asked
                connection.sendall(raw)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            got, fds = b"", []
            while True:
                try:
                    part, passed, _, _ = socket.recv_fds(connection, ANSWER_BYTES_MAX, 4)
                except ConnectionResetError:
                    return got, fds
                fds.extend(passed)
                if not part:
                    return got, fds
                got += part

    return await asyncio.to_thread(work)


async def ask(path: str, request: Request) -> tuple[Answer, list[int]]:
    raw, fds = await exchange(path, encode_request(request))
    return decode_answer(raw), fds


async def settled(count: int) -> bool:
    """Whether the process gets back to `count` open descriptors."""
    for _ in range(1000):
        if open_fds() <= count:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_writer_gets_its_lock_and_the_arena(
    endpoint: ShmServer, arena: HostArena, liveness: Liveness
) -> None:
    answer, fds = await ask(endpoint.address, Request(Mode.WRITE, SESSION, 3, TOKEN))
    assert answer.status is Status.OK
    assert (answer.epoch, answer.arena_id) == (arena.epoch, arena.arena_id)
    assert (answer.data_offset, answer.data_bytes) == (arena.data_offset, arena.data_bytes)
    live, mapped = fds
    assert os.fstat(mapped).st_ino == os.fstat(arena.fd).st_ino
    assert not liveness.is_dead(3)
    os.close(mapped)
    assert not liveness.is_dead(3), "the arena's descriptor is not the lock"
    os.close(live)
    assert liveness.is_dead(3)


async def test_a_reader_gets_a_descriptor_that_cannot_write(endpoint: ShmServer) -> None:
    answer, fds = await ask(endpoint.address, Request(Mode.READ, SESSION, 3, TOKEN))
    assert answer.status is Status.OK
    (mapped,) = fds
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(mapped, b"x", 0)
    os.close(mapped)


async def test_one_writable_mapping_a_client(endpoint: ShmServer) -> None:
    request = Request(Mode.WRITE, SESSION, 3, TOKEN)
    first, fds = await ask(endpoint.address, request)
    second, none = await ask(endpoint.address, request)
    assert (first.status, second.status) == (Status.OK, Status.MAPPED)
    assert none == []
    assert "client 3 already holds" in second.text
    reader, readers = await ask(endpoint.address, Request(Mode.READ, SESSION, 3, TOKEN))
    assert reader.status is Status.OK
    for fd in (*fds, *readers):
        os.close(fd)


@pytest.mark.parametrize(
    ("session", "client", "token"),
    [(SESSION + 1, 3, TOKEN), (SESSION, 0, TOKEN), (SESSION, 3, bytes(16))],
)
async def test_strangers_are_refused(
    endpoint: ShmServer, liveness: Liveness, session: int, client: int, token: bytes
) -> None:
    answer, fds = await ask(endpoint.address, Request(Mode.WRITE, session, client, token))
    assert (answer.status, fds) == (Status.REFUSED, [])
    assert liveness.known() == [], "no lock is made for a stranger"


@pytest.mark.parametrize(
    "raw", [b"\0" * 40, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 20, os.urandom(4096)]
)
async def test_garbage_is_refused_and_leaks_nothing(endpoint: ShmServer, raw: bytes) -> None:
    before = open_fds()
    for _ in range(20):
        got, fds = await exchange(endpoint.address, raw)
        assert fds == []
        # What follows a request unread makes the kernel reset the connection; both are refusals.
        assert got == b"" or decode_answer(got).status is Status.BAD_REQUEST
    assert await settled(before)
    assert endpoint.refused == 20


async def test_half_a_request_ends_at_once(endpoint: ShmServer) -> None:
    raw, _ = await exchange(endpoint.address, b"kvsh\x01", shut=True)
    answer = decode_answer(raw)
    assert answer.status is Status.BAD_REQUEST
    assert "has 5 bytes" in answer.text


async def test_silence_ends_at_the_deadline(
    endpoint: ShmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_handshake_s", 0.3)
    started = time.monotonic()
    raw, _ = await exchange(endpoint.address, b"")
    assert decode_answer(raw).status is Status.BAD_REQUEST
    assert 0.2 < time.monotonic() - started < 4, "its peer would wait for five"


async def test_too_many_at_once_are_told_so(endpoint: ShmServer) -> None:
    before = open_fds()
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
    for connection in silent:
        connection.connect(endpoint.address)
    await asyncio.sleep(0.05)
    answer, _ = await ask(endpoint.address, Request(Mode.READ, SESSION, 3, TOKEN))
    assert answer.status is Status.BUSY
    assert "more than 4" in answer.text
    for connection in silent:
        connection.close()
    assert await settled(before)
    for _ in range(1000):
        answer, fds = await ask(endpoint.address, Request(Mode.READ, SESSION, 3, TOKEN))
        if answer.status is not Status.BUSY:
            break
        await asyncio.sleep(0.01)
    assert answer.status is Status.OK
    os.close(fds[0])


async def test_granting_leaks_nothing(endpoint: ShmServer) -> None:
    before = open_fds()
    for client in range(1, 30):
        answer, fds = await ask(endpoint.address, Request(Mode.WRITE, SESSION, client, TOKEN))
        assert answer.status is Status.OK
        for fd in fds:
            os.close(fd)
    assert await settled(before)


async def test_a_client_that_left_gets_no_lock_kept(
    endpoint: ShmServer, liveness: Liveness
) -> None:
    """It asked and closed without reading: the descriptors die with the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(endpoint.address)
        connection.sendall(encode_request(Request(Mode.WRITE, SESSION, 5, TOKEN)))
    for _ in range(1000):
        if endpoint.granted + endpoint.refused:
            break
        await asyncio.sleep(0.01)
    for _ in range(1000):
        if liveness.is_dead(5):
            break
        await asyncio.sleep(0.01)
    assert liveness.is_dead(5)


async def test_a_stale_socket_is_replaced(
    tmp_path: Path, arena: HostArena, liveness: Liveness
) -> None:
    path = tmp_path / "shm.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ShmServer(path, arena=arena, liveness=liveness, authorise=lambda *_: True)
    await server.start()
    answer, fds = await ask(server.address, Request(Mode.READ, 1, 1, TOKEN))
    assert answer.status is Status.OK
    os.close(fds[0])
    assert path.stat().st_mode & 0o777 == 0o600
    await server.close()
    assert not path.exists()


async def test_a_path_too_long_is_named(
    tmp_path: Path, arena: HostArena, liveness: Liveness
) -> None:
    path = tmp_path / ("x" * 120)
    server = ShmServer(path, arena=arena, liveness=liveness, authorise=lambda *_: True)
    with pytest.raises(TransferError, match="longer than 107 bytes"):
        await server.start()
