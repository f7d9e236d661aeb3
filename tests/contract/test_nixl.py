"""The nixl transport against a real server, with the real library: what moves, and what is refused.

Peers that stop and die are in `tests/fault/test_nixl_peers.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from bench.budget import ticks_of
from kvclient import (
    AsyncClient,
    InvalidArgument,
    KVError,
    LimitExceeded,
    Unavailable,
    Unsupported,
    pushing,
)
from kvclient.timing import Deadline
from kvclient.transfer.nixl import NixlTransfer
from kvproto import nixlib, wires
from kvproto.frames import Status
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb
from tests.contract.conftest import eventually
from tests.contract.oracle import check_all, cut, fresh, random_region
from tests.contract.peer import Peer
from tests.support.server import ServerError, ServerProcess, start_server

pytestmark = pytest.mark.skipif(
    not nixlib.available(), reason="NIXL is not installed (pip install --no-deps nixl-cu12)"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("nixl")
    with start_server(directory, host_bytes="96MiB", nixl_enabled="true") as server:
        yield server


@pytest.fixture
async def client(hub: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient.connect(hub.address, transport="nixl", staging_bytes=16 << 20) as client:
        assert client.transport == "nixl"
        yield client


def counters(hub: ServerProcess) -> dict[str, int]:
    return dict(hub.stats().counters)


# ---- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 4, "heads": 2, "page_bytes": 4096},
        {"layers": 7, "heads": 3, "page_bytes": 500, "block_tokens": 64},
        {"layers": 9, "heads": 1, "page_bytes": 65_536},  # a block is larger than an extent
        {"layers": 1, "heads": 1, "page_bytes": 1, "block_tokens": 1, "page_tokens": 1},
    ],
    ids=lambda shape: "x".join(map(str, shape.values())),
)
async def test_what_is_pushed_is_pulled_and_nixl_moved_it(
    hub: ServerProcess, client: AsyncClient, shape: dict[str, int]
) -> None:
    blocks = fresh(**shape)
    namespace = await client.open_namespace(blocks.spec)
    before = counters(hub)
    keys = blocks.chain(1, 5)
    assert (await namespace.push(keys, blocks.payloads(keys))).written == 5
    await check_all(namespace, blocks, keys)
    eventually(lambda: counters(hub)["nixl_moves_running"] == 0, "all have ended")
    after = counters(hub)
    for name in ("nixl_bytes_in", "nixl_bytes_out"):
        assert after[name] - before[name] == 5 * blocks.payload_bytes, name
    for name in ("nixl_items_corrupt", "nixl_items_denied"):
        assert after[name] == 0, name


async def test_random_regions_in_and_out(client: AsyncClient) -> None:
    """Writers and readers cut the grid differently: TP 2 x PP 3 in, random regions out."""
    rng = np.random.default_rng(11)
    blocks = fresh(layers=7, heads=4, page_bytes=600)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 6)
    payloads = blocks.payloads(keys)
    regions = [
        Region(*layers, *heads) for layers in ((0, 2), (2, 3), (3, 7)) for heads in ((0, 2), (2, 4))
    ]
    for region in rng.permutation(len(regions)).tolist():
        part = regions[region]
        result = await namespace.push(keys, cut(payloads, part), region=part)
        assert result.written == len(keys)
    for _ in range(20):
        part = random_region(rng, blocks.spec.grid)
        out = np.full((len(keys), part.layers, part.heads, blocks.shape[2]), 0xA5, np.uint8)
        assert (await namespace.pull(keys, out, region=part)).found.all()
        assert np.array_equal(out, cut(payloads, part)), part


async def test_tails_and_strided_memory(client: AsyncClient) -> None:
    """Cells of a larger array, of which a tail uses the first bytes."""
    blocks = fresh(layers=3, heads=2, page_bytes=512)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 3)
    wide = np.zeros((3, 6, 4, blocks.shape[2]), np.uint8)
    view = wide[:, ::2, 1:3]
    view[:] = blocks.payloads(keys)
    tokens = [128, 128, 20]  # 2 of 8 pages
    assert (await namespace.push(keys, view, tokens=tokens)).written == 3
    out = np.full_like(wide, 0xA5)
    assert (await namespace.pull(keys, out[:, ::2, 1:3])).found.all()
    assert np.array_equal(out[:2, ::2, 1:3], view[:2])
    assert np.array_equal(out[2, ::2, 1:3, :1024], view[2, :, :, :1024])
    assert (out[2, ::2, 1:3, 1024:] == 0xA5).all()
    assert (out[:, 1::2] == 0xA5).all()


async def test_layer_by_layer_and_many_at_once(client: AsyncClient) -> None:
    blocks = fresh(layers=4, heads=2, page_bytes=8192)

    async def one(seed: int) -> None:
        namespace = await client.open_namespace(blocks.spec)
        keys = blocks.chain(seed, 4)
        payloads = blocks.payloads(keys)
        async with await namespace.reserve(keys) as reservation:
            for layer in range(4):
                part = Region(layer, layer + 1, 0, 2)
                verdicts = await reservation.fill(
                    range(4), payloads[:, layer : layer + 1], region=part
                )
                assert verdicts.tolist() == [0] * 4
        await check_all(namespace, blocks, keys)

    await asyncio.gather(*(one(seed) for seed in range(6)))


@pytest.mark.parametrize("direct", [False, True])
async def test_windows_of_a_push_that_run_side_by_side(
    hub: ServerProcess, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """As they do where there are cores for it."""
    blocks = fresh(layers=4, heads=2, page_bytes=4096)  # 256 KiB
    monkeypatch.setattr(pushing, "PUSH_WINDOW_BYTES", 1 << 20)
    monkeypatch.setattr(wires, "beside", lambda: True)
    running, most = 0, 0

    async def put(self: NixlTransfer, *args: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await whole(self, *args)
        running -= 1

    whole: Any = NixlTransfer.put
    monkeypatch.setattr(NixlTransfer, "put", put)
    async with AsyncClient.connect(hub.address, transport="nixl", direct=direct) as client:
        namespace = await client.open_namespace(blocks.spec)
        keys = blocks.chain(1, 40)
        payloads = blocks.payloads(keys)
        if direct:
            await client.register(payloads)
        for seed in range(3):
            keys = blocks.chain(seed, 40)
            payloads[:] = blocks.payloads(keys)
            assert (await namespace.push(keys, payloads)).written == 40
            await check_all(namespace, blocks, keys)
        assert most == 2


async def test_a_slice_through_views_and_streams(client: AsyncClient) -> None:
    """`cells` and `acquire` work on memory of this process, which is then moved."""
    blocks = fresh(layers=2, heads=2, page_bytes=1024)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 3)
    async with await namespace.reserve(keys) as reservation:
        for index in reservation.writable:
            view = reservation.cells(index)
            view[:] = blocks.payload(keys[index]).reshape(view.shape)
        assert (await reservation.commit()).tolist() == [0] * 3
    async with namespace.acquire(keys) as stream:
        async for granted in stream:
            assert granted.verify()
            wanted = blocks.payload(keys[granted.index])
            assert np.array_equal(granted.cells.reshape(wanted.shape), wanted)


# ---- what is refused ---------------------------------------------------------------------------


async def test_without_nixl_on_offer(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("plain")
    with (
        start_server(directory, host_bytes="8MiB") as server,
        pytest.raises(Unsupported, match="this client wants nixl"),
    ):
        await AsyncClient.connect(server.address, transport="nixl")


async def test_a_client_without_the_library(
    hub: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixlib, "_bindings", None)
    monkeypatch.setattr(nixlib, "_MODULES", ("nixl_cu99",))
    with pytest.raises(Unsupported, match="NIXL cannot be imported"):
        await AsyncClient.connect(hub.address, transport="nixl")
    eventually(lambda: not hub.stats().sessions, "it said goodbye")


async def test_a_layer_that_no_extent_holds(hub: ServerProcess) -> None:
    blocks = fresh(layers=1, heads=2, page_bytes=65_536)
    async with AsyncClient.connect(hub.address, transport="nixl", staging_bytes=1 << 20) as client:
        namespace = await client.open_namespace(blocks.spec)
        keys = blocks.chain(1, 1)
        with pytest.raises(Unsupported, match="raise staging_bytes"):
            await namespace.push(keys, blocks.payloads(keys))


async def moved(client: AsyncClient, **changes: object) -> pb.MoveReply:
    """A Move of one block of a fresh reservation, with fields changed."""
    blocks = fresh(layers=1, heads=1, page_bytes=1024)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 1)
    reservation = await namespace.reserve(keys)
    link = client.session.link
    transfer = link.transfer
    assert isinstance(transfer, NixlTransfer)
    slot = reservation._slots[0]
    whole = pb.Region(layer_stop=1, head_stop=1)
    request = pb.MoveRequest(
        session=link.session, client=link.client, move=1000 + next(transfer._numbers), op=1,
        layers=1, heads=1, granted=whole, region=whole,
        holds=reservation._id.to_bytes(8, "little"),
        offsets=slot.offset.to_bytes(8, "little"),
        generations=slot.generation.to_bytes(8, "little"),
        cell_bytes=blocks.payload_bytes.to_bytes(8, "little"),
        permits=slot.permit,
        addresses=transfer._ring.address.to_bytes(8, "little"),
        checksums=bytes(8),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(request, name, value)
    try:
        return await client.session.rpc("Move", request, Deadline(5))
    finally:
        await reservation.abort()


async def test_wrong_bytes_are_told_at_once(hub: ServerProcess, client: AsyncClient) -> None:
    """The checksum of the call is not that of what arrived."""
    before = counters(hub)["nixl_items_corrupt"]
    reply = await moved(client)
    assert reply.statuses == bytes([Status.CORRUPT])
    assert reply.terminal
    assert counters(hub)["nixl_items_corrupt"] == before + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"permits": os.urandom(16)},
        {"op": 2},  # a permit to write is none to read
        {"offsets": (1 << 20).to_bytes(8, "little")},
        {"generations": (99).to_bytes(8, "little")},
        {"holds": (12345).to_bytes(8, "little")},
        {"cell_bytes": (4096).to_bytes(8, "little")},
        {"layers": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_a_permit_vouches_for_every_field(
    hub: ServerProcess, client: AsyncClient, changes: dict[str, object]
) -> None:
    before = counters(hub)
    reply = await moved(client, **changes)
    assert reply.statuses == bytes([Status.DENIED])
    after = counters(hub)
    assert after["nixl_posts"] == before["nixl_posts"], "nothing was moved"


async def test_memory_that_was_not_attached_is_not_reached(client: AsyncClient) -> None:
    transfer = client.session.link.transfer
    assert isinstance(transfer, NixlTransfer)
    assert transfer._ring is not None
    end = transfer._ring.address + transfer._ring.bytes.nbytes
    for address in (0, 4096, transfer._ring.address - 1, end - 100, (1 << 64) - 1):
        with pytest.raises(InvalidArgument) as caught:
            await moved(client, addresses=address.to_bytes(8, "little"))
        assert caught.value.field == "addresses"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("move", 0),
        ("op", 3),
        ("layers", 0),
        ("heads", 5000),
        ("granted", pb.Region(layer_stop=9, head_stop=1)),
        ("region", pb.Region(layer_stop=2, head_stop=1)),
        ("holds", b""),
        ("offsets", bytes(7)),
        ("generations", bytes(16)),
        ("cell_bytes", bytes(8)),
        ("permits", bytes(15)),
        ("addresses", bytes(24)),
        ("checksums", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_fields_that_cannot_be_right(client: AsyncClient, field: str, value: object) -> None:
    blocks = fresh(layers=1, heads=1, page_bytes=1024)
    link = client.session.link
    whole = pb.Region(layer_stop=1, head_stop=1)
    request = pb.MoveRequest(
        session=link.session, client=link.client, move=5, op=1, layers=1, heads=1, granted=whole,
        region=whole, holds=bytes(8), offsets=bytes(8), generations=bytes(8),
        cell_bytes=blocks.payload_bytes.to_bytes(8, "little"), permits=bytes(16),
        addresses=bytes(8), checksums=bytes(8),
    )  # fmt: skip
    if isinstance(value, pb.Region):
        getattr(request, field).CopyFrom(value)
    else:
        setattr(request, field, value)
    with pytest.raises(InvalidArgument):
        await client.session.rpc("Move", request, Deadline(5))


@pytest.mark.parametrize("metadata", [b"garbage", bytes(60_000), os.urandom(500)])
async def test_metadata_that_is_none(hub: ServerProcess, metadata: bytes) -> None:
    """An authenticated client's nonsense is refused, and the server serves on."""
    async with AsyncClient.connect(hub.address, transport="shm", read_only=True) as client:
        link = client.session.link
        request = pb.AttachRequest(
            session=link.session, client=link.client, metadata=metadata,
            extents=np.array([4096, 4096, 0, 0], "<u8").tobytes(),
        )  # fmt: skip
        with pytest.raises(Unavailable) as caught:
            await client.session.rpc("Attach", request, Deadline(5))
        assert caught.value.field == "metadata"
        request.metadata = bytes(100_000)
        with pytest.raises(InvalidArgument):
            await client.session.rpc("Attach", request, Deadline(5))
    assert hub.exit_code() is None


async def test_an_agent_of_another_name_is_refused(hub: ServerProcess) -> None:
    """A client cannot come as another client's agent, nor as the server's."""
    async with AsyncClient.connect(hub.address, transport="shm", read_only=True) as client:
        link = client.session.link
        agent = nixlib.Agent("kvserver-0000", backend="UCX", params={}, progress=False)
        request = pb.AttachRequest(
            session=link.session, client=link.client, metadata=agent.metadata(),
            extents=np.array([4096, 4096, 0, 0], "<u8").tobytes(),
        )  # fmt: skip
        with pytest.raises(Unavailable, match="must begin with"):
            await client.session.rpc("Attach", request, Deadline(5))
        agent.close()


async def test_who_attached_and_moves_nothing_rests(
    hub: ServerProcess, client: AsyncClient
) -> None:
    """While others move: UCX's thread in it spins for as long as its connection is half made."""
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    first, second = blocks.chain(1, 2)
    await namespace.push([first], blocks.payloads([first]))
    with Peer(hub.address, "write", 1, "nixl", ttl_s=25.0) as peer:
        assert await asyncio.to_thread(peer.says) == "reserved 1"
        await namespace.push([second], blocks.payloads([second]))
        before = ticks_of(peer.pid)
        await asyncio.sleep(1.0)
        assert ticks_of(peer.pid) - before < 0.3 * os.sysconf("SC_CLK_TCK")


async def test_a_transfer_that_closes_while_it_attaches_lets_its_agent_go(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = client.session.link.transfer
    assert isinstance(transfer, NixlTransfer)
    agent = transfer._agent
    assert agent is not None
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow(name: str, request: object, deadline: Deadline) -> None:
        asked.set()
        await go.wait()
        raise Unavailable("the hub has gone")

    monkeypatch.setattr(transfer, "_rpc", slow)
    attaching = asyncio.create_task(transfer.attach(Deadline(10)))
    await asked.wait()
    transfer.close()
    assert not await asyncio.to_thread(agent.ended, 0.05), "it is in use"
    go.set()
    with pytest.raises(Unavailable):
        await attaching
    assert await asyncio.to_thread(agent.ended, 20.0)


async def test_a_client_that_maps_the_arena_cannot_attach_too(hub: ServerProcess) -> None:
    async with AsyncClient.connect(hub.address, transport="shm") as client:
        link = client.session.link
        request = pb.AttachRequest(
            session=link.session, client=link.client, metadata=b"x",
            extents=np.array([4096, 4096, 0, 0], "<u8").tobytes(),
        )  # fmt: skip
        with pytest.raises(KVError, match="already maps the arena"):
            await client.session.rpc("Attach", request, Deadline(5))


async def test_moves_that_were_settled_before_they_came_start_nothing(
    hub: ServerProcess, client: AsyncClient
) -> None:
    """A Move that was lost on the way and settled may arrive later: it must find no extent of it
    in use by another."""
    transfer, link = client.session.link.transfer, client.session.link
    assert isinstance(transfer, NixlTransfer)
    request = pb.SettleRequest(
        session=link.session, client=link.client, key=transfer._key,
        moves=np.array([4711], "<u8").tobytes(),
    )  # fmt: skip
    reply = await client.session.rpc("Settle", request, Deadline(5))
    assert reply.running == b"\0"
    posts = counters(hub)["nixl_posts"]
    with pytest.raises(InvalidArgument, match="settled or in use"):
        await moved(client, move=4711)
    assert counters(hub)["nixl_posts"] == posts
    for start in range(0, 12_000, 4000):  # more than are remembered one by one
        request.moves = np.arange(5000 + start, 9000 + start, dtype="<u8").tobytes()
        await client.session.rpc("Settle", request, Deadline(5))
    for number in (4711, 5000, 9000, 16_999):
        with pytest.raises(InvalidArgument, match="settled or in use"):
            await moved(client, move=number)
    assert (await moved(client, move=17_000)).terminal
    request.key = os.urandom(16)
    with pytest.raises(InvalidArgument):
        await client.session.rpc("Settle", request, Deadline(5))


async def test_a_backend_that_does_not_exist(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ServerError, match="NIXL has no backend 'NOPE'"):
        start_server(
            tmp_path_factory.mktemp("nope"), host_bytes="8MiB", nixl_enabled="true",
            nixl_backend="NOPE",
        )  # fmt: skip


async def test_a_move_larger_than_the_limit(client: AsyncClient) -> None:
    huge = (1 << 30).to_bytes(8, "little")
    with pytest.raises(LimitExceeded) as caught:
        await moved(client, cell_bytes=huge)
    assert caught.value.field == "move_bytes_max"
