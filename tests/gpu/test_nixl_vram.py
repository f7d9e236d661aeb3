"""A card's memory as a client's own, over nixl: pushed from and pulled into, without staging."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from kvclient import AsyncClient, Conflict, InvalidArgument, KVError, Scattered
from kvproto import nixlib
from kvproto.grid import Region
from tests.contract.oracle import fresh
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nixlib.available(), reason="NIXL is not installed"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("vram")
    with start_server(directory, host_bytes="256MiB", nixl_enabled="true") as server:
        yield server


@pytest.fixture
async def client(hub: ServerProcess) -> AsyncIterator[AsyncClient]:
    connecting = AsyncClient.connect(
        hub.address, transport="nixl", direct=True, staging_bytes=16 << 20, deadline_s=20
    )
    async with connecting as client:
        yield client


def on_card(blocks: Blocks, keys: list[bytes]) -> torch.Tensor:
    """Their bytes on the card, uint8 [blocks, layers, heads, cell bytes]."""
    tensor = torch.from_numpy(np.stack([blocks.payload(key) for key in keys])).cuda()
    torch.cuda.synchronize()
    return tensor


def places(tensor: torch.Tensor) -> list[Scattered]:
    return [Scattered.of(block) for block in tensor]


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 4, "heads": 2, "page_bytes": 4096},
        {"layers": 7, "heads": 3, "page_bytes": 500, "block_tokens": 64},
        {"layers": 2, "heads": 1, "page_bytes": 1 << 19},
    ],
    ids=lambda shape: "x".join(map(str, shape.values())),
)
async def test_out_of_a_card_and_into_it(
    hub: ServerProcess, client: AsyncClient, shape: dict[str, int]
) -> None:
    blocks = fresh(**shape)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 5)
    source, target = on_card(blocks, keys), torch.zeros_like(on_card(blocks, keys))
    torch.cuda.synchronize()
    for tensor in (source, target):
        await client.register(tensor)
    before = dict(hub.stats().counters)
    assert (await namespace.push(keys, places(source))).written == 5
    assert (await namespace.pull(keys, places(target))).found.all()
    assert torch.equal(source, target)
    after = dict(hub.stats().counters)
    for name in ("nixl_bytes_in", "nixl_bytes_out"):
        assert after[name] - before[name] == 5 * blocks.payload_bytes, name
    assert after["nixl_items_corrupt"] == 0
    staged, direct = client.session.link.transfer.bytes_moved
    assert (staged, direct) == (0, 10 * blocks.payload_bytes)


async def test_a_card_and_host_memory_meet(hub: ServerProcess, client: AsyncClient) -> None:
    """Pushed from the card, pulled into an array, and the other way round; by layers and heads."""
    blocks = fresh(layers=6, heads=4, page_bytes=2048)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(2, 4)
    source = on_card(blocks, keys)
    await client.register(source)
    for layers in ((0, 2), (2, 6)):
        for heads in ((0, 1), (1, 4)):
            part = Region(*layers, *heads)
            cells = source[:, layers[0] : layers[1], heads[0] : heads[1]]
            assert (await namespace.push(keys, places(cells), region=part)).written == 4
    out = blocks.out(4)
    result = await namespace.pull(keys, out)
    assert result.found.all()
    assert not blocks.wrong(keys, out, result.found)

    others = blocks.chain(3, 4)
    assert (await namespace.push(others, blocks.payloads(others))).written == 4
    source.zero_()
    torch.cuda.synchronize()
    assert (await namespace.pull(others, places(source))).found.all()
    assert torch.equal(source, on_card(blocks, others))


async def test_what_changes_under_a_push_is_not_committed(
    hub: ServerProcess, client: AsyncClient
) -> None:
    """The bytes are hashed on the card's own word first; what the hub read must be the same."""
    blocks = fresh(layers=2, heads=2, page_bytes=4096)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(4, 1)
    source = on_card(blocks, keys)
    await client.register(source)
    (place,) = places(source)

    def read_then_change(first: int, last: int) -> np.ndarray:
        cells = place.read(first, last)
        source[0, 0, 0, 0] ^= 1
        torch.cuda.synchronize()
        return cells

    changed = Scattered(place.addresses, place.piece_bytes, read_then_change)
    assert (await namespace.push(keys, [changed])).written == 0
    assert (await namespace.lookup(keys)).usable_blocks == 0


async def test_a_hub_that_stops_keeps_the_cards_memory_pinned(
    hub: ServerProcess, client: AsyncClient
) -> None:
    """And lets go of it once it goes on: no byte of it changes after that."""
    blocks = fresh(layers=4, heads=2, page_bytes=1 << 16)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(5, 8)
    assert (await namespace.push(keys, blocks.payloads(keys))).written == 8
    target = torch.zeros((8, *blocks.shape), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    memory = await client.register(target)
    assert (await namespace.pull(keys, places(target))).found.all()
    hub.stop_signal()
    try:
        with pytest.raises(KVError):
            await namespace.pull(keys, places(target), deadline_s=0.5)
    finally:
        hub.cont()
    pin = client.pin([target])
    assert await pin.settled(10)
    target.fill_(0x33)
    torch.cuda.synchronize()
    await asyncio.sleep(0.5)
    assert bool((target == 0x33).all()), "nothing comes late"
    assert (await namespace.pull(keys, places(target))).found.all()
    assert torch.equal(target, on_card(blocks, keys))
    await client.unregister(memory)
    with pytest.raises(InvalidArgument):
        await namespace.pull(keys, places(target))


async def test_memory_that_is_registered_twice(client: AsyncClient) -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    await client.register(tensor)
    with pytest.raises(Conflict):
        await client.register(tensor[4096:])
