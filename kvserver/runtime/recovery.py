"""What a start finds: blocks in the host arena and on disk, and slots that may still be written.

Rule 1: recovery tells, the core decides: what is found becomes Restore events, and what the core
does not take it answers with EntryInvalid.
Rule 2: a RESERVED entry is quarantined while one of its writers lives, otherwise cleared.
Rule 3: nothing found here stops the start. What is dropped is counted by reason and logged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from kvproto.errors import FieldError
from kvproto.namespace import NamespaceSpec
from kvserver.core.events import (
    Event,
    RestoreBlocks,
    RestoredBlock,
    RestoreDone,
    RestoreNamespace,
    RestoreQuarantined,
    Tier,
)
from kvserver.journal.record import DiskRecord
from kvserver.tiers.entry import ReservedEntry, ValidEntry
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness

BATCH_BLOCKS = 10_000
Tell = Callable[[Event], None]
HostScan = tuple[list[ValidEntry], list[ReservedEntry], int]


@dataclass(slots=True)
class Recovered:
    """How much was found, and what was dropped, by reason."""

    namespaces: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    quarantined: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def counters(self) -> dict[str, int]:
        """What was dropped, under the names that Stats gives it."""
        return {f"dropped_{why.replace(' ', '_')}": count for why, count in self.dropped.items()}


def restore_namespaces(
    canonicals: Iterable[bytes], used: Collection[bytes], tell: Tell, found: Recovered
) -> list[NamespaceSpec]:
    """Tell the core of the namespaces whose tag is in `used`; those specs, without repetition.

    One without a block is not told: its engines open it again, and it takes no place till then.
    """
    specs: dict[bytes, NamespaceSpec] = {}
    for canonical in canonicals:
        try:
            spec = NamespaceSpec.decode(canonical)
        except FieldError:
            found.drop("unreadable namespace")
            continue
        if spec.tag in used:
            specs.setdefault(spec.id, spec)
    for spec in specs.values():
        tell(RestoreNamespace(spec))
    found.namespaces = len(specs)
    return list(specs.values())


def restore_host(
    host: HostArena, scan: HostScan, liveness: Liveness, tell: Tell, found: Recovered
) -> None:
    """Tell the core what the arena's directory says (`scan` is what `host.scan` gave)."""
    valid, reserved, damaged = scan
    found.drop("damaged host entry", damaged)
    for start in range(0, len(valid), BATCH_BLOCKS):
        batch = valid[start : start + BATCH_BLOCKS]
        tell(RestoreBlocks(Tier.HOST, [_restored(entry) for entry in batch]))
    found.host_blocks = len(valid)
    for entry in reserved:
        for client in entry.clients:
            liveness.raise_floor(client)
        living = [client for client in entry.clients if not liveness.is_dead(client)]
        if living:
            tell(RestoreQuarantined(entry.offset, entry.slot_bytes, entry.generation, living))
            found.quarantined += 1
        else:
            host.write_invalid(entry.offset, entry.generation)
            found.drop("unfinished block")
    tell(RestoreDone(Tier.HOST, host.generation_max))


def restore_disk(records: Sequence[DiskRecord], tell: Tell, found: Recovered) -> None:
    """Tell the core what the journal says."""
    for start in range(0, len(records), BATCH_BLOCKS):
        batch = records[start : start + BATCH_BLOCKS]
        tell(RestoreBlocks(Tier.DISK, [_restored(record) for record in batch]))
    found.disk_blocks = len(records)
    tell(RestoreDone(Tier.DISK, max((r.generation for r in records), default=0)))


def _restored(entry: ValidEntry | DiskRecord) -> RestoredBlock:
    return RestoredBlock(
        entry.tag,
        entry.key,
        entry.parent,
        entry.tokens,
        entry.offset,
        entry.slot_bytes,
        entry.generation,
    )
