"""What each transport must do when something stands in its way: counted, bounded, never wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvclient import AsyncClient, KVError
from kvclient.transfer import tcp
from kvclient.transfer.nixl import NixlTransfer
from kvproto import frames
from tests.contract.conftest import CROWDED, chosen, eventually, host_tier
from tests.contract.oracle import check_all, fresh
from tests.support.cutting import CuttingRelay
from tests.support.payload import Blocks
from tests.support.server import ServerProcess
from tests.support.ways import WAYS, Way

BIG = {"layers": 16, "heads": 8, "page_bytes": 4096}  # 4 MiB a block


@pytest.fixture(scope="module", params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Way:
    return chosen(request)


def family(pid: int) -> list[int]:
    """A process and its children."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


class Stopped:
    """A server, data workers included, that does nothing inside the `with`."""

    def __init__(self, server: ServerProcess) -> None:
        self._pids = family(server.pid)

    def __enter__(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGCONT)


def counters(server: ServerProcess) -> dict[str, int]:
    return dict(server.stats().counters)


async def test_the_bytes_went_this_way(way: Way, hub: ServerProcess, client: AsyncClient) -> None:
    """Neither more nor less than the region, and by no other transport."""
    blocks = fresh(layers=4, heads=2)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 5)
    before = counters(hub)
    await namespace.push(keys, blocks.payloads(keys))
    await check_all(namespace, blocks, keys)
    moved = 5 * blocks.payload_bytes

    def gone(name: str) -> int:
        return counters(hub).get(name, 0) - before.get(name, 0)

    for transport in ("tcp", "nixl"):
        wanted = moved if transport == way.transport else 0
        eventually(lambda n=f"{transport}_bytes_in", w=wanted: gone(n) == w, f"{transport} in")
        eventually(lambda n=f"{transport}_bytes_out", w=wanted: gone(n) == w, f"{transport} out")
    transfer = client.session.link.transfer
    if isinstance(transfer, NixlTransfer):
        assert transfer.bytes_moved == ([0, 2 * moved] if way.direct else [2 * moved, 0])
    (session,) = [s for s in hub.stats().sessions if s.session == client.session.link.session]
    assert list(session.transports) == [way.transport]


def reuse(client: AsyncClient, arrays: np.ndarray) -> list[int]:
    """The caller's memory is the caller's again, but for what is pinned: which of it is not."""
    free = [i for i, array in enumerate(arrays) if client.pin([array]).done]
    arrays[free] = 0x5A
    return free


async def test_a_server_stopped_in_mid_pull_writes_nothing_later(
    way: Way, hub: ServerProcess
) -> None:
    """The caller's deadline passes, its memory is used for something else, the server goes on."""
    blocks = fresh(**BIG)
    async with way.client(hub) as client:
        namespace = await client.open_namespace(blocks.spec)
        keys = blocks.chain(1, 16)
        await namespace.push(keys, blocks.payloads(keys))
        out = blocks.out(16)
        pull = asyncio.create_task(namespace.pull(keys, out, deadline_s=1.0))
        await asyncio.sleep(0.01)
        with Stopped(hub):
            try:
                await pull
            except KVError:
                ended = "late"
            else:
                ended = "before"  # a fast machine: nothing was under way
            free = reuse(client, out)
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        assert (out[free] == 0x5A).all(), f"the pull had ended {ended}"
        assert await client.pin([out]).settled(5)
        assert len(reuse(client, out)) == 16
        await asyncio.sleep(0.2)
        assert (out == 0x5A).all(), "what was pinned is free"
        eventually(lambda: host_tier(hub).slots_quarantined == 0, "nothing is kept back")
    async with way.client(hub) as client:
        await check_all(await client.open_namespace(blocks.spec), blocks, keys)


async def test_a_server_stopped_in_mid_push_commits_nothing_wrong(
    way: Way, hub: ServerProcess
) -> None:
    blocks = fresh(**BIG)
    async with way.client(hub) as client:
        namespace = await client.open_namespace(blocks.spec)
        for seed in range(1, 21):  # until one is caught before its end
            keys = blocks.chain(seed, 16)
            payloads = blocks.payloads(keys)
            push = asyncio.create_task(namespace.push(keys, payloads, deadline_s=1.0))
            await asyncio.sleep(0.01)
            with Stopped(hub):
                (ended,) = await asyncio.gather(push, return_exceptions=True)
                reuse(client, payloads)
                await asyncio.sleep(0.2)
            if isinstance(ended, BaseException):
                break
        assert isinstance(ended, KVError), ended
    async with way.client(hub) as client:
        namespace = await client.open_namespace(blocks.spec)
        out = blocks.out(16)
        result = await namespace.pull(keys, out)
        assert blocks.wrong(keys, out, result.found) == []
        assert result.corrupt == 0
        eventually(lambda: host_tier(hub).slots_quarantined == 0, "its slots came back")
        await namespace.push(keys, blocks.payloads(keys), wait_s=5)
        await check_all(namespace, blocks, keys)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("way", CROWDED, indirect=True, scope="module")
async def test_64_clients_at_once(way: Way, hub: ServerProcess) -> None:
    blocks = fresh(layers=2, heads=2, page_bytes=1024)
    chains = [blocks.chain(seed, 2) for seed in range(64)]

    async def work(keys: list[bytes]) -> None:
        async with way.client(hub, deadline_s=60, staging_bytes=8 << 20) as client:
            namespace = await client.open_namespace(blocks.spec)
            assert (await namespace.push(keys, blocks.payloads(keys))).written == 2
            await check_all(namespace, blocks, keys)

    await asyncio.gather(*(work(keys) for keys in chains))


async def test_a_cancelled_pull_lets_go_of_its_memory(client: AsyncClient) -> None:
    """Whenever it is cancelled: once the call has ended, nothing writes to `out` any more."""
    blocks = fresh(**BIG)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 8)
    await namespace.push(keys, blocks.payloads(keys))
    for step in range(6):
        out = blocks.out(8)
        pull = asyncio.create_task(namespace.pull(keys, out))
        await asyncio.sleep(step / 500)
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        assert await client.pin([out]).settled(5)
        out[:] = 0x5A
        await asyncio.sleep(0.05)
        assert (out == 0x5A).all()
    await check_all(namespace, blocks, keys)


# ---- tcp -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tcp_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with WAYS["tcp"].serve(tmp_path_factory.mktemp("tcp"), host_bytes="64MiB") as server:
        yield server


HELLO = frames.HELLO_BYTES + frames.WELCOME_HEAD_BYTES
SMALL = Blocks(layers=2, heads=2, page_bytes=512, name="cut")
_WRITE = frames.REQUEST_BYTES + 4 * 8 + SMALL.payload_bytes
_READ = frames.REQUEST_BYTES + frames.REPLY_BYTES + 4 * 8 + SMALL.payload_bytes
BOUNDARIES = [
    1,
    frames.HELLO_BYTES,
    HELLO - 1,
    HELLO,
    HELLO + 1,
    HELLO + frames.REQUEST_BYTES,
    HELLO + frames.REQUEST_BYTES + 4 * 8,
    HELLO + _WRITE - 1,
    HELLO + _WRITE,
    HELLO + _WRITE + frames.REPLY_BYTES - 1,
    HELLO + _WRITE + frames.REPLY_BYTES,
    HELLO + _WRITE + frames.REPLY_BYTES + frames.REQUEST_BYTES,
    HELLO + _WRITE + _READ + frames.REPLY_BYTES - 1,
    HELLO + _WRITE + _READ + frames.REPLY_BYTES,
    HELLO + _WRITE + _READ + frames.REPLY_BYTES + frames.AFTER_BYTES - 1,
]


@pytest.mark.parametrize("at", BOUNDARIES)
async def test_a_connection_cut_at_each_boundary(
    tcp_hub: ServerProcess, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """One cut costs a repetition; the caller sees whole blocks or an error, never wrong bytes."""
    blocks = fresh(layers=2, heads=2, page_bytes=512)
    assert blocks.payload_bytes == SMALL.payload_bytes
    port = str(tcp_hub.options["tcp_listen"])
    with CuttingRelay(port, [at]) as relay:
        monkeypatch.setattr(tcp, "address_of", lambda offer, dialled: relay.address)
        if at < HELLO:
            with pytest.raises(KVError):
                await WAYS["tcp"].client(tcp_hub, deadline_s=5)
            assert relay.cut == 1
            return
        async with WAYS["tcp"].client(tcp_hub, deadline_s=5) as client:
            namespace = await client.open_namespace(blocks.spec)
            keys = blocks.chain(1, 1)
            pushed = await namespace.push(keys, blocks.payloads(keys))
            assert pushed.written == 1
            await check_all(namespace, blocks, keys)
        assert relay.cut == 1


async def test_a_data_worker_killed_under_traffic_costs_no_call(tcp_hub: ServerProcess) -> None:
    """Its connections break, the server starts another one, the client repeats what was open."""
    blocks = fresh(**BIG)
    keys = blocks.chain(1, 6)
    killed: list[int] = []

    def kill() -> None:
        for _ in range(3):
            time.sleep(0.7)
            for pid in family(tcp_hub.pid)[1:]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    async with WAYS["tcp"].client(tcp_hub, deadline_s=20) as client:
        namespace = await client.open_namespace(blocks.spec)
        await namespace.push(keys, blocks.payloads(keys))
        killer = threading.Thread(target=kill)
        killer.start()
        hits = pulls = 0
        least, most = time.monotonic() + 3.0, time.monotonic() + 30.0
        while (now := time.monotonic()) < least or (now < most and pulls < 6 * 20):
            out = blocks.out(6)
            result = await namespace.pull(keys, out)
            assert blocks.wrong(keys, out, result.found) == []
            hits += int(np.count_nonzero(result.found))
            pulls += 6
        killer.join()
        await check_all(namespace, blocks, keys)
    assert killed
    assert hits > pulls // 2
