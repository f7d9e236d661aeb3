"""Checksums of cells and slots: values fixed for good, and every way to ask for them agrees."""

from __future__ import annotations

import numpy as np
import pytest

from kvproto.checksum import cell_checksums, checksum, grid_checksums, root_of, trailer_of
from kvproto.grid import Grid, Region
from kvserver.tiers.checksums import slot_root, store_checksums, verify_slot

GRID = Grid(layers=3, heads=4, block_tokens=32, page_tokens=16, page_bytes=100)
CELL = GRID.cell_bytes()


def filled_slot(grid: Grid = GRID) -> np.ndarray:
    slot = np.random.default_rng(1).integers(0, 256, 16384, np.uint8)
    cells = cell_checksums(slot[: grid.payload_bytes()], grid.cell_bytes())
    store_checksums(slot, grid.cells, grid.cell_bytes(), range(grid.cells), cells)
    return slot


def test_the_values_are_those_of_xxh3() -> None:
    """Published test vectors of XXH3_64bits: clients of other languages compute the same."""
    assert checksum(b"") == 0x2D06800538D394C2
    assert checksum(b"a") == 0xE6C632B61E964E1F
    assert checksum(b"abc") == 0x78AF5F94892F3950


def test_each_cell_has_its_own() -> None:
    slot = filled_slot()
    whole = cell_checksums(slot[: GRID.payload_bytes()], CELL)
    assert whole.dtype == np.uint64
    assert whole.tolist() == [
        checksum(slot[i * CELL : (i + 1) * CELL].tobytes()) for i in range(GRID.cells)
    ]
    some = cell_checksums(slot, CELL, [5, 0, 11])
    assert some.tolist() == [whole[5], whole[0], whole[11]]
    assert cell_checksums(slot, CELL, []).tolist() == []


def test_a_strided_region_gives_the_same() -> None:
    slot = filled_slot()
    cells = slot[: GRID.payload_bytes()].reshape(GRID.layers, GRID.heads, GRID.pages, 100)
    region = Region(1, 3, 1, 3)
    view = cells[1:3, 1:3]
    assert not view.flags.c_contiguous
    expected = cell_checksums(slot, CELL, GRID.cell_indices(region))
    assert grid_checksums(view).tolist() == expected.tolist()


def test_a_cell_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        grid_checksums(np.zeros((2, 2, 8, 8), np.uint8)[:, :, :, ::2])


def test_a_slot_verifies_and_no_flipped_bit_does() -> None:
    slot = filled_slot()
    root = slot_root(slot, GRID.cells, CELL)
    assert root == root_of(trailer_of(slot, GRID.cells, CELL))
    assert verify_slot(slot, GRID.cells, CELL, root)
    assert not verify_slot(slot, GRID.cells, CELL, root ^ 1)
    rng = np.random.default_rng(2)
    used = GRID.slot_bytes()
    for byte in [*rng.integers(0, used, 300).tolist(), 0, used - 1]:
        slot[byte] ^= 1 << byte % 8
        assert not verify_slot(slot, GRID.cells, CELL, root)
        slot[byte] ^= 1 << byte % 8
    slot[used] ^= 1  # what follows the trailer is nobody's
    assert verify_slot(slot, GRID.cells, CELL, root)


def test_a_trailer_that_is_not_aligned_works() -> None:
    """Cells of an odd number of bytes put the trailer at an odd offset."""
    grid = Grid(layers=1, heads=3, block_tokens=1, page_tokens=1, page_bytes=7)
    slot = filled_slot(grid)
    assert verify_slot(slot, 3, 7, slot_root(slot, 3, 7))


def test_zeros_are_no_block() -> None:
    """A slot that was never written, or given back by the kernel, does not verify by itself."""
    slot = np.zeros(16384, np.uint8)
    assert not verify_slot(slot, GRID.cells, CELL, 0)
    assert not verify_slot(slot, GRID.cells, CELL, slot_root(slot, GRID.cells, CELL))
