"""Finding a slot: free ones, then room for a slab, then eviction, then slabs of other classes.

Theory of operation. A class that must evict compares its own coldest block with those of the other
classes. Where another class keeps colder ones it takes a run of that class's slabs instead, if
at most a quarter of what stands there was used later than its own victim: so classes of equal worth
leave each other alone, and bytes follow the load. After a search in vain the class evicts its own
for a while before it searches again, unless it has come to blocks that were used since: then all
that the search passed by for being warm is colder than what would go. A class that has nothing to
evict takes the cheapest run there is; one whose slots are in use is closed, and comes when they
are released.

Whoever waits for a slot stands in one queue per class, first come, first served; nobody passes
by it. A waiter takes one slot at a time and goes back to the end of the queue for the next.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from kvserver.core.books import Books
from kvserver.core.events import Tier
from kvserver.core.slabs import Slab
from kvserver.core.slots import SlotAction, SlotTable

_REGRET_MAX = 0.25
_SEARCH_PAUSE = 64  # evictions of a class between two searches for a colder slab
_WINDOWS_JUDGED = 8
_SLOTS_JUDGED = 32


class Retry(Enum):
    """What came of a waiter's try."""

    STUCK = 0  # no slot: it keeps its place
    AGAIN = 1  # it took one and needs another: to the end of the queue
    DONE = 2  # it waits in this queue no longer


class Waiter(Protocol):
    """Someone who needs a host slot."""

    def retry(self) -> Retry:
        """There may be room: take one slot."""


class Space:
    def __init__(self, books: Books) -> None:
        self._books = books
        self._waiting: dict[int, dict[int, Waiter]] = {}  # class -> ticket -> waiter
        self._where: dict[int, int] = {}  # ticket -> class
        self._pause: dict[tuple[Tier, int], tuple[int, int]] = {}  # evictions left; searched when
        self._searched: dict[tuple[Tier, int], int] = {}  # `openings` at the last search in vain
        self._claims: dict[tuple[Tier, int], list[Slab]] = {}  # slabs being emptied for a class

    # ---- slots

    def obtain(self, tier: Tier, slot_bytes: int, action: SlotAction, *, patient: bool) -> int:
        """A slot of a class with a new generation, 0 when there is none now.

        `patient` callers wait: for them slabs whose slots are in use are closed, too.
        """
        books = self._books
        table, policy = books.slots[tier], books.policy[tier]
        if slot_bytes > table.map.total:
            return 0
        slot = table.take(slot_bytes, action)
        if slot:
            return slot
        coldness = policy.coldness(slot_bytes)
        if coldness is not None and self._find_colder(tier, slot_bytes, coldness):
            slot = table.take(slot_bytes, action)
        if not slot:
            victim = policy.victim(slot_bytes)
            if victim:
                books.evict(tier, victim)
                slot = table.take(slot_bytes, action)
        if not slot and self._take_slabs(tier, slot_bytes, None, patient=patient):
            slot = table.take(slot_bytes, action)
        return slot

    def _find_colder(self, tier: Tier, slot_bytes: int, coldness: int) -> bool:
        left, searched = self._pause.get((tier, slot_bytes), (0, 0))
        if left and coldness <= searched:
            self._pause[tier, slot_bytes] = left - 1, searched
            return False
        policy = self._books.policy[tier]
        for other in policy.classes():
            if other == slot_bytes:
                continue
            stamp = policy.coldness(other)
            if stamp is not None and stamp < coldness:
                if self._take_slabs(tier, slot_bytes, coldness, patient=False):
                    return True
                break
        self._pause[tier, slot_bytes] = _SEARCH_PAUSE, self._books.stamp
        return False

    def _take_slabs(
        self, tier: Tier, slot_bytes: int, coldness: int | None, *, patient: bool
    ) -> bool:
        """Empty the cheapest run of other classes' slabs. True when its bytes are free now."""
        books = self._books
        table = books.slots[tier]
        claimed = self._claims.get((tier, slot_bytes), ())
        pending = any(table.map.slabs.get(slab.start) is slab for slab in claimed)
        at_once = pending or not patient
        if at_once and self._searched.get((tier, slot_bytes)) == table.openings:
            return False  # nothing was free for the taking, and nothing has changed
        windows = table.map.windows(slot_bytes)
        if at_once:
            windows = [w for w in windows if not w[0]]
        if not windows:
            if at_once:
                self._searched[tier, slot_bytes] = table.openings
            return False
        least = min(price for price, _, _ in windows)
        windows = [w for w in windows if w[0] == least]
        step = max(1, len(windows) // _WINDOWS_JUDGED)
        shift = books.stamp % step
        judged = [
            (self._regret(table, slabs, coldness), size, slabs)
            for _, size, slabs in windows[shift::step]
        ]
        regret, _, slabs = min(judged, key=lambda window: window[:2])
        if coldness is not None and regret > _REGRET_MAX:
            return False
        for slab in slabs:
            self._close(tier, slab)
        if least:
            self._claims[tier, slot_bytes] = slabs
        return not least

    def _regret(self, table: SlotTable, slabs: list[Slab], coldness: int | None) -> float:
        """The share of judged slots whose block was used later than `coldness`; without one, how
        recently their blocks were used on average."""
        blocks = self._books.blocks
        total, weight = 0.0, 0
        for slab in slabs:
            step = max(1, slab.count // _SLOTS_JUDGED)
            for slot in slab.slots[::step]:
                row = table.row[slot]
                stamp = blocks.stamp[row] if row else 0
                total += (stamp if coldness is None else stamp > coldness) * slab.slot_bytes
                weight += slab.slot_bytes
        return total / weight if weight else 0.0

    def _close(self, tier: Tier, slab: Slab) -> None:
        books = self._books
        table = books.slots[tier]
        books.counters["slabs_moved"] += 1
        table.close(slab)
        for slot in slab.slots:
            if table.slab[slot] is slab and table.evictable(slot):
                books.evict(tier, slot)
        books.policy[tier].closed(slab.slot_bytes, slab.count)

    # ---- waiting for host slots

    def crowded(self, slot_bytes: int) -> bool:
        """Someone waits for a slot of this class already."""
        return bool(self._waiting.get(slot_bytes))

    def wait(self, slot_bytes: int, ticket: int, waiter: Waiter) -> None:
        """Stand at the end of the class's queue, and in no other."""
        self.leave(ticket)
        self._waiting.setdefault(slot_bytes, {})[ticket] = waiter
        self._where[ticket] = slot_bytes

    def stands(self, slot_bytes: int, ticket: int) -> bool:
        """The ticket waits in this class's queue."""
        return self._where.get(ticket) == slot_bytes

    def leave(self, ticket: int) -> None:
        """Wait no longer."""
        slot_bytes = self._where.pop(ticket, None)
        if slot_bytes is not None:
            queue = self._waiting[slot_bytes]
            del queue[ticket]
            if not queue:
                del self._waiting[slot_bytes]

    def serve(self) -> None:
        """Let those who wait try again, each class from the head of its queue."""
        for slot_bytes in list(self._waiting):
            while queue := self._waiting.get(slot_bytes):
                ticket, waiter = next(iter(queue.items()))
                outcome = waiter.retry()
                if outcome is Retry.STUCK:
                    break
                if outcome is Retry.AGAIN:
                    self.wait(slot_bytes, ticket, waiter)
                elif self.stands(slot_bytes, ticket):
                    self.leave(ticket)

    def waiting(self) -> list[int]:
        """Tickets of all that wait."""
        return list(self._where)
