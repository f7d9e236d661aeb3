"""The driver owns the hub on the event loop and carries out what it decides.

Rule 1: `Hub.handle` runs on the loop's thread only, one event at a time, and the instructions it
returns are carried out in order before the next event: no await stands between them.
Rule 2: directory entries are written here, inline; bytes are copied by the mover's threads, whose
results come back through `post`, one wake-up of the loop for a whole batch.
Rule 3: a caller that went away never leaves something behind: its stream is cancelled, and a
reservation that nobody heard of is aborted.
Rule 4: an exception that comes out of the hub, or out of carrying out an instruction, leaves books
that nobody may trust: `fatal` is told, which ends the process. The files are safe at any time, and
the next start verifies what it finds.
Rule 5: no Reserve or Commit holds the loop up for long: a Reserve of many blocks goes on in further
turns, a Commit is handed over in parts of COMMIT_TURN blocks. In between the loop serves others.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import (
    Abort,
    Acquire,
    CancelAcquire,
    ClientDead,
    ClientDrained,
    Commit,
    CommitVerdict,
    Continue,
    Event,
    Place,
    Reserve,
    Stalled,
    Tick,
    Tier,
)
from kvserver.core.hub import Hub
from kvserver.core.instructions import (
    AcquireResult,
    Answer,
    CellsCommitted,
    CellsPresent,
    CommitResult,
    Copy,
    EntryInvalid,
    EntryReserved,
    Granted,
    Instruction,
    Moved,
    MovedTooMuch,
    Refusal,
    ReserveResult,
    TiersUp,
    Unfinished,
    Verify,
)
from kvserver.core.limits import HubConfig
from kvserver.core.stats import HubStats
from kvserver.runtime import failpoints
from kvserver.runtime.entries import HostEntries
from kvserver.tiers.host import HostArena

TICK_S = 0.05
STALL_S = 1.0
SUSPECTS_S = 1.0
COMMIT_TURN = 16  # blocks; what each costs is in docs/measurements.md
Result = TypeVar("Result")
Checksums = npt.NDArray[np.uint64]


def _fine(indices: list[int]) -> None:
    """What has nothing against a Commit."""


class AcquireStep(NamedTuple):
    """What a stream has to tell at once: a grant, its end, or both."""

    granted: Granted | None
    result: AcquireResult | None


class Jobs(Protocol):
    """Takes what needs a thread (`kvserver.runtime.mover`); answers with `Driver.post`."""

    def submit(self, job: Copy | Verify) -> None: ...

    def forget(self, place: Place) -> None: ...


class Watches(Protocol):
    """Takes what moved (`kvserver.runtime.watches`). It must not block."""

    def carry_out(self, instruction: Moved | MovedTooMuch | TiersUp) -> None: ...


class Driver:
    """See the module's rules. `fatal(error)` is expected not to return (tests let it).

    `is_dead(client)`: whether nothing can write for it now; `is_remote`: whether a living session's
    client writes through a remote transport, and so may write again.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        host: HostArena,
        fatal: Callable[[Exception], None],
        is_dead: Callable[[int], bool],
        is_remote: Callable[[int], bool] = lambda client: False,
        clock: Callable[[], float] = time.monotonic,
        log: logging.Logger,
    ) -> None:
        self.hub = Hub(config)
        self.entries = HostEntries(host, self.hub.spec_of)
        self._jobs: Jobs | None = None
        self._watches: Watches | None = None
        self._fatal = fatal
        self._is_dead = is_dead
        self._is_remote = is_remote
        self._clock = clock
        self._log = log
        self._tickets = itertools.count(1)
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, asyncio.Queue[Granted | AcquireResult | Exception]] = {}
        self._checksums: dict[int, Checksums] = {}
        self._mismatches: dict[int, list[int]] = {}
        self._unheard: dict[int, Reserve] = {}
        self._posted: list[Event] = []
        self._posted_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._last = clock()
        self.stalls = 0
        self.commit_mismatches = 0

    # ---- life ----------------------------------------------------------------------------

    def attach(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def attach_watches(self, watches: Watches) -> None:
        """Who is told of blocks that moved, once it asked the core for it."""
        self._watches = watches

    def start(self) -> None:
        """Begin ticking; call it on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._last = self._clock()
        self._ticker = self._loop.create_task(self._tick(), name="driver-tick")
        self._take_posted()

    async def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        with self._posted_lock:
            self._loop = None

    # ---- requests ------------------------------------------------------------------------

    @property
    def open_requests(self) -> int:
        """Requests and streams that have no answer yet."""
        return len(self._open) + len(self._streams)

    def ticket(self) -> int:
        return next(self._tickets)

    def stats(self) -> HubStats:
        return self.hub.stats(self._clock())

    async def ask(self, event: Any, kind: type[Result]) -> Result:
        """The Answer to a request, checked to be a `kind`. Raises the core's refusal."""
        ticket: int = event.ticket
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[ticket] = future
        try:
            self.tell(event)
            result = await future
        except asyncio.CancelledError:
            self._abandon(event, future)
            raise
        finally:
            self._open.pop(ticket, None)
        assert isinstance(result, kind), (event, result)
        return result

    async def commit(
        self, event: Commit, checksums: Checksums, *, check: Callable[[list[int]], None] = _fine
    ) -> CommitResult:
        """A Commit with its checksums, shape [len(indices), cells of the region]. `check(indices)`
        is asked right before each part is handed over, and may refuse it.

        MISMATCH where cells had been committed before with other checksums; the first stay. GONE
        where the reservation ended before their part's turn.
        """
        count = len(event.indices)
        check(event.indices)
        if count <= COMMIT_TURN:
            return await self._commit(event, checksums)
        self.hub.check_commit(event)  # when it is wrong, none of it is applied
        parts: list[asyncio.Task[CommitResult]] = []
        for start in range(0, count, COMMIT_TURN):
            some = slice(start, start + COMMIT_TURN)
            part = replace(
                event, ticket=self.ticket(), indices=event.indices[some],
                hashes=event.hashes[some], parents=event.parents[some],
            )  # fmt: skip
            parts.append(asyncio.create_task(self._commit_part(part, checksums[some], check)))
            await asyncio.sleep(0)
        results = await asyncio.gather(*parts)
        verdicts = [verdict for result in results for verdict in result.verdicts]
        return CommitResult(verdicts, sum(result.completed for result in results))

    async def _commit_part(
        self, part: Commit, checksums: Checksums, check: Callable[[list[int]], None]
    ) -> CommitResult:
        try:
            check(part.indices)
            return await self._commit(part, checksums)
        except CoreError as error:
            if error.kind is ErrorKind.NOT_FOUND and error.field == "reservation":
                return CommitResult([CommitVerdict.GONE] * len(part.indices), 0)
            raise

    async def _commit(self, event: Commit, checksums: Checksums) -> CommitResult:
        self._checksums[event.ticket] = checksums
        try:
            result = await self.ask(event, CommitResult)
        finally:
            del self._checksums[event.ticket]
            mismatches = self._mismatches.pop(event.ticket, [])
        for index in mismatches:
            result.verdicts[index] = CommitVerdict.MISMATCH
        return result

    async def acquire(self, event: Acquire) -> AsyncGenerator[AcquireStep, None]:
        """The stream of an Acquire; closing it early cancels it in the core. An end that the core
        told together with the last grant comes in one step with it.

        What waits in the queue is bounded by the blocks asked for, each is in it at most once.
        """
        queue: asyncio.Queue[Granted | AcquireResult | Exception] = asyncio.Queue(
            maxsize=2 * len(event.hashes) + 2
        )
        self._streams[event.ticket] = queue
        try:
            self.tell(event)
            ahead: Granted | AcquireResult | Exception | None = None
            while True:
                item = ahead if ahead is not None else await queue.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, AcquireResult):
                    yield AcquireStep(None, item)
                    return
                ahead = None if queue.empty() else queue.get_nowait()
                if isinstance(ahead, AcquireResult):
                    yield AcquireStep(item, ahead)
                    return
                yield AcquireStep(item, None)
        finally:
            if self._streams.pop(event.ticket, None) is not None:
                self.tell(CancelAcquire(event.ticket))

    def _abandon(self, event: object, future: asyncio.Future[Any]) -> None:
        if not isinstance(event, Reserve):
            return
        if future.done() and not future.cancelled() and future.exception() is None:
            self._abort_unheard(event, future.result())
        else:
            self._unheard[event.ticket] = event

    def _abort_unheard(self, event: Reserve, result: ReserveResult) -> None:
        if result.reservation:
            # Posted, not told: this may run between two instructions.
            ticket = self.ticket()
            self.post(Abort(ticket, event.session, result.reservation, drained=True))

    # ---- events --------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Hand one event to the hub and carry out what it decides. On the loop's thread."""
        now = self._clock()
        gap, self._last = now - self._last, now
        if gap > STALL_S and self._ticker is not None:
            self.stalls += 1
            self._log.warning("stalled", extra={"fields": {"seconds": round(gap, 3)}})
            self._handle(Stalled(gap), now)
        self._handle(event, now)

    def _handle(self, event: Event, now: float) -> None:
        try:
            for instruction in self.hub.handle(event, now):
                self._carry_out(instruction)
        except Exception as error:
            self._fatal(error)
            raise

    def post(self, event: Event) -> None:
        """Hand over an event from any thread. After `stop` it is dropped."""
        with self._posted_lock:
            self._posted.append(event)
            if len(self._posted) == 1 and self._loop is not None:
                self._loop.call_soon_threadsafe(self._take_posted)

    def _take_posted(self) -> None:
        with self._posted_lock:
            events, self._posted = self._posted, []
        for event in events:
            self.tell(event)

    async def _tick(self) -> None:
        suspects_at = 0.0
        while True:
            self.tell(Tick())
            if self._last >= suspects_at:
                suspects_at = self._last + SUSPECTS_S
                self._poll_suspects()
            deadline = self.hub.next_deadline()
            ahead = TICK_S if deadline is None else deadline - self._clock()
            await asyncio.sleep(min(TICK_S, max(0.002, ahead)))

    def _poll_suspects(self) -> None:
        for client in sorted(self.hub.suspects()):
            try:
                dead = self._is_dead(client)
            except OSError as error:  # out of descriptors, say: the quarantine stands meanwhile
                self._log.warning("liveness_unknown", extra={"fields": {"reason": str(error)}})
                return
            if dead:
                # One that writes through the server's own hands may come back, with new ones.
                remote = self._is_remote(client)
                self.tell(ClientDrained(client) if remote else ClientDead(client))

    # ---- instructions --------------------------------------------------------------------

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Answer(ticket, result):
                self._answer(ticket, result)
            case Refusal(ticket, error):
                self._refuse(ticket, error)
            case Granted(ticket=ticket):
                if ticket in self._streams:
                    self._streams[ticket].put_nowait(instruction)
            case CellsCommitted(ticket=ticket, index=index):
                self.entries.committed(instruction, self._checksums[ticket][index])
            case CellsPresent(ticket=ticket, index=index):
                if self.entries.differ(instruction, self._checksums[ticket][index]):
                    self._mismatches.setdefault(ticket, []).append(index)
                    self.commit_mismatches += 1
            case EntryReserved(place, clients):
                self.entries.reserved(place, clients)
                failpoints.hit("reserve.after_entry")
            case EntryInvalid(place):
                if place.tier is Tier.DISK:
                    self._running_jobs().forget(place)
                elif place.tier is Tier.HOST:
                    self.entries.invalid(place)
            case Copy() | Verify():
                self._running_jobs().submit(instruction)
            case Unfinished():
                if self._loop is not None:
                    self._loop.call_soon(self._continue)
            case Moved() | MovedTooMuch() | TiersUp():
                assert self._watches is not None, "attach_watches() comes first"
                self._watches.carry_out(instruction)

    def _continue(self) -> None:
        if self._loop is not None:  # else the files are let go of
            self.tell(Continue())

    def _running_jobs(self) -> Jobs:
        assert self._jobs is not None, "attach() comes first"
        return self._jobs

    def _answer(self, ticket: int, result: object) -> None:
        if ticket in self._streams:
            self._streams.pop(ticket).put_nowait(result)  # type: ignore[arg-type]
            return
        future = self._open.get(ticket)
        if future is not None and not future.done():
            future.set_result(result)
        elif ticket in self._unheard:
            assert isinstance(result, ReserveResult)
            self._abort_unheard(self._unheard.pop(ticket), result)

    def _refuse(self, ticket: int, error: Exception) -> None:
        self._unheard.pop(ticket, None)
        if ticket in self._streams:
            self._streams.pop(ticket).put_nowait(error)
            return
        future = self._open.get(ticket)
        if future is not None and not future.done():
            future.set_exception(error)
