"""The slots of one tier: their lifecycle, their allocation, and who keeps them from being reused.

Rule 1: only this module changes a slot's state, and only along TRANSITIONS. A slot is born FREE
        when its slab is laid.
Rule 2: a slot is FREE only when nobody can touch it: no pin (lease, job, queued spill), no fence.
Rule 3: every use of a slot has a generation of its own, from one counter per tier: at any offset
        it only grows, whatever classes the bytes served before.

Invariants: free + filling + target + committed + quarantined == slots; `counts` and
`bytes_used` equal what a walk over the columns gives; `slab.busy` counts the slots of a slab that
are neither FREE nor COMMITTED without a pin.
"""

from __future__ import annotations

from array import array
from enum import IntEnum

from kvserver.core.columns import Columns
from kvserver.core.errors import InvariantError
from kvserver.core.events import Place, Tier
from kvserver.core.slabs import Slab, SlabMap


class SlotState(IntEnum):
    DEAD = 0  # an unused id: its slab was closed
    FREE = 1
    FILLING = 2  # clients write it
    TARGET = 3  # a Copy writes it
    COMMITTED = 4
    QUARANTINED = 5  # its block left; a writer, a reader or a job may still touch it


DEAD, FREE, FILLING, TARGET, COMMITTED, QUARANTINED = SlotState


class SlotAction(IntEnum):
    RESERVE = 0  # given to a writer
    AIM = 1  # given to a copy
    RESTORE = 2  # found with a block
    SUSPECT = 3  # found with writers
    COMPLETE = 4  # holds a whole block
    HOLD = 5  # left by its block, still touched
    FREE = 6  # nobody touches it
    CLOSE = 7  # its slab is closed


TRANSITIONS: dict[tuple[int, int], SlotState] = {
    (FREE, SlotAction.RESERVE): FILLING,
    (FREE, SlotAction.AIM): TARGET,
    (FREE, SlotAction.RESTORE): COMMITTED,
    (FREE, SlotAction.SUSPECT): QUARANTINED,
    (FREE, SlotAction.CLOSE): DEAD,
    (FILLING, SlotAction.COMPLETE): COMMITTED,
    (FILLING, SlotAction.HOLD): QUARANTINED,
    (FILLING, SlotAction.FREE): FREE,
    (TARGET, SlotAction.COMPLETE): COMMITTED,
    (TARGET, SlotAction.HOLD): QUARANTINED,
    (TARGET, SlotAction.FREE): FREE,
    (COMMITTED, SlotAction.HOLD): QUARANTINED,
    (COMMITTED, SlotAction.FREE): FREE,
    (QUARANTINED, SlotAction.FREE): FREE,
}


class SlotTable(Columns):
    """`row` is the block that a slot belongs to, 0 for none; `pins` counts who needs its bytes."""

    codes = {  # noqa: RUF012 - ClassVar in the base
        "state": "B", "listed": "B", "pins": "I", "row": "I", "generation": "Q", "offset": "Q",
    }  # fmt: skip

    state: array[int]
    listed: array[int]  # bits of the eviction queues that hold the slot
    pins: array[int]
    row: array[int]
    generation: array[int]
    offset: array[int]

    def __init__(self, tier: Tier, total_bytes: int, ready_bytes: int) -> None:
        super().__init__()
        self.tier = tier
        self.up = True
        self.note = ""
        self.map = SlabMap(total_bytes, ready_bytes)
        self.slab: list[Slab | None] = [None]
        self.counts = [0] * len(SlotState)
        self.bytes_used = 0
        self.generation_last = 0
        self.openings = 0  # grows whenever a slab may have become one that can be emptied at once
        self._open: dict[int, dict[int, Slab]] = {}  # class -> slabs with free slots, by start

    # ---- lifecycle

    def move(self, slot: int, action: SlotAction) -> None:
        state = self.state[slot]
        target = TRANSITIONS.get((state, action))
        slab = self.slab[slot]
        if target is None or slab is None:
            raise InvariantError(
                f"{self.tier.name} slot {slot} at {self.offset[slot]} (generation "
                f"{self.generation[slot]}, block {self.row[slot]}) is {SlotState(state).name}, "
                f"impossible: {action.name}"
            )
        was_busy = self._is_busy(slot)
        self.state[slot] = target
        self.counts[state] -= 1
        if target != DEAD:
            self.counts[target] += 1
        slab.busy += self._is_busy(slot) - was_busy
        self.openings += not slab.busy
        slab.stuck += (target == QUARANTINED) - (state == QUARANTINED)
        if target == FREE:
            self.bytes_used -= slab.slot_bytes
        elif state == FREE and target != DEAD:
            self.bytes_used += slab.slot_bytes

    def _is_busy(self, slot: int) -> bool:
        state = self.state[slot]
        return state > COMMITTED or FREE < state < COMMITTED or self.pins[slot] > 0

    def pin(self, slot: int) -> None:
        self.pins[slot] += 1
        if self.pins[slot] == 1 and self.state[slot] == COMMITTED:
            self._slab(slot).busy += 1

    def unpin(self, slot: int) -> bool:
        """True when this was the last pin."""
        if not self.pins[slot]:
            raise InvariantError(f"{self.tier.name} slot {slot} is unpinned without a pin")
        self.pins[slot] -= 1
        if self.pins[slot]:
            return False
        if self.state[slot] == COMMITTED:
            slab = self._slab(slot)
            slab.busy -= 1
            self.openings += not slab.busy
        return True

    def evictable(self, slot: int) -> bool:
        return self.state[slot] == COMMITTED and not self.pins[slot]

    def next_generation(self, slot: int) -> int:
        self.generation_last += 1
        self.generation[slot] = self.generation_last
        return self.generation_last

    def place(self, slot: int) -> Place:
        return Place(
            self.tier, self.offset[slot], self._slab(slot).slot_bytes, self.generation[slot]
        )

    def bytes_of(self, slot: int) -> int:
        return self._slab(slot).slot_bytes

    def closing(self, slot: int) -> bool:
        return self._slab(slot).closing

    def _slab(self, slot: int) -> Slab:
        slab = self.slab[slot]
        assert slab is not None, f"{self.tier.name} slot {slot} belongs to no slab"
        return slab

    # ---- allocation

    def take(self, slot_bytes: int, action: SlotAction) -> int:
        """A free slot of a class, with a new generation; opens a slab if need be. 0 for none."""
        slabs = self._open.get(slot_bytes)
        if not slabs:
            room = self.map.carve(slot_bytes)
            if room is None:
                return 0
            self.lay(room[0], slot_bytes, room[1])
            slabs = self._open[slot_bytes]
        start, slab = next(iter(slabs.items()))
        slot = slab.free.pop()
        if not slab.free:
            del slabs[start]
        self.move(slot, action)
        self.next_generation(slot)
        return slot

    def give(self, slot: int) -> None:
        """The slot is free; a closing slab that is now empty gives its bytes back."""
        self.move(slot, SlotAction.FREE)
        slab = self._slab(slot)
        slab.free.append(slot)
        if not slab.closing:
            self._offer(slab)
        elif len(slab.free) == slab.count:
            self._dissolve(slab)

    def close(self, slab: Slab) -> None:
        """Hand no slot of this slab out any more; its bytes go back once it is empty."""
        slab.closing = True
        self._open.get(slab.slot_bytes, {}).pop(slab.start, None)
        if len(slab.free) == slab.count:
            self._dissolve(slab)

    def retire(self, slot: int) -> None:
        """The id of a DEAD slot may be given to another slot."""
        self.slab[slot] = None
        self._delete(slot)

    def lay(self, start: int, slot_bytes: int, count: int) -> Slab:
        """Open a slab on bytes that belong to no free run: its slots are born FREE."""
        slots = [self._new() for _ in range(count)]
        slab = Slab(start, slot_bytes, slots)
        self.openings += 1
        self.slab.extend([None] * (self.length - len(self.slab)))
        for at, slot in enumerate(slots):
            self.slab[slot] = slab
            self.offset[slot] = start + at * slot_bytes
            self.state[slot] = FREE
        self.counts[FREE] += count
        slab.free.extend(reversed(slots))
        self.map.slabs[start] = slab
        self._offer(slab)
        return slab

    def grow(self, ready_bytes: int) -> None:
        """More bytes of the tier may be used."""
        self.openings += 1
        self.map.ready = max(self.map.ready, min(ready_bytes, self.map.total))
        for slab in self.map.slabs.values():
            if not slab.closing:
                self._offer(slab)

    def settle(self, slab: Slab) -> None:
        """Recovery took slots of a slab: its free ones are those that still are FREE."""
        slab.free = [slot for slot in reversed(slab.slots) if self.state[slot] == FREE]
        if not slab.free:
            self._open.get(slab.slot_bytes, {}).pop(slab.start, None)

    def _offer(self, slab: Slab) -> None:
        if slab.free and slab.stop <= self.map.ready:
            self._open.setdefault(slab.slot_bytes, {})[slab.start] = slab

    def _dissolve(self, slab: Slab) -> None:
        del self.map.slabs[slab.start]
        for slot in slab.slots:
            self.move(slot, SlotAction.CLOSE)
            if not self.listed[slot]:
                self.retire(slot)
        slab.free = []
        self.map.give_back(slab.start, slab.stop)

    @property
    def slots(self) -> int:
        return sum(self.counts[FREE:])
