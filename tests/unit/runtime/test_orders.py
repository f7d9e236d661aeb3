"""The arithmetic of a Move: which bytes of the arena meet which of the client's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.checksum import grid_checksums
from kvproto.frames import Op, Place
from kvproto.grid import Region
from kvproto.nixlib import Memory
from kvserver.runtime.orders import Order
from kvserver.transfer.nixl.work import Work


@st.composite
def orders(draw: st.DrawFn) -> Order:
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    layer = sorted(draw(st.lists(st.integers(0, layers), min_size=2, max_size=2, unique=True)))
    head = sorted(draw(st.lists(st.integers(0, heads), min_size=2, max_size=2, unique=True)))
    region = Region(*layer, *head)
    told = draw(st.sampled_from([1, region.layers, region.cells]))
    places, addresses = [], []
    for at in range(draw(st.integers(1, 4))):
        cell = draw(st.integers(1, 6))
        places.append(Place(1, 1000 * at, 7, cell, layers, heads, region))
        size = region.cells * cell // told
        starts = draw(st.permutations(range(told)))
        addresses.append([100_000 * (at + 1) + start * (size + 3) for start in starts])
    return Order(1, Op.READ, region, places, np.array(addresses, np.uint64), None, 1.0)


def expected(order: Order, at: int) -> dict[int, int]:
    """Byte of the arena -> byte of the client, one by one, by the protocol's words."""
    place, region, told = order.places[at], order.region, order.addresses.shape[1]
    pairs = {}
    for layer in range(region.layers):
        for head in range(region.heads):
            number = layer * region.heads + head
            cell = (region.layer_start + layer) * place.heads + region.head_start + head
            cells_a_piece = region.cells // told
            piece, within = divmod(number, cells_a_piece)
            for byte in range(place.cell_bytes):
                ours = place.offset + cell * place.cell_bytes + byte
                theirs = int(order.addresses[at, piece]) + within * place.cell_bytes + byte
                pairs[ours] = theirs
    return pairs


@given(orders(), st.data())
@settings(max_examples=300, deadline=None)
def test_every_byte_goes_to_its_place(order: Order, data: st.DataObject) -> None:
    everyone = list(range(len(order.places)))
    chosen = sorted(data.draw(st.sets(st.sampled_from(everyone), min_size=1)))
    base = 1 << 32
    moved: dict[int, int] = {}
    work = order.work(9, 4, chosen, (Memory.VRAM, 2))
    told = Work.decode(work.encode())
    assert (told.number, told.client, told.read, told.memory) == (9, 4, False, Memory.VRAM)
    assert told.checksums is None
    for post in told.posts(base):
        assert set(post.items) <= set(range(len(chosen)))
        for (ours, size, _), (theirs, size_, device) in zip(
            post.local.tolist(), post.remote.tolist(), strict=True
        ):
            assert (size, device) == (size_, 2)
            for byte in range(size):
                assert ours + byte - base not in moved
                moved[ours + byte - base] = theirs + byte
    wanted: dict[int, int] = {}
    for at in chosen:
        wanted |= expected(order, at)
    assert moved == wanted


def test_what_is_read_into_slots_is_held_against_its_checksums() -> None:
    arena = np.random.default_rng(3).integers(0, 256, 4096, np.uint8)
    whole, region = Region(0, 4, 0, 3), Region(1, 3, 1, 3)
    places = [Place(1, offset, 1, 8, 4, 3, whole) for offset in (0, 512, 1024)]
    sums = []
    for place in places:
        cells = arena[place.offset : place.offset + 96].reshape(4, 3, 8)[1:3, 1:3]
        sums.append(grid_checksums(cells))
    order = Order(
        1, Op.WRITE, region, places, np.zeros((3, 1), np.uint64), np.array(sums), 1.0
    )  # fmt: skip
    work = Work.decode(order.work(1, 2, [0, 1, 2], (Memory.DRAM, 0)).encode())
    assert work.read
    assert work.wrong(arena, [0, 1, 2]) == []
    arena[512 + (1 * 3 + 1) * 8] ^= 1
    arena[1024] ^= 1  # outside the region
    assert work.wrong(arena, [0, 1, 2]) == [1]
    assert work.wrong(arena, [0, 2]) == []
    some = Work.decode(order.work(2, 2, [1, 2], (Memory.DRAM, 0)).encode())
    assert some.wrong(arena, [0, 1]) == [0], "items count what was chosen"
    assert [place.offset for place in some.places()] == [512, 1024]
