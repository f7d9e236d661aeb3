"""Tails: blocks of fewer tokens than a full one, the ends of prompts that are handed off.

A tail serves whoever asks for exactly its prompt, mostly once, and soon. So tails live short and
have a quota of their own, and whatever is pushed as tails drives out nothing but older tails.

Rule 1: host slots of tails take at most `tail_bytes` in all. Where a new one finds no room, the
        oldest complete ones that nobody reads make way; if that is not enough it gets no space.
Rule 2: a tail leaves `tail_ttl` after its last cell was committed; one that is being read then
        leaves when it is not.
Rule 3: a tail is not written to disk. One that a writer wants durable, or that has a copy on
        another tier, is a block like any other, and so is a durable one from its start.

Invariant: the books here name exactly the tails that have a host slot, but for those of rule 3.
"""

from __future__ import annotations

from collections import OrderedDict

from kvserver.core.blocks import COMPLETE, Action, bit
from kvserver.core.books import HOST, Books
from kvserver.core.timers import Kind

_AGAIN = 1.0
"""Seconds until a tail that was being read at its end is looked at again."""


class Tails:
    def __init__(self, books: Books) -> None:
        self._books = books
        self._bytes: OrderedDict[int, int] = OrderedDict()  # row -> slot bytes, oldest first
        self.bytes = 0
        books.host_left.append(self.forget)

    def make_room(self, slot_bytes: int) -> bool:
        """Whether the quota takes another tail of this size; older ones make way for it."""
        books, allowed = self._books, self._books.config.tail_bytes
        if slot_bytes > allowed:
            return False
        if self.bytes + slot_bytes > allowed:
            for row in [row for row in self._bytes if self._idle(row)]:
                books.counters["tails_displaced"] += 1
                books.leave(row, Action.LOSE)
                if self.bytes + slot_bytes <= allowed:
                    break
        return self.bytes + slot_bytes <= allowed

    def begin(self, row: int) -> None:
        """A block has taken a host slot."""
        blocks = self._books.blocks
        full = self._books.namespaces[blocks.namespace[row]].grid.block_tokens
        if blocks.tokens[row] < full:
            self._bytes[row] = self._books.host.bytes_of(blocks.slot[HOST][row])
            self.bytes += self._bytes[row]

    def complete(self, row: int) -> bool:
        """The last cell was committed: a tail's time runs. False when it is none of those here."""
        books = self._books
        if row not in self._bytes:
            return False
        books.timers.set(Kind.TAIL, row, books.now + books.config.tail_ttl)
        return True

    def expire(self, row: int) -> None:
        books = self._books
        if books.blocks.resident[row] != bit(HOST) or books.blocks.spill[row]:
            self.forget(row)
        elif self._idle(row):
            books.counters["tails_expired"] += 1
            books.leave(row, Action.LOSE)
        else:
            books.timers.set(Kind.TAIL, row, books.now + _AGAIN)

    def forget(self, row: int) -> None:
        """The block has no host slot any more, or is to be kept like any other."""
        size = self._bytes.pop(row, 0)
        if size:
            self.bytes -= size
            self._books.timers.cancel(Kind.TAIL, row)

    def check(self) -> list[str]:
        """What is wrong with the books, for validation."""
        blocks, host = self._books.blocks, self._books.host
        wrong = []
        for row, size in self._bytes.items():
            slot = blocks.slot[HOST][row]
            if not slot or host.bytes_of(slot) != size:
                wrong.append(f"row {row} counts as a tail and has no such slot")
            timed = self._books.timers.get(Kind.TAIL, row) is not None
            if timed != (blocks.state[row] == COMPLETE):
                wrong.append(f"tail {row} has a deadline or is complete, not both")
        if self.bytes != sum(self._bytes.values()):
            wrong.append("the bytes of the tails do not add up")
        if self._books.timers.count(Kind.TAIL) > len(self._bytes):
            wrong.append("a deadline of a tail that is gone")
        return wrong

    def _idle(self, row: int) -> bool:
        """Complete, on the host only, and nobody uses it."""
        books = self._books
        alone = books.blocks.resident[row] == bit(HOST)
        return alone and books.host.evictable(books.blocks.slot[HOST][row])
