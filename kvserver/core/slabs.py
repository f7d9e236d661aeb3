"""Size classes, and how the bytes of one tier are divided into slabs and free runs.

A slab is an extent that holds slots of one class. Slabs and free runs cover the tier's data area
without gap or overlap; freed neighbours coalesce. Nothing here is persisted: recovery infers the
slabs from the slots that it finds.

Sizes: 16 KiB steps up to 128 KiB, above that eight steps per power of two, so that rounding a
block up wastes at most one part in nine. A slab is max(4 slots, tier / 256, 4 MiB), at most
tier / 8, in whole slots; where a free run is shorter but takes a slot, a shorter one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

SLOT_UNIT = 16 << 10
_UNITS_FINE = 8
SLAB_BYTES_MIN = 4 << 20
SLAB_SLOTS_MIN = 4
TIER_SLABS_MAX = 256
TIER_SLOT_PARTS = 8


def slot_class_bytes(size: int) -> int:
    """The size class that takes `size` bytes."""
    units = max(1, -(-size // SLOT_UNIT))
    if units <= _UNITS_FINE:
        return units * SLOT_UNIT
    step = 1 << (units.bit_length() - 4)
    return -(-units // step) * step * SLOT_UNIT


def slot_bytes_max(tier_bytes: int) -> int:
    """The largest size class that a tier takes; 0 when it takes none."""
    units = tier_bytes // TIER_SLOT_PARTS // SLOT_UNIT
    if units <= _UNITS_FINE:
        return units * SLOT_UNIT
    step = 1 << (units.bit_length() - 4)
    return units // step * step * SLOT_UNIT


class Slab:
    """Slots of one class, side by side. `free` is a stack of slot ids.

    `busy` counts slots that can be neither handed out nor emptied by eviction, `stuck` those of
    them that are quarantined: they may stay so for as long as a client lives.
    """

    __slots__ = ("busy", "closing", "count", "free", "slot_bytes", "slots", "start", "stuck")

    def __init__(self, start: int, slot_bytes: int, slots: list[int]) -> None:
        self.start = start
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.count = len(slots)
        self.free: list[int] = []
        self.busy = 0
        self.stuck = 0
        self.closing = False

    @property
    def stop(self) -> int:
        return self.start + self.count * self.slot_bytes

    @property
    def price(self) -> int:
        """How long emptying it may take: 0 at once, the more the longer."""
        return self.busy + self.stuck * self.count


class SlabMap:
    """The division of one tier. Only bytes below `ready` are given to new slabs."""

    def __init__(self, total_bytes: int, ready_bytes: int) -> None:
        self.total = total_bytes // SLOT_UNIT * SLOT_UNIT
        self.ready = min(ready_bytes, self.total)
        self.slabs: dict[int, Slab] = {}  # by start
        self._runs: list[tuple[int, int]] = [(0, self.total)] if self.total else []

    def slab_bytes(self, slot_bytes: int) -> int:
        """What a whole slab of a class takes."""
        wanted = max(SLAB_SLOTS_MIN * slot_bytes, self.total // TIER_SLABS_MAX, SLAB_BYTES_MIN)
        slots = min(wanted, self.total // TIER_SLOT_PARTS) // slot_bytes
        return max(1, slots) * slot_bytes

    def runs(self) -> Iterator[tuple[int, int]]:
        """Free runs as (start, stop), ascending."""
        return iter(self._runs)

    def carve(self, slot_bytes: int) -> tuple[int, int] | None:
        """Take room for a slab out of the free runs: (start, slots). None when no slot fits.

        The first run that holds a whole slab, else as much as the largest holds.
        """
        whole = self.slab_bytes(slot_bytes)
        best_room, best = 0, -1
        for at, (start, stop) in enumerate(self._runs):
            room = min(stop, self.ready) - start
            if room > best_room:
                best_room, best = room, at
            if room >= whole:
                break
        slots = min(best_room, whole) // slot_bytes
        if slots < 1:
            return None
        start, stop = self._runs[best]
        taken = start + slots * slot_bytes
        self._runs[best : best + 1] = [(taken, stop)] if taken < stop else []
        return start, slots

    def occupy(self, start: int, stop: int) -> None:
        """Take exactly these bytes out of the free run that holds them."""
        at = bisect_left(self._runs, (start + 1, 0)) - 1
        run_start, run_stop = self._runs[at]
        pieces = [(run_start, start), (stop, run_stop)]
        self._runs[at : at + 1] = [piece for piece in pieces if piece[0] < piece[1]]

    def give_back(self, start: int, stop: int) -> None:
        """Bytes become free; neighbours coalesce."""
        insort(self._runs, (start, stop))
        at = bisect_left(self._runs, (start, stop))
        if at + 1 < len(self._runs) and self._runs[at + 1][0] == stop:
            self._runs[at : at + 2] = [(start, self._runs[at + 1][1])]
        if at and self._runs[at - 1][1] == self._runs[at][0]:
            self._runs[at - 1 : at + 1] = [(self._runs[at - 1][0], self._runs[at][1])]

    def windows(self, slot_bytes: int) -> list[tuple[int, int, list[Slab]]]:
        """Shortest runs of neighbours that would hold one slot of a class once emptied.

        Each is (the sum of its slabs' prices, bytes in it, its slabs). Slabs of the class itself,
        and those that are closing already, stand in no window. Costs O(slabs).
        """
        extents: list[tuple[int, int, Slab | None]] = [
            (start, min(stop, self.ready), None) for start, stop in self._runs if start < self.ready
        ]
        extents += [(slab.start, slab.stop, slab) for slab in self.slabs.values()]
        extents.sort(key=lambda extent: extent[0])
        found: list[tuple[int, int, list[Slab]]] = []
        first, price, reach = 0, 0, -1
        for at, (start, stop, slab) in enumerate(extents):
            unfit = slab is not None and (slab.closing or slab.slot_bytes == slot_bytes)
            if unfit or stop > self.ready or start != reach:
                first, price = at, 0
            reach = stop
            if unfit or stop > self.ready:
                first = at + 1
                continue
            price += slab.price if slab else 0
            while first < at and stop - extents[first + 1][0] >= slot_bytes:
                leaving = extents[first][2]
                price -= leaving.price if leaving else 0
                first += 1
            if stop - extents[first][0] >= slot_bytes:
                slabs = [s for _, _, s in extents[first : at + 1] if s is not None]
                found.append((price, stop - extents[first][0], slabs))
        return found
