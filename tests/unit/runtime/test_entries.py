"""Commits reach the arena's directory: checksums first, then the root with VALID."""

from __future__ import annotations

import numpy as np
import pytest

from kvproto.checksum import grid_checksums
from kvproto.grid import Region
from kvproto.prefix import ROOT
from kvserver.core.events import (
    Place,
    Tier,
)
from kvserver.core.instructions import (
    BlockInfo,
    CellsCommitted,
)
from kvserver.runtime.entries import HostEntries
from kvserver.tiers.checksums import verify_slot
from kvserver.tiers.entry import ReservedEntry, ValidEntry
from kvserver.tiers.host import HostArena
from tests.support.payload import Blocks
from tests.unit.runtime.conftest import BLOCKS, HANDLE, SLOT, spec_of

KEY = BLOCKS.chain(1, 1)[0]
PLACE = Place(Tier.HOST, 0, SLOT, 3)
GRID = BLOCKS.spec.grid


def committed(region: Region, *, complete: bool, tokens: int = 128) -> CellsCommitted:
    info = BlockInfo(HANDLE, KEY, ROOT, tokens)
    return CellsCommitted(1, 0, PLACE, region, info, complete)


@pytest.fixture
def entries(host: HostArena) -> HostEntries:
    made = HostEntries(host, spec_of)
    made.reserved(PLACE, (4, 5))
    payload = BLOCKS.payload(KEY)
    host.slot(0, payload.size)[:] = payload.reshape(-1)
    return made


def sums(region: Region) -> np.ndarray:
    payload = BLOCKS.payload(KEY)
    part = payload[region.layer_start : region.layer_stop, region.head_start : region.head_stop]
    return grid_checksums(part)


def test_two_ranks_fill_a_block_and_it_becomes_valid_with_the_last(
    host: HostArena, entries: HostEntries
) -> None:
    assert isinstance(host.read_entry(0), ReservedEntry)
    left, right = Region(0, 2, 0, 1), Region(0, 2, 1, 2)
    entries.committed(committed(left, complete=False), sums(left))
    assert isinstance(host.read_entry(0), ReservedEntry)
    assert entries.root(PLACE) == 0
    entries.committed(committed(right, complete=True), sums(right))
    entry = host.read_entry(0)
    assert isinstance(entry, ValidEntry)
    assert (entry.key, entry.generation, entry.tokens) == (KEY, 3, 128)
    assert entries.root(PLACE) == entry.root
    assert verify_slot(host.slot(0, SLOT), GRID.cells, GRID.cell_bytes(), entry.root)


def test_a_tail_whose_trailer_is_not_aligned(host: HostArena) -> None:
    blocks = Blocks(layers=3, heads=1, page_bytes=13)
    entries = HostEntries(host, lambda _: blocks.spec)
    place = Place(Tier.HOST, 16 << 10, 16 << 10, 1)
    entries.reserved(place, (1,))
    cells = np.arange(39, dtype=np.uint8).reshape(3, 1, 13)
    host.slot(place.offset, 39)[:] = cells.reshape(-1)
    info = BlockInfo(HANDLE, KEY, ROOT, 16)
    instruction = CellsCommitted(1, 0, place, blocks.spec.grid.whole, info, complete=True)
    entries.committed(instruction, grid_checksums(cells))
    slot = host.slot(place.offset, place.slot_bytes)
    assert verify_slot(slot, 3, 13, entries.root(place))


def test_the_root_of_another_life_of_the_slot_is_not_told(
    host: HostArena, entries: HostEntries
) -> None:
    whole = GRID.whole
    entries.committed(committed(whole, complete=True), sums(whole))
    assert entries.root(PLACE) != 0
    assert entries.root(Place(Tier.HOST, 0, SLOT, 4)) == 0
    assert entries.root(Place(Tier.DISK, 0, SLOT, 3)) == 0
