"""Under which name a slot is filled: given with the Reserve, or with the Commit.

A writer of small blocks reserves ahead, under keys that nobody else knows (32 random bytes), fills
a slot when it has something to write, and says with the Commit which block that is: then a push is
one call. Until then such a block is like any other, with its expiry, quarantine and fences.

Rule 1: a name can be given to a block of one writer, while no cell of it is committed. Its slot,
        its writer and its time go with it; the row of the old name leaves.
Rule 2: a name under which others fill or hold a block is taken: nothing is changed, and the writer
        has its slot as before.
"""

from __future__ import annotations

from kvserver.core.blocks import ABSENT, ANNOUNCED, Action, Filling
from kvserver.core.books import HOST, Books
from kvserver.core.holds import Holds
from kvserver.core.tails import Tails


class Naming:
    def __init__(self, books: Books, holds: Holds, tails: Tails) -> None:
        self._books = books
        self._holds = holds
        self._tails = tails

    def begin(
        self, handle: int, key: bytes, parent: bytes, *, tokens: int, slot: int, durable: bool
    ) -> Filling:
        """A block that is ABSENT or ANNOUNCED is filled in this slot from now on."""
        row = self._enter(handle, key, parent, tokens, slot)
        filling = self._books.blocks.fillings[row] = Filling(row, slot)
        filling.durable = durable
        if not durable:
            self._tails.begin(row)
        return filling

    def name(self, filling: Filling, key: bytes, parent: bytes) -> bool:
        """Give the block this name; False when that is taken."""
        books, blocks, old = self._books, self._books.blocks, filling.row
        handle, tokens = blocks.namespace[old], blocks.tokens[old]
        row = blocks.find(handle, key)
        if row and blocks.state[row] not in (ABSENT, ANNOUNCED):
            return False
        del blocks.fillings[old]
        self._tails.forget(old)
        slot = books.give_over(old, HOST)
        books.wake(old)
        blocks.move(old, Action.NAME)
        blocks.release(old)
        filling.row = self._enter(handle, key, parent, tokens, slot)
        blocks.fillings[filling.row] = filling
        if not filling.durable:
            self._tails.begin(filling.row)
        return True

    def _enter(self, handle: int, key: bytes, parent: bytes, tokens: int, slot: int) -> int:
        books, blocks = self._books, self._books.blocks
        row = blocks.obtain(handle, key)
        self._holds.arrive(row)
        blocks.move(row, Action.RESERVE)
        blocks.adopt(row, blocks.obtain(handle, parent))
        blocks.tokens[row] = tokens
        blocks.stamp[row] = books.stamp
        books.attach(row, HOST, slot)
        return row
