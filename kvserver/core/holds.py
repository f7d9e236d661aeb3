"""Who holds what: sessions and their clients, reservations, leases, announcements.

Plain registries. What ending a hold means for blocks and slots is decided in `writing` and
`reading`; here only the books of holders are kept.

Invariants:
  * every reservation, lease and stream belongs to a live session and stands in its sets.
  * a client belongs to one session.
  * `announced[row]` holds the calls that announced the block; an ANNOUNCED row has at least one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kvproto.grid import Region
from kvserver.core.blocks import ANNOUNCED, Action, Filling
from kvserver.core.books import Books
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Place, Tier
from kvserver.core.timers import Kind


@dataclass(eq=False, slots=True)
class Session:
    ident: int
    tenant: str
    beat: float
    clients: set[int] = field(default_factory=set)
    reservations: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    requests: set[int] = field(default_factory=set)  # tickets of streams and waiting Reserves
    announcements: set[int] = field(default_factory=set)
    namespaces: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Written:
    """A host slot as a writer left it; it is still so as long as the block has this place."""

    row: int
    slot: int
    place: Place


@dataclass(eq=False, slots=True)
class Reservation:
    """A writer's right to fill cells. `blocks` maps the position in the Reserve call to a block;
    a position leaves it when its last cell is committed."""

    ident: int
    session: int
    client: int
    namespace: int
    region: Region
    durable: bool
    count: int  # positions of the Reserve call
    pending: bool = True  # not answered yet
    blocks: dict[int, Filling] = field(default_factory=dict)
    # Positions that ended: where the cells were committed, None if the block was gone.
    done: dict[int, Written | None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Lease:
    """Pins on slots. `stream` is the ticket of its Acquire, 0 for a Lookup's."""

    ident: int
    session: int
    stream: int
    pins: list[tuple[Tier, int]]
    bytes: int
    born: float


@dataclass(eq=False, slots=True)
class Announcement:
    session: int
    rows: set[int]


class Holds:
    def __init__(self, books: Books) -> None:
        self._books = books
        self._last = 0
        self.sessions: dict[int, Session] = {}
        self.clients: dict[int, int] = {}  # client -> session
        self.reservations: dict[int, Reservation] = {}
        self.expired: OrderedDict[int, int] = OrderedDict()  # ended reservation -> session
        self.leases: dict[int, Lease] = {}
        self.announcements: dict[int, Announcement] = {}
        self.announced: dict[int, set[int]] = {}  # row -> announcements
        self.announced_count = 0

    def ident(self) -> int:
        """A number that no other hold has."""
        self._last += 1
        return self._last

    # ---- sessions

    def session(self, ident: int) -> Session:
        session = self.sessions.get(ident)
        if session is None:
            raise CoreError(ErrorKind.NOT_FOUND, "the session has ended", field="session")
        return session

    def client(self, session: Session, ident: int) -> None:
        """CoreError unless the client belongs to the session."""
        if ident not in session.clients:
            raise CoreError(ErrorKind.NOT_FOUND, "no such client in the session", field="client")

    def open_session(self, ident: int, tenant: str) -> Session:
        books = self._books
        if ident in self.sessions:
            raise CoreError(ErrorKind.CONFLICT, "the session exists", field="session")
        books.limit("sessions_max", len(self.sessions))
        session = self.sessions[ident] = Session(ident, tenant, books.now)
        self.beat(session)
        return session

    def beat(self, session: Session) -> None:
        session.beat = self._books.now
        deadline = self._books.now + self._books.config.session_ttl
        self._books.timers.set(Kind.SESSION, session.ident, deadline)

    def join(self, session: Session, client: int) -> None:
        if client in self.clients:
            raise CoreError(ErrorKind.CONFLICT, "the client exists", field="client")
        self._books.limit("clients_per_session_max", len(session.clients))
        session.clients.add(client)
        self.clients[client] = session.ident

    # ---- reservations

    def end_reservation(self, reservation: Reservation, *, remember: bool) -> None:
        """It gives no right any more. A late Fence is understood as long as it is remembered."""
        del self.reservations[reservation.ident]
        self.sessions[reservation.session].reservations.discard(reservation.ident)
        self._books.timers.cancel(Kind.RESERVATION, reservation.ident)
        if remember:
            self.expired[reservation.ident] = reservation.session
            if len(self.expired) > self._books.config.expired_max:
                self.expired.popitem(last=False)

    # ---- leases

    def grant(
        self, session: Session, stream: int, pins: list[tuple[Tier, int]], size: int, life: float
    ) -> Lease:
        """A lease that takes over pins which the caller has set."""
        now = self._books.now
        lease = Lease(self.ident(), session.ident, stream, pins, size, now)
        self.leases[lease.ident] = lease
        session.leases.add(lease.ident)
        self._books.timers.set(Kind.LEASE, lease.ident, now + life)
        return lease

    def end_lease(self, lease: Lease) -> None:
        """Its pins are taken off."""
        del self.leases[lease.ident]
        self.sessions[lease.session].leases.discard(lease.ident)
        self._books.timers.cancel(Kind.LEASE, lease.ident)
        for tier, slot in lease.pins:
            self._books.unpin(tier, slot)

    # ---- announcements

    def announce(self, session: Session, rows: list[int], ttl: float) -> None:
        """The rows are ANNOUNCED until the ttl ends, the session ends, or they are reserved."""
        ident = self.ident()
        self.announcements[ident] = Announcement(session.ident, set(rows))
        session.announcements.add(ident)
        for row in rows:
            self.announced.setdefault(row, set()).add(ident)
            if self._books.blocks.state[row] != ANNOUNCED:
                self._books.blocks.move(row, Action.ANNOUNCE)
        self.announced_count += len(rows)
        self._books.timers.set(Kind.ANNOUNCEMENT, ident, self._books.now + ttl)

    def arrive(self, row: int) -> None:
        """An announced block is being written, or is dropped: its announcements are fulfilled."""
        for ident in self.announced.pop(row, ()):
            self.announcements[ident].rows.discard(row)
            self.announced_count -= 1
            if not self.announcements[ident].rows:
                self._forget(ident)

    def withdraw(self, ident: int) -> None:
        """An announcement ends; blocks that nobody else announced leave."""
        for row in self.announcements[ident].rows:
            self._withdraw_row(ident, row)
        self._forget(ident)

    def take_back(self, session: Session, rows: set[int]) -> int:
        """The session announces these rows no longer. Returns of how many that was so."""
        taken: set[int] = set()
        for ident in list(session.announcements):
            mine = self.announcements[ident].rows & rows
            taken |= mine
            for row in mine:
                self._withdraw_row(ident, row)
            self.announcements[ident].rows -= mine
            if mine and not self.announcements[ident].rows:
                self._forget(ident)
        return len(taken)

    def _withdraw_row(self, ident: int, row: int) -> None:
        others = self.announced[row]
        others.discard(ident)
        self.announced_count -= 1
        if not others:
            del self.announced[row]
            self._books.leave(row, Action.WITHDRAW)

    def _forget(self, ident: int) -> None:
        announcement = self.announcements.pop(ident)
        self.sessions[announcement.session].announcements.discard(ident)
        self._books.timers.cancel(Kind.ANNOUNCEMENT, ident)
