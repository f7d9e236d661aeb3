"""What the hub tells about itself: plain numbers, kept by counters, never by a walk over blocks."""

from __future__ import annotations

from dataclasses import dataclass

from kvproto.namespace import NamespaceSpec
from kvserver.core.blocks import ANNOUNCED, COMPLETE, FILLING
from kvserver.core.books import Books
from kvserver.core.events import Tier
from kvserver.core.holds import Holds
from kvserver.core.slots import SlotState


@dataclass(frozen=True, slots=True)
class TierStats:
    """`slots` is the sum of the five states after it. Bytes; `bytes_used` in slots not free."""

    bytes_total: int
    bytes_ready: int
    bytes_used: int
    slots: int
    free: int
    filling: int
    target: int
    committed: int
    quarantined: int
    up: bool
    note: str


@dataclass(frozen=True, slots=True)
class SessionStats:
    session: int
    tenant: str
    clients: int
    reservations: int
    leases: int
    idle: float  # seconds since the last heartbeat


@dataclass(frozen=True, slots=True)
class NamespaceStats:
    handle: int
    spec: NamespaceSpec
    blocks: int
    bytes: int
    hits: int
    misses: int
    near_misses: list[str]


@dataclass(frozen=True, slots=True)
class HubStats:
    tiers: dict[Tier, TierStats]
    sessions: list[SessionStats]
    namespaces: list[NamespaceStats]
    counters: dict[str, int]
    blocks: int
    filling: int
    announced: int
    streams: int
    leases: int
    reservations: int
    spill_queue_bytes: int  # queued, running and promised
    draining: bool


def collect(
    books: Books, holds: Holds, *, streams: int, spill_queue_bytes: int, draining: bool
) -> HubStats:
    counts = books.blocks.counts
    return HubStats(
        tiers={tier: _tier(books, tier) for tier in Tier},
        sessions=[
            SessionStats(
                s.ident, s.tenant, len(s.clients), len(s.reservations), len(s.leases),
                books.now - s.beat,
            )
            for s in holds.sessions.values()
        ],
        namespaces=[
            NamespaceStats(n.handle, n.spec, n.blocks, n.bytes, n.hits, n.misses, list(n.near))
            for n in books.namespaces.values()
        ],
        counters=dict(books.counters),
        blocks=counts[COMPLETE],
        filling=counts[FILLING],
        announced=counts[ANNOUNCED],
        streams=streams,
        leases=len(holds.leases),
        reservations=len(holds.reservations),
        spill_queue_bytes=spill_queue_bytes,
        draining=draining,
    )  # fmt: skip


def _tier(books: Books, tier: Tier) -> TierStats:
    table = books.slots[tier]
    counts = table.counts
    return TierStats(
        bytes_total=table.map.total,
        bytes_ready=table.map.ready,
        bytes_used=table.bytes_used,
        slots=table.slots,
        free=counts[SlotState.FREE],
        filling=counts[SlotState.FILLING],
        target=counts[SlotState.TARGET],
        committed=counts[SlotState.COMMITTED],
        quarantined=counts[SlotState.QUARANTINED],
        up=table.up,
        note=table.note,
    )
