"""Grid arithmetic against a byte-by-byte model of a slot."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto.errors import FieldError
from kvproto.grid import CELLS_MAX, Grid, Region


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    page_tokens = draw(st.integers(1, 8))
    return Grid(
        layers=draw(st.integers(1, 6)),
        heads=draw(st.integers(1, 6)),
        page_tokens=page_tokens,
        block_tokens=page_tokens * draw(st.integers(1, 5)),
        page_bytes=draw(st.integers(1, 24)),
    )


@st.composite
def regions(draw: st.DrawFn, grid: Grid) -> Region:
    layer = draw(st.integers(0, grid.layers - 1))
    head = draw(st.integers(0, grid.heads - 1))
    return Region(
        layer,
        draw(st.integers(layer + 1, grid.layers)),
        head,
        draw(st.integers(head + 1, grid.heads)),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Grid, Region, int]:
    grid = draw(grids())
    return grid, draw(regions(grid)), draw(st.integers(1, grid.block_tokens))


def _owner_of_each_byte(grid: Grid, tokens: int) -> list[tuple[int, int]]:
    """(layer, head) of each payload byte: the slot layout, spelled out."""
    pages = len(range(0, tokens, grid.page_tokens))
    return [
        (layer, head)
        for layer in range(grid.layers)
        for head in range(grid.heads)
        for _ in range(pages * grid.page_bytes)
    ]


def _inside(region: Region, layer: int, head: int) -> bool:
    layers = range(region.layer_start, region.layer_stop)
    return layer in layers and head in range(region.head_start, region.head_stop)


@given(cases())
def test_runs_cover_exactly_the_regions_bytes(case: tuple[Grid, Region, int]) -> None:
    grid, region, tokens = case
    owners = _owner_of_each_byte(grid, tokens)
    assert len(owners) == grid.payload_bytes(tokens) == grid.trailer_offset(tokens)
    wanted = [_inside(region, *owner) for owner in owners]
    covered = [False] * len(owners)
    end = -1
    for offset, length in grid.runs(region, tokens):
        assert offset > end, "ascending, and neighbours are one run"
        assert length > 0
        for at in range(offset, offset + length):
            covered[at] = True
        end = offset + length
    assert covered == wanted
    assert sum(wanted) == grid.region_bytes(region, tokens)


@given(cases())
def test_masks_and_indices_name_the_same_cells(case: tuple[Grid, Region, int]) -> None:
    grid, region, _ = case
    cells = [
        layer * grid.heads + head
        for layer in range(grid.layers)
        for head in range(grid.heads)
        if _inside(region, layer, head)
    ]
    assert list(grid.cell_indices(region)) == cells
    assert grid.mask(region) == sum(1 << cell for cell in cells)
    assert grid.mask(region) & ~grid.full_mask == 0
    assert region.cells == len(cells) == grid.mask(region).bit_count()


@given(cases())
def test_a_tails_cells_are_shorter(case: tuple[Grid, Region, int]) -> None:
    grid, _, tokens = case
    pages = len(range(0, tokens, grid.page_tokens))
    assert grid.pages_for(tokens) == pages <= grid.pages
    assert grid.cell_bytes(tokens) == pages * grid.page_bytes
    assert grid.slot_bytes(tokens) == grid.cells * (grid.cell_bytes(tokens) + 8)
    assert grid.slot_bytes() == grid.slot_bytes(grid.block_tokens)
    assert grid.cell_bytes() == grid.cell_bytes(grid.block_tokens)
    assert grid.runs(grid.whole) == grid.runs(grid.whole, grid.block_tokens)


@given(grids().flatmap(lambda g: st.tuples(st.just(g), regions(g), regions(g))))
def test_overlap_and_containment_against_masks(case: tuple[Grid, Region, Region]) -> None:
    grid, one, two = case
    a, b = grid.mask(one), grid.mask(two)
    assert one.intersects(two) == bool(a & b) == two.intersects(one)
    assert one.contains(two) == (a | b == a)
    assert grid.whole.contains(one)
    assert grid.mask(grid.whole) == grid.full_mask == (1 << grid.cells) - 1


@given(cases())
def test_a_slot_read_as_an_array_is_layer_head_page(case: tuple[Grid, Region, int]) -> None:
    """The strided view that clients use and the runs of the grid are the same bytes."""
    grid, region, tokens = case
    slot = np.arange(grid.payload_bytes(tokens), dtype=np.uint32)
    array = slot.reshape(grid.layers, grid.heads, grid.cell_bytes(tokens))
    view = array[region.layer_start : region.layer_stop, region.head_start : region.head_stop]
    from_runs = [slot[offset : offset + length] for offset, length in grid.runs(region, tokens)]
    assert view.reshape(-1).tolist() == np.concatenate(from_runs).tolist()


@given(st.integers(1, 4), st.integers(1, 4), grids())
def test_ranks_of_any_two_shapes_tile_the_grid(stages: int, ranks: int, grid: Grid) -> None:
    """Pipeline stages and tensor-parallel ranks OR their regions into one full mask."""

    def cuts(total: int, parts: int) -> list[tuple[int, int]]:
        edges = [total * i // parts for i in range(parts + 1)]
        return [(a, b) for a, b in pairwise(edges) if a < b]

    covered = 0
    for layer_start, layer_stop in cuts(grid.layers, stages):
        for head_start, head_stop in cuts(grid.heads, ranks):
            mask = grid.mask(grid.check(Region(layer_start, layer_stop, head_start, head_stop)))
            assert covered & mask == 0
            covered |= mask
    assert covered == grid.full_mask


GRID = Grid(layers=4, heads=2, block_tokens=128, page_tokens=16, page_bytes=4096)


def test_figures_of_a_plain_grid() -> None:
    assert (GRID.cells, GRID.pages, GRID.cell_bytes()) == (8, 8, 32_768)
    assert (GRID.payload_bytes(), GRID.trailer_bytes, GRID.slot_bytes()) == (262_144, 64, 262_208)
    assert GRID.runs(Region(1, 3, 0, 2)) == [(65_536, 131_072)]
    assert GRID.runs(Region(1, 3, 1, 2), tokens=17) == [(24_576, 8192), (40_960, 8192)]
    assert GRID.mask(Region(1, 3, 1, 2)) == 0b00101000


@pytest.mark.parametrize(
    ("region", "field"),
    [
        (Region(0, 0, 0, 2), "region.layers"),
        (Region(2, 1, 0, 2), "region.layers"),
        (Region(-1, 1, 0, 2), "region.layers"),
        (Region(0, 5, 0, 2), "region.layers"),
        (Region(0, 4, 1, 1), "region.heads"),
        (Region(0, 4, 0, 3), "region.heads"),
        (Region(0, 4, -1, 1), "region.heads"),
    ],
)
def test_a_region_outside_the_grid_is_named(region: Region, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        GRID.check(region)
    assert caught.value.field == field
    assert "within [0, " in caught.value.limit


@pytest.mark.parametrize("tokens", [0, -1, 129, True, 1.5])
def test_a_tail_outside_the_block_is_named(tokens: int) -> None:
    with pytest.raises(FieldError) as caught:
        GRID.pages_for(tokens)
    assert (caught.value.field, "128" in caught.value.limit) == ("tokens", True)


def test_the_number_of_cells_is_bounded() -> None:
    Grid(layers=1024, heads=CELLS_MAX // 1024, block_tokens=1, page_tokens=1, page_bytes=1)
    with pytest.raises(FieldError, match=str(CELLS_MAX)):
        Grid(layers=1023, heads=17, block_tokens=1, page_tokens=1, page_bytes=1)
