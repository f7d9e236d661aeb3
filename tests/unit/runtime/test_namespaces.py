"""What is written down of namespaces: before use, in both places, and bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvproto.namespace import NamespaceSpec
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.observe.logs import get_logger
from kvserver.runtime.copies import Copies
from kvserver.runtime.mover import Mover
from kvserver.runtime.namespaces import Namespaces
from kvserver.tiers.host import HostArena
from kvserver.tiers.names import NamespaceLog
from tests.support.payload import Blocks
from tests.unit.runtime.conftest import DiskFiles, Posted, spec_of

SPECS = [Blocks(name=f"model-{i}").spec for i in range(12)]
LIVE_MAX = 4


class Rig:
    def __init__(self, host: HostArena, disk_files: DiskFiles) -> None:
        disk = disk_files.open()
        self.journal = disk._journal
        self.log = NamespaceLog.open(host.path.parent)
        self.live: set[bytes] = set()
        self.mover = Mover(
            host,
            Copies(host, disk=disk, device=None),
            disk,
            threads=1,
            spec_of=spec_of,
            post=Posted(),
            report=lambda *_: None,
            log=get_logger("test"),
        )
        self.namespaces = Namespaces(
            self.log, self.mover, lives=self.live.__contains__, live_max=LIVE_MAX
        )
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.mover.close()
            self.log.close()

    def names(self) -> set[bytes]:
        return set(NamespaceLog.open(self.log.path.parent).canonicals)


@pytest.fixture
def rig(host: HostArena, disk_files: DiskFiles) -> Iterator[Rig]:
    rig = Rig(host, disk_files)
    yield rig
    rig.close()


def canonicals(specs: list[NamespaceSpec]) -> set[bytes]:
    return {spec.canonical for spec in specs}


def journaled(disk_files: DiskFiles) -> set[bytes]:
    disk = disk_files.open()
    found = set(disk._journal.namespaces().values())
    disk.close()
    return found


def test_a_namespace_is_in_log_and_journal(rig: Rig, disk_files: DiskFiles) -> None:
    for spec in (*SPECS[:3], SPECS[0]):
        rig.namespaces.add(spec)
    assert rig.names() == canonicals(SPECS[:3])
    rig.namespaces.drop([SPECS[1].id, bytes(32)])
    rig.close()
    assert rig.names() == canonicals([SPECS[0], SPECS[2]])
    assert journaled(disk_files) == canonicals([SPECS[0], SPECS[2]])


def test_what_the_core_has_forgotten_goes_when_there_are_too_many(rig: Rig) -> None:
    rig.live.update(spec.id for spec in SPECS[:2])
    for spec in SPECS:
        rig.namespaces.add(spec)
    assert len(rig.namespaces) <= 2 * LIVE_MAX
    assert canonicals([*SPECS[:2], SPECS[-1]]) <= rig.names()


def test_a_start_brings_log_and_journal_in_line(rig: Rig, disk_files: DiskFiles) -> None:
    """A namespace that only the arena knew must reach the journal before a block of it does."""
    rig.namespaces.add(SPECS[0])
    rig.namespaces.add(SPECS[1])
    rig.namespaces.restored(SPECS[1:3], [SPECS[0].id, SPECS[1].id])
    rig.close()
    assert rig.names() == canonicals(SPECS[1:3])
    assert journaled(disk_files) == canonicals(SPECS[1:3])


def test_a_log_that_cannot_be_written_refuses_the_namespace(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: bytes) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rig.log, "add", full)
        with pytest.raises(CoreError, match="No space left") as caught:
            rig.namespaces.add(SPECS[0])
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert len(rig.namespaces) == 0
    rig.namespaces.add(SPECS[0])
    assert len(rig.namespaces) == 1
