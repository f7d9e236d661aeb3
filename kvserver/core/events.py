"""What goes into the hub and what comes out of it.

`Hub.handle(event, now)` takes one Event and returns the Instructions that it led to, in the order
in which they must be carried out. A request carries a `ticket`, chosen by the caller and unique
among open requests; its outcome is an `Answer` with that ticket, now or in a later call.

Rules:
 1. Every request is answered exactly once by an `Answer` or a `Refusal`. An Acquire gets any
    number of `Granted` before its Answer.
 2. Directory instructions (`EntryReserved`, `EntryInvalid`, `CellsCommitted`, `CellsPresent`) come
    before the Answer that rests on them: the shell carries them out synchronously, in order.
 3. A `Copy` or a `Verify` is answered by exactly one `JobDone`, however late: until then neither
    of its slots is reused. There is no other way to end a job.
 4. Times are seconds on the caller's monotonic clock, durations are seconds, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from kvproto.grid import Region
from kvproto.namespace import NamespaceSpec


class Tier(IntEnum):
    """Fastest first. The numbers are those of the protocol."""

    DEVICE = 1
    HOST = 2
    DISK = 3


class BlockState(IntEnum):
    """What a lookup says of a block. The numbers are those of the protocol."""

    ABSENT = 0
    ANNOUNCED = 1
    FILLING = 2
    COMPLETE = 3


class ReserveVerdict(IntEnum):
    WRITE = 0
    PRESENT = 1
    BUSY = 2
    NO_SPACE = 3


class CommitVerdict(IntEnum):
    OK = 0
    GONE = 1
    MISMATCH = 2  # given by the shell, which has the checksums: see CellsPresent
    TAKEN = 3  # the name that the Commit gives is another block's


@dataclass(frozen=True, slots=True)
class Place:
    """A slot: its tier, byte offset in the tier's arena, the size of its class and generation."""

    tier: Tier
    offset: int
    slot_bytes: int
    generation: int


# ---- events: requests (each carries a ticket) ----------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Answer: None. `session` is chosen by the shell and never reused."""

    ticket: int
    session: int
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class JoinSession:
    """A further writer (rank, connection) of a session. Answer: None.

    `client` is the writer id that liveness is judged by; the shell never reuses it for an arena.
    """

    ticket: int
    session: int
    client: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Answer: None; Refusal NOT_FOUND when the session has ended."""

    ticket: int
    session: int


@dataclass(frozen=True, slots=True)
class CloseClient:
    """One writer leaves. With `drained`, none of its copies still runs. Answer: None."""

    ticket: int
    session: int
    client: int
    drained: bool


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Ends a session and its clients; without `drained` their slots are quarantined.

    Answer: None.
    """

    ticket: int
    session: int
    drained: bool


@dataclass(frozen=True, slots=True)
class OpenNamespace:
    """Answer: the namespace's handle (int), the same for an equal spec as long as the hub lives.

    Refusal NO_SPACE when a full block cannot fit the host tier's largest slot.
    """

    ticket: int
    session: int
    spec: NamespaceSpec


@dataclass(frozen=True, slots=True)
class Need:
    """What a group of layers needs of a prefix: 'every', 'last' (`blocks` many) or 'state'.

    With a `region`, a block that is still filling will do once these cells are committed.
    """

    kind: str
    blocks: int = 0
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """Answer: LookupResult. `pin` is a lease's life in seconds, 0 for none."""

    ticket: int
    session: int
    namespace: int
    hashes: list[bytes]
    need: tuple[Need, ...] = ()
    pin: float = 0.0


@dataclass(frozen=True, slots=True)
class Announce:
    """Answer: how many of the blocks are now announced by this call (int); with `withdraw`, how
    many the session had announced and announces no longer."""

    ticket: int
    session: int
    namespace: int
    hashes: list[bytes]
    ttl: float
    withdraw: bool = False


@dataclass(frozen=True, slots=True)
class Reserve:
    """Answer: ReserveResult. Waits up to `wait` seconds for space. `tokens` is empty: all full."""

    ticket: int
    session: int
    client: int
    namespace: int
    hashes: list[bytes]
    parents: list[bytes]
    tokens: list[int]
    region: Region
    ttl: float
    wait: float = 0.0
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """Answer: CommitResult. For each block that is OK the core emits CellsCommitted first, or
    CellsPresent where the cells had been committed before and still stand in the same slot.

    A durable block's Answer comes only after its disk copy is VALID (JobDone ok).

    With `hashes` and `parents`, one of each an index, it says which blocks these are: see `naming`.
    """

    ticket: int
    session: int
    reservation: int
    indices: list[int]
    region: Region
    hashes: list[bytes] = field(default_factory=list)
    parents: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends a reservation. Answer: None."""

    ticket: int
    session: int
    reservation: int
    drained: bool


@dataclass(frozen=True, slots=True)
class Fence:
    """The writer says that its copies for `reservation` have drained; valid after expiry too.

    Answer: the number of slots that left quarantine (int).
    """

    ticket: int
    session: int
    reservation: int


@dataclass(frozen=True, slots=True)
class Acquire:
    """Opens a read stream. Granted instructions follow; Answer: AcquireResult when it has ended.

    Blocks come in order of `hashes`. At most `window` bytes of the region are leased at once, but
    always at least one block when nothing is leased. A block that is nowhere, or does not arrive
    within `wait`, is missing; so is one whose copy from disk fails.
    `readable` are the tiers whose slots the reader's transport can reach.
    """

    ticket: int
    session: int
    namespace: int
    hashes: list[bytes]
    region: Region
    wait: float
    window: int
    lease: float
    inherit: int = 0
    readable: frozenset[Tier] = frozenset({Tier.HOST})


@dataclass(frozen=True, slots=True)
class CancelAcquire:
    """The reader is gone (its call was cancelled): ends the stream and its leases. No Answer."""

    ticket_of_acquire: int


@dataclass(frozen=True, slots=True)
class Release:
    """Answer: how many leases were given back (int). Unknown or expired ones are ignored."""

    ticket: int
    session: int
    leases: list[int]


@dataclass(frozen=True, slots=True)
class ReportCorrupt:
    """A reader saw wrong bytes. The core stops granting the blocks and has them verified.

    Answer: how many blocks were dropped (int), after verification.
    """

    ticket: int
    session: int
    namespace: int
    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class Evict:
    """Drops unleased blocks of one namespace from all tiers; empty `hashes`: all.

    Answer: Evicted, which counts the leased ones as well: they stay.
    """

    ticket: int
    namespace_id: bytes
    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class DropNamespace:
    """Answer: Evicted. Leased blocks leave when released; the handle answers NOT_FOUND."""

    ticket: int
    namespace_id: bytes


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new reservations from now on; Answer None when the write-behind is empty."""

    ticket: int


# ---- events: what the world reports (no ticket, no Answer) -------------------------------------


@dataclass(frozen=True, slots=True)
class ClientDead:
    """The liveness lock of a writer is free: it can never write again."""

    client: int


@dataclass(frozen=True, slots=True)
class ClientDrained:
    """Nothing that this writer began can still write; it lives, and may begin anew.

    A client of a remote transport: its writer is the server's, whose connections were dropped.
    """

    client: int


@dataclass(frozen=True, slots=True)
class JobDone:
    """A Copy or Verify ended. `error` is empty when it succeeded.

    `corrupt` says that the source's bytes were wrong (not that an I/O failed).
    """

    job: int
    error: str = ""
    corrupt: bool = False


@dataclass(frozen=True, slots=True)
class TierGrew:
    """The first `bytes_ready` bytes of a tier's arena may be used from now on (prefault)."""

    tier: Tier
    bytes_ready: int


@dataclass(frozen=True, slots=True)
class TierDown:
    """A tier stopped working: nothing is written to or read from it until TierUp."""

    tier: Tier
    reason: str


@dataclass(frozen=True, slots=True)
class TierUp:
    tier: Tier


@dataclass(frozen=True, slots=True)
class Watch:
    """From now on tell where blocks are (Moved, MovedTooMuch, TiersUp), or no longer."""

    on: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. The shell sends one at least every `HubConfig.tick` seconds."""


@dataclass(frozen=True, slots=True)
class Continue:
    """The answer to Unfinished: others had their turn."""


@dataclass(frozen=True, slots=True)
class Stalled:
    """The server stood still for `duration` seconds: every expiry shifts by it."""

    duration: float


# ---- events: recovery (before the first request) -----------------------------------------------


@dataclass(frozen=True, slots=True)
class RestoreNamespace:
    """A namespace known from disk or arena. No Answer; `Hub.namespace_of` gives the handle."""

    spec: NamespaceSpec


@dataclass(frozen=True, slots=True)
class RestoredBlock:
    tag: bytes  # namespace tag, 16 bytes
    key: bytes
    parent: bytes
    tokens: int
    offset: int
    slot_bytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class RestoreBlocks:
    """Committed blocks found in a tier, in one batch or several; RestoreDone ends them.

    Each is verified (Verify for the host, PROMOTE for the disk) before its first lease.
    """

    tier: Tier
    blocks: list[RestoredBlock]


@dataclass(frozen=True, slots=True)
class RestoreQuarantined:
    """A reserved slot whose writers may still live: quarantined until each is dead."""

    offset: int
    slot_bytes: int
    generation: int
    clients: list[int]


@dataclass(frozen=True, slots=True)
class RestoreDone:
    """All that a tier held has been told. The hub lays slabs around it.

    Blocks that lie outside today's size, overlap, or whose namespace is unknown are answered with
    EntryInvalid and counted. `generation` is the largest that any slot of the tier ever had, free
    ones included (`HostArena.generation_max`): every generation given from now on is above it.
    """

    tier: Tier
    generation: int = 0


Event = (
    OpenSession | JoinSession | Heartbeat | CloseClient | CloseSession | OpenNamespace | Lookup
    | Announce | Reserve | Commit | Abort | Fence | Acquire | CancelAcquire | Release
    | ReportCorrupt | Evict | DropNamespace | Drain | ClientDead | ClientDrained | JobDone
    | TierGrew | TierDown | TierUp | Tick | Continue | Stalled | Watch
    | RestoreNamespace | RestoreBlocks | RestoreQuarantined | RestoreDone
)  # fmt: skip
