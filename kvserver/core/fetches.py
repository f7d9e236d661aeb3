"""Copies into the host tier for readers (from disk or device), and out to the device by heat.

Rule 1: one block has at most one fetch; whoever wants it shares the copy.
Rule 2: what arrives is pinned for each stream and each Lookup lease that asked for it and still
        wants it, before anything else may take the slot.
Rule 3: fetches in flight are bounded in number and bytes; one is always allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np
import numpy.typing as npt

from kvserver.core.blocks import COMPLETE, bit
from kvserver.core.books import DEVICE, HOST, Books
from kvserver.core.events import JobDone, Tier
from kvserver.core.holds import Holds
from kvserver.core.instructions import JobKind
from kvserver.core.jobs import Job, Jobs
from kvserver.core.slabs import slot_bytes_max
from kvserver.core.slots import SlotAction
from kvserver.core.space import Space


class Start(Enum):
    """What came of asking for a block."""

    RUNNING = 0  # it is on its way
    NO_ROOM = 1  # no host slot, or too much in flight: stand in the queue of its class
    NOWHERE = 2  # no working tier holds it


class Fetches:
    def __init__(self, books: Books, space: Space, jobs: Jobs, holds: Holds) -> None:
        self._books = books
        self._space = space
        self._jobs = jobs
        self._holds = holds
        self._wanted: dict[int, tuple[dict[int, int], set[int]]] = {}  # row -> streams, leases
        self._device_slot_bytes_max = slot_bytes_max(books.slots[DEVICE].map.total)
        self.running = 0
        self.bytes = 0
        self.uploads = 0
        self.arrived: Callable[[int, int, int], None] = lambda stream, index, slot: None
        self.failed: Callable[[int, int], None] = lambda stream, index: None
        for kind in (JobKind.PROMOTE, JobKind.DOWNLOAD):
            jobs.on(kind, self._done)
        jobs.on(JobKind.UPLOAD, self._uploaded)
        books.before_leave.append(self._forget)

    # ---- into the host tier

    def source(self, row: int) -> Tier | None:
        """The fastest working tier other than the host that holds the block."""
        return self._books.blocks.fastest(row, self._books.up_bits & ~bit(HOST))

    def begin(self, row: int, *, patient: bool) -> Start:
        """Have a COMPLETE block that is not on the host copied there."""
        if row in self._wanted:
            return Start.RUNNING
        books = self._books
        source = self.source(row)
        if source is None or not books.host.up:
            return Start.NOWHERE
        slot_bytes = books.slots[source].bytes_of(books.blocks.slot[source][row])
        if self.running and not self._allowed(slot_bytes):
            return Start.NO_ROOM
        slot = self._space.obtain(HOST, slot_bytes, SlotAction.AIM, patient=patient)
        if not slot:
            return Start.NO_ROOM
        kind = JobKind.DOWNLOAD if source == DEVICE else JobKind.PROMOTE
        self._wanted[row] = ({}, set())
        self._jobs.copy(kind, row, source, HOST, slot)
        self.running += 1
        self.bytes += slot_bytes
        return Start.RUNNING

    def coming(self, row: int) -> bool:
        """A fetch of the block is running."""
        return row in self._wanted

    def _allowed(self, slot_bytes: int) -> bool:
        config = self._books.config
        room = self.bytes + slot_bytes <= config.promotion_bytes_max
        return room and self.running < config.promotions_max

    def want_for_stream(self, row: int, stream: int, index: int) -> None:
        self._wanted[row][0][stream] = index

    def want_for_lease(self, row: int, lease: int) -> None:
        self._wanted[row][1].add(lease)

    def unwant(self, row: int, stream: int) -> None:
        """A stream does without; the copy goes on."""
        if row in self._wanted:
            self._wanted[row][0].pop(stream, None)

    def _done(self, job: Job, event: JobDone) -> None:
        books, row = self._books, job.row
        self.running -= 1
        self.bytes -= job.bytes
        books.room = True
        failed = bool(event.error) or event.corrupt
        name = "downloads" if job.kind is JobKind.DOWNLOAD else "promotions"
        books.counters["promotion_failed" if failed else name] += 1
        if not self._jobs.alive(job):
            if job.target and books.host.row[job.target[1]] == row:
                books.detach(row, HOST)  # the source was found wrong meanwhile
                self._forget(row)
            return
        streams, leases = self._wanted.pop(row)
        if failed:
            books.detach(row, HOST)
            self._fail(job, event, streams)
            return
        slot = books.blocks.slot[HOST][row]
        books.settle(row, HOST)
        for stream, index in streams.items():
            self.arrived(stream, index, slot)
        for ident in leases:
            lease = self._holds.leases.get(ident)
            if lease is not None:
                books.pin(HOST, slot)
                lease.pins.append((HOST, slot))
        books.wake(row)

    def _fail(self, job: Job, event: JobDone, streams: dict[int, int]) -> None:
        books, row = self._books, job.row
        if event.corrupt:
            books.corrupt(row, job.source[0])
            return
        for stream, index in streams.items():
            self.failed(stream, index)
        books.wake(row)

    def _forget(self, row: int) -> None:
        self._wanted.pop(row, None)
        self._books.wake(row)

    # ---- out to the device

    def warm(self, rows: npt.NDArray[np.intp]) -> None:
        """Blocks were used: the hot ones among them go to the device, as far as it is idle."""
        books = self._books
        device, blocks = books.slots[DEVICE], books.blocks
        if not device.map.total or not device.up:
            return
        resident = blocks.resident_view[rows]
        hot = (blocks.heat_view[rows] >= books.config.upload_heat) & (resident & bit(HOST) > 0)
        for row in np.unique(rows[hot & (resident & bit(DEVICE) == 0)]).tolist():
            if self.uploads >= books.config.uploads_max:
                return
            self._upload(row)

    def _upload(self, row: int) -> None:
        books, blocks = self._books, self._books.blocks
        taken = blocks.slot[DEVICE][row] or blocks.suspect[row] & bit(HOST)
        slot_bytes = books.host.bytes_of(blocks.slot[HOST][row])
        if blocks.state[row] != COMPLETE or taken or slot_bytes > self._device_slot_bytes_max:
            return
        slot = self._space.obtain(DEVICE, slot_bytes, SlotAction.AIM, patient=False)
        if slot:
            self._jobs.copy(JobKind.UPLOAD, row, HOST, DEVICE, slot)
            self.uploads += 1

    def _uploaded(self, job: Job, event: JobDone) -> None:
        books, row = self._books, job.row
        self.uploads -= 1
        failed = bool(event.error) or event.corrupt
        books.counters["uploads"] += not failed
        target = job.target[1] if job.target else 0
        if books.slots[DEVICE].row[target] != row:
            return
        if failed or not self._jobs.alive(job) or not books.slots[DEVICE].up:
            books.detach(row, DEVICE)
        else:
            books.settle(row, DEVICE)
        if event.corrupt and books.host.row[job.source[1]] == row:
            books.corrupt(row, HOST)
