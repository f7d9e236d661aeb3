"""Copies and verifications in flight.

Rule 1: a job pins its slots from its instruction to its JobDone, however late that comes. Nothing
        else ends a job, so nothing else may reuse what it reads or writes.
Rule 2: a block may leave the table while a job runs. Whoever handles the JobDone asks `alive`
        before it touches the block again: a pinned slot is given to no other block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvserver.core.books import Books
from kvserver.core.errors import InvariantError
from kvserver.core.events import JobDone, Tier
from kvserver.core.instructions import Copy, JobKind, Verify


@dataclass(frozen=True, slots=True)
class Job:
    """`kind` is None for a Verify, which has no target."""

    ident: int
    kind: JobKind | None
    row: int
    source: tuple[Tier, int]
    target: tuple[Tier, int] | None
    bytes: int


Handler = Callable[[Job, JobDone], None]


class Jobs:
    def __init__(self, books: Books) -> None:
        self._books = books
        self._last = 0
        self.running: dict[int, Job] = {}
        self._handlers: dict[JobKind | None, Handler] = {}

    def on(self, kind: JobKind | None, handler: Handler) -> None:
        """Who is told when a job of this kind has ended."""
        self._handlers[kind] = handler

    def copy(
        self,
        kind: JobKind,
        row: int,
        source: Tier,
        target: Tier,
        slot: int,
        *,
        durable: bool = False,
    ) -> Job:
        """Copy a block from its slot on `source` into `slot` (TARGET) of `target`."""
        books = self._books
        origin = books.blocks.slot[source][row]
        books.attach(row, target, slot)
        job = self._start(kind, row, (source, origin), (target, slot))
        books.out.append(
            Copy(
                job.ident,
                kind,
                books.slots[source].place(origin),
                books.slots[target].place(slot),
                books.info(row),
                durable,
            )
        )
        return job

    def verify(self, row: int, tier: Tier) -> Job:
        """Check a block's slot on a tier."""
        books = self._books
        slot = books.blocks.slot[tier][row]
        job = self._start(None, row, (tier, slot), None)
        books.out.append(Verify(job.ident, books.slots[tier].place(slot), books.info(row)))
        return job

    def _start(
        self,
        kind: JobKind | None,
        row: int,
        source: tuple[Tier, int],
        target: tuple[Tier, int] | None,
    ) -> Job:
        self._last += 1
        size = self._books.slots[source[0]].bytes_of(source[1])
        job = Job(self._last, kind, row, source, target, size)
        self.running[job.ident] = job
        self._books.pin(*source)
        if target:
            self._books.pin(*target)
        return job

    def alive(self, job: Job) -> bool:
        """The block is still in the table, in the slots that the job worked on."""
        slots = [job.source, job.target] if job.target else [job.source]
        return all(self._books.slots[tier].row[slot] == job.row for tier, slot in slots)

    def done(self, event: JobDone) -> None:
        job = self.running.pop(event.job, None)
        if job is None:
            raise InvariantError(f"JobDone for job {event.job}, which does not run")
        self._handlers[job.kind](job, event)
        self._books.unpin(*job.source)
        if job.target:
            self._books.unpin(*job.target)
