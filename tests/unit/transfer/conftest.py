"""A real arena with real liveness files behind a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.transfer.shm import ShmServer
from tests.unit.transfer.tcp_bench import HASTE_S, TcpBench

TOKEN = b"0123456789abcdef"
SESSION = 77


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[HostArena]:
    arena = HostArena.open(tmp_path / "host", 4 << 20)
    yield arena
    arena.close(keep=False)


@pytest.fixture
def liveness(tmp_path: Path) -> Liveness:
    return Liveness(tmp_path / "host")


@pytest.fixture
async def endpoint(
    tmp_path: Path, arena: HostArena, liveness: Liveness
) -> AsyncIterator[ShmServer]:
    def authorise(session: int, client: int, token: bytes) -> bool:
        return (session, token) == (SESSION, TOKEN) and client > 0

    server = ShmServer(
        tmp_path / "shm.sock",
        arena=arena,
        liveness=liveness,
        authorise=authorise,
        connections_max=4,
        handshake_s=20.0,
    )
    await server.start()
    yield server
    await server.close()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[TcpBench]:
    """A data port that soon gives up a peer that stands still."""
    bench = TcpBench(tmp_path / "host", stall_s=HASTE_S, hello_s=HASTE_S)
    yield bench
    bench.close()
