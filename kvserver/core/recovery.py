"""After a restart: blocks and quarantined slots that were found in a tier become the books.

Theory of operation. What was found is collected, then laid out when RestoreDone says that it was
all. Slots of one class at congruent offsets form a slab, the gaps between slabs become free runs.
Where two records overlap, the later one (by generation) stands; slots that a client may still
write stand before everything.

Invariant: every record that is not restored is answered with EntryInvalid and counted, so that it
is not found again; except where a restored slot begins at the same offset.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvproto.errors import FieldError
from kvproto.prefix import HASH_BYTES, ROOT
from kvserver.core.blocks import ABSENT, ANNOUNCED, Action, bit
from kvserver.core.books import HOST, Books
from kvserver.core.errors import CoreError
from kvserver.core.events import (
    Place,
    RestoreBlocks,
    RestoredBlock,
    RestoreDone,
    RestoreNamespace,
    RestoreQuarantined,
    Tier,
)
from kvserver.core.instructions import EntryInvalid
from kvserver.core.quarantine import RESTORED
from kvserver.core.sessions import Sessions
from kvserver.core.slabs import SLOT_UNIT
from kvserver.core.slots import SlotAction, SlotTable
from kvserver.core.tails import Tails


@dataclass(slots=True)
class _Found:
    """An extent of a tier: a block, or None for one that `clients` may still write."""

    offset: int
    slot_bytes: int
    generation: int
    block: RestoredBlock | None
    clients: set[int] = field(default_factory=set)
    handle: int = 0

    @property
    def stop(self) -> int:
        return self.offset + self.slot_bytes


class Recovery:
    def __init__(self, books: Books, sessions: Sessions, tails: Tails) -> None:
        self._books = books
        self._tails = tails
        self._sessions = sessions
        self._blocks: dict[Tier, list[RestoredBlock]] = {tier: [] for tier in Tier}
        self._fenced: list[RestoreQuarantined] = []

    def namespace(self, event: RestoreNamespace) -> None:
        """One that today's tiers or limits cannot take stays unknown; its blocks are dropped."""
        try:
            self._sessions.add_namespace(event.spec)
        except CoreError:
            self._books.counters["restore_namespaces_dropped"] += 1

    def blocks(self, event: RestoreBlocks) -> None:
        self._blocks[event.tier].extend(event.blocks)

    def quarantined(self, event: RestoreQuarantined) -> None:
        self._fenced.append(event)

    def done(self, event: RestoreDone) -> None:
        tier, table = event.tier, self._books.slots[event.tier]
        found, self._blocks[tier] = self._blocks[tier], []
        fenced: list[RestoreQuarantined] = []
        if tier == HOST:
            fenced, self._fenced = self._fenced, []
        generations = [block.generation for block in found]
        generations += [extent.generation for extent in fenced]
        table.generation_last = max(table.generation_last, event.generation, *generations)
        kept = self._merge_fenced(table, fenced)
        dropped: list[_Found] = []
        for block in self._distinct(found, dropped):
            item = _Found(block.offset, block.slot_bytes, block.generation, block)
            item.handle = self._handle_of(table, block)
            (kept if item.handle else dropped).append(item)
        kept = _without_overlaps(kept, dropped)
        self._lay(tier, kept)
        self._drop(table, kept, dropped)

    # ---- what to keep

    def _merge_fenced(self, table: SlotTable, fenced: list[RestoreQuarantined]) -> list[_Found]:
        """Extents that clients may write; overlapping ones become one."""
        merged: list[_Found] = []
        for event in sorted(fenced, key=lambda event: event.offset):
            stop = event.offset + event.slot_bytes
            fits = not event.offset % SLOT_UNIT and not event.slot_bytes % SLOT_UNIT
            if not fits or event.offset < 0 or not event.slot_bytes or stop > table.map.total:
                self._books.counters["restore_dropped"] += 1
                continue
            if not event.clients:
                generation = table.generation_last = table.generation_last + 1
                place = Place(HOST, event.offset, event.slot_bytes, generation)
                self._books.out.append(EntryInvalid(place))
                continue
            item = _Found(
                event.offset, event.slot_bytes, event.generation, None, set(event.clients)
            )
            if merged and merged[-1].stop > item.offset:
                before = merged[-1]
                before.slot_bytes = max(before.stop, item.stop) - before.offset
                before.generation = max(before.generation, item.generation)
                before.clients |= item.clients
            else:
                merged.append(item)
        self._books.counters["restore_quarantined"] += len(merged)
        return merged

    def _distinct(self, found: list[RestoredBlock], dropped: list[_Found]) -> list[RestoredBlock]:
        """One record per block: the one with the largest generation."""
        latest: dict[tuple[bytes, bytes], RestoredBlock] = {}
        for block in found:
            name = (block.tag, block.key)
            other = latest.get(name)
            if other is not None:
                older = min(other, block, key=lambda b: b.generation)
                dropped.append(_Found(older.offset, older.slot_bytes, older.generation, older))
                block = other if older is block else block
            latest[name] = block
        return list(latest.values())

    def _handle_of(self, table: SlotTable, block: RestoredBlock) -> int:
        """The block's namespace if the record can be right, else 0."""
        handle = self._sessions.by_tag.get(block.tag, 0)
        if not handle or block.offset < 0 or block.offset % SLOT_UNIT:
            return 0
        if block.offset + block.slot_bytes > table.map.total:
            return 0
        keys = len(block.key) == len(block.parent) == HASH_BYTES
        if not keys or block.key in (ROOT, block.parent):
            return 0
        try:
            fits = self._books.namespaces[handle].slot_bytes(block.tokens) == block.slot_bytes
        except FieldError:
            return 0
        books = self._books
        row = books.blocks.find(handle, block.key)
        state = books.blocks.state[row]
        if not fits or (
            row
            and state not in (ABSENT, ANNOUNCED)
            and (books.blocks.tokens[row] != block.tokens or books.blocks.slot[table.tier][row])
        ):
            return 0
        return handle

    # ---- laying out

    def _lay(self, tier: Tier, kept: list[_Found]) -> None:
        table = self._books.slots[tier]
        start = 0
        placed: list[tuple[_Found, int]] = []
        while start < len(kept):
            first, stop = kept[start], start + 1
            limit = first.offset + table.map.slab_bytes(first.slot_bytes)
            while stop < len(kept) and _continues(first, kept[stop], limit):
                stop += 1
            count = (kept[stop - 1].stop - first.offset) // first.slot_bytes
            table.map.occupy(first.offset, kept[stop - 1].stop)
            slab = table.lay(first.offset, first.slot_bytes, count)
            for item in kept[start:stop]:
                slot = slab.slots[(item.offset - first.offset) // first.slot_bytes]
                placed.append((item, slot))
                action = SlotAction.RESTORE if item.block else SlotAction.SUSPECT
                table.move(slot, action)
                table.generation[slot] = item.generation
            table.settle(slab)
            start = stop
        name = "restored_host" if tier == HOST else "restored_disk"
        self._books.counters[name] += sum(item.block is not None for item in kept)
        for item, slot in placed:
            if item.block is not None:
                self._adopt(tier, item.handle, item.block, slot)
            for client in item.clients:
                self._books.quarantine.hold(slot, RESTORED, client)
        # Oldest first, and only now: whether a block is a leaf is known when all are there.
        placed.sort(key=lambda pair: pair[0].generation)
        for _, slot in placed:
            self._books.offer(tier, slot)

    def _adopt(self, tier: Tier, handle: int, block: RestoredBlock, slot: int) -> None:
        books, blocks = self._books, self._books.blocks
        row = blocks.obtain(handle, block.key)
        if blocks.state[row] in (ABSENT, ANNOUNCED):
            blocks.move(row, Action.RESTORE)
            blocks.tokens[row] = block.tokens
            blocks.adopt(row, blocks.obtain(handle, block.parent))
            books.namespaces[handle].blocks += 1
        books.attach(row, tier, slot)
        blocks.resident[row] |= bit(tier)
        books.namespaces[handle].bytes += block.slot_bytes
        if tier == HOST:
            blocks.suspect[row] |= bit(HOST)
            self._tails.begin(row)
            self._tails.complete(row)

    def _drop(self, table: SlotTable, kept: list[_Found], dropped: list[_Found]) -> None:
        taken = {item.offset for item in kept}
        for item in dropped:
            self._books.counters["restore_dropped"] += 1
            if item.offset not in taken:
                table.generation_last += 1
                place = Place(table.tier, item.offset, item.slot_bytes, table.generation_last)
                self._books.out.append(EntryInvalid(place))


def _continues(first: _Found, item: _Found, limit: int) -> bool:
    """The item stands in the slab that `first` begins."""
    same = item.slot_bytes == first.slot_bytes
    return same and item.stop <= limit and not (item.offset - first.offset) % first.slot_bytes


def _without_overlaps(items: list[_Found], dropped: list[_Found]) -> list[_Found]:
    """By offset; of two that overlap the fenced one stands, else the later one."""
    kept: list[_Found] = []
    for item in sorted(items, key=lambda item: (item.offset, item.generation)):
        while kept and kept[-1].stop > item.offset and _stands_before(item, kept[-1]):
            dropped.append(kept.pop())
        if kept and kept[-1].stop > item.offset:
            dropped.append(item)
        else:
            kept.append(item)
    return kept


def _stands_before(item: _Found, other: _Found) -> bool:
    if other.block is None:
        return False
    return item.block is None or item.generation > other.generation
