"""The arena as a data worker sees it: slots found by a permit's place, cut into rows.

Rule 1: the map is this process's own; what stands in it is checked against the arena's directory
before a byte of a slot is touched, whatever a permit says.
Rule 2: nothing here writes the header, the table or a trailer: those are the server's.
"""

from __future__ import annotations

import contextlib
import mmap
import time

import numpy as np

from kvproto.arena import ENTRY_BYTES, RESERVED, STATE_SHIFT, STATE_WORD, UNIT, ArenaReader
from kvproto.checksum import cell_checksums
from kvproto.frames import Place
from kvproto.grid import Region
from kvproto.wires import Arrival, Guard
from kvserver.tiers import syscalls
from kvserver.tiers.entry import EntryTable, ReservedEntry, ValidEntry

MAP_BYTES = 2 << 20  # mapped in at once
VIEWS_MAX = 256  # extents of one system call
_ENTRY_TRIES = 3  # an entry that is being rewritten reads as damaged for a moment
_ENTRY_PAUSE_S = 1e-4


class Slots:
    """A writable map of the arena file behind `fd`, which the caller closes."""

    def __init__(self, fd: int, file_bytes: int, *, arena_id: bytes, epoch: int) -> None:
        # Views keep the map alive; it goes with the last of them.
        file = np.frombuffer(mmap.mmap(fd, file_bytes), np.uint8)
        self._reader = ArenaReader(file)
        self._unmapped = set(range(-(-self._reader.data.size // MAP_BYTES)))
        head = self._reader.header
        assert head.arena_id == arena_id, "this is another arena"
        self.arena_id = arena_id
        self.epoch = epoch
        self.data = self._reader.data.data
        table = file[head.table_offset :][: head.data_bytes // UNIT * ENTRY_BYTES]
        self._entries = EntryTable(table)

    def within(self, place: Place) -> bool:
        """Whether the whole slot lies in the data, at the start of a unit."""
        size = place.payload_bytes + place.trailer_bytes
        return place.offset % UNIT == 0 and place.offset + size <= len(self.data)

    def current(self, place: Place) -> bool:
        """Whether the slot still is what was granted."""
        return self._reader.current(place.offset, place.generation, self.epoch)

    def may_write(self, place: Place, client: int) -> bool:
        """Whether the directory says so: reserved, of this generation, for this client."""
        for _ in range(_ENTRY_TRIES):
            if not self.current(place):
                return False
            entry = self._entries.read(place.offset)
            if isinstance(entry, ReservedEntry):
                size = place.payload_bytes + place.trailer_bytes
                return (
                    entry.generation == place.generation
                    and client in entry.clients
                    and size <= entry.slot_bytes
                )
            if isinstance(entry, ValidEntry):
                return False
            time.sleep(_ENTRY_PAUSE_S)
        return False

    def reserved(self, place: Place) -> bool:
        """Whether the slot still is what was granted, and still being written: a look at two words,
        for who was told by the hub that it `may_write`."""
        state = int(self._entries.words[place.offset // UNIT][STATE_WORD])
        return self.current(place) and state >> STATE_SHIFT & 0xFF == RESERVED

    def map_in(self, place: Place) -> None:
        """Enter the slot's pages into this process's page table, all at once: done by faults, page
        by page, it costs as much as the copy. The server's memory behind them is there already.
        """
        first = place.offset // MAP_BYTES
        last = (place.offset + place.payload_bytes + place.trailer_bytes - 1) // MAP_BYTES
        for part in range(first, last + 1):
            if part in self._unmapped:
                self._unmapped.discard(part)
                whole = self._reader.data[part * MAP_BYTES : (part + 1) * MAP_BYTES]
                with contextlib.suppress(OSError):  # an old kernel: then by faults
                    syscalls.madvise(whole, syscalls.MADV_POPULATE_WRITE)

    def arrival(self, place: Place, region: Region) -> Arrival:
        """The region's cells of a slot, for `kvproto.wires`, as long as the slot is `current`."""
        whole = self._reader.data[place.offset : place.offset + place.payload_bytes]
        cells = whole.reshape(place.layers, place.heads, place.cell_bytes)
        layers = slice(region.layer_start, region.layer_stop)
        heads = slice(region.head_start, region.head_stop)
        generation, epoch = self._reader.words(place.offset)
        return Arrival(cells[layers, heads], Guard(generation, place.generation, epoch, self.epoch))

    def trailer(self, place: Place) -> memoryview:
        start = place.offset + place.payload_bytes
        return self.data[start : start + place.trailer_bytes]

    def rows(self, place: Place, region: Region) -> Rows:
        return Rows(self.data, place, region)


class Rows:
    """A region's cells in a slot, as the bytes that travel: position 0 is the first cell's first.

    Rows of cells that lie beside each other are one extent; a region of all heads is one row.
    """

    def __init__(self, data: memoryview, place: Place, region: Region) -> None:
        self._data = data
        self._cell = place.cell_bytes
        self._stride = place.heads * place.cell_bytes
        first = region.layer_start * place.heads + region.head_start
        self._start = place.offset + first * place.cell_bytes
        whole = region.heads == place.heads
        self._row_cells = region.cells if whole else region.heads
        self._row = self._row_cells * place.cell_bytes
        self.cells = region.cells
        self.nbytes = region.cells * place.cell_bytes

    def views(self, position: int, limit: int) -> list[memoryview]:
        """The extents from `position` on: at most `limit` bytes and VIEWS_MAX of them."""
        views: list[memoryview] = []
        end = min(self.nbytes, position + limit)
        while position < end and len(views) < VIEWS_MAX:
            row, within = divmod(position, self._row)
            count = min(self._row - within, end - position)
            at = self._start + row * self._stride + within
            views.append(self._data[at : at + count])
            position += count
        return views

    def checksums(self, start: int, stop: int) -> list[int]:
        """Of the cells from number `start` to `stop`, in layer-major order, as they stand."""
        data, cell, sums = self._data, self._cell, list[int]()
        for row in range(start // self._row_cells, -(-stop // self._row_cells)):
            first = row * self._row_cells
            at = self._start + row * self._stride - first * cell
            begin, end = max(start, first), min(stop, first + self._row_cells)
            cells = np.frombuffer(data[at + begin * cell : at + end * cell], np.uint8)
            sums += cell_checksums(cells, cell).tolist()
        return sums
