"""The block table: what the hub knows of each block, keyed by (namespace handle, prefix hash).

Rule 1: only `BlockTable.move` changes a block's state, and only along TRANSITIONS.
Rule 2: a row outlives its block while other rows name it as their parent (state ABSENT, found by
        nobody's lookup), so a parent is always a row and children counts are always right.
Rule 3: masks exist only while a block is FILLING; a COMPLETE one has every cell.

Invariants:
  * `slot[tier][row]` is the block's slot on that tier, 0 for none. Bit `tier` of `resident` says
    that it holds the whole block; of `suspect`, that it may not be granted before a Verify.
  * `kids[tier][row]` counts the rows whose parent is `row` and which have a slot on that tier;
    `links[row]` counts all rows whose parent is `row`.
  * a COMPLETE block is resident somewhere; an ABSENT row has no slot, no parent, and `links > 0`.
"""

from __future__ import annotations

from array import array
from collections import deque
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvproto.prefix import ROOT
from kvserver.core.columns import Columns
from kvserver.core.errors import InvariantError
from kvserver.core.events import BlockState, Tier

ABSENT, ANNOUNCED, FILLING, COMPLETE = BlockState


class Action(IntEnum):
    """What happens to a block."""

    ANNOUNCE = 0
    WITHDRAW = 1  # no announcement is left
    RESERVE = 2  # its first cells are reserved
    FILL = 3  # all cells are committed
    RESTORE = 4  # found by recovery
    EXPIRE = 5  # a writer ended without fence
    DROP = 6  # by an operator
    LAPSE = 7  # partial, and nobody writes it
    LOSE = 8  # its last copy is gone
    NAME = 9  # its slot is another block's from here on


TRANSITIONS: dict[tuple[int, int], BlockState] = {
    (ABSENT, Action.ANNOUNCE): ANNOUNCED,
    (ABSENT, Action.RESERVE): FILLING,
    (ABSENT, Action.RESTORE): COMPLETE,
    (ANNOUNCED, Action.RESERVE): FILLING,
    (ANNOUNCED, Action.RESTORE): COMPLETE,
    (ANNOUNCED, Action.WITHDRAW): ABSENT,
    (ANNOUNCED, Action.DROP): ABSENT,
    (FILLING, Action.FILL): COMPLETE,
    (FILLING, Action.EXPIRE): ABSENT,
    (FILLING, Action.LAPSE): ABSENT,
    (FILLING, Action.DROP): ABSENT,
    (FILLING, Action.NAME): ABSENT,
    (COMPLETE, Action.LOSE): ABSENT,
    (COMPLETE, Action.DROP): ABSENT,
}


def bit(tier: int) -> int:
    """The bit of a tier in `resident` and `suspect`; the fastest tier has the lowest."""
    return 1 << (tier - 1)


class Filling:
    """Progress of one FILLING block, shared by all its writers.

    `parts` maps a reservation to the mask of cells that it still has to commit, `writers` to its
    client. When the block leaves the table `gone` is set, and they tell who might still write
    into the slot.
    """

    __slots__ = (
        "clients", "committed", "durable", "gone", "parts", "reserved", "row", "slot", "writers",
    )  # fmt: skip

    def __init__(self, row: int, slot: int) -> None:
        self.row = row
        self.slot = slot
        self.committed = 0
        self.reserved = 0  # union of parts' masks
        self.parts: dict[int, int] = {}
        self.writers: dict[int, int] = {}
        self.clients: tuple[int, ...] = ()  # as written in the slot's directory entry
        self.durable = False  # a place in the spill lag is promised
        self.gone = False


class History:
    """The last transitions of all blocks, a ring; told when one turns out impossible."""

    def __init__(self, length: int) -> None:
        self._ring: deque[tuple[float, int, int, BlockState, Action]] = deque(maxlen=length)
        self.now = 0.0

    def note(self, row: int, state: int, target: BlockState, action: Action) -> None:
        self._ring.append((self.now, row, state, target, action))

    def story(self, row: int) -> str:
        lines = [
            f"  {at:.3f} {action.name}: {BlockState(state).name} -> {target.name}"
            for at, who, state, target, action in self._ring
            if who == row
        ]
        return "\n".join(lines[-20:]) or "  (no remembered event)"


class BlockTable(Columns):
    codes = {  # noqa: RUF012 - ClassVar in the base
        "state": "B", "resident": "B", "suspect": "B", "heat": "B", "spill": "B",
        "namespace": "I", "tokens": "I", "parent": "I", "links": "I", "stamp": "q",
        "slot_device": "I", "slot_host": "I", "slot_disk": "I",
        "kids_device": "I", "kids_host": "I", "kids_disk": "I",
    }  # fmt: skip
    viewed = ("state", "resident", "heat", "stamp")

    state: array[int]
    resident: array[int]
    suspect: array[int]
    heat: array[int]
    spill: array[int]
    namespace: array[int]
    tokens: array[int]
    parent: array[int]
    links: array[int]
    stamp: array[int]
    state_view: npt.NDArray[np.uint8]
    resident_view: npt.NDArray[np.uint8]
    heat_view: npt.NDArray[np.uint8]
    stamp_view: npt.NDArray[np.int64]

    def __init__(self, history: History) -> None:
        self.keys: list[bytes] = [ROOT]
        self.index: dict[int, dict[bytes, int]] = {}
        self.fillings: dict[int, Filling] = {}
        self.history = history
        self.counts = [0] * len(BlockState)
        super().__init__()

    def _regrown(self) -> None:
        none: array[int] = array("I")
        get = self.__dict__.__getitem__
        self.slot: tuple[array[int], ...] = (
            none, get("slot_device"), get("slot_host"), get("slot_disk"),
        )  # fmt: skip
        self.kids: tuple[array[int], ...] = (
            none, get("kids_device"), get("kids_host"), get("kids_disk"),
        )  # fmt: skip

    # ---- rows

    def find(self, namespace: int, key: bytes) -> int:
        """The block's row, 0 when there is none."""
        return self.index[namespace].get(key, 0)

    def obtain(self, namespace: int, key: bytes) -> int:
        """The block's row, a new ABSENT one if need be. ROOT has row 0."""
        if key == ROOT:
            return 0
        index = self.index[namespace]
        row = index.get(key, 0)
        if not row:
            row = self._new()
            if row == len(self.keys):
                self.keys.append(key)
            else:
                self.keys[row] = key
            index[key] = row
            self.namespace[row] = namespace
            self.counts[ABSENT] += 1
        return row

    def release(self, row: int) -> None:
        """Forget a row that is ABSENT and nobody's parent; others stay."""
        if row and self.state[row] == ABSENT and not self.links[row]:
            del self.index[self.namespace[row]][self.keys[row]]
            self.keys[row] = b""
            self.counts[ABSENT] -= 1
            self._delete(row)

    def adopt(self, row: int, parent: int) -> None:
        """Set the parent of a row that has none and no slot yet."""
        self.parent[row] = parent
        if parent:
            self.links[parent] += 1

    def move(self, row: int, action: Action) -> BlockState:
        """Change a block's state. InvariantError, with its story, when TRANSITIONS has no way."""
        state = self.state[row]
        target = TRANSITIONS.get((state, action))
        if target is None:
            raise InvariantError(
                f"block {self.keys[row].hex()[:16]} is {BlockState(state).name}, impossible: "
                f"{action.name}\n{self.history.story(row)}"
            )
        self.history.note(row, state, target, action)
        self.state[row] = target
        self.counts[state] -= 1
        self.counts[target] += 1
        if target == ABSENT:
            self._orphan(row)
        return target

    def _orphan(self, row: int) -> None:
        """A block that left names no parent any more."""
        parent = self.parent[row]
        self.parent[row] = 0
        self.heat[row] = 0
        self.tokens[row] = 0
        if parent:
            self.links[parent] -= 1
            self.release(parent)

    # ---- residences

    def attach(self, row: int, tier: int, slot: int) -> None:
        """The block takes a slot on a tier."""
        self.slot[tier][row] = slot
        self.kids[tier][self.parent[row]] += 1

    def detach(self, row: int, tier: int) -> int:
        """The block gives its slot on a tier up. Returns the slot."""
        slot = self.slot[tier][row]
        self.slot[tier][row] = 0
        self.resident[row] &= ~bit(tier)
        self.suspect[row] &= ~bit(tier)
        self.kids[tier][self.parent[row]] -= 1
        return slot

    def touch(self, rows: npt.NDArray[np.intp], stamp: int) -> None:
        """A use of these blocks: they are the most recent, and a little warmer."""
        self.stamp_view[rows] = stamp
        heat = self.heat_view[rows]
        self.heat_view[rows] = heat + (heat < 255)

    def fastest(self, row: int, up: int) -> Tier | None:
        """The fastest tier of those in `up` that holds the whole block."""
        bits = self.resident[row] & up
        return Tier((bits & -bits).bit_length()) if bits else None
