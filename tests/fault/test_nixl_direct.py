"""Direct to the caller's memory, and a hub that stops in the middle: what stays pinned, till when.

Over CMA the hub alone copies, so a stopped hub's bytes come when it goes on. A failpoint
(`nixl.post`) keeps it at the last moment before it moves: everything was checked.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from kvclient import AsyncClient, Conflict, KVError, Pin, Registered, Scattered
from kvclient.transfer import ring as rings
from kvproto import nixlib
from kvproto.grid import Region
from tests.contract.peer import BLOCKS
from tests.fault.test_nixl_peers import pushed, running, small, transfer_of, until
from tests.support.server import ServerProcess

pytestmark = pytest.mark.skipif(
    not nixlib.available(), reason="NIXL is not installed (pip install --no-deps nixl-cu12)"
)
Serve = Callable[..., ServerProcess]
COUNT = 6
LONG = {"session_ttl_ms": 60_000, "reservation_ms_max": 20_000}


@pytest.fixture(autouse=True)
def no_orphans_of_others() -> Iterator[None]:
    rings.orphans.kept.clear()
    yield
    rings.orphans.kept.clear()


class Engine:
    """Memory of the caller: what is pulled into, or pushed from, in the middle of more of it."""

    def __init__(self) -> None:
        self.memory = np.full((COUNT + 2, *BLOCKS.shape), 0x11, np.uint8)
        self.pages = self.memory[1:-1]

    def reuse(self, client: AsyncClient) -> np.ndarray:
        """Write all that is not pinned, as an engine does with blocks that are free; what is."""
        pinned = np.array([not client.pin([block]).done for block in self.memory])
        self.memory[~pinned] = 0x77
        return pinned


@asynccontextmanager
async def direct(server: ServerProcess, engine: Engine) -> AsyncIterator[AsyncClient]:
    async with AsyncClient.connect(server.address, transport="nixl", direct=True) as client:
        await client.register(engine.memory)
        assert client.direct
        yield client


async def failed(call: asyncio.Task[object], server: ServerProcess) -> Pin:
    """Stop the hub in the middle of a call, which fails at its deadline and says what it left."""
    await until(lambda: running(server) > 0, "the hub is about to move")
    server.stop_signal()
    with pytest.raises(KVError, match="stay pinned") as caught:
        await call
    pin = caught.value.pin
    assert pin is not None
    assert not pin.done
    return pin


async def test_a_hub_stopped_in_mid_pull_writes_only_what_is_pinned(serve: Serve) -> None:
    server = small(serve, failpoints="nixl.post=sleep:1.5@1", **LONG)
    keys = await pushed(server, 1)
    engine = Engine()
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        pull = asyncio.create_task(namespace.pull(keys, engine.pages, deadline_s=1.2))
        try:
            pin = await failed(pull, server)
            pinned = engine.reuse(client)
            assert pinned.any()
            assert not pinned[[0, -1]].any()
            assert pin.nbytes == int(pinned.sum()) * BLOCKS.payload_bytes
            with pytest.raises(Conflict, match="may still"):
                await client.unregister(client.memories.registered[0])
            before = engine.memory.copy()
        finally:
            server.cont()
        assert await pin.settled(10)
        assert client.pin([engine.memory]).done
        assert (engine.memory[pinned] != before[pinned]).any(), "late bytes came"
        assert (engine.memory[~pinned] == 0x77).all(), "and only where they were pinned"
        engine.memory[:] = 0x33
        await asyncio.sleep(0.3)
        assert (engine.memory == 0x33).all(), "what is no longer pinned is the caller's"
        result = await namespace.pull(keys, engine.pages)
        assert result.found.all()
        assert BLOCKS.wrong(keys, engine.pages, result.found) == []
        transfer = transfer_of(client)
        staged, moved = transfer.bytes_moved
        assert staged == 0
        assert moved >= COUNT * BLOCKS.payload_bytes
        await client.unregister(client.memories.registered[0])


@pytest.mark.parametrize("honest", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_a_hub_stopped_in_mid_push_commits_nothing_wrong(serve: Serve, honest: bool) -> None:
    """Also from a caller that writes what is pinned: it is refused by its checksums."""
    server = small(serve, failpoints="nixl.post=sleep:1.5@1", **LONG)
    engine = Engine()
    keys = BLOCKS.chain(1, COUNT)
    engine.pages[:] = BLOCKS.payloads(keys)
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        push = asyncio.create_task(namespace.push(keys, engine.pages, deadline_s=1.2))
        try:
            pin = await failed(push, server)
            if honest:
                engine.reuse(client)
            else:
                engine.memory[:] = 0x77
            before = engine.memory.copy()
        finally:
            server.cont()
        assert await pin.settled(10)
        assert (engine.memory == before).all(), "a push only reads"
        out = BLOCKS.out(COUNT)
        result = await namespace.pull(keys, out)
        assert BLOCKS.wrong(keys, out, result.found) == []
        assert result.corrupt == 0
        assert not result.found.any(), "the client has not said that its pages were held"
        engine.pages[:] = BLOCKS.payloads(keys)
        assert (await namespace.push(keys, engine.pages, wait_s=5)).written == COUNT
        result = await namespace.pull(keys, out)
        assert result.found.all()
        assert BLOCKS.wrong(keys, out, result.found) == []


@pytest.mark.slow
async def test_pages_that_change_under_a_push_are_not_committed(serve: Serve) -> None:
    """No call fails here: the hub is only slow, and the caller does not keep to the rule."""
    server = small(serve, failpoints="nixl.post=sleep:0.5@1", **LONG)
    engine = Engine()
    keys = BLOCKS.chain(1, COUNT)
    engine.pages[:] = BLOCKS.payloads(keys)
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        push = asyncio.create_task(namespace.push(keys, engine.pages, deadline_s=8))
        await until(lambda: running(server) > 0, "the hub is about to read")
        assert not client.pin([engine.pages]).done
        engine.pages[:] = 0x77
        assert (await push).written == 0
        assert client.pin([engine.pages]).done
        assert not (await namespace.pull(keys, BLOCKS.out(COUNT))).found.any()


@pytest.mark.slow
async def test_a_cancelled_call_leaves_its_memory_pinned(serve: Serve) -> None:
    server = small(serve, failpoints="nixl.post=sleep:0.7@1", **LONG)
    keys = await pushed(server, 1)
    engine = Engine()
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        pull = asyncio.create_task(namespace.pull(keys, engine.pages))
        await until(lambda: running(server) > 0, "the hub is about to write")
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        pin = client.pin([engine.pages])
        assert not pin.done
        assert await asyncio.to_thread(pin.wait, 10)
        engine.memory[:] = 0x33
        await asyncio.sleep(0.3)
        assert (engine.memory == 0x33).all()


@pytest.mark.slow
async def test_a_session_that_ends_under_a_pull_is_settled_by_the_next(serve: Serve) -> None:
    """The hub stands still for longer than the session lives; then it goes on, the same hub."""
    server = small(serve, failpoints="nixl.post=sleep:1.5@1")
    keys = await pushed(server, 1)
    engine = Engine()
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        pull = asyncio.create_task(namespace.pull(keys, engine.pages, deadline_s=1.2))
        pin = await failed(pull, server)
        client.session._lose(client.session.link, "the test says so")
        assert not pin.done
        with pytest.raises(KVError):
            await namespace.pull(keys, engine.pages, deadline_s=0.2)
        server.cont()
        assert await pin.settled(15)
        assert rings.orphans.kept == []
        await until(lambda: client.healthy, "reconnected")
        assert client.direct
        result = await namespace.pull(keys, engine.pages)
        assert result.found.all(), "the memory is registered with the next session as well"
        assert BLOCKS.wrong(keys, engine.pages, result.found) == []
        assert transfer_of(client).bytes_moved[0] == 0


async def test_a_killed_hubs_successor_is_the_proof(serve: Serve) -> None:
    server = small(serve, failpoints="nixl.post=sleep:5@1", **LONG)
    keys = await pushed(server, 1)
    engine = Engine()
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        pull = asyncio.create_task(namespace.pull(keys, engine.pages, deadline_s=5))
        await until(lambda: running(server) > 0, "the hub is about to write")
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(KVError) as caught:
            await pull
        pin = caught.value.pin
        assert pin is not None
        assert not await pin.settled(0.5), "nobody has said that the hub writes no more"
        server.kill()
        server.restart()
        assert await pin.settled(15)
        await until(lambda: client.healthy, "reconnected")
        result = await namespace.pull(keys, engine.pages)
        assert result.found.all(), "a warm restart"
        assert BLOCKS.wrong(keys, engine.pages, result.found) == []


@pytest.mark.slow
async def test_a_client_that_leaves_keeps_the_memory_until_another_asks(serve: Serve) -> None:
    server = small(serve, failpoints="nixl.post=sleep:1.5@1", **LONG)
    keys = await pushed(server, 1)
    engine = Engine()
    async with direct(server, engine) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        pull = asyncio.create_task(namespace.pull(keys, engine.pages, deadline_s=1.2))
        pin = await failed(pull, server)
    assert len(rings.orphans.kept) == 1
    server.cont()
    await until(lambda: running(server) == 0, "the hub has ended them")
    assert not pin.done, "it was not asked"
    async with AsyncClient.connect(server.address, transport="nixl"):
        assert await pin.settled(5)
        assert rings.orphans.kept == []


async def test_pages_of_an_engine_in_and_out(serve: Serve) -> None:
    """Cells in pieces all over the memory, layer by layer, and a tail."""
    server = small(serve, **LONG)
    grid, cell = BLOCKS.spec.grid, BLOCKS.shape[2]
    page, count = BLOCKS.spec.page_bytes, cell // BLOCKS.spec.page_bytes
    pool = np.zeros((2 * COUNT * grid.cells * count, page), np.uint8)
    ids = (
        np.random.default_rng(7).permutation(len(pool)).reshape(2, COUNT, *BLOCKS.shape[:2], count)
    )

    def block(where: np.ndarray, layers: slice = slice(None)) -> Scattered:
        chosen = where[layers]

        def read(start: int, stop: int) -> np.ndarray:
            return pool[chosen[start:stop]].reshape(stop - start, grid.heads, cell)

        addresses = pool.ctypes.data + chosen.astype(np.uint64) * np.uint64(page)
        return Scattered(addresses, page, read)

    async with AsyncClient.connect(server.address, transport="nixl", direct=True) as client:
        memory = await client.register(pool)
        assert isinstance(memory, Registered)
        namespace = await client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(1, COUNT)
        payloads = BLOCKS.payloads(keys)
        pool[ids[0]] = payloads.reshape(*ids[0].shape, page)
        tokens = [128] * (COUNT - 1) + [20]
        async with await namespace.reserve(keys, tokens=tokens) as reservation:
            for layer in range(grid.layers):
                part = Region(layer, layer + 1, 0, grid.heads)
                blocks = [block(ids[0, i], slice(layer, layer + 1)) for i in range(COUNT)]
                verdicts = await reservation.fill(range(COUNT), blocks, region=part)
                assert verdicts.tolist() == [0] * COUNT
        result = await namespace.pull(keys, [block(ids[1, i]) for i in range(COUNT)])
        assert result.found.all()
        pulled = pool[ids[1]].reshape(payloads.shape)
        assert np.array_equal(pulled[:-1], payloads[:-1])
        assert np.array_equal(pulled[-1, :, :, : 2 * page], payloads[-1, :, :, : 2 * page])
        assert (pulled[-1, :, :, 2 * page :] == 0).all(), "a tail leaves the rest alone"
        transfer = transfer_of(client)
        assert transfer.bytes_moved == [0, 2 * result.bytes]
    async with AsyncClient.connect(server.address, transport="shm") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        with pytest.raises(KVError, match="direct=True, not by shm"):
            await namespace.pull(keys, [block(ids[1, i]) for i in range(COUNT)])
