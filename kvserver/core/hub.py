"""The hub: `handle(event, now)` is the one entry, instructions are the one way out.

Theory of operation. Every call first lets expire what is due, then deals with its event, then
carries on what became possible (streams that were woken, spills and verifications, those who wait
for space) until nothing more is. The same events at the same times give the same instructions.

The hub's clock is the caller's minus the time that the server stood still (`Stalled`): all expiries
shift at once. A refusal (CoreError) changes nothing. An InvariantError is a bug of ours: the hub
must not be used any further.

Who decides what: `writing` reservations and commits; `reading` lookups and leases; `streams`
Acquire; `spills`, `fetches`, `verifies` the copies between tiers; `space` where a slot comes from;
`eviction` what leaves, `tails` how long the ends of prompts stay; `sessions` who is there;
`recovery` what a restart finds; `residences` what watchers are told; all share `books`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvproto.errors import FieldError
from kvproto.namespace import NamespaceSpec
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.admin import Admin
from kvserver.core.books import Books
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.fetches import Fetches
from kvserver.core.holds import Holds
from kvserver.core.jobs import Jobs
from kvserver.core.limits import HubConfig
from kvserver.core.reading import Reading
from kvserver.core.recovery import Recovery
from kvserver.core.residences import Residences
from kvserver.core.sessions import Sessions
from kvserver.core.slabs import slot_bytes_max, slot_class_bytes
from kvserver.core.space import Space
from kvserver.core.spills import Spills
from kvserver.core.stats import HubStats, collect
from kvserver.core.streams import Streams
from kvserver.core.tails import Tails
from kvserver.core.timers import Kind
from kvserver.core.validate import validate
from kvserver.core.verifies import Verifies
from kvserver.core.writing import Writing

__all__ = ["Hub", "HubConfig", "HubStats"]


class Hub:
    """See the module. Not thread-safe: one thread owns it."""

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self._stood_still = 0.0
        self._continuing = False  # a Continue is asked for, and has not come
        books = self._books = Books(config)
        self._holds = Holds(books)
        self._space = Space(books)
        self._jobs = Jobs(books)
        self._spills = Spills(books, self._space, self._jobs)
        self._verifies = Verifies(books, self._jobs)
        self._verifies.verified = self._spills.recover
        self._fetches = Fetches(books, self._space, self._jobs, self._holds)
        self._tails = Tails(books)
        self._writing = Writing(books, self._holds, self._space, self._spills, self._tails)
        self._streams = Streams(books, self._holds, self._space, self._fetches, self._verifies)
        self._reading = Reading(books, self._holds, self._fetches, self._verifies, self._streams)
        self._sessions = Sessions(books, self._holds, self._writing, self._reading, self._streams)
        self._admin = Admin(books, self._holds, self._sessions, self._spills)
        self._recovery = Recovery(books, self._sessions, self._tails)
        self._residences = Residences(books)
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.OpenSession: self._open_session,
            ev.JoinSession: self._join_session,
            ev.Heartbeat: self._heartbeat,
            ev.CloseClient: self._close_client,
            ev.CloseSession: self._close_session,
            ev.OpenNamespace: self._open_namespace,
            ev.Lookup: self._lookup,
            ev.Announce: self._announce,
            ev.Reserve: self._reserve,
            ev.Commit: self._writing.commit,
            ev.Abort: self._abort,
            ev.Fence: self._fence,
            ev.Acquire: self._acquire,
            ev.CancelAcquire: self._cancel_acquire,
            ev.Release: self._release,
            ev.ReportCorrupt: self._report_corrupt,
            ev.Evict: self._evict,
            ev.DropNamespace: self._drop_namespace,
            ev.Drain: self._drain,
            ev.ClientDead: self._client_dead,
            ev.ClientDrained: self._client_drained,
            ev.JobDone: self._jobs.done,
            ev.TierGrew: self._admin.tier_grew,
            ev.TierDown: self._admin.tier_down,
            ev.TierUp: self._admin.tier_up,
            ev.Tick: self._nothing,
            ev.Continue: self._continue,
            ev.Stalled: self._nothing,
            ev.Watch: self._residences.watch,
            ev.RestoreNamespace: self._recovery.namespace,
            ev.RestoreBlocks: self._recovery.blocks,
            ev.RestoreQuarantined: self._recovery.quarantined,
            ev.RestoreDone: self._recovery.done,
        }
        self._expiries: dict[Kind, Callable[[int], None]] = {
            Kind.SESSION: self._session_expired,
            Kind.RESERVATION: self._reservation_expired,
            Kind.LEASE: self._reading.expire_lease,
            Kind.ANNOUNCEMENT: self._holds.withdraw,
            Kind.PARTIAL: self._writing.lapse,
            Kind.RESERVE_WAIT: self._writing.give_up_waiting,
            Kind.STREAM_WAIT: self._wake_stream,
            Kind.STREAM_STARVE: self._streams.starved,
            Kind.TAIL: self._tails.expire,
        }

    # ---- the one entry

    def handle(self, event: ev.Event, now: float) -> list[ins.Instruction]:
        """Deal with one event at caller's time `now`. Returns instructions, in order."""
        books = self._books
        if isinstance(event, ev.Stalled):
            self._stood_still += event.duration
        books.now = books.history.now = max(books.now, now - self._stood_still)
        while due := books.timers.pop_due(books.now):
            self._expiries[due[0]](due[1])
        try:
            self._handlers[type(event)](event)
        except CoreError as error:
            self._refuse(event, error)
        except FieldError as error:
            self._refuse(event, _invalid(error))
        self._carry_on()
        if self._writing.unfinished and not self._continuing:
            self._continuing = True
            books.out.append(ins.Unfinished())
        out, books.out = books.out, []
        return out

    def _refuse(self, event: ev.Event, error: CoreError) -> None:
        ticket = getattr(event, "ticket", None)
        if ticket is None:
            raise error
        self._books.refuse(ticket, error)

    def _carry_on(self) -> None:
        """Do what has become possible, until nothing more is."""
        books = self._books
        while True:
            while books.ready:
                ticket = next(iter(books.ready))
                del books.ready[ticket]
                stream = self._streams.open.get(ticket)
                if stream is not None:
                    self._streams.pump(stream)
            self._spills.pump()
            self._verifies.pump()
            if books.room:
                books.room = False
                self._space.serve()
                self._writing.serve_lag()
            elif not books.ready:
                break
        self._admin.settle()
        self._residences.settle()

    # ---- questions

    def validate(self) -> None:
        """Check all books against each other. InvariantError says what is wrong. O(blocks)."""
        validate(
            self._books, self._holds, self._jobs, self._spills, self._streams, self._space,
            self._writing, self._tails,
        )  # fmt: skip

    def stats(self, now: float) -> HubStats:
        books = self._books
        books.now = max(books.now, now - self._stood_still)
        return collect(
            books,
            self._holds,
            streams=len(self._streams.open),
            spill_queue_bytes=self._spills.lag_bytes,
            draining=self._admin.draining,
        )

    def namespace_of(self, spec_id: bytes) -> int | None:
        """The handle of the live namespace with this id."""
        return self._sessions.handle_of(spec_id)

    def spec_of(self, handle: int) -> NamespaceSpec:
        """The spec behind a handle, also of one that was dropped lately. KeyError otherwise."""
        namespace = self._books.namespaces.get(handle)
        return self._admin.dropped[handle] if namespace is None else namespace.spec

    def near_misses(self, handle: int) -> list[str]:
        """In which one field a namespace differed from each that was live when it was opened."""
        return list(self._books.namespaces[handle].near)

    def walk(
        self, start: int, rows: int, wanted: Callable[[NamespaceSpec], bool]
    ) -> tuple[list[ins.Moved], int]:
        """A piece of the table for a watcher of the `wanted` namespaces, and where the next one
        begins; 0 both for the first piece and when there is none."""
        return self._residences.walk(start, rows, wanted)

    @property
    def tiers_up(self) -> int:
        """Which tiers work, by bit `tier - 1`."""
        return self._books.up_bits

    def suspects(self) -> frozenset[int]:
        """Clients whose death would lift a quarantine."""
        return self._books.quarantine.clients()

    def check_commit(self, event: ev.Commit) -> None:
        """CoreError when this Commit would be refused now, for whatever is wrong with it."""
        try:
            self._writing.check_commit(event)
        except FieldError as error:
            raise _invalid(error) from error

    def may_write(self, reservation: int, session: int, client: int) -> bool:
        """Whether this client holds that reservation now."""
        found = self._holds.reservations.get(reservation)
        mine = found is not None and (found.session, found.client) == (session, client)
        return mine and found is not None and not found.pending

    def offsets_of(self, reservation: int, indices: list[int]) -> set[int]:
        """Where the host slots stand that these positions of a reservation still have to fill."""
        found = self._holds.reservations.get(reservation)
        blocks = {} if found is None else found.blocks
        host = self._books.host
        return {host.place(blocks[at].slot).offset for at in indices if at in blocks}

    def next_deadline(self) -> float | None:
        """When, on the caller's clock, something expires next."""
        deadline = self._books.timers.next()
        return None if deadline is None else deadline + self._stood_still

    def slot_class_bytes(self, size: int) -> int:
        """The size class that `size` bytes take."""
        return slot_class_bytes(size)

    @property
    def slot_bytes_max(self) -> int:
        """The largest slot of the host tier."""
        return slot_bytes_max(self._books.host.map.total)

    # ---- requests

    def _keys(self, hashes: list[bytes]) -> None:
        allowed = self.config.keys_per_call_max
        if len(hashes) > allowed:
            raise CoreError(
                ErrorKind.LIMIT,
                f"{len(hashes)} keys, keys_per_call_max is {allowed}",
                field="keys_per_call_max",
                limit=allowed,
            )

    def _open_session(self, event: ev.OpenSession) -> None:
        self._holds.open_session(event.session, event.tenant)
        self._books.answer(event.ticket)

    def _join_session(self, event: ev.JoinSession) -> None:
        self._holds.join(self._holds.session(event.session), event.client)
        self._books.answer(event.ticket)

    def _heartbeat(self, event: ev.Heartbeat) -> None:
        self._holds.beat(self._holds.session(event.session))
        self._books.answer(event.ticket)

    def _close_client(self, event: ev.CloseClient) -> None:
        session = self._holds.session(event.session)
        self._holds.client(session, event.client)
        self._sessions.end_client(session, event.client, drained=event.drained)
        self._books.answer(event.ticket)

    def _close_session(self, event: ev.CloseSession) -> None:
        self._sessions.end(self._holds.session(event.session), drained=event.drained)
        self._books.answer(event.ticket)

    def _open_namespace(self, event: ev.OpenNamespace) -> None:
        self._books.answer(event.ticket, self._sessions.open_namespace(event))

    def _lookup(self, event: ev.Lookup) -> None:
        self._keys(event.hashes)
        self._reading.lookup(event, self._sessions.namespace(event.session, event.namespace))

    def _announce(self, event: ev.Announce) -> None:
        self._keys(event.hashes)
        namespace = self._sessions.namespace(event.session, event.namespace)
        self._books.answer(event.ticket, self._sessions.announce(event, namespace))

    def _reserve(self, event: ev.Reserve) -> None:
        self._keys(event.hashes)
        namespace = self._sessions.namespace(event.session, event.namespace)
        if self._admin.draining:
            raise CoreError(ErrorKind.UNAVAILABLE, "the server is draining", field="draining")
        if not self._books.host.up:
            raise CoreError(ErrorKind.UNAVAILABLE, "the host tier is down", field="host")
        self._writing.reserve(event, namespace)

    def _abort(self, event: ev.Abort) -> None:
        self._holds.session(event.session)
        reservation = self._holds.reservations.get(event.reservation)
        mine = reservation is not None and reservation.session == event.session
        if reservation is None or not mine or reservation.pending:
            raise CoreError(ErrorKind.NOT_FOUND, "no such reservation", field="reservation")
        self._writing.end(reservation, drained=event.drained)
        self._books.answer(event.ticket)

    def _fence(self, event: ev.Fence) -> None:
        freed = self._writing.fence(event.reservation, event.session)
        self._books.answer(event.ticket, freed)

    def _acquire(self, event: ev.Acquire) -> None:
        self._keys(event.hashes)
        namespace = self._sessions.namespace(event.session, event.namespace)
        self._reading.touch_all(namespace, event.hashes)
        self._streams.acquire(event, namespace)

    def _cancel_acquire(self, event: ev.CancelAcquire) -> None:
        if event.ticket_of_acquire in self._streams.open:
            self._streams.cancel(event.ticket_of_acquire)

    def _release(self, event: ev.Release) -> None:
        self._books.answer(event.ticket, self._reading.release(event))

    def _report_corrupt(self, event: ev.ReportCorrupt) -> None:
        self._keys(event.hashes)
        namespace = self._sessions.namespace(event.session, event.namespace)
        self._books.limit("reports_max", self._verifies.reports)
        find = self._books.blocks.find
        rows = dict.fromkeys(find(namespace.handle, key) for key in event.hashes)
        self._verifies.report(event.ticket, [row for row in rows if row])

    def _evict(self, event: ev.Evict) -> None:
        self._books.answer(event.ticket, self._admin.evict(event))

    def _drop_namespace(self, event: ev.DropNamespace) -> None:
        self._books.answer(event.ticket, self._admin.drop_namespace(event))

    def _drain(self, event: ev.Drain) -> None:
        self._admin.drain(event.ticket)

    def _client_dead(self, event: ev.ClientDead) -> None:
        self._sessions.client_dead(event.client)

    def _client_drained(self, event: ev.ClientDrained) -> None:
        self._sessions.client_drained(event.client)

    def _continue(self, event: ev.Continue) -> None:
        self._continuing = False
        self._writing.go_on()

    def _nothing(self, event: ev.Event) -> None:
        """Time has passed; what was due has expired already."""

    # ---- expiries

    def _session_expired(self, ident: int) -> None:
        self._books.counters["expired_sessions"] += 1
        self._sessions.end(self._holds.sessions[ident], drained=False)

    def _reservation_expired(self, ident: int) -> None:
        self._books.counters["expired_reservations"] += 1
        self._writing.end(self._holds.reservations[ident], drained=False)

    def _wake_stream(self, ticket: int) -> None:
        self._books.ready[ticket] = None


def _invalid(error: FieldError) -> CoreError:
    return CoreError(ErrorKind.INVALID, str(error), field=error.field, limit=error.limit)
