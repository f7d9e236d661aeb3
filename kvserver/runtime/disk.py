"""The disk tier: slot file and journal together, their write order, their failure and return.

    SPILL   records of the targets gone, synced -> bytes -> fdatasync -> records VALID -> synced

Rule 1: a record is VALID only while the slot's bytes are what it says: it is deleted, durably,
before a byte of its slot changes, and written after the bytes are synced.
Rule 2: one batch of spills pays for one sync each of journal, file and journal.
Rule 3: the first failure takes the whole tier down. What may or may not be in the journal then is
deleted before the tier comes back; the memory tier never notices.
Rule 4: a namespace is in the journal before the first record that names it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvproto.namespace import NamespaceSpec
from kvserver.core.events import (
    Place,
)
from kvserver.core.instructions import (
    BlockInfo,
    Copy,
)
from kvserver.journal.errors import JournalError
from kvserver.journal.record import DiskRecord
from kvserver.runtime import failpoints
from kvserver.tiers.disk import DiskFile
from kvserver.tiers.errors import DiskError

if TYPE_CHECKING:
    from kvserver.journal.directory import Directory

FAILURES = (DiskError, JournalError, OSError)


class DiskDown(Exception):
    """The tier is down; the job cannot be done now."""


@dataclass(frozen=True, slots=True)
class Spill:
    """One block to write: the bytes of its host slot and what the journal is to say."""

    copy: Copy
    view: npt.NDArray[np.uint8]
    record: DiskRecord


class DiskTier:
    """Slot file and journal of one directory. Thread-safe; `spill` is called by one thread.

    `failed(reason)` is called once, from any thread, when the tier goes down.
    """

    def __init__(
        self,
        file: DiskFile,
        journal: Directory,
        *,
        failed: Callable[[str], None],
        log: logging.Logger,
    ) -> None:
        self._file = file
        self._journal = journal
        self._failed = failed
        self._log = log
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running = 0  # operations on journal or file, in any thread
        self._namespaces: dict[bytes, bytes] = {}
        self._recorded: set[int] = set()
        self._forgotten: set[int] = set()
        self._deletes_unsynced = False
        self.up = True
        self.bytes_written = 0
        self.bytes_read = 0

    # ---- what the journal knows --------------------------------------------------------------

    def restored(self, offsets: Iterable[int], namespaces: Mapping[bytes, bytes]) -> None:
        """What recovery found, so that it is not asked for again."""
        self._recorded.update(offsets)
        self._namespaces.update(namespaces)

    def forget(self, offsets: Sequence[int]) -> None:
        """These slots hold nothing any more; durable before their bytes change."""
        with self._lock:
            self._forgotten.update(offsets)

    def record(self, place: Place, info: BlockInfo) -> DiskRecord | None:
        """The record of a block, None when the journal does not have exactly it."""
        with self._io("journal read"):
            record = self._journal.get(place.offset)
        if record is None or (record.key, record.generation) != (info.key, place.generation):
            return None
        return record

    def add_namespace(self, spec: NamespaceSpec) -> None:
        """Make a namespace known to the journal, now or when the tier is up again."""
        if spec.id in self._namespaces:
            return
        self._namespaces[spec.id] = spec.canonical
        with contextlib.suppress(DiskDown), self._io("journal write"):
            self._journal.put_namespace(spec.id, spec.canonical)

    def drop_namespace(self, identity: bytes) -> None:
        """No record names it any more."""
        if self._namespaces.pop(identity, None) is not None:
            with contextlib.suppress(DiskDown), self._io("journal write"):
                self._journal.remove_namespaces([identity])

    # ---- bytes ---------------------------------------------------------------------------------

    def read(self, place: Place, view: npt.NDArray[np.uint8]) -> None:
        with self._io("read"):
            failpoints.hit("promote.read")
            self._file.read(place.offset, view)
        self.bytes_read += view.nbytes

    def spill(self, batch: Sequence[Spill]) -> None:
        """Write a batch, in the order that the module's head shows. All of it or DiskDown."""
        with self._io("spill"):
            targets = [spill.copy.target.offset for spill in batch]
            try:
                self._write(batch, targets)
            except FAILURES:
                self.forget(targets)  # the journal may or may not know them
                raise
        self.bytes_written += sum(spill.view.nbytes for spill in batch)

    def _write(self, batch: Sequence[Spill], targets: list[int]) -> None:
        failpoints.hit("spill.before_invalid")
        self._delete(self._recorded.intersection(targets))
        if self._deletes_unsynced:
            self._sync_journal()
        failpoints.hit("spill.before_write")
        for spill in batch:
            failpoints.hit("spill.write")
            self._file.write(spill.copy.target.offset, spill.view)
        failpoints.hit("spill.before_sync")
        self._file.sync()
        failpoints.hit("spill.before_valid")
        self._recorded.update(targets)
        failpoints.hit("journal.put")
        self._journal.put_valid(*(spill.record for spill in batch))
        failpoints.hit("spill.before_wal_sync")
        self._sync_journal()
        failpoints.hit("spill.after_valid")

    def flush_forgotten(self) -> None:
        """Delete the records of dropped blocks; not synced, a spill into them will be."""
        with self._io("journal write"):
            self._delete(set())

    def _delete(self, offsets: set[int]) -> None:
        with self._lock:
            stale = offsets | self._forgotten
            self._forgotten = set()
        if not stale:
            return
        try:
            self._deletes_unsynced = True
            self._journal.put_invalid(sorted(stale))
        except BaseException:
            self.forget(sorted(stale))
            raise
        self._recorded -= stale

    def _sync_journal(self) -> None:
        failpoints.hit("journal.sync")
        self._journal.sync()
        self._deletes_unsynced = False

    # ---- failure and return --------------------------------------------------------------------

    @contextlib.contextmanager
    def _io(self, operation: str) -> Iterator[None]:
        with self._lock:
            if not self.up:
                raise DiskDown(f"{operation}: the disk tier is down")
            self._running += 1
        try:
            yield
        except FAILURES as error:
            self._go_down(f"{operation}: {error}")
            raise DiskDown(f"{operation}: {error}") from error
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _go_down(self, reason: str) -> None:
        with self._lock:
            was_up, self.up = self.up, False
        if was_up:
            self._failed(reason)

    def reopen(self) -> bool:
        """Try to come back: journal, file, and the records that must not survive."""
        with self._idle:
            self._idle.wait_for(lambda: self._running == 0)
        try:
            failpoints.hit("disk.reopen")
            self._journal.reopen()
            for identity, canonical in self._namespaces.items():
                self._journal.put_namespace(identity, canonical)
            self._file.sync()
            self._delete(set())
            self._journal.sync()
        except FAILURES as error:
            self._log.warning("disk_still_down", extra={"fields": {"reason": str(error)}})
            return False
        with self._lock:
            self.up = True
        return True

    def close(self) -> None:
        with contextlib.suppress(*FAILURES):
            self._delete(set())
            self._journal.sync()
        self._journal.close()
        self._file.close()
