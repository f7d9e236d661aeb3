"""What a start finds in arena and journal becomes Restore events, quickly and without trust."""

from __future__ import annotations

import os
import time
from pathlib import Path

from kvserver.core.events import (
    Event,
    RestoreBlocks,
    RestoreDone,
    RestoreNamespace,
    RestoreQuarantined,
    Tier,
)
from kvserver.journal.record import DiskRecord
from kvserver.runtime.recovery import Recovered, restore_disk, restore_host, restore_namespaces
from kvserver.tiers.entry import InvalidEntry
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from tests.support.payload import Blocks
from tests.unit.runtime.conftest import BLOCKS, SLOT, put_block

KEYS = BLOCKS.chain(1, 4)
UNUSED = Blocks(name="unused")


def test_used_namespaces_are_told_once_and_damaged_ones_counted() -> None:
    told: list[Event] = []
    found = Recovered()
    canonical = BLOCKS.spec.canonical
    canonicals = [canonical, b"garbage", UNUSED.spec.canonical, canonical]
    specs = restore_namespaces(canonicals, {BLOCKS.spec.tag}, told.append, found)
    assert told == [RestoreNamespace(BLOCKS.spec)]
    assert specs == [BLOCKS.spec]
    assert found.dropped == {"unreadable namespace": 1}


def test_blocks_are_told_and_reserved_slots_judged_by_their_writers(host: HostArena) -> None:
    liveness = Liveness(host.path.parent)
    alive, dead = liveness.new_client_id(), liveness.new_client_id()
    lock = liveness.grant(alive)
    os.close(liveness.grant(dead))
    for i, key in enumerate(KEYS):
        put_block(host, i * SLOT, key, generation=3)
    host.write_reserved(8 * SLOT, SLOT, 7, (alive, dead))
    host.write_reserved(9 * SLOT, SLOT, 8, (dead,))
    directory = host.path.parent
    host.close()
    again = HostArena.open(directory, 8 << 20)
    told: list[Event] = []
    found = Recovered()
    restore_host(again, again.scan(), liveness, told.append, found)
    os.close(lock)
    (blocks,) = (e for e in told if isinstance(e, RestoreBlocks))
    assert [(b.key, b.offset, b.generation) for b in blocks.blocks] == [
        (key, i * SLOT, 3) for i, key in enumerate(KEYS)
    ]
    assert [e for e in told if isinstance(e, RestoreQuarantined)] == [
        RestoreQuarantined(8 * SLOT, SLOT, 7, [alive])
    ]
    assert isinstance(told[-1], RestoreDone)
    assert (told[-1].tier, told[-1].generation) == (Tier.HOST, 8)
    assert isinstance(again.read_entry(9 * SLOT), InvalidEntry)
    assert found.dropped == {"unfinished block": 1}
    assert (found.host_blocks, found.quarantined) == (4, 1)
    assert liveness.new_client_id() > dead
    again.close()


def test_a_hundred_thousand_blocks_take_about_a_second(tmp_path: Path) -> None:
    spec = BLOCKS.spec
    records = [
        DiskRecord(i * SLOT, SLOT, i + 1, spec.tag, i.to_bytes(32, "little"), bytes(32), 128, i)
        for i in range(100_000)
    ]
    told: list[Event] = []
    found = Recovered()
    started = time.process_time()
    restore_disk(records, told.append, found)
    took = time.process_time() - started
    assert took < 5.0, f"{took:.1f} s; about one is expected on an idle core"
    assert sum(len(e.blocks) for e in told if isinstance(e, RestoreBlocks)) == 100_000
    assert told[-1] == RestoreDone(Tier.DISK, 100_000)
    assert found.disk_blocks == 100_000
