"""A small arena, slot file and journal in temporary directories, and blocks to put there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvproto.checksum import grid_checksums, root_of
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT
from kvserver.core.events import (
    Event,
    JobDone,
    Place,
    Tier,
)
from kvserver.core.instructions import (
    BlockInfo,
    Copy,
    JobKind,
)
from kvserver.journal.directory import Directory
from kvserver.journal.errors import JOURNAL_NAME
from kvserver.observe.logs import get_logger
from kvserver.runtime import failpoints
from kvserver.runtime.disk import DiskTier
from kvserver.tiers.disk import SLOTS_NAME, DiskFile
from kvserver.tiers.host import HostArena
from tests.support.payload import Blocks

BLOCKS = Blocks(layers=2, heads=2, page_bytes=512)
SLOT = 32 << 10  # payload 16 KiB and a trailer
HANDLE = 1


def spec_of(handle: int) -> NamespaceSpec:
    assert handle == HANDLE
    return BLOCKS.spec


def info(key: bytes) -> BlockInfo:
    return BlockInfo(HANDLE, key, ROOT, BLOCKS.spec.block_tokens)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


@pytest.fixture
def host() -> Iterator[HostArena]:
    directory = Path(tempfile.mkdtemp(prefix="kvserver-test-", dir="/dev/shm"))
    arena = HostArena.open(directory, 8 << 20)
    yield arena
    arena.close()
    shutil.rmtree(directory)


def put_block(host: HostArena, offset: int, key: bytes, generation: int = 1) -> Place:
    """A VALID block in the arena, as pushes leave it."""
    payload = BLOCKS.payload(key)
    trailer = grid_checksums(payload).tobytes()
    slot = host.slot(offset, SLOT)
    slot[: payload.size] = payload.reshape(-1)
    slot[payload.size : payload.size + len(trailer)] = memoryview(trailer)
    spec = BLOCKS.spec
    host.write_valid(
        offset, SLOT, generation, spec.tag, key, ROOT, spec.block_tokens, root_of(trailer)
    )
    return Place(Tier.HOST, offset, SLOT, generation)


def is_block(host: HostArena, offset: int, key: bytes) -> bool:
    payload = BLOCKS.payload(key).reshape(-1)
    return bool((host.slot(offset, payload.size) == payload).all())


@dataclass
class DiskFiles:
    """A DiskTier that can be opened again, as after a restart."""

    path: Path
    failures: list[str] = field(default_factory=list)

    def open(self) -> DiskTier:
        self.path.mkdir(exist_ok=True)
        file = DiskFile.open(self.path / SLOTS_NAME, 8 << 20)
        journal = Directory.open(self.path / JOURNAL_NAME, file_id=file.file_id)
        return DiskTier(file, journal, failed=self.failures.append, log=get_logger("test"))

    def records(self) -> dict[int, bytes]:
        """Offset -> key of every record, read from a closed journal."""
        journal = Directory.open_readonly(self.path / JOURNAL_NAME)
        try:
            return {record.offset: record.key for record in journal.scan(1 << 40).records}
        finally:
            journal.close()


@pytest.fixture
def disk_files(tmp_path: Path) -> DiskFiles:
    return DiskFiles(tmp_path / "disk")


def spill_job(job: int, source: Place, offset: int, key: bytes, *, generation: int = 1) -> Copy:
    target = Place(Tier.DISK, offset, SLOT, generation)
    return Copy(job, JobKind.SPILL, source, target, info(key))


class Posted:
    """Collects what the mover posts; `done` waits for that many JobDone."""

    def __init__(self) -> None:
        import threading

        self.events: list[Event] = []
        self._more = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    def wait(self, count: int, kind: type[Event] = JobDone, timeout: float = 10.0) -> list[Event]:
        def found() -> list[Event]:
            return [event for event in self.events if isinstance(event, kind)]

        with self._more:
            assert self._more.wait_for(lambda: len(found()) >= count, timeout), self.events
            return found()
