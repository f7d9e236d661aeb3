"""The data plane of the client: copies and checksums in a few threads.

Work comes as pieces: some layers of one block. A task is a run of pieces of about a megabyte or
more, so that threads do not meet at the interpreter's lock for each. A piece is copied and hashed
(`kvproto.cells`) chunk by chunk.

Rules:
 1. Views of the arena exist only inside these functions, never in a frame that can raise to the
    user: a kept traceback must not keep a mapping.
 2. Before each chunk that is written, the slot's generation and the epoch are read: what is known
    to belong to somebody else is not written.
 3. A read is good if the checksums of the bytes that ARRIVED match the trailer, the trailer
    matches the root, and the slot was current before and after.
 4. A task that was told to stop ends within one chunk. `run` returns only when no copy runs.

`Writing` and `Reading` are what any Transfer is given; how a mapped Arena does them stands here,
how others do in `kvclient.transfer`.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import xxhash

from kvclient.errors import KVError, Unavailable, Unsupported
from kvclient.timing import Deadline
from kvclient.transfer.base import Arena, Bytes, Transfer
from kvclient.transfer.direct import Block, Scattered
from kvproto.cells import Checksums, copy_rows
from kvproto.checksum import grid_checksums, root_of
from kvproto.grid import Grid, Region

# Between two looks at the generation. Of 1, 2, 4 and 8 MiB, one thread's pushes of 8 MiB had 0.49,
# 0.57, 0.57 and 0.57 of memcpy (docs/adr/0012).
CHUNK_BYTES = 2 << 20
TASK_BYTES_MIN = 1 << 20
TASK_BYTES = 4 << 20
THREADS = 2
HERE_BYTES_MAX = 8 << 20  # work of which the loop's thread does a part: 4 MiB at most, about 0.5 ms


class Outcome(IntEnum):
    """What became of a piece."""

    OK = 0
    STALE = 1  # the slot is no longer what was granted, or the work was told to stop
    CORRUPT = 2  # current, but the checksums do not match


@dataclass(frozen=True, slots=True)
class Slot:
    """A granted slot: where it is and what it holds. `root` is 0 while the block is filling;
    `permit` proves the grant where the bytes go through the hub.
    """

    offset: int
    generation: int
    tokens: int
    root: int = 0
    permit: bytes = b""


@dataclass(frozen=True, slots=True)
class Piece:
    """Layers [start, stop) of the region (counted from its first layer) of block `index`."""

    index: int
    start: int
    stop: int


class Copier:
    """A pool of copy threads. Belongs to one client; `close` waits for what runs."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvclient-copy")
        self._threads = threads

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def run(
        self, task: Callable[[Piece], None], pieces: Sequence[list[Piece]], *, here: bool = False
    ) -> None:
        """Run `task` for every piece, each list in one thread. When cancelled, tell it to stop
        and return only after the last copy has ended. With `here` the loop's own thread does the
        last list, while the others run: it stands still for that long, and spares two wake-ups.
        """
        *pieces, own = (*pieces, []) if not here else pieces
        failure: Exception | None = None
        stop = threading.Event()
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        running = itertools.count(1 - len(pieces))  # the last one to end is given 0

        def work(part: list[Piece]) -> None:
            for piece in part:
                if stop.is_set():
                    return
                task(piece)

        def one_ended(_: Future[None]) -> None:
            if next(running) == 0:
                loop.call_soon_threadsafe(ended.set)  # one wake-up of the loop for all

        futures: list[Future[None]] = []
        try:
            futures.extend(self._pool.submit(work, part) for part in pieces)
        except RuntimeError as error:  # the pool is shut down
            stop.set()
            raise Unavailable("the client is closed") from error
        for future in futures:
            future.add_done_callback(one_ended)
        try:
            work(own)
        except Exception as error:
            failure = error
        if not futures:
            ended.set()
        try:
            await ended.wait()
        except asyncio.CancelledError:
            stop.set()
            for future in futures:
                future.cancel()
            while not ended.is_set():
                with suppress(asyncio.CancelledError):
                    await ended.wait()
            raise
        for future in futures:
            if future.cancelled():
                raise Unavailable("the client is closed")
            future.result()
        if failure is not None:
            raise failure

    def split(self, layers: int, layer_bytes: int, indices: Sequence[int]) -> list[list[Piece]]:
        """Tasks for these blocks: big blocks are cut between layers, small ones are gathered."""
        total = layers * layer_bytes * len(indices)
        target = min(TASK_BYTES, max(TASK_BYTES_MIN, -(-total // self._threads)))
        step = min(layers, max(1, target // max(layer_bytes, 1)))
        cuts = [*range(0, layers, step), layers]
        tasks: list[list[Piece]] = [[]]
        filled = 0
        for index in indices:
            for start, stop in pairwise(cuts):
                if filled >= target:
                    tasks.append([])
                    filled = 0
                tasks[-1].append(Piece(index, start, stop))
                filled += (stop - start) * layer_bytes
        return tasks if tasks[0] else []


# ---- views -----------------------------------------------------------------------------------


def cells_of(slot: Bytes, grid: Grid, tokens: int, region: Region) -> Bytes:
    """[layers, heads, cell bytes] of the region, a view of a slot's payload."""
    cell = grid.cell_bytes(tokens)
    payload = slot[: grid.cells * cell].reshape(grid.layers, grid.heads, cell)
    return payload[region.layer_start : region.layer_stop, region.head_start : region.head_stop]


def _rows(cells: Bytes, other: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Both arrays [layers, heads, bytes] as matching [rows, bytes]; one when both are dense."""
    if _dense(cells) and _dense(other):
        shape = (cells.shape[0] * cells.shape[1], cells.shape[2])
        yield _flat(cells, shape), _flat(other, shape)
    else:
        yield from zip(cells, other, strict=True)


def _dense(cells: Bytes) -> bool:
    """Whether layers and heads can be walked as one axis."""
    return bool(cells.shape[0] == 1 or cells.strides[0] == cells.shape[1] * cells.strides[1])


def _flat(cells: Bytes, shape: tuple[int, int]) -> Bytes:
    flat: Bytes = np.lib.stride_tricks.as_strided(
        cells, shape, (cells.strides[1], cells.strides[2]), writeable=cells.flags.writeable
    )
    return flat


def copy_cells(target: Bytes, source: Bytes, sums: Checksums, go_on: Callable[[], bool]) -> bool:
    """Copy cells [layers, heads, bytes] and hash them where they arrive, into `sums` [layers *
    heads]. `go_on` is asked before each chunk; False when it said no.
    """
    at = 0
    for into, rows in _rows(target, source):
        if not _copy_hashed(into, rows, sums[at : at + len(into)], go_on):
            return False
        at += len(into)
    return True


def _copy_hashed(target: Bytes, source: Bytes, sums: Checksums, go_on: Callable[[], bool]) -> bool:
    """Copy rows and hash them into `sums`, one per row, chunk by chunk; False when `go_on` said
    no.
    """
    row_bytes = target.shape[1]
    if row_bytes > CHUNK_BYTES:
        return _copy_long_rows(target, source, sums, go_on)
    step = max(1, CHUNK_BYTES // row_bytes)
    return copy_rows(target, source, sums, stream=True, portion=step, go_on=go_on)


def _copy_long_rows(
    target: Bytes, source: Bytes, sums: Checksums, go_on: Callable[[], bool]
) -> bool:
    """The same for rows of several chunks, hashed as a stream."""
    for row in range(len(target)):
        state = xxhash.xxh3_64()
        for start in range(0, target.shape[1], CHUNK_BYTES):
            if not go_on():
                return False
            part = slice(start, start + CHUNK_BYTES)
            np.copyto(target[row, part], source[row, part])
            state.update(target[row, part].data)
        sums[row] = state.intdigest()
    return True


# ---- writing ---------------------------------------------------------------------------------


class Writing:
    """What goes into granted slots: `sources`, one [layers, heads, >= cell bytes] a block, or what
    is Scattered in registered memory (a `direct` Transfer takes that). Without sources, what
    stands in the slots is only hashed (an Arena can do that).

    `hold` is the reservation, `granted` its region. `sums[i]` are block i's checksums in
    layer-major order once it was moved; `stale[i]` says that its slot was lost on the way.
    """

    def __init__(
        self,
        grid: Grid,
        region: Region,
        slots: Sequence[Slot],
        sources: Sequence[Block] | None,
        *,
        hold: int = 0,
        granted: Region | None = None,
    ) -> None:
        self.grid = grid
        self.region = region
        self.slots = slots
        self.sources = sources
        self.hold = hold
        self.granted = granted or region
        self.sums: Checksums = np.zeros((len(slots), region.layers, region.heads), np.uint64)
        self.stale = np.zeros(len(slots), np.bool_)
        self.drained = True  # False: a hub may still write these slots on our behalf

    def source(self, index: int) -> Bytes:
        """Of a block that is an array."""
        assert self.sources is not None
        return as_array(self.sources[index])


def write_piece(arena: Arena, work: Writing, piece: Piece) -> None:
    """Copy and hash one piece of a Writing in a mapped arena."""
    try:
        done = _write(arena, work, piece)
    except KVError:  # the arena was closed under us: its session is lost
        done = False
    if not done:
        work.stale[piece.index] = True


def _write(arena: Arena, work: Writing, piece: Piece) -> bool:
    slot, grid = work.slots[piece.index], work.grid
    length = grid.payload_bytes(slot.tokens)
    sums = work.sums[piece.index, piece.start : piece.stop]

    def ours() -> bool:
        return arena.current(slot.offset, slot.generation)

    if work.sources is None:
        whole = arena.reading(slot.offset, length)
        cells = cells_of(whole, grid, slot.tokens, work.region)
        sums[:] = grid_checksums(cells[piece.start : piece.stop]).reshape(sums.shape)
        return ours()
    whole = arena.writing(slot.offset, length)
    target = cells_of(whole, grid, slot.tokens, work.region)[piece.start : piece.stop]
    source = work.source(piece.index)[piece.start : piece.stop, :, : target.shape[2]]
    return copy_cells(target, source, sums.reshape(-1), ours)


def write_whole(arena: Arena, grid: Grid, slot: Slot, source: Bytes) -> Checksums | None:
    """All of a full block whose cells stand one behind the other. The checksums; None when the
    slot was lost.
    """
    rows = (grid.cells, grid.cell_bytes())
    sums: Checksums = np.empty(grid.cells, np.uint64)
    try:
        target = arena.writing(slot.offset, source.nbytes).reshape(rows)
        done = _copy_hashed(
            target, source.reshape(rows), sums, partial(arena.current, slot.offset, slot.generation)
        )
    except KVError:  # the arena was closed under us: its session is lost
        return None
    return sums if done else None


# ---- reading ---------------------------------------------------------------------------------


class Reading:
    """What is read of granted slots into `targets` (one [layers, heads, >= cell bytes] a block;
    rows contiguous; or Scattered, as in Writing), every byte checked. Without targets, what stands
    in the slots is only checked (an Arena can do that).

    `hold` is the lease. `outcomes[i]` is valid once all of block i was moved.
    """

    def __init__(
        self,
        grid: Grid,
        region: Region,
        slots: Sequence[Slot],
        targets: Sequence[Block] | None,
        *,
        hold: int = 0,
        granted: Region | None = None,
    ) -> None:
        self.grid = grid
        self.region = region
        self.slots = slots
        self.targets = targets
        self.hold = hold
        self.granted = granted or region
        self.outcomes = np.zeros(len(slots), np.uint8)

    def target(self, index: int) -> Bytes:
        """Of a block that is an array."""
        assert self.targets is not None
        return as_array(self.targets[index])

    def matches(self, index: int, start: int, stop: int, sums: Checksums, trailer: Bytes) -> bool:
        """Whether the checksums of layers [start, stop) of the region, and the root of block
        `index`, are those of the slot's `trailer` (its bytes, all cells).
        """
        slot, grid, region = self.slots[index], self.grid, self.region
        wanted = trailer.view("<u8").reshape(grid.layers, grid.heads)[
            region.layer_start + start : region.layer_start + stop,
            region.head_start : region.head_stop,
        ]
        good = bool(np.array_equal(sums, wanted.reshape(-1)))
        return good and (not slot.root or root_of(trailer) == slot.root)


def read_piece(arena: Arena, work: Reading, piece: Piece) -> None:
    """Copy and check one piece of a Reading in a mapped arena."""
    try:
        outcome = _read(arena, work, piece)
    except KVError:
        outcome = Outcome.STALE
    if outcome is not Outcome.OK:
        work.outcomes[piece.index] = outcome


def _read(arena: Arena, work: Reading, piece: Piece) -> Outcome:
    slot, grid = work.slots[piece.index], work.grid

    def current() -> bool:
        return arena.current(slot.offset, slot.generation)

    if not current():
        return Outcome.STALE
    payload = grid.payload_bytes(slot.tokens)
    whole = arena.reading(slot.offset, payload + grid.trailer_bytes)
    cells = cells_of(whole, grid, slot.tokens, work.region)[piece.start : piece.stop]
    if work.targets is None:
        sums = grid_checksums(cells)
    else:
        target = work.target(piece.index)[piece.start : piece.stop, :, : cells.shape[2]]
        sums = np.zeros(cells.shape[0] * cells.shape[1], np.uint64)
        if not copy_cells(target, cells, sums, current):
            return Outcome.STALE
    good = work.matches(piece.index, piece.start, piece.stop, sums, whole[payload:])
    if not current():
        return Outcome.STALE
    return Outcome.OK if good else Outcome.CORRUPT


def read_whole(arena: Arena, grid: Grid, slot: Slot, target: Bytes) -> Outcome:
    """All of a full block into a target whose cells stand one behind the other."""
    rows = (grid.cells, grid.cell_bytes())
    sums: Checksums = np.empty(grid.cells, np.uint64)
    current = partial(arena.current, slot.offset, slot.generation)
    try:
        whole = arena.reading(slot.offset, target.nbytes + grid.trailer_bytes)
        source, trailer = whole[: target.nbytes].reshape(rows), whole[target.nbytes :]
        if not _copy_hashed(target.reshape(rows), source, sums, current):
            return Outcome.STALE
        good = sums.astype("<u8", copy=False).tobytes() == trailer.tobytes()
        good = good and root_of(trailer) == slot.root
        if not current():
            return Outcome.STALE
    except KVError:
        return Outcome.STALE
    return Outcome.OK if good else Outcome.CORRUPT


# ---- both ------------------------------------------------------------------------------------


class Mapped:
    """`put` and `get` of an Arena: this process copies, in the copy threads and, where that is
    little, in the loop's.
    """

    @property
    def mapped(self) -> Literal[True]:
        return True

    @property
    def direct(self) -> bool:
        return False

    async def attach(self, deadline: Deadline) -> None:
        """Nothing is registered here."""

    async def put(self: Arena, work: Writing, copier: Copier) -> None:
        await _run(partial(write_piece, self, work), work, copier)

    async def get(self: Arena, work: Reading, copier: Copier) -> None:
        await _run(partial(read_piece, self, work), work, copier)


async def _run(task: Callable[[Piece], None], work: Writing | Reading, copier: Copier) -> None:
    count, layers = len(work.slots), work.region.layers
    tokens = max((slot.tokens for slot in work.slots), default=work.grid.block_tokens)
    layer_bytes = work.region.heads * work.grid.cell_bytes(tokens)
    small = count * layers * layer_bytes <= HERE_BYTES_MAX
    pieces = copier.split(layers, layer_bytes, range(count))
    await copier.run(task, pieces, here=small and bool(pieces))


def check_blocks(transfer: Transfer, blocks: Sequence[Block]) -> None:
    """Unsupported for Scattered blocks where only arrays can be moved."""
    if not transfer.direct and any(isinstance(block, Scattered) for block in blocks):
        raise Unsupported(
            f"pages in registered memory move by nixl with direct=True, not by {transfer.transport}"
        )


def as_array(block: Block) -> Bytes:
    """Of blocks that `check_blocks` has let through."""
    assert not isinstance(block, Scattered)
    return block


def as_arena(transfer: Transfer) -> Arena | None:
    """The same, when this process maps the hub's memory."""
    return cast("Arena", transfer) if transfer.mapped else None
