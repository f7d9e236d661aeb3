"""On which tiers blocks are, told to whoever watches.

Theory of operation. A Moved says what holds at the end of an event, not what happened in it: where
a block is whole now, nowhere if it left. So telling something twice does no harm, and a watcher
that has heard `walk` from the first row to the last, and every Moved since before it began, knows
the table: a block is either found by the walk, or was told when it came.

Rule 1: while nobody watches nothing is noted; it costs one comparison a change.
Rule 2: a Moved is of one namespace. Of one that is forgotten nothing else is told in that event.
Rule 3: an event that moves more than `moved_max` blocks is told as MovedTooMuch: every watcher
        starts again. So what is noted is bounded, whatever an operator evicts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT
from kvserver.core.blocks import COMPLETE
from kvserver.core.books import Books
from kvserver.core.events import Watch
from kvserver.core.instructions import Moved, MovedTooMuch, Residence, TiersUp


class Residences:
    def __init__(self, books: Books) -> None:
        self._books = books
        self._up_bits = books.up_bits

    def watch(self, event: Watch) -> None:
        """Begin or end to tell."""
        books = self._books
        books.moved = {} if event.on else None
        books.forgotten.clear()
        self._up_bits = books.up_bits

    def settle(self) -> None:
        """The event is over: tell what it moved."""
        books = self._books
        if books.moved is None:
            return
        if books.up_bits != self._up_bits:
            self._up_bits = books.up_bits
            books.out.append(TiersUp(books.up_bits))
        if books.forgotten:
            books.out.extend(Moved(spec, [], forgotten=True) for spec in books.forgotten)
            books.forgotten.clear()
        if len(books.moved) > books.config.moved_max:
            books.out.append(MovedTooMuch())
        elif books.moved:
            self._tell(list(books.moved))
        books.moved.clear()

    def _tell(self, moved: list[tuple[int, bytes]]) -> None:
        books = self._books
        told: dict[int, list[Residence]] = {}
        for handle, key in moved:
            if handle in books.namespaces:
                row = books.blocks.find(handle, key)
                told.setdefault(handle, []).append(self._residence(row, key))
        for handle, blocks in told.items():
            books.out.append(Moved(books.namespaces[handle].spec, blocks))

    def _residence(self, row: int, key: bytes) -> Residence:
        blocks = self._books.blocks
        tiers = blocks.resident[row] if row else 0
        if not tiers:
            return Residence(key, ROOT, 0, 0)
        return Residence(key, blocks.keys[blocks.parent[row]], blocks.tokens[row], tiers)

    def walk(
        self, start: int, rows: int, wanted: Callable[[NamespaceSpec], bool]
    ) -> tuple[list[Moved], int]:
        """What stands in `rows` rows from row `start` on, and where to go on; 0: at the end."""
        books, blocks = self._books, self._books.blocks
        stop = min(max(start, 1) + rows, blocks.length)
        start = min(max(start, 1), stop)
        handles = {handle for handle, one in books.namespaces.items() if wanted(one.spec)}
        found: dict[int, list[Residence]] = {}
        complete = np.flatnonzero(blocks.state_view[start:stop] == COMPLETE) + start
        for row in complete.tolist():
            handle = blocks.namespace[row]
            if handle in handles:
                found.setdefault(handle, []).append(self._residence(row, blocks.keys[row]))
        told = [Moved(books.namespaces[handle].spec, some) for handle, some in found.items()]
        return told, stop if stop < blocks.length else 0
