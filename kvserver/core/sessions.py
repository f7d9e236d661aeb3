"""Sessions, clients, namespaces and announcements: opening and ending them.

What an ending session held is released in a fixed order: its open requests are refused, its leases
given back, its reservations ended (with or without fence), its announcements withdrawn.
"""

from __future__ import annotations

from kvproto.namespace import NamespaceSpec
from kvproto.prefix import HASH_BYTES, ROOT
from kvserver.core.blocks import ABSENT, ANNOUNCED
from kvserver.core.books import Books, Namespace
from kvserver.core.checks import invalid
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Announce, OpenNamespace
from kvserver.core.holds import Holds, Session
from kvserver.core.near import NearMisses
from kvserver.core.reading import Reading
from kvserver.core.slabs import slot_bytes_max
from kvserver.core.streams import Streams
from kvserver.core.timers import Kind
from kvserver.core.writing import Writing


class Sessions:
    def __init__(
        self, books: Books, holds: Holds, writing: Writing, reading: Reading, streams: Streams
    ) -> None:
        self._books = books
        self._holds = holds
        self._writing = writing
        self._reading = reading
        self._streams = streams
        self._handles: dict[bytes, int] = {}  # namespace id -> handle
        self._last_handle = 0
        self._near = NearMisses(books.config.near_misses_max)
        self.by_tag: dict[bytes, int] = {}

    # ---- sessions and clients

    def end(self, session: Session, *, drained: bool) -> None:
        """Give back all that a session held, and forget it."""
        error = CoreError(ErrorKind.NOT_FOUND, "the session has ended", field="session")
        self._cancel(session.requests, error)
        for lease in list(session.leases):
            self._reading.end_lease(lease)
        for client in list(session.clients):
            self.end_client(session, client, drained=drained)
        for announcement in list(session.announcements):
            self._holds.withdraw(announcement)
        for handle in session.namespaces:
            namespace = self._books.namespaces.get(handle)
            if namespace is not None:
                namespace.sessions.discard(session.ident)
        self._books.timers.cancel(Kind.SESSION, session.ident)
        del self._holds.sessions[session.ident]

    def _cancel(self, tickets: set[int], error: CoreError) -> None:
        for ticket in sorted(tickets):
            if ticket in self._writing.pending:
                self._writing.cancel(ticket, error)
            elif ticket in self._streams.open:
                self._streams.refuse(ticket, error)

    def end_client(self, session: Session, client: int, *, drained: bool) -> None:
        """A writer leaves. `drained`: it can write no more, or says that it will not."""
        error = CoreError(ErrorKind.NOT_FOUND, "the client has left", field="client")
        waiting = {
            ticket
            for ticket in session.requests
            if ticket in self._writing.pending
            and self._writing.pending[ticket].event.client == client
        }
        self._cancel(waiting, error)
        for ident in list(session.reservations):
            reservation = self._holds.reservations.get(ident)
            if reservation is not None and reservation.client == client:
                self._writing.end(reservation, drained=drained)
        session.clients.discard(client)
        del self._holds.clients[client]
        if drained:
            self._writing.lift(self._books.quarantine.lift_client(client))

    def client_dead(self, client: int) -> None:
        """Nothing that this writer started can still write."""
        owner = self._holds.clients.get(client)
        if owner is not None:
            self.end_client(self._holds.sessions[owner], client, drained=True)
        else:
            self.client_drained(client)

    def client_drained(self, client: int) -> None:
        """Nothing that this writer began can still write; what it has reserved stays its own."""
        self._writing.lift(self._books.quarantine.lift_client(client))

    # ---- namespaces

    def open_namespace(self, event: OpenNamespace) -> int:
        session = self._holds.session(event.session)
        if event.spec.tenant != session.tenant:
            raise invalid("tenant", "the namespace is another tenant's", session.tenant)
        namespace = self.add_namespace(event.spec)
        namespace.sessions.add(session.ident)
        session.namespaces.add(namespace.handle)
        return namespace.handle

    def add_namespace(self, spec: NamespaceSpec) -> Namespace:
        """The live namespace of this spec, a new one if need be."""
        books = self._books
        handle = self._handles.get(spec.id)
        if handle is not None:
            return books.namespaces[handle]
        allowed = slot_bytes_max(books.host.map.total)
        if spec.grid.slot_bytes() > allowed:
            raise CoreError(
                ErrorKind.NO_SPACE,
                f"a block takes {spec.grid.slot_bytes()} bytes, the host tier {allowed} at most",
                field="slot_bytes",
                limit=allowed,
            )
        if len(books.namespaces) >= books.config.namespaces_max:
            self._forget_idle()
        books.limit("namespaces_max", len(books.namespaces))
        self._last_handle += 1
        handle = self._last_handle
        near = self._near.find(spec)
        self._near.add(handle, spec)
        books.counters["near_misses"] += len(near)
        namespace = books.namespaces[handle] = Namespace(handle, spec, spec.grid, near)
        books.blocks.index[handle] = {}
        self._handles[spec.id] = handle
        self.by_tag[spec.tag] = handle
        return namespace

    def _forget_idle(self) -> None:
        """Make room for a namespace: the oldest that is empty and that no session has open goes."""
        for handle, namespace in self._books.namespaces.items():
            if not namespace.sessions and not self._books.blocks.index[handle]:
                self.forget_namespace(handle)
                return

    def forget_namespace(self, handle: int) -> None:
        """No block of it is left. A spec that is opened again gets a new handle."""
        namespace = self._books.namespaces.pop(handle)
        if self._books.moved is not None:
            self._books.forgotten.append(namespace.spec)
        del self._books.blocks.index[handle]
        del self._handles[namespace.spec.id]
        del self.by_tag[namespace.spec.tag]
        self._near.remove(handle, namespace.spec)
        for ident in namespace.sessions:
            self._holds.sessions[ident].namespaces.discard(handle)

    def handle_of(self, spec_id: bytes) -> int | None:
        return self._handles.get(spec_id)

    def namespace(self, session: int, handle: int) -> Namespace:
        """A namespace that the session may use; CoreError NOT_FOUND otherwise."""
        namespace = self._books.namespaces.get(handle)
        if namespace is None or namespace.spec.tenant != self._holds.session(session).tenant:
            raise CoreError(ErrorKind.NOT_FOUND, "no such namespace", field="namespace")
        return namespace

    def leave_requests(self, handle: int) -> None:
        """The namespace is dropped: its open streams and waiting Reserves are refused."""
        error = CoreError(ErrorKind.NOT_FOUND, "the namespace was dropped", field="namespace")
        for ticket, stream in list(self._streams.open.items()):
            if stream.namespace.handle == handle:
                self._streams.refuse(ticket, error)
        for ticket, pending in list(self._writing.pending.items()):
            if pending.namespace.handle == handle:
                self._writing.cancel(ticket, error)

    # ---- announcements

    def announce(self, event: Announce, namespace: Namespace) -> int:
        """How many blocks this call announces: those that are not here, nor being written. Or how
        many it withdraws."""
        books, blocks = self._books, self._books.blocks
        session = self._holds.session(event.session)
        if event.withdraw:
            found = (blocks.find(namespace.handle, key) for key in event.hashes)
            return self._holds.take_back(session, {row for row in found if row})
        rows: dict[int, None] = {}
        books.limit("announcements_max", self._holds.announced_count + len(event.hashes) - 1)
        for key in event.hashes:
            if len(key) != HASH_BYTES or key == ROOT:
                raise invalid("hashes", "a hash is no digest of 32 bytes", HASH_BYTES)
        for key in event.hashes:
            row = blocks.obtain(namespace.handle, key)
            if blocks.state[row] in (ABSENT, ANNOUNCED):
                rows[row] = None
        if rows:
            ttl = books.clamp("announce_ttl_max", event.ttl)
            self._holds.announce(session, list(rows), ttl)
        return len(rows)
