"""Which block leaves a tier when room is needed: an interface, and the policy that is used.

Theory of operation. Each size class has two queues of slots, both first in, first out and lazy:
an entry is judged when it reaches the head, so pins and uses cost nothing here.
  * `leaves`: blocks of which no child is on the tier. Only these are evicted as long as there
    are any, so a prefix is never cut in its middle.
  * `inner`: the others, for the case that every leaf is in use.
A use makes a block warmer (BlockTable.touch). A warm block that reaches the head goes back to the
tail with half its heat; a cold one is the victim. What was written and never used leaves at its
first turn, so a scan passes through without driving out what is used. When a leaf leaves and its
parent becomes one, the parent goes to the head unless it was used later than its child: the
longest unused chain goes first, from its end.

Cost: O(1) amortised; one search passes over at most `scan_max` warm blocks.

Invariants: a slot stands at most once in each queue, and exactly when its `listed` bit is set;
every evictable slot stands in `leaves` if no child is on the tier, else in one of them.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from kvserver.core.blocks import BlockTable
from kvserver.core.slots import DEAD, SlotTable

_LEAF = 1
_INNER = 2


class EvictionPolicy(Protocol):
    """Chooses; never changes a block or a slot. The caller says what became evictable."""

    def offer(self, slot: int, *, front: bool = False) -> None:
        """A slot has become evictable, or has lost its last child on the tier."""

    def victim(self, slot_bytes: int) -> int:
        """The slot of this class to be emptied next, 0 when none can be. It must be emptied or
        offered again."""

    def coldness(self, slot_bytes: int) -> int | None:
        """When the block that `victim` would take was last used; None when there is none."""

    def classes(self) -> list[int]:
        """Size classes that have something on offer."""

    def closed(self, slot_bytes: int, slots: int) -> None:
        """A slab of so many slots was closed; what the policy holds stays bounded by the rest."""

    def check(self) -> list[str]:
        """What is wrong with the books, for validation."""


class PrefixLru:
    def __init__(self, blocks: BlockTable, slots: SlotTable, scan_max: int) -> None:
        self._blocks = blocks
        self._slots = slots
        self._tier = slots.tier
        self._scan_max = scan_max
        self._queues: tuple[dict[int, deque[int]], ...] = ({}, {}, {})  # by _LEAF and _INNER
        self._stale: dict[int, int] = {}  # entries that closed slabs may have left in the queues

    def offer(self, slot: int, *, front: bool = False) -> None:
        slots = self._slots
        if not slots.evictable(slot):
            return
        row = slots.row[slot]
        if self._blocks.kids[self._tier][row]:
            self._list(slot, _INNER)
        elif front and not slots.listed[slot] & _LEAF:
            self._blocks.heat[row] = 0
            self._list(slot, _LEAF, front=True)
        else:
            self._list(slot, _LEAF)

    def victim(self, slot_bytes: int) -> int:
        slot = self._head(slot_bytes, _LEAF) or self._head(slot_bytes, _INNER)
        if slot:
            which = _LEAF if self._slots.listed[slot] & _LEAF else _INNER
            self._queues[which][slot_bytes].popleft()
            self._slots.listed[slot] &= ~which
        return slot

    def coldness(self, slot_bytes: int) -> int | None:
        slot = self._head(slot_bytes, _LEAF)
        return self._blocks.stamp[self._slots.row[slot]] if slot else None

    def classes(self) -> list[int]:
        return [slot_bytes for slot_bytes, queue in self._queues[_LEAF].items() if queue]

    def _head(self, slot_bytes: int, which: int) -> int:
        """The slot at the head of a queue, once everything stale or warm before it has gone."""
        queue = self._queues[which].get(slot_bytes)
        slots, blocks = self._slots, self._blocks
        scans = 0
        while queue:
            slot = queue[0]
            row = slots.row[slot]
            if not slots.evictable(slot):
                self._unlist(queue, slot, which)
            elif (which == _LEAF) == bool(blocks.kids[self._tier][row]):
                self._unlist(queue, slot, which)
                self._list(slot, _LEAF + _INNER - which)
                if which == _INNER:
                    return self._head(slot_bytes, _LEAF)
            elif blocks.heat[row] and scans < self._scan_max:
                blocks.heat[row] >>= 1
                queue.rotate(-1)
                scans += 1
            else:
                return slot
        return 0

    def _list(self, slot: int, which: int, *, front: bool = False) -> None:
        slots = self._slots
        if slots.listed[slot] & which:
            return
        slots.listed[slot] |= which
        queue = self._queues[which].setdefault(slots.bytes_of(slot), deque())
        if front:
            queue.appendleft(slot)
        else:
            queue.append(slot)

    def _unlist(self, queue: deque[int], slot: int, which: int) -> None:
        queue.popleft()
        slots = self._slots
        slots.listed[slot] &= ~which
        if slots.state[slot] == DEAD and not slots.listed[slot]:
            slots.retire(slot)

    def closed(self, slot_bytes: int, slots: int) -> None:
        queues = [self._queues[which].get(slot_bytes, deque()) for which in (_LEAF, _INNER)]
        self._stale[slot_bytes] = self._stale.get(slot_bytes, 0) + slots
        if 2 * self._stale[slot_bytes] <= sum(map(len, queues)):
            return
        del self._stale[slot_bytes]
        for which, queue in zip((_LEAF, _INNER), queues, strict=True):
            for _ in range(len(queue)):
                if self._slots.state[queue[0]] == DEAD:
                    self._unlist(queue, queue[0], which)
                else:
                    queue.rotate(-1)

    def check(self) -> list[str]:
        slots, blocks = self._slots, self._blocks
        wrong = []
        seen: dict[tuple[int, int], int] = {}
        for which in (_LEAF, _INNER):
            for slot_bytes, queue in self._queues[which].items():
                for slot in queue:
                    seen[slot, which] = seen.get((slot, which), 0) + 1
                    if slots.state[slot] != DEAD and slots.bytes_of(slot) != slot_bytes:
                        wrong.append(f"slot {slot} stands in the queue of another class")
        for slot in range(1, slots.length):
            for which in (_LEAF, _INNER):
                expected = bool(slots.listed[slot] & which)
                if seen.get((slot, which), 0) != expected:
                    wrong.append(f"slot {slot} is listed {slots.listed[slot]}, found {seen}")
            if slots.evictable(slot):
                inner = blocks.kids[self._tier][slots.row[slot]] > 0
                if not slots.listed[slot] & (_LEAF | _INNER if inner else _LEAF):
                    wrong.append(f"slot {slot} is evictable and on offer nowhere")
        return wrong
