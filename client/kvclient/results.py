"""What calls take and answer: plain values, nothing that talks to the hub.

The numbers of the enums are those of the protocol. Arrays of a call with N keys have N elements,
in the order of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvproto.grid import Region

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]


class BlockState(IntEnum):
    ABSENT = 0
    ANNOUNCED = 1
    FILLING = 2
    COMPLETE = 3


class Tier(IntEnum):
    """Where a block was when it was asked for; NONE for a miss."""

    NONE = 0
    DEVICE = 1
    HOST = 2
    DISK = 3


class ReserveVerdict(IntEnum):
    WRITE = 0
    PRESENT = 1
    BUSY = 2
    NO_SPACE = 3


class CommitVerdict(IntEnum):
    OK = 0
    GONE = 1
    MISMATCH = 2
    TAKEN = 3  # only for a Commit that gives names


class PushVerdict(IntEnum):
    """What became of one block of a push."""

    WRITTEN = 0
    PRESENT = 1  # already there: nothing was copied
    BUSY = 2  # another writes it
    NO_SPACE = 3
    GONE = 4  # reserved, but lost before the commit (expiry, another writer of it lost)
    MISMATCH = 5  # committed before with other bytes; the first stays


@dataclass(frozen=True, slots=True)
class Need:
    """What a group of layers needs of a prefix before it is usable.

    `kind`: "every" (full attention: every block), "last" (sliding window: the last `blocks` of the
    prefix), "state" (recurrent state: exactly the last position). `region` is the group's cells,
    None for all.
    """

    kind: Literal["every", "last", "state"] = "every"
    blocks: int = 0
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """`usable_blocks`: longest usable prefix, in blocks. `live_blocks`: the same if everything
    filling or announced becomes complete. `lease` (0 without `pin_s`) pins the usable prefix for
    `lease_s` seconds, for all ranks of the session; give it to `acquire`/`pull` as
    `inherit_lease`, and back with `release`. `committed_cells` of all the blocks grow while one of
    them is being written.
    """

    usable_blocks: int
    live_blocks: int
    states: Bytes  # BlockState
    tiers: Bytes  # Tier
    lease: int = 0
    lease_s: float = 0.0
    committed_cells: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class PushResult:
    """Counts of blocks by what became of them, and the verdict of each (PushVerdict)."""

    verdicts: Bytes

    def count(self, verdict: PushVerdict) -> int:
        return int(np.count_nonzero(self.verdicts == verdict))

    @property
    def written(self) -> int:
        return self.count(PushVerdict.WRITTEN)

    @property
    def present(self) -> int:
        return self.count(PushVerdict.PRESENT)

    @property
    def busy(self) -> int:
        return self.count(PushVerdict.BUSY)

    @property
    def no_space(self) -> int:
        return self.count(PushVerdict.NO_SPACE)

    @property
    def gone(self) -> int:
        return self.count(PushVerdict.GONE)

    @property
    def mismatched(self) -> int:
        return self.count(PushVerdict.MISMATCH)

    def __repr__(self) -> str:
        parts = [f"{v.name.lower()}={self.count(v)}" for v in PushVerdict if self.count(v)]
        return f"PushResult({', '.join(parts) or 'no blocks'})"


@dataclass(frozen=True, slots=True)
class PullResult:
    """`found[i]`: block i stands in the output, byte for byte as it was committed; otherwise what
    stands there is unspecified. `tokens[i]`: tokens it holds (a tail fills only the first bytes of
    each cell). `tiers[i]`: Tier it came from. `bytes`: copied for found blocks.
    """

    found: Mask
    tokens: Numbers
    tiers: Bytes
    bytes: int
    corrupt: int = 0  # blocks whose checksum was wrong; reported to the hub, counted as misses


@dataclass(frozen=True, slots=True)
class Role:
    """Whether an engine pushes what it computes, and whether it looks up and pulls."""

    produces: bool
    consumes: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """The hub's limits, as Hello told them. Durations in seconds, sizes in bytes."""

    keys_per_call_max: int
    reservation_s_max: float
    lease_s_max: float
    wait_s_max: float
    window_bytes_max: int
    heartbeat_s: float
    session_ttl_s: float
    announce_ttl_s_max: float
    writers_per_block_max: int
    slot_bytes_max: int
    commit_names: bool = False  # a Commit may say which blocks it commits
