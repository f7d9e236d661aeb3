"""Threads that move bytes for the driver: a pool for copies and checks, one thread for the disk.

Rule 1: every job is answered by exactly one JobDone, whatever happens. `close` lets what has begun
end and answers what still waits for the disk with an error.
Rule 2: only the disk thread writes the slot file and the journal, so their order needs no locks.
Reads of the slot file run in the pool beside it.
Rule 3: when the disk tier goes down, its jobs fail at once until it has come back; the disk thread
tries every REOPEN_S seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvproto.namespace import NamespaceSpec
from kvserver.core.events import (
    Event,
    JobDone,
    Place,
    Tier,
    TierUp,
)
from kvserver.core.instructions import (
    Copy,
    JobKind,
    Verify,
)
from kvserver.journal.record import DiskRecord
from kvserver.runtime.copies import Copies, Shape
from kvserver.runtime.device import DeviceDown
from kvserver.runtime.disk import DiskDown, DiskTier, Spill
from kvserver.tiers.checksums import verify_slot
from kvserver.tiers.entry import ValidEntry
from kvserver.tiers.host import HostArena

REOPEN_S = 3.0
BATCH_BLOCKS_MAX = 64
BATCH_BYTES_MAX = 64 << 20


class Mover:
    """`post` takes events from any thread; `report(where, error)` is told of every incident."""

    def __init__(
        self,
        host: HostArena,
        copies: Copies,
        disk: DiskTier | None,
        *,
        threads: int,
        spec_of: Callable[[int], NamespaceSpec],
        post: Callable[[Event], None],
        report: Callable[[str, BaseException], object],
        log: logging.Logger,
        reopen_s: float = REOPEN_S,
    ) -> None:
        self._host = host
        self._copies = copies
        self._disk = disk
        self._spec_of = spec_of
        self._post = post
        self._report = report
        self._log = log
        self._reopen_s = reopen_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mover")
        self._spills: deque[tuple[Copy, NamespaceSpec]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._dirty = False  # something waits for the disk thread besides spills
        self._namespaces: deque[NamespaceSpec | bytes] = deque()  # to be added, or an id to go
        self._retry_at = 0.0
        self._disk_thread: threading.Thread | None = None
        if disk is not None:
            self._disk_thread = threading.Thread(target=self._run_disk, name="mover-disk")
            self._disk_thread.start()

    # ---- called on the loop's thread -----------------------------------------------------------

    def submit(self, job: Copy | Verify) -> None:
        """Begin a job; its JobDone is posted when it has ended."""
        spec = self._spec_of(job.info.namespace)
        if isinstance(job, Copy) and job.kind is JobKind.SPILL:
            with self._wake:
                self._spills.append((job, spec))
                self._wake.notify()
        else:
            self._pool.submit(self._run_job, job, spec)

    def forget(self, place: Place) -> None:
        """A disk slot's block has left: its record goes, at the latest before its bytes change."""
        assert self._disk is not None, place
        self._disk.forget([place.offset])
        with self._wake:
            self._dirty = True
            self._wake.notify()

    def add_namespace(self, spec: NamespaceSpec) -> None:
        """The journal learns of it before any record that names it."""
        if self._disk is not None:
            with self._wake:
                self._namespaces.append(spec)
                self._wake.notify()

    def drop_namespace(self, identity: bytes) -> None:
        """No block of it is left: the journal forgets it."""
        if self._disk is not None:
            with self._wake:
                self._namespaces.append(identity)
                self._wake.notify()

    def close(self) -> None:
        """What has begun ends, what waits for the disk is given up; then the threads end."""
        with self._wake:
            self._closing = True
            given_up = [job.job for job, _ in self._spills]
            self._spills.clear()
            self._wake.notify()
        for job in given_up:
            self._post(JobDone(job, "the server is stopping"))
        if self._disk_thread is not None:
            self._disk_thread.join()
        self._pool.shutdown(wait=True)
        if self._disk is not None:
            self._disk.close()

    # ---- the pool --------------------------------------------------------------------------

    def _run_job(self, job: Copy | Verify, spec: NamespaceSpec) -> None:
        try:
            done = self._copies.carry_out(job, spec)
        except (DiskDown, DeviceDown, OSError) as error:
            done = JobDone(job.job, str(error))
            with self._wake:
                self._wake.notify()  # a read may be what took the disk down
        except Exception as error:
            self._report(type(job).__name__, error)
            done = JobDone(job.job, f"internal error: {error!r}")
        self._post(done)

    # ---- the disk thread ---------------------------------------------------------------------

    def _run_disk(self) -> None:
        disk = self._disk
        assert disk is not None
        while True:
            with self._wake:
                if disk.up:
                    self._wake.wait_for(lambda: self._has_work() or not disk.up)
                else:
                    self._wake.wait_for(self._has_work, self._reopen_s)
                batch, namespaces = self._take_batch(), list(self._namespaces)
                self._namespaces.clear()
                dirty, self._dirty = self._dirty, False
                if self._closing and not batch and not namespaces and not dirty:
                    return
            try:
                ended = self._serve_disk(disk, batch, namespaces, dirty=dirty)
            except Exception as error:
                self._report("disk thread", error)
                ended = [JobDone(job.job, f"internal error: {error!r}") for job, _ in batch]
            for done in ended:
                self._post(done)

    def _has_work(self) -> bool:
        return bool(self._spills or self._namespaces or self._dirty or self._closing)

    def _take_batch(self) -> list[tuple[Copy, NamespaceSpec]]:
        batch: list[tuple[Copy, NamespaceSpec]] = []
        total = 0
        while self._spills and len(batch) < BATCH_BLOCKS_MAX and total < BATCH_BYTES_MAX:
            batch.append(self._spills.popleft())
            total += batch[-1][0].source.slot_bytes
        return batch

    def _serve_disk(
        self,
        disk: DiskTier,
        batch: list[tuple[Copy, NamespaceSpec]],
        namespaces: list[NamespaceSpec | bytes],
        *,
        dirty: bool,
    ) -> list[JobDone]:
        for item in namespaces:
            if isinstance(item, bytes):
                disk.drop_namespace(item)
            else:
                disk.add_namespace(item)
        if not disk.up:
            self._come_back(disk)
        prepared = [self._prepare(job, spec) for job, spec in batch]
        ready = [spill for spill in prepared if isinstance(spill, Spill)]
        error = ""
        try:
            if ready:
                disk.spill(ready)
            elif dirty:
                disk.flush_forgotten()
        except DiskDown as down:
            error = str(down)
        return [
            JobDone(done.copy.job, error) if isinstance(done, Spill) else done for done in prepared
        ]

    def _prepare(self, job: Copy, spec: NamespaceSpec) -> Spill | JobDone:
        """What to write; bytes that are wrong already stay off the disk."""
        entry = self._host.read_entry(job.source.offset)
        if not isinstance(entry, ValidEntry) or entry.generation != job.source.generation:
            return JobDone(job.job, "the source has changed")
        info, target, shape = job.info, job.target, Shape.of(spec, job.info)
        view = self._host.slot(job.source.offset, shape.io_bytes)
        if not verify_slot(view, shape.cells, shape.cell_bytes, entry.root):
            return JobDone(job.job, "checksums differ in memory", corrupt=True)
        record = DiskRecord(
            target.offset,
            target.slot_bytes,
            target.generation,
            spec.tag,
            info.key,
            info.parent,
            info.tokens,
            entry.root,
        )
        return Spill(job, view, record)

    def _come_back(self, disk: DiskTier) -> None:
        now = time.monotonic()
        if self._closing or now < self._retry_at:
            return
        self._retry_at = now + self._reopen_s
        if disk.reopen():
            self._log.warning("disk_up")
            self._post(TierUp(Tier.DISK))
