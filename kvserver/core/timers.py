"""Deadlines of everything that expires, on the hub's own clock.

Invariants:
  * a key has at most one deadline; `due` gives it back once, in order of deadline.
  * the heap holds at most about twice as many entries as there are deadlines: stale ones are
    swept when they outnumber the live ones, so memory is bounded by what is alive.
"""

from __future__ import annotations

from enum import IntEnum
from heapq import heapify, heappop, heappush

_SLACK = 64
_BITS = 4  # of a key, for its kind
_KINDS = (1 << _BITS) - 1


class Kind(IntEnum):
    """What a deadline belongs to; with an id it makes a key."""

    SESSION = 0
    RESERVATION = 1
    LEASE = 2
    ANNOUNCEMENT = 3
    PARTIAL = 4  # id: the host slot of a partial block without reservation
    RESERVE_WAIT = 5  # id: the ticket
    STREAM_WAIT = 6  # id: the ticket
    STREAM_STARVE = 7  # id: the ticket
    TAIL = 8  # id: the row of a complete tail


class Timers:
    def __init__(self) -> None:
        self._deadline: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def set(self, kind: Kind, ident: int, deadline: float) -> None:
        """Set or replace the deadline of (kind, ident)."""
        key = ident << _BITS | kind
        self._deadline[key] = deadline
        heappush(self._heap, (deadline, key))
        if len(self._heap) > 2 * len(self._deadline) + _SLACK:
            self._heap = [(at, key) for key, at in self._deadline.items()]
            heapify(self._heap)

    def get(self, kind: Kind, ident: int) -> float | None:
        return self._deadline.get(ident << _BITS | kind)

    def cancel(self, kind: Kind, ident: int) -> None:
        self._deadline.pop(ident << _BITS | kind, None)

    def pop_due(self, now: float) -> tuple[Kind, int] | None:
        """Take out the earliest key whose deadline is not after `now`; None when there is none."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            at, key = heappop(heap)
            if self._deadline.get(key) == at:
                del self._deadline[key]
                return Kind(key & _KINDS), key >> _BITS
        return None

    def next(self) -> float | None:
        """The earliest deadline."""
        heap = self._heap
        while heap and self._deadline.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def count(self, kind: Kind) -> int:
        """How many deadlines of a kind there are. Walks all of them: for validation only."""
        return sum(key & _KINDS == kind for key in self._deadline)
