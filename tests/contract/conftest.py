"""One server for all tests of a module that leave it alone, and ways to watch it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from kvclient import AsyncClient
from kvproto.v1 import kvserver_pb2 as pb
from tests.support.server import ServerProcess
from tests.support.ways import WAYS, Way

CROWDED = [name for name, way in WAYS.items() if not way.direct]
"""For tests of many clients at once: what a client costs, it costs with and without staging."""


def chosen(request: pytest.FixtureRequest) -> Way:
    way = WAYS[request.param]
    if way.missing:
        pytest.skip(way.missing)
    return way


def _slow_if_direct(name: str) -> object:
    """Without staging `make test` asks what a transport must do (test_transports.py), and leaves
    the rest to `make test-all`."""
    return pytest.param(name, marks=[pytest.mark.slow] if WAYS[name].direct else [])


@pytest.fixture(scope="module", params=list(map(_slow_if_direct, WAYS)))
def way(request: pytest.FixtureRequest) -> Way:
    """Each transport in turn."""
    return chosen(request)


@pytest.fixture(scope="module")
def hub(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with 96 MiB of host memory and no disk, shared by a module's tests."""
    server = way.serve(tmp_path_factory.mktemp("hub"), host_bytes="96MiB")
    yield server
    server.close()


@pytest.fixture
async def client(way: Way, hub: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with way.client(hub, name="contract") as client:
        assert client.transport == way.transport
        yield client


def host_tier(server: ServerProcess) -> pb.TierStats:
    (tier,) = (tier for tier in server.stats().tiers if tier.tier == pb.TIER_HOST)
    return tier


def eventually(true: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until `true()`; the test fails when that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
