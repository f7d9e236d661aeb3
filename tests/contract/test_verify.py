"""What was leased and copied is judged by the bytes that stand in the arena."""

from __future__ import annotations

import pytest

from kvclient import AsyncClient
from kvclient.copying import as_arena
from tests.contract.oracle import fresh


@pytest.mark.parametrize("way", ["shm"], indirect=True, scope="module")
async def test_one_wrong_byte_is_seen_by_whichever_thread_has_it(
    client: AsyncClient,
) -> None:
    blocks = fresh(layers=8, page_bytes=65536)  # 8 MiB: cut for several threads
    namespace = await client.open_namespace(blocks.spec)
    keys = blocks.chain(1, 2)
    await namespace.push(keys, blocks.payloads(keys))
    arena = as_arena(client.session.link.transfer)
    assert arena is not None
    async with namespace.acquire(keys) as stream:
        wrong, whole = [granted async for granted in stream]
        for at in (0, blocks.payload_bytes // 2, blocks.payload_bytes - 1):
            assert await wrong.verified()
            byte = arena.writing(wrong.slot.offset + at, 1)
            byte ^= 1
            assert not await wrong.verified()
            assert not wrong.verify()
            assert await whole.verified()
            byte ^= 1
            del byte
        assert await wrong.verified()
        assert wrong.corrupt
