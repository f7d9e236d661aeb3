"""The staging ring's books, and what frees a ring that a hub may still write."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvclient.errors import Unavailable
from kvclient.transfer.ring import (
    EXTENTS,
    ORPHANED_BYTES_MAX,
    STAGING_BYTES_MIN,
    Orphan,
    Orphans,
    Ring,
)

ARENA, OTHER = b"a" * 16, b"b" * 16


async def full_ring() -> Ring:
    ring = Ring(STAGING_BYTES_MIN)
    for _ in range(EXTENTS):
        await ring.take(1)
    return ring


async def test_extents_are_apart_and_within_the_ring() -> None:
    ring = Ring(STAGING_BYTES_MIN)
    taken = [await ring.take(1) for _ in range(EXTENTS)]
    assert sorted(taken) == list(range(EXTENTS))
    for extent in taken:
        ring.view(extent)[:] = extent
    for extent in taken:
        assert (ring.view(extent) == extent).all()
        assert ring.view(extent).ctypes.data == ring.address_of(extent)


async def test_a_withheld_extent_is_not_given_out_until_its_move_is_settled() -> None:
    ring = await full_ring()
    ring.withhold(3, 77)
    ring.withhold(4, 78)
    with pytest.raises(Unavailable, match="2 are withheld"):
        await ring.take(0.01)
    ring.settled(79)
    with pytest.raises(Unavailable):
        await ring.take(0.01)
    ring.settled(77)
    assert await ring.take(0.01) == 3
    assert ring.withheld == [78]
    ring.validate()


async def test_who_waits_gets_the_next_free_extent_in_order() -> None:
    ring = await full_ring()
    first, second = (asyncio.create_task(ring.take(5)) for _ in range(2))
    await asyncio.sleep(0)
    ring.give_back(6)
    ring.withhold(1, 5)
    ring.settled(5)
    assert await first == 6
    assert await second == 1
    ring.validate()


async def test_an_extent_that_nobody_waits_for_any_more_is_not_lost() -> None:
    ring = await full_ring()
    waiting = asyncio.create_task(ring.take(5))
    await asyncio.sleep(0)
    ring.give_back(2)
    waiting.cancel()  # after it was given the extent, before it woke up
    with pytest.raises(asyncio.CancelledError):
        await waiting
    ring.validate()
    assert await ring.take(0.01) == 2


@given(st.lists(st.tuples(st.sampled_from("tgws"), st.integers(0, 5)), max_size=200))
@settings(max_examples=100, deadline=None)
def test_the_books_are_right_after_any_history(history: list[tuple[str, int]]) -> None:
    async def run() -> None:
        ring = Ring(STAGING_BYTES_MIN)
        taken: list[int] = []
        for action, number in history:
            if action == "t" and len(taken) + len(ring.withheld) < EXTENTS:
                try:
                    taken.append(await ring.take(0.0001))
                except Unavailable:
                    assert not ring._free
            elif action == "g" and taken:
                ring.give_back(taken.pop(number % len(taken)))
            elif action == "w" and taken:
                ring.withhold(taken.pop(number % len(taken)), number + 1)
            elif action == "s":
                ring.settled(number + 1)
            ring.validate()

    asyncio.run(run())


# ---- rings that outlive their session ----------------------------------------------------------


def orphan(epoch: int = 3, arena: bytes = ARENA) -> Orphan:
    return Orphan(Ring(STAGING_BYTES_MIN), arena, epoch, client=1, key=bytes(16))


def test_only_a_later_epoch_of_the_same_arena_proves_that_a_server_is_gone() -> None:
    """A server with another arena may answer at the address of one that is only stopped."""
    orphans = Orphans()
    kept = orphan()
    orphans.add(kept)
    assert orphans.meet(OTHER, 4) == []
    assert orphans.meet(OTHER, 1) == []
    assert orphans.kept == [kept]
    assert orphans.meet(ARENA, 3) == [kept], "the same server can be asked"
    assert orphans.meet(ARENA, 4) == []
    assert orphans.kept == []


def test_an_orphans_memory_stays_mapped_until_it_is_dropped() -> None:
    orphans = Orphans()
    kept = orphan()
    memory = weakref.ref(kept.held)
    orphans.add(kept)
    del kept
    gc.collect()
    assert memory() is not None
    orphans.meet(ARENA, 9)
    gc.collect()
    assert memory() is None


def test_what_is_withheld_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvclient.transfer.ring.ORPHANED_BYTES_MAX", 2 * STAGING_BYTES_MIN)
    assert ORPHANED_BYTES_MAX == 512 << 20
    orphans = Orphans()
    orphans.add(orphan())
    orphans.check()
    orphans.add(orphan())
    with pytest.raises(Unavailable, match="restart this process"):
        orphans.check()
