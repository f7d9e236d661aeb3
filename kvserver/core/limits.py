"""Every limit of the hub, with its default and its unit. Nothing in the core is unbounded.

Durations are seconds, sizes are bytes, the rest are counts. A limit that a caller runs into is
answered by a CoreError of kind LIMIT that carries the field's name and value.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """Sizes of the tiers' data areas (0: no such tier) and limits. Immutable.

    `host_bytes` is needed; DEVICE and DISK are usable at once, HOST as far as TierGrew says.
    """

    host_bytes: int
    disk_bytes: int = 0
    device_bytes: int = 0

    # time
    tick: float = 0.05  # the shell sends a Tick at least this often
    session_ttl: float = 30.0  # a session without a Heartbeat for longer ends
    reservation_ttl_max: float = 60.0  # also what a ttl of 0 means
    lease_max: float = 60.0  # also what a lease of 0 means
    announce_ttl_max: float = 120.0
    wait_max: float = 120.0  # of Reserve and Acquire
    reserve_gather: float = 0.1  # how long a Reserve waits for more after its first grant
    starve_max: float = 30.0  # a stream waits so long for a host slot before the block is missing
    partial_ttl: float = 5.0  # a partial block without a reservation waits so long for other ranks
    tail_ttl: float = (
        30.0  # a block of fewer tokens than a full one leaves so long after it is whole
    )

    # counts
    sessions_max: int = 4096
    clients_per_session_max: int = 256
    namespaces_max: int = 4096
    near_misses_max: int = 8  # told of one namespace
    keys_per_call_max: int = 8192
    announcements_max: int = 65_536  # announced blocks, counted once per announcing call
    reservations_max: int = 16_384
    expired_max: int = 65_536  # ended reservations that a late Fence is still understood for
    writers_per_block_max: int = 16
    leases_max: int = 65_536
    leases_per_stream_max: int = 64
    streams_max: int = 4096
    reserve_waits_max: int = 4096  # Reserve calls that wait for space
    reserve_turn: int = 8  # slots that one takes in one event; each may evict a block
    reports_max: int = 1024  # ReportCorrupt calls under verification
    moved_max: int = 65_536  # blocks of one event that watchers are told of one by one
    history_max: int = 4096  # remembered transitions, for the story of an InvariantError

    # bytes and copies
    window_bytes_max: int = 256 * MIB  # also what a window of 0 means
    pin_bytes_max: int = GIB  # bytes one Lookup may pin
    pin_promote_bytes_max: int = 64 * MIB  # bytes one Lookup may have copied from disk
    tail_bytes_max: int = 256 * MIB  # host slots of such blocks; at most an eighth of the host tier
    spill_lag_bytes_max: int = GIB  # queued and running; at most a quarter of the host tier
    spill_copies_max: int = 4
    promotions_max: int = 32  # copies into the host tier in flight
    promotion_bytes_max: int = 256 * MIB
    verifies_max: int = 8
    uploads_max: int = 4
    upload_heat: int = 4  # uses after which a host block is copied to the device
    eviction_scan_max: int = 64  # hot blocks passed over in the search for one victim

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            floor = 0 if name in ("disk_bytes", "device_bytes") else 1
            if isinstance(value, int) and value < floor:
                raise ValueError(f"{name} is {value}, must be at least {floor}")
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"{name} is {value}, must be above 0")

    @property
    def tail_bytes(self) -> int:
        """Bytes that tails may take on the host."""
        return min(self.tail_bytes_max, self.host_bytes // 8)

    @property
    def lag_bytes_max(self) -> int:
        """Bytes that may wait for or be on their way to disk; they cannot be evicted meanwhile."""
        return min(self.spill_lag_bytes_max, self.host_bytes // 4)
