"""Registered memory: whose it is, where a block's cells lie in it, and what still holds it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvclient.copying import Slot, Writing
from kvclient.errors import Conflict, InvalidArgument, Unsupported
from kvclient.transfer.cutting import PIECES_MAX, cells_at, direct_addresses, parts
from kvclient.transfer.direct import Holds, Memories, Registered, Scattered, _overlap
from kvclient.transfer.ring import Orphan, Orphans
from kvproto.frames import Op, Place
from kvproto.grid import Grid, Region
from kvproto.nixlib import Memory
from kvserver.runtime.extents import Extents
from kvserver.runtime.orders import Order


class CudaTensor:
    """What this code touches of a torch tensor on a GPU: there is none here."""

    def __init__(self, address: int, elements: int, device: int, item_bytes: int = 2) -> None:
        self.device = SimpleNamespace(type="cuda", index=device)
        self._address, self._elements, self._item_bytes = address, elements, item_bytes

    def data_ptr(self) -> int:
        return self._address

    def numel(self) -> int:
        return self._elements

    def element_size(self) -> int:
        return self._item_bytes

    def is_contiguous(self) -> bool:
        return True


def heap(size: int = 1 << 16) -> tuple[Memories, np.ndarray]:
    memories, memory = Memories(), np.zeros(size, np.uint8)
    memories.add(Registered.of(memory))
    return memories, memory


# ---- registering -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros((4, 4), np.uint8)[:, :2],
        np.frombuffer(b"read only", np.uint8),
        np.zeros(0, np.uint8),
        b"bytes",
        SimpleNamespace(
            data_ptr=lambda: 1, device=SimpleNamespace(type="xpu", index=0), numel=lambda: 1,
            element_size=lambda: 1, is_contiguous=lambda: True,
        ),
    ],
    ids=["strided", "read-only", "empty", "bytes", "xpu"],
)  # fmt: skip
def test_memory_that_cannot_be_registered(memory: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Registered.of(memory)
    assert caught.value.field == "memory"


def test_memory_is_registered_once() -> None:
    memories, memory = heap(100)
    for part in (memory, memory[50:], memory[99:]):
        with pytest.raises(Conflict, match="overlaps"):
            memories.add(Registered.of(part))
    (only,) = memories.registered
    memories.remove(only)
    with pytest.raises(Conflict, match="not registered"):
        memories.remove(only)


# ---- where blocks lie --------------------------------------------------------------------------


def test_arrays_are_noticed_where_they_lie_in_registered_memory() -> None:
    memories, memory = heap()
    cells = memory[64 : 64 + 3 * 4 * 16].reshape(3, 4, 16)
    for block in (cells, cells[:, 1:3, :8], cells[1:2]):
        place = memories.scattered(block)
        assert place is not None
        assert place.shape == block.shape
        for (layer, head), address in np.ndenumerate(place.addresses[:, :, 0]):
            assert address == block[layer, head].ctypes.data
    for elsewhere in (
        np.zeros((3, 4, 16), np.uint8),
        cells[::-1],
        cells[:, :, ::2],
        np.lib.stride_tricks.as_strided(memory[-16:], (2, 1, 16), (16, 16, 1)),
    ):
        assert memories.scattered(elsewhere) is None


def test_pieces_outside_are_an_error() -> None:
    memories, memory = heap(1024)
    inside = np.array([[[memory.ctypes.data, memory.ctypes.data + 1024 - 16]]], np.uint64)
    read = lambda a, b: memory[:32].reshape(1, 1, 32)  # noqa: E731
    assert memories.scattered(Scattered(inside, 16, read)) is not None
    with pytest.raises(InvalidArgument) as caught:
        memories.scattered(Scattered(inside + np.uint64(1), 16, read))
    assert caught.value.field == "addresses"


def work_of(blocks: int, layers: int, heads: int, cell: int, tokens: int = 8) -> Writing:
    grid = Grid(layers, heads, 8, 1, cell // 8)
    slots = [Slot(0, 0, tokens) for _ in range(blocks)]
    return Writing(grid, grid.whole, slots, None)


def scattered_of(memory: np.ndarray, *shape: int) -> list[Scattered]:
    memories = Memories()
    memories.add(Registered.of(memory))
    found = [memories.scattered(block) for block in memory[: np.prod(shape)].reshape(shape)]
    return [place for place in found if place is not None]


def test_addresses_are_as_few_as_the_gaps_allow() -> None:
    (whole,) = scattered_of(np.zeros(1 << 16, np.uint8), 1, 3, 4, 16)
    for gap, wanted in ((None, 1), ((2,), 3), ((2, 3), 12)):
        addresses = whole.addresses.copy()
        if gap is not None:
            addresses[gap] += np.uint64(4096)
        place = Scattered(addresses, 16, whole.read)
        (part,) = parts(work_of(1, 3, 4, 16), [0], 1 << 20, {0: place})
        told, extents = direct_addresses(part)
        assert told.shape == (1, wanted)
        assert int((extents[:, 1] - extents[:, 0]).sum()) == 3 * 4 * 16


def test_pages_of_a_cell_may_lie_apart() -> None:
    base = np.arange(2 * 3 * 4, dtype=np.uint64).reshape(2, 3, 4) * np.uint64(1024)
    place = Scattered(base, 16, lambda a, b: np.zeros((b - a, 3, 64), np.uint8))
    (part,) = parts(work_of(1, 2, 3, 64), [0], 1 << 20, {0: place})
    addresses, _ = direct_addresses(part)
    assert np.array_equal(addresses.reshape(2, 3, 4), base)
    assert cells_at(place, 32)[0].shape == (2, 3, 2), "a tail takes the first pages"
    assert cells_at(place, 8)[1] == 8
    with pytest.raises(Unsupported, match="cannot be made of"):
        cells_at(place, 24)
    with pytest.raises(Unsupported):
        cells_at(place, 80)


def test_a_move_names_no_more_pieces_than_the_hub_takes() -> None:
    layers, heads, count = 64, 32, 64
    base = np.arange(layers * heads * count, dtype=np.uint64).reshape(layers, heads, count) * 128
    place = Scattered(base.astype(np.uint64), 64, lambda a, b: np.zeros(0, np.uint8))
    cut = list(parts(work_of(1, layers, heads, 64 * count), [0], 1 << 40, {0: place}))
    assert [part.start for part in cut] == list(range(0, layers, PIECES_MAX // (heads * count)))
    assert all(direct_addresses(part)[0].size <= PIECES_MAX for part in cut)


def test_blocks_of_different_lengths_are_never_in_one_move() -> None:
    work = work_of(4, 2, 2, 64)
    work.slots = [Slot(0, 0, tokens) for tokens in (8, 8, 3, 8)]
    memory = np.zeros(1 << 16, np.uint8)
    places = dict(enumerate(scattered_of(memory, 4, 2, 2, 64)))
    cut = list(parts(work, [0, 1, 2, 3], 1 << 20, places))
    assert [(part.indices, part.cell_bytes) for part in cut] == [
        ([0], 64), ([1], 64), ([2], 24), ([3], 64),
    ]  # fmt: skip


# ---- memory of a GPU ---------------------------------------------------------------------------


def test_vram_goes_the_same_way_to_the_descriptors() -> None:
    """From a CUDA tensor to what the hub's agent is told, by address, kind and device."""
    memories = Memories()
    memory = Registered.of(CudaTensor(0x7000_0000_0000, 4096, device=3))
    memories.add(memory)
    assert (memory.memory, memory.device, memory.nbytes) == (Memory.VRAM, 3, 8192)
    base = memory.address + np.arange(2 * 2 * 4, dtype=np.uint64).reshape(2, 2, 4) * 256
    place = memories.scattered(
        Scattered(base.astype(np.uint64), 64, lambda a, b: np.zeros((b - a, 2, 256), np.uint8))
    )
    assert place is not None
    (part,) = parts(work_of(1, 2, 2, 256), [0], 1 << 20, {0: place})
    addresses, _ = direct_addresses(part)

    row = [memory.address, memory.nbytes, memory.memory.code, memory.device]
    extents = Extents(np.array([[4096, 4096, 0, 0], row], np.uint64))
    whole = Region(0, 2, 0, 2)
    slot = Place(1, 0, 1, 256, 2, 2, whole, bytes(16))
    order = Order(1, Op.WRITE, whole, [slot], addresses, None, 1.0)
    kind, device = order.memory(extents)
    assert (kind, device) == (Memory.VRAM, 3)
    posts = order.work(1, 1, [0], (kind, device)).posts(1 << 40)
    told = np.concatenate([post.remote for post in posts])
    assert np.array_equal(told[:, 0], base.reshape(-1))
    assert (told[:, 1] == 64).all()
    assert (told[:, 2] == 3).all()


# ---- holds -------------------------------------------------------------------------------------


def span(memory: np.ndarray, start: int, stop: int) -> np.ndarray:
    base = memory.ctypes.data
    return np.array([[base + start, base + stop]], np.uint64)


async def test_a_hold_lasts_until_its_move_is_over_and_pins_no_more_than_it_touches() -> None:
    memories, memory = heap(1000)
    holds = Holds(memories)
    holds.begin(1, span(memory, 100, 200))
    pin = memories.pin([memory[150:160]])
    assert not pin.done
    assert pin.nbytes == 100
    assert memories.pin([memory[:100], memory[200:]]).done
    with pytest.raises(Conflict, match="may still"):
        memories.remove(memories.registered[0])
    holds.withhold(1)
    assert holds.withheld == [1]
    assert not pin.wait(0.01)
    assert not await pin.settled(0.01)
    holds.settled(2)
    assert not pin.done
    holds.settled(1)
    assert pin.done
    assert await pin.settled()
    memories.remove(memories.registered[0])


async def test_who_stops_waiting_ends_no_hold() -> None:
    memories, memory = heap(1000)
    holds = Holds(memories)
    holds.begin(1, span(memory, 0, 10))
    over = holds.withhold(1)
    pin = memories.pin([memory])
    waiting = asyncio.create_task(pin.settled())
    await asyncio.sleep(0)
    waiting.cancel()
    over.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not pin.done


def test_memory_that_is_held_stays_alive() -> None:
    class Owner(np.ndarray):
        """An array that can be referred to weakly."""

    memory = np.zeros(100, np.uint8).view(Owner)
    alive = weakref.ref(memory)
    memories = Memories()
    memories.add(Registered.of(memory))
    holds = Holds(memories)
    holds.begin(1, span(memory, 0, 10))
    orphans = Orphans()
    orphans.add(Orphan(holds, b"a" * 16, 3, client=1, key=bytes(16)))
    pin = memories.pin([memory])
    del memory, memories
    gc.collect()
    assert alive() is not None
    orphans.meet(b"b" * 16, 4)
    assert not pin.done
    orphans.meet(b"a" * 16, 4)
    assert pin.done, "a successor of the hub is the proof"
    assert orphans.kept == []


ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda t: (t[0], t[0] + t[1])),
    min_size=1, max_size=8,
)  # fmt: skip


@given(ranges, ranges)
@settings(deadline=None)
def test_overlap_is_that_of_the_bytes(
    some: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    one, two = ({at for low, high in side for at in range(low, high)} for side in (some, others))
    wanted = bool(one & two)
    assert _overlap(np.array(some, np.uint64), np.array(others, np.uint64)) == wanted
