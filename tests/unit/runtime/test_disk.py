"""The disk tier: what the journal says at every place where a write may end."""

from __future__ import annotations

import numpy as np
import pytest

from kvserver.core.events import (
    Place,
    Tier,
)
from kvserver.journal.record import DiskRecord
from kvserver.runtime import failpoints
from kvserver.runtime.disk import DiskDown, DiskTier, Spill
from kvserver.tiers.host import HostArena
from tests.unit.runtime.conftest import BLOCKS, SLOT, DiskFiles, info, put_block, spill_job

KEYS = BLOCKS.chain(1, 6)


def spill(host: HostArena, at: int, key: bytes, offset: int, generation: int = 1) -> Spill:
    source = put_block(host, at, key, generation)
    entry = host.read_entry(at)
    spec = BLOCKS.spec
    record = DiskRecord(
        offset, SLOT, generation, spec.tag, key, bytes(32), spec.block_tokens, entry.root
    )
    copy = spill_job(1, source, offset, key, generation=generation)
    return Spill(copy, host.slot(at, SLOT), record)


def place(offset: int, generation: int = 1) -> Place:
    return Place(Tier.DISK, offset, SLOT, generation)


def test_a_batch_is_written_and_found_again(host: HostArena, disk_files: DiskFiles) -> None:
    disk = disk_files.open()
    disk.spill([spill(host, i * SLOT, KEYS[i], i * SLOT) for i in range(3)])
    out = np.empty(SLOT + 4096, np.uint8)
    out = out[-out.ctypes.data % 4096 :][:SLOT]
    for i in range(3):
        assert disk.record(place(i * SLOT), info(KEYS[i])) is not None
        disk.read(place(i * SLOT), out)
        payload = BLOCKS.payload(KEYS[i]).reshape(-1)
        assert (out[: payload.size] == payload).all()
    assert disk.record(place(0), info(KEYS[1])) is None  # another block's
    assert disk.record(place(0, 2), info(KEYS[0])) is None  # another life of the slot
    disk.close()
    assert disk_files.records() == {i * SLOT: KEYS[i] for i in range(3)}


@pytest.mark.parametrize(
    ("failpoint", "remains"),
    [
        ("spill.before_invalid", True),
        ("spill.before_write", False),
        ("spill.write", False),
        ("spill.before_sync", False),
        ("spill.before_valid", False),
        ("journal.put", False),
    ],
)
def test_a_failure_before_the_record_leaves_no_record_of_the_new_block(
    host: HostArena, disk_files: DiskFiles, failpoint: str, remains: bool
) -> None:
    """And the old record is gone as soon as its bytes may have changed."""
    disk = disk_files.open()
    disk.spill([spill(host, 0, KEYS[0], 0)])
    failpoints.arm(f"{failpoint}=errno:EIO@1")
    with pytest.raises(DiskDown, match=failpoint):
        disk.spill([spill(host, SLOT, KEYS[1], 0, generation=2)])
    assert not disk.up
    assert len(disk_files.failures) == 1
    disk._journal.close()
    expected = {0: KEYS[0]} if remains else {}
    assert disk_files.records() == expected


def test_down_means_down_until_it_has_come_back_clean(
    host: HostArena, disk_files: DiskFiles
) -> None:
    disk = disk_files.open()
    disk.add_namespace(BLOCKS.spec)
    failpoints.arm("journal.sync=errno:EIO@1")
    with pytest.raises(DiskDown):
        disk.spill([spill(host, 0, KEYS[0], 0)])  # the journal has the record, unsynced
    with pytest.raises(DiskDown, match="the disk tier is down"):
        disk.read(place(0), host.slot(0, SLOT))
    failpoints.arm("disk.reopen=errno:EIO@1")
    assert not disk.reopen()
    assert disk.reopen()
    assert disk.up
    assert disk.record(place(0), info(KEYS[0])) is None
    disk.spill([spill(host, 0, KEYS[0], 0, generation=2)])
    assert disk.record(place(0, 2), info(KEYS[0])) is not None
    disk.close()
    assert len(disk_files.failures) == 1


def test_a_forgotten_block_is_gone_after_a_restart(host: HostArena, disk_files: DiskFiles) -> None:
    disk = disk_files.open()
    disk.spill([spill(host, i * SLOT, KEYS[i], i * SLOT) for i in range(3)])
    disk.forget([SLOT])
    disk.flush_forgotten()
    disk.forget([2 * SLOT])  # closing flushes too
    disk.close()
    assert disk_files.records() == {0: KEYS[0]}


def test_what_was_forgotten_while_down_does_not_come_back(
    host: HostArena, disk_files: DiskFiles
) -> None:
    disk = disk_files.open()
    disk.spill([spill(host, i * SLOT, KEYS[i], i * SLOT) for i in range(2)])
    failpoints.arm("promote.read=errno:EIO@1")
    with pytest.raises(DiskDown):
        disk.read(place(0), host.slot(0, SLOT))
    disk.forget([0])
    assert disk.reopen()
    assert disk.record(place(0), info(KEYS[0])) is None
    assert disk.record(place(SLOT), info(KEYS[1])) is not None
    disk.close()


def test_a_namespace_added_while_down_is_there_afterwards(disk_files: DiskFiles) -> None:
    disk: DiskTier = disk_files.open()
    failpoints.arm("promote.read=errno:EIO@1")
    with pytest.raises(DiskDown):
        disk.read(place(0), np.empty(4096, np.uint8))
    disk.add_namespace(BLOCKS.spec)
    assert disk.reopen()
    assert disk._journal.namespaces() == {BLOCKS.spec.id: BLOCKS.spec.canonical}
    disk.close()
