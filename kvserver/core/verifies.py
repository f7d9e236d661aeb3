"""Checks of host slots that may not be granted yet: restored after a restart, or reported wrong.

Rule 1: `suspect` keeps a residence from being granted, until its Verify has succeeded.
Rule 2: a corrupt residence is dropped and counted; another copy of the block stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable

from kvserver.core.blocks import COMPLETE, bit
from kvserver.core.books import HOST, Books
from kvserver.core.events import JobDone
from kvserver.core.jobs import Job, Jobs


class _Report:
    """A ReportCorrupt under verification."""

    __slots__ = ("dropped", "rows", "ticket")

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket
        self.rows: set[int] = set()
        self.dropped = 0


class Verifies:
    def __init__(self, books: Books, jobs: Jobs) -> None:
        self._books = books
        self._jobs = jobs
        self._queue: dict[int, None] = {}
        self._running: dict[int, int] = {}  # row -> job
        self._reports: dict[int, list[_Report]] = {}  # row -> who waits for the verdict
        self.reports = 0
        self.jobs = 0
        self.failed: Callable[[int], None] = lambda row: None
        self.verified: Callable[[int], None] = lambda row: None
        jobs.on(None, self._done)
        books.before_leave.append(self._left)

    def want(self, row: int) -> None:
        """Have a suspect host residence checked."""
        if row not in self._running:
            self._queue[row] = None

    def pump(self) -> None:
        books = self._books
        while self._queue and self.jobs < books.config.verifies_max:
            row = next(iter(self._queue))
            del self._queue[row]
            if not books.blocks.suspect[row] & bit(HOST):
                self._tell(row, dropped=False)
                books.wake(row)
                continue
            self._running[row] = self._jobs.verify(row, HOST).ident
            self.jobs += 1

    def report(self, ticket: int, rows: list[int]) -> None:
        """A reader saw wrong bytes in these blocks. Answered when all have been checked."""
        books, blocks = self._books, self._books.blocks
        report = _Report(ticket)
        for row in rows:
            if blocks.state[row] == COMPLETE and blocks.resident[row] & bit(HOST):
                blocks.suspect[row] |= bit(HOST)
                report.rows.add(row)
                self._reports.setdefault(row, []).append(report)
                self.want(row)
        if report.rows:
            self.reports += 1
        else:
            books.answer(ticket, 0)

    def _done(self, job: Job, event: JobDone) -> None:
        books, row = self._books, job.row
        self.jobs -= 1
        books.counters["verifies"] += 1
        if self._running.get(row) == job.ident:
            del self._running[row]
        if not self._jobs.alive(job):
            return
        if event.corrupt:
            self._tell(row, dropped=True)
            books.corrupt(row, HOST)
            return
        if event.error:
            self.failed(row)
        else:
            books.blocks.suspect[row] &= ~bit(HOST)
            self.verified(row)
        self._tell(row, dropped=False)
        books.wake(row)

    def _left(self, row: int) -> None:
        """The block leaves the table: nothing is left to be checked."""
        self._queue.pop(row, None)
        self._running.pop(row, None)
        self._tell(row, dropped=True)

    def _tell(self, row: int, *, dropped: bool) -> None:
        for report in self._reports.pop(row, ()):
            report.rows.discard(row)
            report.dropped += dropped
            if not report.rows:
                self.reports -= 1
                self._books.answer(report.ticket, report.dropped)
