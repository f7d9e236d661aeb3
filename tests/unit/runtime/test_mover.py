"""The mover carries out every kind of job, and answers each exactly once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvserver.core.events import (
    JobDone,
    Place,
    Tier,
    TierDown,
    TierUp,
)
from kvserver.core.instructions import (
    Copy,
    JobKind,
    Verify,
)
from kvserver.observe.logs import get_logger
from kvserver.runtime import failpoints
from kvserver.runtime.copies import Copies
from kvserver.runtime.device import DeviceTier
from kvserver.runtime.disk import DiskTier
from kvserver.runtime.mover import Mover
from kvserver.tiers.device import MemoryDevice
from kvserver.tiers.entry import ValidEntry
from kvserver.tiers.errors import TierError
from kvserver.tiers.host import HostArena
from tests.unit.runtime.conftest import (
    BLOCKS,
    SLOT,
    DiskFiles,
    Posted,
    info,
    is_block,
    put_block,
    spec_of,
    spill_job,
)

KEYS = BLOCKS.chain(1, 8)


class Rig:
    """A mover over real tiers, and what it posted."""

    def __init__(self, host: HostArena, disk_files: DiskFiles) -> None:
        self.host = host
        self.posted = Posted()
        self.incidents: list[BaseException] = []
        self.disk: DiskTier = disk_files.open()
        self.disk._failed = lambda reason: self.posted(TierDown(Tier.DISK, reason))
        self.arena = MemoryDevice(1 << 20)
        self.device = DeviceTier(
            self.arena, failed=lambda reason: self.posted(TierDown(Tier.DEVICE, reason))
        )
        copies = Copies(host, disk=self.disk, device=self.device)
        self.mover = Mover(
            host,
            copies,
            self.disk,
            threads=2,
            spec_of=spec_of,
            post=self.posted,
            report=lambda _, error: self.incidents.append(error),
            log=get_logger("test"),
            reopen_s=0.1,
        )

    def done(self, count: int) -> dict[int, JobDone]:
        """The last `count` results, by job; each job once."""
        events = self.posted.wait(count)
        assert len(events) == count, events
        return {event.job: event for event in events if isinstance(event, JobDone)}


@pytest.fixture
def rig(host: HostArena, disk_files: DiskFiles) -> Iterator[Rig]:
    rig = Rig(host, disk_files)
    yield rig
    rig.mover.close()
    assert rig.incidents == []


def promote(job: int, source_offset: int, target: Place, key: bytes) -> Copy:
    source = Place(Tier.DISK, source_offset, SLOT, 1)
    return Copy(job, JobKind.PROMOTE, source, target, info(key))


def spilled(rig: Rig, count: int) -> None:
    for i in range(count):
        source = put_block(rig.host, i * SLOT, KEYS[i])
        rig.mover.submit(spill_job(i, source, i * SLOT, KEYS[i]))
    assert all(not done.error for done in rig.done(count).values())
    rig.posted.events.clear()


def test_spill_and_promote_bring_the_same_block_back(rig: Rig) -> None:
    spilled(rig, 4)
    base = 16 * SLOT
    for i in range(4):
        target = Place(Tier.HOST, base + i * SLOT, SLOT, 5)
        rig.mover.submit(promote(i, i * SLOT, target, KEYS[i]))
    assert all(done == JobDone(job) for job, done in rig.done(4).items())
    for i in range(4):
        assert is_block(rig.host, base + i * SLOT, KEYS[i])
        entry = rig.host.read_entry(base + i * SLOT)
        assert isinstance(entry, ValidEntry)
        assert (entry.key, entry.generation) == (KEYS[i], 5)


def test_wrong_bytes_on_disk_are_corrupt_and_never_valid(rig: Rig) -> None:
    spilled(rig, 1)
    page = rig.host.slot(4 << 20, 4096)
    rig.disk.read(Place(Tier.DISK, 0, SLOT, 1), page)
    page[17] ^= 1
    rig.disk._file.write(0, page)
    target = Place(Tier.HOST, 16 * SLOT, SLOT, 5)
    rig.mover.submit(promote(7, 0, target, KEYS[0]))
    done = rig.done(1)[7]
    assert done.corrupt
    assert not isinstance(rig.host.read_entry(target.offset), ValidEntry)
    assert rig.disk.up


def test_a_block_that_the_journal_does_not_know_is_corrupt(rig: Rig) -> None:
    rig.mover.submit(promote(1, 5 * SLOT, Place(Tier.HOST, 0, SLOT, 5), KEYS[0]))
    assert rig.done(1)[1].corrupt


def test_upload_and_download_through_the_device(rig: Rig) -> None:
    source = put_block(rig.host, 0, KEYS[0])
    device = Place(Tier.DEVICE, SLOT, SLOT, 1)
    target = Place(Tier.HOST, 16 * SLOT, SLOT, 9)
    rig.mover.submit(Copy(1, JobKind.UPLOAD, source, device, info(KEYS[0])))
    rig.done(1)
    rig.mover.submit(Copy(2, JobKind.DOWNLOAD, device, target, info(KEYS[0])))
    assert not rig.done(2)[2].error
    assert is_block(rig.host, target.offset, KEYS[0])
    rig.mover.submit(Verify(3, device, info(KEYS[0])))
    rig.mover.submit(Verify(4, target, info(KEYS[0])))
    assert all(not done.error for done in rig.done(4).values())


def test_wrong_bytes_on_the_device_are_corrupt_and_never_valid(rig: Rig) -> None:
    source = put_block(rig.host, 0, KEYS[0])
    device = Place(Tier.DEVICE, SLOT, SLOT, 1)
    target = Place(Tier.HOST, 16 * SLOT, SLOT, 9)
    rig.mover.submit(Copy(1, JobKind.UPLOAD, source, device, info(KEYS[0])))
    rig.done(1)
    rig.arena.upload(SLOT + 17, rig.host.slot(17, 1) ^ 1)
    rig.mover.submit(Copy(2, JobKind.DOWNLOAD, device, target, info(KEYS[0])))
    assert rig.done(2)[2].corrupt
    assert not isinstance(rig.host.read_entry(target.offset), ValidEntry)
    assert rig.device.up


@pytest.mark.parametrize("name", ["upload", "download"])
def test_a_device_that_fails_once_is_asked_no_more(
    rig: Rig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put_block(rig.host, 0, KEYS[0])
    device = Place(Tier.DEVICE, SLOT, SLOT, 1)
    target = Place(Tier.HOST, 16 * SLOT, SLOT, 9)
    rig.mover.submit(Copy(1, JobKind.UPLOAD, source, device, info(KEYS[0])))
    rig.done(1)
    asked: list[int] = []

    def broken(offset: int, view: object) -> None:
        asked.append(offset)
        raise TierError(f"{name}: cudaErrorIllegalAddress: an illegal memory access")

    monkeypatch.setattr(rig.arena, name, broken)
    up = Copy(2, JobKind.UPLOAD, source, device, info(KEYS[0]))
    down = Copy(3, JobKind.DOWNLOAD, device, target, info(KEYS[0]))
    rig.mover.submit(up if name == "upload" else down)
    (fallen,) = rig.posted.wait(1, TierDown)
    assert isinstance(fallen, TierDown)
    assert fallen.tier is Tier.DEVICE
    assert "cudaErrorIllegalAddress" in fallen.reason
    for job in (up, down, Verify(4, device, info(KEYS[0]))):
        rig.mover.submit(job)
    ended = [e for e in rig.posted.wait(5) if isinstance(e, JobDone) and e.job > 1]
    assert len(ended) == 4
    assert all(done.error and not done.corrupt for done in ended), ended
    assert asked == [SLOT]
    assert not rig.device.up
    assert not isinstance(rig.host.read_entry(target.offset), ValidEntry)


def test_verify_finds_a_flipped_bit_in_every_tier(rig: Rig) -> None:
    spilled(rig, 2)
    host = Place(Tier.HOST, 0, SLOT, 1)
    rig.mover.submit(Verify(1, host, info(KEYS[0])))
    rig.mover.submit(Verify(2, Place(Tier.DISK, SLOT, SLOT, 1), info(KEYS[1])))
    assert all(not done.corrupt for done in rig.done(2).values())
    rig.host.slot(0, SLOT)[SLOT // 4] ^= 4
    rig.mover.submit(Verify(3, host, info(KEYS[0])))
    assert rig.done(3)[3].corrupt
    rig.mover.submit(Verify(4, Place(Tier.HOST, 0, SLOT, 2), info(KEYS[0])))
    assert rig.done(4)[4].corrupt  # not this life of the slot


def test_a_source_that_changed_is_not_written(rig: Rig) -> None:
    source = put_block(rig.host, 0, KEYS[0])
    rig.host.write_invalid(0, 2)
    rig.mover.submit(spill_job(1, source, 0, KEYS[0]))
    assert rig.done(1)[1].error == "the source has changed"
    assert rig.disk.record(Place(Tier.DISK, 0, SLOT, 1), info(KEYS[0])) is None


def test_bytes_that_are_wrong_in_memory_stay_off_the_disk(rig: Rig) -> None:
    source = put_block(rig.host, 0, KEYS[0])
    rig.host.slot(0, SLOT)[5] ^= 1
    rig.mover.submit(spill_job(1, source, 0, KEYS[0]))
    assert rig.done(1)[1].corrupt
    assert rig.disk.record(Place(Tier.DISK, 0, SLOT, 1), info(KEYS[0])) is None


def test_the_disk_goes_down_and_comes_back_by_itself(rig: Rig) -> None:
    failpoints.arm("spill.write=errno:EIO@1;disk.reopen=errno:EIO@1-2")
    source = put_block(rig.host, 0, KEYS[0])
    rig.mover.submit(spill_job(1, source, 0, KEYS[0]))
    assert "EIO" in rig.done(1)[1].error or "Input/output" in rig.done(1)[1].error
    assert len(rig.posted.wait(1, TierDown)) == 1
    rig.posted.wait(1, TierUp, timeout=5)
    rig.mover.submit(spill_job(2, source, 0, KEYS[0]))
    assert rig.done(2)[2] == JobDone(2)


def test_spills_of_one_batch_share_their_syncs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, syncs = threading.Event(), []
    sync = rig.disk._file.sync

    def counted() -> None:
        syncs.append(1)
        gate.wait(10)
        sync()

    monkeypatch.setattr(rig.disk._file, "sync", counted)
    for i in range(8):
        source = put_block(rig.host, i * SLOT, KEYS[i])
        rig.mover.submit(spill_job(i, source, i * SLOT, KEYS[i]))
    gate.set()
    assert all(not done.error for done in rig.done(8).values())
    assert len(syncs) <= 3


def test_a_bug_in_a_job_is_an_incident_and_still_answers(
    host: HostArena, disk_files: DiskFiles
) -> None:
    rig = Rig(host, disk_files)
    nowhere = Place(Tier.HOST, 1 << 40, SLOT, 1)
    rig.mover.submit(Verify(1, nowhere, info(KEYS[0])))
    rig.mover.submit(spill_job(2, nowhere, 0, KEYS[0]))
    assert all(done.error.startswith("internal error") for done in rig.done(2).values())
    assert len(rig.incidents) == 2
    rig.mover.close()


def test_close_answers_what_still_waits(host: HostArena, disk_files: DiskFiles) -> None:
    rig = Rig(host, disk_files)
    failpoints.arm("spill.before_write=sleep:0.2")
    for i in range(8):
        source = put_block(host, i * SLOT, KEYS[i])
        rig.mover.submit(spill_job(i, source, i * SLOT, KEYS[i]))
    rig.mover.close()
    assert len(rig.done(8)) == 8
