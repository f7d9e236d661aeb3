"""The data plane over a real arena: bytes, checksums, and what makes a copy count."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvclient.copying import (
    Copier,
    Mapped,
    Outcome,
    Piece,
    Reading,
    Slot,
    Writing,
    cells_of,
    read_piece,
    write_piece,
)
from kvclient.errors import Unavailable
from kvclient.transfer.shm import ShmArena
from kvproto import cells
from kvproto.checksum import root_of
from kvproto.grid import Grid, Region
from tests.unit.client.conftest import ServedArena

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
GRID = Grid(layers=6, heads=4, block_tokens=64, page_tokens=16, page_bytes=256)
LONG = Grid(layers=2, heads=1, block_tokens=16, page_tokens=16, page_bytes=2_500_000)
SLOT = Slot(offset=32 << 10, generation=4, tokens=64)
REGIONS = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 3), st.integers(1, 4)).map(
    lambda t: Region(t[0], min(6, t[0] + t[1]), t[2], min(4, t[2] + t[3]))
)


def noise(*shape: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sums_of(cells: Bytes) -> list[int]:
    return [xxh3_64_intdigest(cell.tobytes()) for layer in cells for cell in layer]


def pieces(layers: int) -> list[Piece]:
    return [Piece(0, start, start + 1) for start in range(layers)]


@pytest.fixture(autouse=True, params=["native", "python"])
def cells_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with native code, where it was built, and without."""
    if request.param == "python":
        monkeypatch.setattr(cells, "_library", None)
    elif not cells.NATIVE:
        pytest.skip("kvproto was built without native code: no C compiler")


@pytest.fixture
def arena(served: ServedArena) -> Iterator[ShmArena]:
    served.arena.write_reserved(SLOT.offset, 1 << 20, SLOT.generation, (1,))
    arena = served.open()
    yield arena
    arena.close()


def put(served: ServedArena, grid: Grid, slot: Slot, payload: Bytes) -> Slot:
    """Fill a slot as writer and server do together; the Slot with its root."""
    flat = payload.reshape(-1)
    view = served.arena.slot(slot.offset, grid.slot_bytes(slot.tokens))
    view[: flat.size] = flat
    trailer = np.array(sums_of(payload), "<u8").view(np.uint8)
    view[flat.size :] = trailer
    return Slot(slot.offset, slot.generation, slot.tokens, root_of(trailer))


@settings(max_examples=40, deadline=None)
@given(region=REGIONS, tokens=st.integers(1, 64), dense=st.booleans())
def test_writing_puts_a_region_and_its_checksums(region: Region, tokens: int, dense: bool) -> None:
    grid = GRID
    data = np.zeros(1 << 20, np.uint8)
    slot = Slot(0, 1, tokens)
    cell = grid.cell_bytes(tokens)
    source = noise(region.layers, region.heads, cell if dense else cell + 40)
    work = Writing(grid, region, [slot], [source])
    for piece in pieces(region.layers):
        write_piece(_Memory(data), work, piece)
    assert not work.stale.any()
    wanted = np.zeros((grid.layers, grid.heads, cell), np.uint8)
    rows = slice(region.layer_start, region.layer_stop)
    wanted[rows, region.head_start : region.head_stop] = source[:, :, :cell]
    payload = grid.payload_bytes(tokens)
    assert np.array_equal(data[:payload], wanted.reshape(-1))
    assert not data[payload:].any()
    assert work.sums.reshape(-1).tolist() == sums_of(source[:, :, :cell])


class _Memory(Mapped):
    """An Arena over plain memory, whose slots are always current."""

    transport = "memory"
    follows = False
    address = ""
    arena_id = bytes(16)
    epoch = 1
    drained = True

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self.data_bytes = data.size

    def alive(self) -> bool:
        return True

    def current(self, offset: int, generation: int) -> bool:
        return True

    def reading(self, offset: int, length: int) -> Bytes:
        return self._data[offset : offset + length]

    writing = reading

    def close(self) -> None: ...


@pytest.mark.parametrize("grid", [GRID, LONG], ids=["short cells", "long cells"])
def test_read_back_what_was_written(served: ServedArena, arena: ShmArena, grid: Grid) -> None:
    slot = Slot(SLOT.offset, SLOT.generation, grid.block_tokens)
    source = noise(grid.layers, grid.heads, grid.cell_bytes())
    work = Writing(grid, grid.whole, [slot], [source])
    write_piece(arena, work, Piece(0, 0, grid.layers))
    assert work.sums.reshape(-1).tolist() == sums_of(source)
    whole = put(served, grid, slot, source)
    out = np.zeros_like(source)
    reading = Reading(grid, grid.whole, [whole], [out])
    read_piece(arena, reading, Piece(0, 0, grid.layers))
    assert reading.outcomes.tolist() == [Outcome.OK]
    assert np.array_equal(out, source)


@pytest.mark.parametrize("copies", [True, False], ids=["copy", "verify"])
@pytest.mark.parametrize("byte", [0, 4095, 6 * 4 * 1024 - 1])
def test_one_wrong_byte_is_corrupt(
    served: ServedArena, arena: ShmArena, byte: int, copies: bool
) -> None:
    source = noise(6, 4, 1024)
    slot = put(served, GRID, SLOT, source)
    served.arena.slot(SLOT.offset, 1 << 16)[byte] ^= 1
    out = [np.zeros_like(source)] if copies else None
    reading = Reading(GRID, GRID.whole, [slot], out)
    read_piece(arena, reading, Piece(0, 0, 6))
    assert reading.outcomes.tolist() == [Outcome.CORRUPT]


def test_a_wrong_byte_outside_the_region_does_not_matter(
    served: ServedArena, arena: ShmArena
) -> None:
    source = noise(6, 4, 1024)
    slot = put(served, GRID, SLOT, source)
    served.arena.slot(SLOT.offset, 1)[0] ^= 1
    region = Region(1, 6, 0, 4)
    out = np.zeros((5, 4, 1024), np.uint8)
    reading = Reading(GRID, region, [slot], [out])
    read_piece(arena, reading, Piece(0, 0, 5))
    assert reading.outcomes.tolist() == [Outcome.OK]
    assert np.array_equal(out, source[1:])


def test_a_trailer_that_fits_wrong_bytes_fails_at_the_root(
    served: ServedArena, arena: ShmArena
) -> None:
    """Another block's bytes with that block's trailer: each cell fits, the whole does not."""
    slot = put(served, GRID, SLOT, noise(6, 4, 1024, seed=1))
    put(served, GRID, SLOT, noise(6, 4, 1024, seed=2))
    reading = Reading(GRID, GRID.whole, [slot], None)
    read_piece(arena, reading, Piece(0, 0, 6))
    assert reading.outcomes.tolist() == [Outcome.CORRUPT]


def test_a_block_still_filling_has_no_root(served: ServedArena, arena: ShmArena) -> None:
    whole = put(served, GRID, SLOT, noise(6, 4, 1024))
    filling = Slot(whole.offset, whole.generation, whole.tokens, 0)
    reading = Reading(GRID, Region(0, 1, 0, 4), [filling], None)
    read_piece(arena, reading, Piece(0, 0, 1))
    assert reading.outcomes.tolist() == [Outcome.OK]


@pytest.mark.parametrize("wrong", [True, False])
def test_a_reused_slot_is_stale_even_if_its_bytes_are_wrong(
    served: ServedArena, arena: ShmArena, wrong: bool
) -> None:
    """Stale wins over corrupt: a reader that was overtaken must not accuse the new block."""
    slot = put(served, GRID, SLOT, noise(6, 4, 1024))
    served.arena.write_invalid(SLOT.offset, SLOT.generation + 1)
    if wrong:
        served.arena.slot(SLOT.offset, 1)[0] ^= 1
    out = np.zeros((6, 4, 1024), np.uint8)
    reading = Reading(GRID, GRID.whole, [slot], [out])
    read_piece(arena, reading, Piece(0, 0, 6))
    assert reading.outcomes.tolist() == [Outcome.STALE]


def test_a_slot_that_changes_under_the_copy_is_stale(
    served: ServedArena, arena: ShmArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check after the copy: the generation moves when the last chunk has been copied."""
    slot = put(served, LONG, Slot(SLOT.offset, SLOT.generation, 16), noise(2, 1, 2_500_000))
    calls = 0
    genuine = ShmArena.current

    def current(self: ShmArena, offset: int, generation: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1 + 2 * 2 + 1:  # once before, once a chunk, once after
            served.arena.write_invalid(SLOT.offset, SLOT.generation + 1)
        return genuine(self, offset, generation)

    monkeypatch.setattr(ShmArena, "current", current)
    out = np.zeros((2, 1, 2_500_000), np.uint8)
    reading = Reading(LONG, LONG.whole, [slot], [out])
    read_piece(arena, reading, Piece(0, 0, 2))
    assert calls == 6
    assert reading.outcomes.tolist() == [Outcome.STALE]


def test_nothing_is_written_into_a_slot_of_another_generation(
    served: ServedArena, arena: ShmArena
) -> None:
    served.arena.write_reserved(SLOT.offset, 1 << 20, SLOT.generation + 1, (2,))
    work = Writing(GRID, GRID.whole, [SLOT], [noise(6, 4, 1024)])
    write_piece(arena, work, Piece(0, 0, 6))
    assert work.stale.tolist() == [True]
    assert not served.arena.slot(SLOT.offset, 1 << 16).any()


def test_nothing_is_written_after_an_epoch_change(served: ServedArena, arena: ShmArena) -> None:
    served.arena._header.step(0, 2, served.arena.epoch + 1, seed=0)
    work = Writing(GRID, GRID.whole, [SLOT], [noise(6, 4, 1024)])
    write_piece(arena, work, Piece(0, 0, 6))
    assert work.stale.tolist() == [True]
    assert not served.arena.slot(SLOT.offset, 1 << 16).any()


def test_a_closed_arena_makes_work_stale_and_raises_nothing(
    served: ServedArena, arena: ShmArena
) -> None:
    arena.close()
    writing = Writing(GRID, GRID.whole, [SLOT], [noise(6, 4, 1024)])
    write_piece(arena, writing, Piece(0, 0, 6))
    reading = Reading(GRID, GRID.whole, [SLOT], None)
    read_piece(arena, reading, Piece(0, 0, 6))
    assert (writing.stale.tolist(), reading.outcomes.tolist()) == ([True], [Outcome.STALE])


@given(
    layers=st.integers(1, 128),
    layer_bytes=st.integers(1, 8 << 20),
    count=st.integers(0, 20),
    threads=st.integers(1, 4),
)
def test_split_covers_every_layer_once(
    layers: int, layer_bytes: int, count: int, threads: int
) -> None:
    copier = Copier(threads)
    tasks = copier.split(layers, layer_bytes, range(count))
    copier.close()
    assert all(tasks)
    covered = [
        (piece.index, layer)
        for task in tasks
        for piece in task
        for layer in range(piece.start, piece.stop)
    ]
    assert covered == [(i, layer) for i in range(count) for layer in range(layers)]
    for task in tasks[:-1]:
        size = sum(piece.stop - piece.start for piece in task) * layer_bytes
        assert size >= min(1 << 20, layers * layer_bytes * count), "no task of crumbs"


async def test_a_cancelled_run_returns_when_the_last_copy_has_ended() -> None:
    copier = Copier(2)
    running, gate = threading.Event(), threading.Event()
    begun: list[int] = []
    ended: list[int] = []

    def slow(piece: Piece) -> None:
        begun.append(piece.index)
        running.set()
        assert gate.wait(20)
        ended.append(piece.index)

    task = asyncio.create_task(copier.run(slow, [[Piece(i, 0, 1)] * 10 for i in range(8)]))
    assert await asyncio.to_thread(running.wait, 20)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done(), "it waits for what has begun"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 1 <= len(ended) == len(begun) <= 2, "a piece a thread, and it stopped early"
    await asyncio.sleep(0.15)
    assert len(ended) == len(begun) <= 2, "nothing runs after run() has returned"
    copier.close()


async def test_a_closed_copier_says_so() -> None:
    copier = Copier(1)
    copier.close()
    with pytest.raises(Unavailable, match="closed"):
        await copier.run(lambda _: None, [[Piece(0, 0, 1)]])


def test_cells_of_is_a_view_of_the_region() -> None:
    slot = np.arange(GRID.payload_bytes(20) + 50).astype(np.uint8)
    cells = cells_of(slot, GRID, 20, Region(1, 3, 2, 4))
    assert cells.shape == (2, 2, 512)
    assert np.shares_memory(cells, slot)
    assert np.array_equal(cells[1, 0], slot[(2 * 4 + 2) * 512 : (2 * 4 + 3) * 512])


async def test_the_loops_thread_does_a_part_and_waits_for_the_others() -> None:
    copier, threads = Copier(2), {}
    gate = threading.Event()

    def note(piece: Piece) -> None:
        threads[piece.index] = threading.current_thread()
        if piece.index == 0:
            assert gate.wait(5), "the part of the loop's thread runs beside it"
        else:
            gate.set()

    await copier.run(note, [[Piece(0, 0, 1)], [Piece(1, 0, 1)]], here=True)
    assert threads[1] is threading.current_thread()
    assert threads[0] is not threading.current_thread()
    await copier.run(note, [[Piece(2, 0, 1)]], here=True)
    assert threads[2] is threading.current_thread()

    def fail(piece: Piece) -> None:
        raise ValueError(f"piece {piece.index}")

    with pytest.raises(ValueError, match="piece 1"):
        await copier.run(fail, [[], [Piece(1, 0, 1)]], here=True)
    copier.close()
