"""Write-behind: completed host blocks on their way to disk.

Rule 1: a queued or running spill pins its host slot: what has no copy yet is not evicted.
Rule 2: bytes queued, running and promised to durable writers stay within the lag limit. At the
        limit an ordinary block loses its disk copy (counted); a durable one is not reserved.
Rule 3: when the disk goes down every queued spill fails, and who waits for it is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from kvserver.core.blocks import bit
from kvserver.core.books import DISK, HOST, Books
from kvserver.core.events import JobDone
from kvserver.core.instructions import JobKind
from kvserver.core.jobs import Job, Jobs
from kvserver.core.slabs import slot_bytes_max
from kvserver.core.slots import SlotAction
from kvserver.core.space import Space

DurableAnswer = Callable[[set[int]], None]


class Spill(IntEnum):
    """The `spill` column of the block table."""

    NONE = 0
    QUEUED = 1
    RUNNING = 2


class Spills:
    def __init__(self, books: Books, space: Space, jobs: Jobs) -> None:
        self._books = books
        self._space = space
        self._jobs = jobs
        self._queue: deque[int] = deque()  # rows; one whose `spill` is not QUEUED is stale
        self._durable: set[int] = set()  # rows whose copy someone waits for
        self._answers: dict[int, list[_Pending]] = {}  # row -> who waits
        self._disk = books.slots[DISK]
        self._slot_bytes_max = slot_bytes_max(self._disk.map.total)
        self.lag_bytes = 0
        self.running = 0
        self.queued = 0
        jobs.on(JobKind.SPILL, self._done)
        books.before_leave.append(self.cancel)
        books.before_corrupt_host.append(self.cancel)

    @property
    def possible(self) -> bool:
        """There is a disk tier, and it works."""
        return self._disk.up and self._disk.map.total > 0

    @property
    def idle(self) -> bool:
        return not self.queued and not self.running

    def on_disk(self, row: int) -> bool:
        return bool(self._books.blocks.resident[row] & bit(DISK)) and self._disk.up

    # ---- the lag limit

    def has_room(self, slot_bytes: int) -> bool:
        """The lag takes another block of this size, and the disk could hold it."""
        if not self.possible or slot_bytes > self._slot_bytes_max:
            return False
        return self.lag_bytes + slot_bytes <= self._books.config.lag_bytes_max

    def promise(self, slot_bytes: int) -> bool:
        """Keep room in the lag for a block; False when there is none."""
        if not self.has_room(slot_bytes):
            return False
        self.lag_bytes += slot_bytes
        return True

    def break_promise(self, slot_bytes: int) -> None:
        self.lag_bytes -= slot_bytes
        self._books.room = True

    # ---- the queue

    def add(self, row: int, *, durable: bool) -> None:
        """A block is complete. For a durable one room has been promised."""
        books = self._books
        slot_bytes = books.host.bytes_of(books.blocks.slot[HOST][row])
        if durable and not self.possible:
            self.break_promise(slot_bytes)
            books.counters["spill_failed"] += 1
        elif durable or self.promise(slot_bytes):
            self._enqueue(row, durable=durable)
        elif self._disk.map.total:
            books.counters["spill_skipped"] += 1

    def recover(self, row: int) -> None:
        """A restored block has proved sound: it may have been on its way to disk at the crash."""
        blocks = self._books.blocks
        if not blocks.slot[DISK][row] and not blocks.spill[row]:
            self.add(row, durable=False)

    def force(self, row: int) -> bool:
        """Have a block that is on the host only spilled. False when the lag has no room for it.

        One that has left the host is on disk or on the device; it is fetched first by no one.
        """
        books = self._books
        if books.blocks.spill[row]:
            self._durable.add(row)
            return True
        slot = books.blocks.slot[HOST][row]
        usable = books.blocks.resident[row] & bit(HOST) and not books.blocks.suspect[row] & bit(
            HOST
        )
        if not usable or not self.promise(books.host.bytes_of(slot)):
            return False
        self._enqueue(row, durable=True)
        return True

    def _enqueue(self, row: int, *, durable: bool) -> None:
        books = self._books
        books.blocks.spill[row] = Spill.QUEUED
        books.pin(HOST, books.blocks.slot[HOST][row])
        self.queued += 1
        self._queue.append(row)
        if durable:
            self._durable.add(row)

    def pump(self) -> None:
        """Start as many copies as are allowed, oldest first."""
        books = self._books
        while self._queue and self.running < books.config.spill_copies_max and self._disk.up:
            row = self._queue[0]
            if books.blocks.spill[row] != Spill.QUEUED:
                self._queue.popleft()
                continue
            slot_bytes = books.host.bytes_of(books.blocks.slot[HOST][row])
            slot = self._space.obtain(DISK, slot_bytes, SlotAction.AIM, patient=False)
            if not slot:
                return
            self._queue.popleft()
            books.blocks.spill[row] = Spill.RUNNING
            self.queued -= 1
            self.running += 1
            self._jobs.copy(JobKind.SPILL, row, HOST, DISK, slot, durable=row in self._durable)

    def _done(self, job: Job, event: JobDone) -> None:
        books, row = self._books, job.row
        self.running -= 1
        self.break_promise(job.bytes)
        alive = self._jobs.alive(job)
        failed = bool(event.error) or event.corrupt
        books.counters["spill_failed" if failed else "spills"] += 1
        if not alive:
            if self._disk.row[job.target[1] if job.target else 0] == row:
                books.detach(row, DISK)  # the host's copy turned out wrong
            return
        books.blocks.spill[row] = Spill.NONE
        books.unpin(*job.source)  # the queue's pin; the job's own still stands
        if failed:
            books.detach(row, DISK)
        else:
            books.settle(row, DISK)
        self._tell(row, failed=failed)
        if event.corrupt:
            books.corrupt(row, HOST)

    def cancel(self, row: int) -> None:
        """The block leaves the host: its spill is pointless, or runs on for nobody."""
        books = self._books
        state = books.blocks.spill[row]
        if state == Spill.NONE:
            return
        books.blocks.spill[row] = Spill.NONE
        slot = books.blocks.slot[HOST][row]
        if state == Spill.QUEUED:
            self.queued -= 1
            self.break_promise(books.host.bytes_of(slot))
        books.host.unpin(slot)
        self._tell(row, failed=True)

    def fail_all(self) -> None:
        """The disk is down."""
        books = self._books
        for row in self._queue:
            if books.blocks.spill[row] == Spill.QUEUED:
                slot = books.blocks.slot[HOST][row]
                books.blocks.spill[row] = Spill.NONE
                self.queued -= 1
                self.break_promise(books.host.bytes_of(slot))
                books.counters["spill_failed"] += 1
                self._tell(row, failed=True)
                books.unpin(HOST, slot)
        self._queue.clear()

    # ---- durable answers

    def when_durable(self, rows: set[int], answer: DurableAnswer) -> None:
        """Call `answer` with the rows that failed, once every row is on disk or has failed."""
        pending = _Pending(set(), set(), answer)
        for row in rows:
            if self._books.blocks.spill[row] and row in self._durable:
                pending.rows.add(row)
                self._answers.setdefault(row, []).append(pending)
            elif not self.on_disk(row):
                pending.failed.add(row)
        if not pending.rows:
            answer(pending.failed)

    def _tell(self, row: int, *, failed: bool) -> None:
        self._durable.discard(row)
        for pending in self._answers.pop(row, ()):
            pending.rows.discard(row)
            if failed:
                pending.failed.add(row)
            if not pending.rows:
                pending.answer(pending.failed)


class _Pending:
    """An answer that waits for disk copies."""

    __slots__ = ("answer", "failed", "rows")

    def __init__(self, rows: set[int], failed: set[int], answer: DurableAnswer) -> None:
        self.rows = rows
        self.failed = failed
        self.answer = answer
