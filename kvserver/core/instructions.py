"""What comes out of the hub: the results of requests, and instructions for the shell.

The rules that hold between events and instructions stand in `kvserver.core.events`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvproto.grid import Region
from kvproto.namespace import NamespaceSpec
from kvserver.core.events import CommitVerdict, Place, ReserveVerdict, Tier

# ---- results -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LookupResult:
    usable_blocks: int
    live_blocks: int
    states: bytes  # N x u8 BlockState
    tiers: bytes  # N x u8 Tier, 0 where none
    lease: int = 0
    lease_seconds: float = 0.0
    committed_cells: int = 0  # of all the blocks, also of those that are still being written


@dataclass(frozen=True, slots=True)
class ReserveResult:
    reservation: int  # 0 when nothing was granted
    ttl: float
    verdicts: list[ReserveVerdict]
    places: list[Place | None]


@dataclass(frozen=True, slots=True)
class CommitResult:
    verdicts: list[CommitVerdict]
    completed: int


@dataclass(frozen=True, slots=True)
class AcquireResult:
    granted: int
    missing: list[int]  # positions not yet reported by a Granted


@dataclass(frozen=True, slots=True)
class Evicted:
    blocks: int
    bytes: int
    in_use: int = 0  # complete blocks that stayed: leased, or source or target of a copy


# ---- instructions --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    ticket: int
    result: object


@dataclass(frozen=True, slots=True)
class Refusal:
    """The request is refused: `error` is a CoreError."""

    ticket: int
    error: Exception


@dataclass(frozen=True, slots=True)
class GrantedBlock:
    index: int  # position in Acquire.hashes
    place: Place
    tokens: int
    complete: bool
    came_from: Tier  # where the block was when it was asked for


@dataclass(frozen=True, slots=True)
class Granted:
    """One lease over some blocks of a read stream, and positions that will not come."""

    ticket: int
    lease: int
    lease_seconds: float
    blocks: list[GrantedBlock]
    missing: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EntryReserved:
    """Write the host slot's directory entry: RESERVED, this generation, these writers."""

    place: Place
    clients: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EntryInvalid:
    """Write the slot's entry (host) or forget its record (disk): INVALID, this generation.

    On disk this must be durable before the slot's bytes change; a Copy into the slot does that
    itself, so no EntryInvalid precedes it.
    """

    place: Place


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What a directory entry or journal record says of a block."""

    namespace: int
    key: bytes
    parent: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class CellsCommitted:
    """A Commit put cells into a host slot: store their checksums in its trailer.

    `index` is the position in Commit.indices. With `complete`, compute the root and write the
    entry VALID.
    """

    ticket: int
    index: int
    place: Place
    region: Region
    info: BlockInfo
    complete: bool


@dataclass(frozen=True, slots=True)
class CellsPresent:
    """A Commit named cells of a host slot that had been committed before.

    Compare its checksums with those in the slot's trailer: where they differ, the verdict at
    `index` of the Answer that follows is MISMATCH instead of OK. What stands there stays.
    """

    ticket: int
    index: int
    place: Place
    region: Region
    info: BlockInfo


class JobKind(Enum):
    SPILL = "spill"  # host -> disk
    PROMOTE = "promote"  # disk -> host
    UPLOAD = "upload"  # host -> device
    DOWNLOAD = "download"  # device -> host


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a slot's payload and trailer; at the end the target's entry or record is VALID.

    A PROMOTE verifies every checksum and the root before it writes the entry.
    """

    job: int
    kind: JobKind
    source: Place
    target: Place
    info: BlockInfo
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Verify:
    """Check a restored or suspected slot against its root and checksums."""

    job: int
    place: Place
    info: BlockInfo


@dataclass(frozen=True, slots=True)
class Residence:
    """Where a block is whole: bit `tier - 1` of `tiers` for each tier; 0: it is gone, and so are
    its parent (ROOT) and tokens (0)."""

    key: bytes
    parent: bytes
    tokens: int
    tiers: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Where these blocks of a namespace are now. With `forgotten`, the namespace is gone with all
    of its blocks."""

    spec: NamespaceSpec
    blocks: list[Residence]
    forgotten: bool = False


@dataclass(frozen=True, slots=True)
class MovedTooMuch:
    """So many blocks moved at once that watchers do better to walk the table again."""


@dataclass(frozen=True, slots=True)
class TiersUp:
    """Which tiers work now, by bit `tier - 1`: blocks that are on others only cannot be read."""

    tiers: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A request needs more turns. Hand in one Continue, after what else waits to be handed in."""


Instruction = (
    Answer | Refusal | Granted | EntryReserved | EntryInvalid | CellsCommitted | CellsPresent
    | Copy | Verify | Moved | MovedTooMuch | TiersUp | Unfinished
)  # fmt: skip
