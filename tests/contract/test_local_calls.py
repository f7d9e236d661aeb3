"""The short way of a client on the hub's host: taken where it is there, and done without."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvclient import AsyncClient, DeadlineExceeded, Unavailable
from kvclient.local import LocalCalls
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)
Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("local"), host_bytes="64MiB") as server:
        yield server


def local_of(client: AsyncClient) -> LocalCalls:
    local = client.session.link.local
    assert local is not None
    return local


async def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("not within 10 s")


async def push_and_pull(client: AsyncClient, seed: int) -> None:
    namespace = await client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(seed, 4)
    assert (await namespace.push(keys, BLOCKS.payloads(keys))).written == 4
    out = BLOCKS.out(4)
    result = await namespace.pull(keys, out)
    assert result.found.all()
    assert BLOCKS.wrong(keys, out, result.found) == []


async def test_the_hot_calls_go_this_way(hub: ServerProcess) -> None:
    async with AsyncClient.connect(hub.address) as client:
        local = local_of(client)
        carried: list[str] = []
        begin = local.begin

        def noted(call: object, request: object, seconds: float) -> int:
            carried.append(call.name)  # type: ignore[attr-defined]
            return begin(call, request, seconds)  # type: ignore[arg-type]

        local.begin = noted  # type: ignore[method-assign, assignment]
        await push_and_pull(client, 1)
        assert carried == ["Reserve", "Commit", "Acquire"]


async def test_without_it_everything_goes_by_grpc(hub: ServerProcess) -> None:
    """Closed under a client's hands, in use or not: calls fail as for a hub that is away, and the
    next ones find gRPC, under the same session.
    """
    async with AsyncClient.connect(hub.address) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(2, 2)
        await namespace.announce(keys, 5.0)

        async def wait() -> None:
            async with namespace.acquire(keys, wait_s=5.0) as stream:
                await anext(stream)

        before = hub.stats().counters["streams"]
        waiting = asyncio.create_task(wait())
        await until(lambda: hub.stats().counters["streams"] > before)
        token, local = client.token, local_of(client)
        local.close()
        with pytest.raises(Unavailable):
            await waiting
        await push_and_pull(client, 3)
        assert (client.token, client.reconnects) == (token, 0)


async def test_a_hub_stopped_in_the_middle_of_a_call(hub: ServerProcess) -> None:
    async with AsyncClient.connect(hub.address) as client:
        await push_and_pull(client, 4)
        namespace = await client.open_namespace(BLOCKS.spec)
        os.kill(hub.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await namespace.lookup(BLOCKS.chain(4, 4), deadline_s=0.3)
            assert time.monotonic() - started < 5, "any other call may take ten"
        finally:
            os.kill(hub.pid, signal.SIGCONT)
        await push_and_pull(client, 5)


async def test_a_hub_killed_in_the_middle_of_calls(tmp_path: Path, serve: Serve) -> None:
    hub = serve(host_bytes="64MiB")
    async with AsyncClient.connect(hub.address, deadline_s=5.0) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        os.kill(hub.pid, signal.SIGSTOP)
        running = [asyncio.create_task(namespace.lookup(BLOCKS.chain(6, 4))) for _ in range(3)]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        hub.kill()
        for ended in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(ended, Unavailable), ended
        assert time.monotonic() - started < 4.5, "its end is seen before their deadline"
        hub.restart()
        await until(lambda: client.healthy and client.reconnects == 1)
        await push_and_pull(client, 7)
        assert local_of(client) is not None
