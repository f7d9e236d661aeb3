"""Push and pull over a real server: any region, any count, any number of writers."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from kvclient import (
    AsyncClient,
    BlockState,
    CommitVerdict,
    DeadlineExceeded,
    InvalidArgument,
    LimitExceeded,
    Need,
    NotFound,
    PushVerdict,
    ReserveVerdict,
    Tier,
)
from kvclient.transfer.shm import ShmArena
from kvproto.arena import ArenaHeader
from kvproto.grid import Region
from kvproto.prefix import prefix_hashes
from tests.contract.conftest import CROWDED
from tests.contract.oracle import check_all, cut, fresh, random_region
from tests.support.payload import Blocks
from tests.support.server import ServerProcess
from tests.support.ways import Way


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 4, "heads": 2, "page_bytes": 4096},
        {"layers": 7, "heads": 3, "page_bytes": 500, "block_tokens": 64},
        {"layers": 32, "heads": 8, "page_bytes": 512},
        {"layers": 2, "heads": 1, "page_bytes": 131_072},
        {"layers": 1, "heads": 1, "page_bytes": 1, "block_tokens": 1, "page_tokens": 1},
    ],
    ids=lambda shape: "x".join(map(str, shape.values())),
)
async def test_what_is_pushed_is_pulled(client: AsyncClient, shape: dict[str, int]) -> None:
    blocks = fresh(**shape)
    namespace = await client.open_namespace(blocks.spec)
    for number in (1, 2, 9):
        keys = blocks.chain(number, number)
        result = await namespace.push(keys, blocks.payloads(keys))
        assert result.written == number, result
        found = await namespace.lookup(keys)
        assert found.usable_blocks == number
        assert found.states.tolist() == [BlockState.COMPLETE] * number
        assert found.tiers.tolist() == [Tier.HOST] * number
        out = blocks.out(number)
        pulled = await namespace.pull(keys, out)
        assert pulled.found.all()
        assert pulled.bytes == number * blocks.payload_bytes
        assert pulled.tiers.tolist() == [Tier.HOST] * number
        assert blocks.wrong(keys, out, pulled.found) == []


async def test_random_regions_in_and_out(client: AsyncClient) -> None:
    """Writers and readers cut the grid differently: TP 2 x PP 3 in, random regions out."""
    rng = np.random.default_rng(7)
    blocks = fresh(layers=7, heads=4, page_bytes=600)
    grid = blocks.spec.grid
    namespace = await client.open_namespace(blocks.spec)
    for seed in range(4):
        keys = blocks.chain(seed, int(rng.integers(1, 12)))
        payloads = blocks.payloads(keys)
        parts = [
            Region(low, high, head, head + 2)
            for low, high in ((0, 2), (2, 3), (3, 7))
            for head in (0, 2)
        ]
        for part in rng.permutation(len(parts)):
            region = parts[part]
            result = await namespace.push(keys, cut(payloads, region), region=region)
            assert result.written == len(keys), result
        for _ in range(6):
            region = random_region(rng, grid)
            out = np.zeros((len(keys), region.layers, region.heads, grid.cell_bytes()), np.uint8)
            pulled = await namespace.pull(keys, out, region=region)
            assert pulled.found.all()
            assert np.array_equal(out, cut(payloads, region))


async def test_tails_hold_fewer_pages(client: AsyncClient) -> None:
    blocks = fresh(layers=3, heads=2, page_bytes=256)
    grid = blocks.spec.grid
    namespace = await client.open_namespace(blocks.spec)
    for left in (1, 15, 16, 17, 100, 127):
        tokens = np.arange(2 * 128 + left) + 1000 * left
        keys = prefix_hashes(tokens, 128, tail=True)
        cell = grid.cell_bytes(left)
        arrays = [*blocks.payloads(keys[:2]), blocks.payload(keys[2])[:, :, :cell]]
        result = await namespace.push(keys, arrays, tokens=[128, 128, left])
        assert result.written == 3
        out = blocks.out(3)
        pulled = await namespace.pull(keys, out)
        assert pulled.tokens.tolist() == [128, 128, left]
        assert np.array_equal(out[2][:, :, :cell], arrays[2])
        assert (out[2][:, :, cell:] == 0xA5).all(), "nothing is written behind a tail's cells"
        narrow = [np.zeros((3, 2, cell), np.uint8)]
        assert (await namespace.pull(keys[2:], narrow)).found.all()
        assert np.array_equal(narrow[0], arrays[2])


async def test_a_block_that_is_there_is_not_pushed_again(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 4)
    payloads = blocks.payloads(keys)
    await namespace.push(keys[:2], payloads[:2])
    again = await namespace.push(keys, np.zeros_like(payloads))
    wanted = [PushVerdict.PRESENT] * 2 + [PushVerdict.WRITTEN] * 2
    assert again.verdicts.tolist() == wanted
    assert (again.present, again.written) == (2, 2)
    await check_all(namespace, blocks, keys[:2])


@pytest.mark.parametrize("way", CROWDED, indirect=True, scope="module")
async def test_32_writers_of_one_chain(way: Way, hub: ServerProcess, client: AsyncClient) -> None:
    blocks = fresh(layers=8)
    keys = blocks.chain(1, 3)
    payloads = blocks.payloads(keys)

    async def write(number: int) -> np.ndarray:
        async with way.client(hub, name=f"writer-{number}", deadline_s=30) as writer:
            namespace = await writer.open_namespace(blocks.spec)
            return (await namespace.push(keys, payloads)).verdicts

    verdicts = np.stack(await asyncio.gather(*(write(i) for i in range(32))))
    assert (np.count_nonzero(verdicts == PushVerdict.WRITTEN, axis=0) == 1).all(), verdicts
    rest = {PushVerdict.WRITTEN, PushVerdict.PRESENT, PushVerdict.BUSY}
    assert set(verdicts.reshape(-1).tolist()) <= set(map(int, rest))
    await check_all(await client.open_namespace(blocks.spec), blocks, keys)


async def test_two_ranks_of_a_session_fill_one_block(way: Way, hub: ServerProcess) -> None:
    blocks = fresh(layers=4, heads=4)
    keys = blocks.chain(1, 2)
    payloads = blocks.payloads(keys)
    async with (
        way.client(hub, rank=0) as first,
        way.client(hub, rank=1, join_token=first.token) as second,
    ):
        assert first.token == second.token
        halves = [Region(0, 4, 0, 2), Region(0, 4, 2, 4)]
        namespaces = [await rank.open_namespace(blocks.spec) for rank in (first, second)]
        async with (
            await namespaces[0].reserve(keys, region=halves[0]) as left,
            await namespaces[1].reserve(keys, region=halves[1]) as right,
        ):
            assert left.writable == right.writable == [0, 1]
            await left.fill([0, 1], cut(payloads, halves[0]))
            states = (await namespaces[0].lookup(keys)).states
            assert states.tolist() == [BlockState.FILLING] * 2
            assert (await right.fill([0, 1], cut(payloads, halves[1]))).tolist() == [0, 0]
        assert (await namespaces[1].lookup(keys)).usable_blocks == 2
        await check_all(namespaces[0], blocks, keys)
        pinned = await namespaces[0].lookup(keys, pin_s=5)
        assert pinned.lease
        out = blocks.out(2)
        pulled = await namespaces[1].pull(keys, out, inherit_lease=pinned.lease)
        assert pulled.found.all(), "one rank's lease holds for the other"
        await namespaces[0].release(pinned.lease)


async def test_evict_tells_of_the_leased_blocks_that_stayed(client: AsyncClient) -> None:
    """A lookup's pin outlives the lookup: an eviction that it stops must not look like one that
    had nothing to do, nor a push after it like a failed one."""
    blocks = fresh()
    keys = blocks.chain(1, 4)
    namespace = await client.open_namespace(blocks.spec)
    assert repr(await namespace.push(keys, blocks.payloads(keys))) == "PushResult(written=4)"
    lease = (await namespace.lookup(keys[:3], pin_s=5)).lease
    reply = await client.evict(namespace.id, keys)
    assert (reply.blocks, reply.in_use) == (1, 3)
    pushed = await namespace.push(keys, blocks.payloads(keys))
    assert repr(pushed) == "PushResult(written=1, present=3)"
    await namespace.release(lease)  # an eviction of the same client comes after it
    reply = await client.evict(namespace.id, keys)
    assert (reply.blocks, reply.in_use) == (4, 0)


async def test_join_without_such_a_session_is_not_found(way: Way, hub: ServerProcess) -> None:
    with pytest.raises(NotFound) as caught:
        await way.client(hub, join_token=bytes(16))
    assert caught.value.field == "join_token"
    assert hub.address in str(caught.value)


async def test_layer_by_layer_through_views(client: AsyncClient) -> None:
    """The way an engine pushes: write views, commit each layer."""
    blocks = fresh(layers=5, heads=2)
    grid = blocks.spec.grid
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 3)
    payloads = blocks.payloads(keys)
    async with await namespace.reserve(keys) as reservation:
        for layer in range(5):
            for i in reservation.writable:
                cells = reservation.cells(i)
                assert cells.shape == (5, 2, grid.pages, grid.page_bytes)
                cells[layer] = payloads[i][layer].reshape(2, grid.pages, grid.page_bytes)
            region = Region(layer, layer + 1, 0, 2)
            assert (await reservation.commit(region=region)).tolist() == [CommitVerdict.OK] * 3
            out = np.zeros((3, 1, 2, grid.cell_bytes()), np.uint8)
            assert (await namespace.pull(keys, out, region=region)).found.all()
            assert np.array_equal(out, payloads[:, layer : layer + 1])
    await check_all(namespace, blocks, keys)


async def test_a_reader_streams_behind_a_live_writer(client: AsyncClient) -> None:
    blocks = fresh(layers=4)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 6)
    payloads = blocks.payloads(keys)
    await namespace.announce(keys, 10)
    seen: list[int] = []

    async def read() -> None:
        async with namespace.acquire(keys, wait_s=10) as stream:
            async for granted in stream:
                out = np.zeros(blocks.shape, np.uint8)
                assert await granted.copy_to(out)
                assert np.array_equal(out, payloads[granted.index])
                seen.append(granted.index)
                await granted.release()
        assert stream.missing == []

    reader = asyncio.create_task(read())
    for i in range(6):
        await asyncio.sleep(0.05)
        assert len(seen) <= i, "nothing is granted before it is written"
        parents = None if i == 0 else [keys[i - 1]]
        pushed = await namespace.push([keys[i]], [payloads[i]], parents=parents)
        assert pushed.written == 1
    await asyncio.wait_for(reader, 10)
    assert seen == list(range(6))


async def test_a_reader_gives_up_on_what_never_comes(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 3)
    await namespace.push(keys[:1], blocks.payloads(keys[:1]))
    await namespace.announce(keys, 30)
    out = blocks.out(3)
    result = await namespace.pull(keys, out, wait_s=0.3)
    assert result.found.tolist() == [True, False, False]
    async with namespace.acquire(keys) as stream:
        granted = [one.index async for one in stream]
    assert (granted, sorted(stream.missing)) == ([0], [1, 2])


async def test_committed_cells_are_immutable_for_their_writer_too(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 1)
    payloads = blocks.payloads(keys)
    half, rest = Region(0, 2, 0, 2), Region(2, 4, 0, 2)
    async with await namespace.reserve(keys) as reservation:
        await reservation.fill([0], payloads[:, :2], region=half)
        for overlapping in (half, blocks.spec.grid.whole, Region(1, 3, 0, 1)):
            with pytest.raises(InvalidArgument) as caught:
                await reservation.fill([0], 255 - cut(payloads, overlapping), region=overlapping)
            assert caught.value.field == "region"
        await reservation.fill([0], payloads[:, 2:], region=rest)
    await check_all(namespace, blocks, keys)


async def test_an_aborted_block_is_absent_and_free_for_the_next(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 2)
    async with await namespace.reserve(keys) as reservation:
        reservation.cells(0)[:] = 1
        busy = await namespace.reserve(keys)
        assert busy.verdicts.tolist() == [ReserveVerdict.BUSY] * 2
    assert (await namespace.lookup(keys)).states.tolist() == [BlockState.ABSENT] * 2
    assert (await namespace.push(keys, blocks.payloads(keys))).written == 2


async def test_a_prompt_larger_than_the_window_streams(client: AsyncClient) -> None:
    blocks = fresh(layers=8)  # 512 KiB a block
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 40)
    assert (await namespace.push(keys, blocks.payloads(keys))).written == 40
    out = blocks.out(40)
    result = await namespace.pull(keys, out, window_bytes=2 * blocks.payload_bytes)
    assert result.found.all()
    assert blocks.wrong(keys, out, result.found) == []


async def test_a_stream_whose_blocks_are_kept_ends_at_its_deadline(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 3)
    await namespace.push(keys, blocks.payloads(keys))
    window = blocks.payload_bytes
    async with namespace.acquire(keys, window_bytes=window, deadline_s=0.5) as stream:
        kept = await anext(stream)
        with pytest.raises(DeadlineExceeded):
            await anext(stream)
        assert kept.verify()


@pytest.mark.parametrize("way", ["shm"], indirect=True, scope="module")
async def test_a_pull_overtaken_by_reuse_is_a_miss(
    way: Way, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot changes hands while its last bytes are copied: right or not, they do not count.

    Over the others the hub looks, and says so: `unit/transfer/test_tcp_worker.py`.
    """
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 2)
    await namespace.push(keys, blocks.payloads(keys))
    genuine, calls = ShmArena.current, count(1)

    def current(self: ShmArena, offset: int, generation: int) -> bool:
        return genuine(self, offset, generation) and next(calls) <= 2

    monkeypatch.setattr(ShmArena, "current", current)
    result = await namespace.pull(keys, blocks.out(2))
    assert next(calls) > 2
    assert (result.found.tolist(), result.corrupt, result.bytes) == ([False] * 2, 0, 0)


async def test_a_flipped_bit_is_a_miss_and_the_block_is_dropped(
    hub: ServerProcess, client: AsyncClient
) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 3)
    await namespace.push(keys, blocks.payloads(keys))
    async with namespace.acquire(keys[1:2]) as stream:
        granted = await anext(stream)
        offset = granted.slot.offset
        await granted.release()
    fd = os.open(hub.host_dir / "arena", os.O_RDWR)
    header = ArenaHeader.decode(os.pread(fd, 128, 0))
    at = header.data_offset + offset + blocks.payload_bytes - 1
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 4]), at)
    os.close(fd)
    out = blocks.out(3)
    result = await namespace.pull(keys, out)
    assert (result.found.tolist(), result.corrupt) == ([True, False, True], 1)
    assert blocks.wrong(keys, out, result.found) == []
    assert (await namespace.lookup(keys)).usable_blocks == 1, "reported, verified, dropped"
    assert (await namespace.push(keys, blocks.payloads(keys))).written == 1
    await check_all(namespace, blocks, keys)


async def test_need_of_a_sliding_window(client: AsyncClient) -> None:
    blocks = fresh(layers=4)
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 6)
    payloads = blocks.payloads(keys)
    await namespace.push(keys[2:], payloads[2:], parents=keys[1:5])
    assert (await namespace.lookup(keys)).usable_blocks == 0
    window = await namespace.lookup(keys, need=[Need("last", blocks=2)])
    assert window.usable_blocks == 6


async def test_dropping_a_namespace_is_survived_by_its_handle(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 2)
    await namespace.push(keys, blocks.payloads(keys))
    assert (await client.drop_namespace(namespace.id)).blocks == 2
    assert (await namespace.lookup(keys)).usable_blocks == 0
    assert (await namespace.push(keys, blocks.payloads(keys))).written == 2


async def test_the_old_weights_are_dropped_while_the_new_ones_are_used(
    way: Way, hub: ServerProcess, client: AsyncClient
) -> None:
    """A rollout: two versions behind one model name, equal keys, other bytes."""
    old, new = fresh(layers=16), fresh(layers=16)  # 1 MiB a block: the arena comes round
    assert (old.spec.model, old.shape) == (new.spec.model, new.shape)
    assert old.spec.id != new.spec.id
    keys = old.chain(1, 8)
    was, now = old.payloads(keys), 255 - old.payloads(keys)
    async with way.client(hub, name="old") as engine:
        before = await engine.open_namespace(old.spec)
        after = await client.open_namespace(new.spec)
        assert (await before.push(keys, was)).written == len(keys)
        assert (await after.push(keys[:4], now[:4])).written == 4

        async def use() -> None:
            """Read and written, again and again."""
            for at in (4, 5, 6, 7):
                assert (await after.push(keys[at : at + 1], now[at : at + 1])).written == 1
                out = new.out(at + 1)
                assert (await after.pull(keys[: at + 1], out)).found.all()
                assert np.array_equal(out, now[: at + 1])

        async with before.acquire(keys[:2], lease_s=20) as stream:
            held = [granted async for granted in stream]
            _, dropped = await asyncio.gather(use(), client.drop_namespace(old.spec.id))
            assert dropped.blocks == len(keys)
            left = {one.namespace_id for one in await client.list_namespaces()}
            assert new.spec.id in left
            assert old.spec.id not in left
            assert (await before.lookup(keys)).usable_blocks == 0
            out = old.out(len(keys))
            assert not (await before.pull(keys, out)).found.any()
            assert (out == 0xA5).all(), "a miss writes nothing"
            for seed in range(10, 23):  # more than the arena has room for: slots are reused
                churn = new.chain(seed, 8)
                assert (await after.push(churn, new.payloads(churn))).written == 8
                assert (await after.pull(keys, new.out(8))).found.all(), "used, so it stays"
            for granted in held:
                cells = granted.cells.reshape(old.shape)
                assert np.array_equal(cells, was[granted.index])
                assert granted.verify()
                assert await granted.verified()
                await granted.release()
        out = new.out(len(keys))
        assert (await after.pull(keys, out)).found.all()
        assert np.array_equal(out, now)


async def test_evict_drops_the_blocks_of_one_namespace(client: AsyncClient) -> None:
    mine, other = fresh(), fresh()
    spaces = [await client.open_namespace(blocks.spec) for blocks in (mine, other)]
    for blocks, namespace in zip((mine, other), spaces, strict=True):
        keys = blocks.chain(1, 2)
        await namespace.push(keys, blocks.payloads(keys))
    evicted = await client.evict(spaces[0].id)
    assert evicted.blocks == 2
    assert (await spaces[0].lookup(mine.chain(1, 2))).usable_blocks == 0
    await check_all(spaces[1], other, other.chain(1, 2))
    assert mine.spec.id in {one.namespace_id for one in await client.list_namespaces()}


async def test_near_misses_answer_why_there_are_no_hits(client: AsyncClient) -> None:
    blocks = fresh()
    await client.open_namespace(blocks.spec)
    near = Blocks(weights=blocks.spec.weights, page_bytes=2048)
    namespace = await client.open_namespace(near.spec)
    assert any("page_bytes differs" in text for text in namespace.near_misses)


async def test_the_first_log_line_names_transport_and_address(
    way: Way, hub: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="kvclient"):
        async with way.client(hub) as client:
            assert client.transport == way.transport
    (line,) = [r.getMessage() for r in caplog.records if "connected" in r.getMessage()]
    assert hub.address in line
    where = hub.host_dir if way.name == "shm" else ""
    assert f"transport {way.transport} at {where}" in line


# ---- bad input -----------------------------------------------------------------------------------


async def test_limits_are_named(client: AsyncClient) -> None:
    blocks = fresh()
    namespace = await client.open_namespace(blocks.spec)
    limits = client.limits
    many = [bytes(32)] * (limits.keys_per_call_max + 1)
    with pytest.raises(InvalidArgument) as caught:
        await namespace.lookup(many)
    assert (caught.value.field, "keys_per_call_max" in caught.value.limit) == ("hashes", True)
    with pytest.raises(InvalidArgument) as caught:
        await namespace.pull(blocks.chain(1, 1), blocks.out(1), wait_s=1e6)
    assert caught.value.field == "wait_s"
    with pytest.raises(InvalidArgument) as caught:
        namespace.acquire(blocks.chain(1, 1), window_bytes=1 << 50)
    assert caught.value.field == "window_bytes"
    with pytest.raises(InvalidArgument) as caught:
        await namespace.push(blocks.chain(1, 1), blocks.out(1)[:, :1])
    assert caught.value.field == "arrays[0]"


async def test_a_block_too_large_for_the_tier_is_refused_at_open(client: AsyncClient) -> None:
    huge = fresh(layers=64, heads=16, page_bytes=65_536)
    with pytest.raises(LimitExceeded) as caught:
        await client.open_namespace(huge.spec)
    assert caught.value.kind == "no_space"


async def test_the_server_refuses_what_the_client_lets_pass(client: AsyncClient) -> None:
    """Another tenant's spec: the field's name comes back from the hub."""
    blocks = fresh()
    with pytest.raises(InvalidArgument) as caught:
        await client.open_namespace(replace(blocks.spec, tenant="somebody"))
    assert caught.value.field == "spec.tenant"
