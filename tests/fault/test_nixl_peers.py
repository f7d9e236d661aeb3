"""NIXL's peers that stop, die or come back too late, in the middle of a transfer.

The hub initiates, so either side may stand still while bytes are under way. Over UCX's tcp a READ
needs the client's help: a stopped client's transfer never ends, and its bytes come when it goes on.
Over CMA the hub alone copies: a stopped hub's bytes come when the hub goes on.

A failpoint (`nixl.post`) keeps the hub at the last moment before it moves: everything was checked.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvclient import AsyncClient, Client, KVError, Namespace
from kvclient.timing import Deadline
from kvclient.transfer import ring as rings
from kvclient.transfer.cutting import region_message
from kvclient.transfer.nixl import NixlTransfer
from kvproto import nixlib
from kvproto.v1 import kvserver_pb2 as pb
from tests.contract.conftest import eventually, host_tier
from tests.contract.peer import BLOCKS, SEED, Peer
from tests.support.server import ServerProcess

pytestmark = pytest.mark.skipif(
    not nixlib.available(), reason="NIXL is not installed (pip install --no-deps nixl-cu12)"
)
Serve = Callable[..., ServerProcess]
FILL = 40  # more blocks than the host tier holds
SHORT = {"session_ttl_ms": 2000, "heartbeat_ms": 100, "reservation_ms_max": 1000}


@pytest.fixture(autouse=True)
def no_orphans_of_others() -> Iterator[None]:
    rings.orphans.kept.clear()
    yield
    rings.orphans.kept.clear()


def small(serve: Serve, **options: object) -> ServerProcess:
    return serve(host_bytes="8MiB", nixl_enabled="true", **{**SHORT, **options})


def running(server: ServerProcess) -> int:
    return int(server.stats().counters["nixl_moves_running"])


def fill(namespace: Namespace) -> list[bytes]:
    """Push more than the tier holds, so that every free slot is used anew."""
    keys = [BLOCKS.chain(seed, 1)[0] for seed in range(FILL)]
    for key in keys:
        namespace.push([key], BLOCKS.payloads([key]))
    return keys


def check(namespace: Namespace, keys: list[bytes]) -> int:
    out = BLOCKS.out(len(keys))
    result = namespace.pull(keys, out)
    assert BLOCKS.wrong(keys, out, result.found) == []
    assert result.corrupt == 0
    return int(result.found.sum())


# ---- the client ----------------------------------------------------------------------------


@pytest.mark.parametrize("tls", ["all", "tcp"])
def test_a_client_killed_in_the_middle_of_a_push(
    tls: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    server = small(serve, failpoints="nixl.post=sleep:1.2@1")
    with Peer(server.address, "push", 6, "nixl") as peer:
        assert peer.says() == "pushing"
        eventually(lambda: running(server) > 0, "the hub is about to read")
        os.kill(peer.pid, signal.SIGKILL)
    eventually(lambda: running(server) == 0, "a dead client's transfer ends")
    eventually(lambda: host_tier(server).slots_quarantined == 0, "its slots are back", 15)
    with Client.connect(server.address, transport="nixl") as client:
        namespace = client.open_namespace(BLOCKS.spec)
        assert check(namespace, fill(namespace)) > 0
        assert namespace.lookup(BLOCKS.chain(SEED, 6)).usable_blocks == 0
    assert server.stats().counters["nixl_rebuilds"] == 0


def test_a_client_stopped_in_the_middle_of_a_push_writes_into_no_reused_slot(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reservation expires, its session ends, its slots stay where they are."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    server = small(serve, failpoints="nixl.post=sleep:1.2@1", nixl_move_ms=500)
    with Peer(server.address, "push", 6, "nixl") as peer:
        assert peer.says() == "pushing"
        eventually(lambda: running(server) > 0, "the hub is about to read")
        os.kill(peer.pid, signal.SIGSTOP)
        eventually(lambda: host_tier(server).slots_quarantined > 0, "its reservation expired")
        eventually(lambda: len(server.stats().sessions) == 0, "its session ended")
        time.sleep(2.5)  # the driver has asked several times whether it is dead
        assert running(server) > 0, "its transfer is not terminal"
        held = host_tier(server).slots_quarantined
        assert held > 0
        with Client.connect(server.address, transport="nixl") as client:
            namespace = client.open_namespace(BLOCKS.spec)
            keys = fill(namespace)
            before = check(namespace, keys)
            assert before > 0
            assert host_tier(server).slots_quarantined == held
            os.kill(peer.pid, signal.SIGCONT)
            assert peer.says(), "it has gone on, and was told that its session is over"
            eventually(lambda: running(server) == 0, "its bytes have come")
            assert check(namespace, keys) == before, "they hit nobody"
            eventually(lambda: host_tier(server).slots_quarantined == 0, "its slots are back", 15)


def test_a_transfer_that_never_ends_costs_the_agent_and_frees_the_slots(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other clients see: a move that was under way fails, the next one works again."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    server = small(
        serve, failpoints="nixl.post=sleep:1.2@1", nixl_move_ms=500, nixl_rebuild_ms=4000
    )
    with (
        Peer(server.address, "push", 6, "nixl") as peer,
        Client.connect(server.address, transport="nixl") as client,
    ):
        assert peer.says() == "pushing"
        eventually(lambda: running(server) > 0, "the hub is about to read")
        os.kill(peer.pid, signal.SIGSTOP)
        namespace = client.open_namespace(BLOCKS.spec)
        first = BLOCKS.chain(1, 2)
        eventually(
            lambda: namespace.push(first, BLOCKS.payloads(first)).present == 2, "others move on"
        )
        eventually(lambda: server.stats().counters["nixl_rebuilds"] == 1, "the agent is new", 15)
        eventually(lambda: host_tier(server).slots_quarantined == 0, "the slots are back")
        keys = BLOCKS.chain(2, 2)

        def works() -> bool:
            namespace.push(keys, BLOCKS.payloads(keys))
            return check(namespace, keys) == 2

        eventually(works, "the client has attached again")
        assert client.transport == "nixl"
        assert server.exit_code() is None


# ---- the hub -------------------------------------------------------------------------------


async def until(true: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def transfer_of(client: AsyncClient) -> NixlTransfer:
    transfer = client.session.link.transfer
    assert isinstance(transfer, NixlTransfer)
    return transfer


async def pushed(server: ServerProcess, seed: int) -> list[bytes]:
    """Blocks that came by shm, so that the failpoint is hit by pulls only."""
    keys = BLOCKS.chain(seed, 6)
    async with AsyncClient.connect(server.address, transport="shm") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        assert (await namespace.push(keys, BLOCKS.payloads(keys))).written == 6
    return keys


async def test_a_hub_stopped_in_the_middle_of_a_pull_writes_into_no_memory_of_ours(
    serve: Serve,
) -> None:
    """The call fails at its deadline, the caller uses its memory for something else, the hub goes
    on: what it writes then lands in extents that nobody was given.
    """
    server = small(serve, failpoints="nixl.post=sleep:1.5@1-3", session_ttl_ms=60_000)
    keys = await pushed(server, 1)
    async with AsyncClient.connect(server.address, transport="nixl") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        transfer = transfer_of(client)
        ring = transfer._ring
        assert ring is not None
        out = BLOCKS.out(6)
        pull = asyncio.create_task(namespace.pull(keys, out, deadline_s=1.2))
        await until(lambda: running(server) > 0, "the hub is about to write")
        server.stop_signal()
        try:
            started = time.monotonic()
            with pytest.raises(KVError):
                await pull
            assert time.monotonic() - started < 6, "the deadline holds although the hub stands"
            assert ring.withheld, "the moves were not answered"
            withheld = [ring.view(extent) for extent in ring._withheld]
            out[:] = 0x77  # the caller's memory is the caller's again
            for view in withheld:
                view[:] = 0x5A
        finally:
            server.cont()
        await until(lambda: any((view != 0x5A).any() for view in withheld), "late bytes came")
        assert (out == 0x77).all()
        await until(lambda: not ring.withheld, "the hub has settled them")
        ring.validate()
        await until(lambda: running(server) == 0, "nothing runs")
        again = BLOCKS.out(6)
        result = await namespace.pull(keys, again)
        assert result.found.all()
        assert BLOCKS.wrong(keys, again, result.found) == []


@pytest.mark.parametrize("part", ["hub", "worker"])
async def test_a_part_of_the_hub_that_stands_still_writes_into_no_memory_of_ours(
    serve: Serve, part: str
) -> None:
    """Its loop, which cannot answer while its worker writes; or its worker, which writes late."""
    server = small(serve, failpoints="nixl.post=sleep:1.5@1-3", session_ttl_ms=60_000)
    keys = await pushed(server, 1)
    async with AsyncClient.connect(server.address, transport="nixl") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        ring = transfer_of(client)._ring
        assert ring is not None
        out = BLOCKS.out(6)
        pull = asyncio.create_task(namespace.pull(keys, out, deadline_s=1.2))
        await until(lambda: running(server) > 0, "the hub is about to write")
        pid = server.pid if part == "hub" else server.nixl_worker
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(KVError):
                await pull
            assert ring.withheld, "the moves were not answered"
            out[:] = 0x77
            await asyncio.sleep(2.0)
            assert ring.withheld, "nor is time an answer"
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: not ring.withheld, "the hub has settled them")
        ring.validate()
        assert (out == 0x77).all()
        again = BLOCKS.out(6)
        result = await namespace.pull(keys, again)
        assert result.found.all()
        assert BLOCKS.wrong(keys, again, result.found) == []
        assert server.stats().counters["nixl_rebuilds"] == 0


@pytest.mark.parametrize("word", ["push", "pull"])
async def test_a_worker_that_is_killed_costs_the_moves_under_way(serve: Serve, word: str) -> None:
    server = small(serve, failpoints="nixl.post=sleep:1.5@1", session_ttl_ms=60_000)
    keys = await pushed(server, 1)
    async with AsyncClient.connect(server.address, transport="nixl") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        fresh = BLOCKS.chain(2, 6)
        call: asyncio.Task[object]
        if word == "push":
            call = asyncio.create_task(namespace.push(fresh, BLOCKS.payloads(fresh)))
        else:
            call = asyncio.create_task(namespace.pull(keys, BLOCKS.out(6)))
        await until(lambda: running(server) > 0, "the hub is about to move")
        first = server.nixl_worker
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: running(server) == 0, "a dead worker's moves have ended")
        await until(lambda: host_tier(server).slots_quarantined == 0, "its slots are back")
        assert server.stats().counters["nixl_rebuilds"] == 1
        out = BLOCKS.out(6)
        found = np.zeros(6, bool)

        async def works() -> bool:
            nonlocal found
            await namespace.push(fresh, BLOCKS.payloads(fresh))
            found = (await namespace.pull(fresh, out)).found
            return bool(found.all())

        deadline = time.monotonic() + 10
        while not await works():
            assert time.monotonic() < deadline, "the client has attached again"
        assert BLOCKS.wrong(fresh, out, found) == []
        assert client.transport == "nixl"
        assert server.nixl_worker not in (None, first)


async def test_a_client_that_leaves_keeps_what_a_stopped_hub_may_still_write(
    serve: Serve,
) -> None:
    server = small(serve, failpoints="nixl.post=sleep:1.5@1-3", session_ttl_ms=60_000)
    keys = await pushed(server, 1)
    async with AsyncClient.connect(server.address, transport="nixl") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        out = BLOCKS.out(6)
        pull = asyncio.create_task(namespace.pull(keys, out, deadline_s=1.2))
        await until(lambda: running(server) > 0, "the hub is about to write")
        server.stop_signal()
        with pytest.raises(KVError):
            await pull
    (orphan,) = rings.orphans.kept
    held = orphan.held
    assert isinstance(held, rings.Ring)
    for extent in held._withheld:
        held.view(extent)[:] = 0x5A
    server.cont()
    await until(lambda: running(server) == 0, "the hub has ended them")
    async with AsyncClient.connect(server.address, transport="nixl"):
        assert rings.orphans.kept == [], "the next session to this hub settled them"


async def test_a_hub_that_was_killed_writes_no_more(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor in the same directory is the proof."""
    server = small(serve, failpoints="nixl.post=sleep:5@1-3", session_ttl_ms=60_000)
    keys = await pushed(server, 1)
    async with AsyncClient.connect(server.address, transport="nixl") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        first = transfer_of(client)
        pull = asyncio.create_task(namespace.pull(keys, BLOCKS.out(6), deadline_s=5))
        await until(lambda: running(server) > 0, "the hub is about to write")
        server.kill()
        result = (await asyncio.gather(pull, return_exceptions=True))[0]
        assert isinstance(result, KVError) or not result.found.any()
        assert first._ring is not None
        assert first._ring.withheld, "nobody has said that the hub writes no more"
        met: list[int] = []
        kept = rings.Orphans.meet

        def meet(self: rings.Orphans, arena_id: bytes, epoch: int) -> list[rings.Orphan]:
            met.append(len(self.kept))
            return kept(self, arena_id, epoch)

        monkeypatch.setattr(rings.Orphans, "meet", meet)
        server.restart()
        await until(lambda: client.healthy and client.epoch == 2, "reconnected")
        assert met == [1], "the ring was kept until then"
        assert rings.orphans.kept == []
        assert first._closed
        namespace = await client.open_namespace(BLOCKS.spec)
        out = BLOCKS.out(6)
        result = await namespace.pull(keys, out)
        assert result.found.all(), "a warm restart"
        assert BLOCKS.wrong(keys, out, result.found) == []


async def test_cells_that_are_still_being_moved_are_not_committed(serve: Serve) -> None:
    """Complete, the block could leave its slot to others while bytes still come."""
    server = small(serve, failpoints="nixl.post=sleep:1.2@1", reservation_ms_max=10_000)
    async with AsyncClient.connect(server.address, transport="nixl") as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(1, 1)
        reservation = await namespace.reserve(keys)
        filling = asyncio.create_task(reservation.fill([0], BLOCKS.payloads(keys)))
        await until(lambda: running(server) > 0, "the hub is about to read")
        sums = np.zeros(BLOCKS.spec.grid.cells, "<u8")
        link = client.session.link
        part = reservation.region
        request = pb.CommitRequest(
            session=link.session, client=link.client, reservation=reservation._id,
            indices=bytes(4), region=region_message(part), checksums=sums.tobytes(),
        )  # fmt: skip
        with pytest.raises(KVError, match="still runs"):
            await client.session.rpc("Commit", request, Deadline(5))
        assert (await filling).tolist() == [0]
        out = BLOCKS.out(1)
        assert (await namespace.pull(keys, out)).found.all()
        assert BLOCKS.wrong(keys, out, [True]) == []
