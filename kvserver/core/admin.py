"""The operator's side: evicting blocks, dropping a namespace, draining; and tiers that come and go.

These walk all blocks of a namespace: the only requests whose cost is not that of their answer.
"""

from __future__ import annotations

from collections import OrderedDict

from kvproto.namespace import NamespaceSpec
from kvserver.core.blocks import ABSENT, ANNOUNCED, COMPLETE, Action, bit
from kvserver.core.books import DEVICE, DISK, HOST, Books
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import DropNamespace, Evict, Tier, TierDown, TierGrew, TierUp
from kvserver.core.holds import Holds
from kvserver.core.instructions import Evicted
from kvserver.core.sessions import Sessions
from kvserver.core.slots import COMMITTED
from kvserver.core.spills import Spill, Spills

_DROPPED_MAX = 1024


class Admin:
    def __init__(self, books: Books, holds: Holds, sessions: Sessions, spills: Spills) -> None:
        self._books = books
        self._holds = holds
        self._sessions = sessions
        self._spills = spills
        self.draining = False
        self._drains: list[int] = []
        self.dropped: OrderedDict[int, NamespaceSpec] = OrderedDict()  # jobs may still name them

    def evict(self, event: Evict) -> Evicted:
        blocks, handle = self._books.blocks, self._handle_of(event.namespace_id)
        index = blocks.index[handle]
        rows = [index.get(key, 0) for key in event.hashes] if event.hashes else list(index.values())
        count = size = in_use = 0
        for row in dict.fromkeys(rows):
            if not row or blocks.state[row] != COMPLETE:
                continue
            if self._in_use(row):
                in_use += 1
                continue
            count += 1
            size += self._bytes_of(row)
            self._books.leave(row, Action.DROP)
        return Evicted(count, size, in_use)

    def drop_namespace(self, event: DropNamespace) -> Evicted:
        books, blocks = self._books, self._books.blocks
        handle = self._handle_of(event.namespace_id)
        self._sessions.leave_requests(handle)
        count = size = 0
        for row in list(blocks.index[handle].values()):
            state = blocks.state[row]
            if state == ABSENT:
                continue
            if state == ANNOUNCED:
                self._holds.arrive(row)
            else:
                count += state == COMPLETE
                size += self._bytes_of(row)
            books.leave(row, Action.DROP)
        self.dropped[handle] = books.namespaces[handle].spec
        if len(self.dropped) > _DROPPED_MAX:
            self.dropped.popitem(last=False)
        self._sessions.forget_namespace(handle)
        return Evicted(count, size)

    def _handle_of(self, namespace_id: bytes) -> int:
        handle = self._sessions.handle_of(namespace_id)
        if handle is None:
            raise CoreError(ErrorKind.NOT_FOUND, "no such namespace", field="namespace_id")
        return handle

    def _bytes_of(self, row: int) -> int:
        slots = ((tier, self._books.blocks.slot[tier][row]) for tier in Tier)
        return sum(self._books.slots[tier].bytes_of(slot) for tier, slot in slots if slot)

    def _in_use(self, row: int) -> bool:
        """Someone other than the write-behind needs the block's bytes."""
        blocks, slots = self._books.blocks, self._books.slots
        running = blocks.spill[row] == Spill.RUNNING
        own = {DEVICE: 0, HOST: (blocks.spill[row] > 0) + running, DISK: int(running)}
        return any(slots[tier].pins[blocks.slot[tier][row]] > own[tier] for tier in Tier)

    # ---- drain

    def drain(self, ticket: int) -> None:
        """No new reservations; answered when the write-behind is empty."""
        self.draining = True
        self._drains.append(ticket)

    def settle(self) -> None:
        if self._drains and self._spills.idle:
            for ticket in self._drains:
                self._books.answer(ticket)
            self._drains = []

    # ---- tiers

    def tier_grew(self, event: TierGrew) -> None:
        self._books.slots[event.tier].grow(event.bytes_ready)
        self._books.room = True

    def tier_down(self, event: TierDown) -> None:
        table = self._books.slots[event.tier]
        table.up, table.note = False, event.reason
        self._books.up_bits &= ~bit(event.tier)
        if event.tier == DISK:
            self._spills.fail_all()
        elif event.tier == DEVICE:
            self._lose_device()

    def _lose_device(self) -> None:
        """What a device held is gone for good; what is on its way there, its JobDone ends."""
        table = self._books.slots[DEVICE]
        for slot in range(1, table.length):
            if table.state[slot] == COMMITTED:
                self._books.lose(table.row[slot], DEVICE)

    def tier_up(self, event: TierUp) -> None:
        table = self._books.slots[event.tier]
        table.up, table.note = True, ""
        self._books.up_bits |= bit(event.tier)
        self._books.room = True
