"""Writers: reservations, commits, and how a reservation ends.

Rule 1: a reservation is per cell, but a slot lives and dies as a whole. When a reservation ends
        without every cell committed and without the word that its copies have drained, the block
        leaves the table at once and the slot is quarantined for everyone who might still write it.
Rule 2: a Commit is applied to all its blocks or, when it is wrong, to none.
Rule 3: who waits for space holds what it has got so far, but from its first grant on for
        `reserve_gather` only: a call that asks for more than there is must not wait for itself,
        nor two of them for each other. Its expiry starts with its Answer.
Rule 4: a Reserve takes at most `reserve_turn` slots in one event, and goes on with a Continue: each
        may evict a block, and the loop has others to serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvserver.core.blocks import COMPLETE, Action, Filling
from kvserver.core.books import HOST, Books, Namespace
from kvserver.core.checks import check_commit, check_reserve, stands
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import Commit, CommitVerdict, Place, Reserve, ReserveVerdict
from kvserver.core.holds import Holds, Reservation, Written
from kvserver.core.instructions import (
    CellsCommitted,
    CellsPresent,
    CommitResult,
    EntryReserved,
    ReserveResult,
)
from kvserver.core.naming import Naming
from kvserver.core.slots import SlotAction
from kvserver.core.space import Retry, Space
from kvserver.core.spills import Spills
from kvserver.core.tails import Tails
from kvserver.core.timers import Kind

_LAG = -1  # what a Reserve waits for, instead of a size class: room in the spill lag
_UNLIMITED = 1 << 62
WRITE, PRESENT, BUSY, NO_SPACE = ReserveVerdict


@dataclass(eq=False, slots=True)
class PendingReserve:
    """A Reserve that is being answered; `next` is the position it has come to."""

    writing: Writing
    event: Reserve
    namespace: Namespace
    mask: int
    reservation: Reservation
    deadline: float
    next: int = 0
    verdicts: list[ReserveVerdict] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    forced: dict[int, int] = field(default_factory=dict)  # PRESENT row to be spilled -> position
    wants: int = 0  # size class or _LAG that it waits for
    slots_left: int = _UNLIMITED  # how many it may take in this turn

    def retry(self) -> Retry:
        wanted, self.slots_left = self.wants, 1
        self.writing.advance(self)
        if self.wants != wanted:
            return Retry.DONE
        return Retry.STUCK if self.slots_left else Retry.AGAIN


class Writing:
    def __init__(
        self, books: Books, holds: Holds, space: Space, spills: Spills, tails: Tails
    ) -> None:
        self._books = books
        self._tails = tails
        self._holds = holds
        self._space = space
        self._spills = spills
        self._naming = Naming(books, holds, tails)
        self.pending: dict[int, PendingReserve] = {}
        self._lag_waiting: dict[int, PendingReserve] = {}
        self.unfinished: dict[int, PendingReserve] = {}  # go on with a Continue, the next first
        books.before_leave.append(self._forget_filling)

    # ---- reserve

    def reserve(self, event: Reserve, namespace: Namespace) -> None:
        books, config = self._books, self._books.config
        session = self._holds.session(event.session)
        self._holds.client(session, event.client)
        namespace.grid.check(event.region)
        check_reserve(event, namespace, books.blocks)
        books.limit("reservations_max", len(self._holds.reservations))
        books.limit("reserve_waits_max", len(self.pending))
        if event.durable and not self._spills.possible:
            raise CoreError(ErrorKind.UNAVAILABLE, "there is no disk tier now", field="durable")
        reservation = Reservation(
            ident=self._holds.ident(),
            session=session.ident,
            client=event.client,
            namespace=namespace.handle,
            region=event.region,
            durable=event.durable,
            count=len(event.hashes),
        )
        self._holds.reservations[reservation.ident] = reservation
        session.reservations.add(reservation.ident)
        wait = min(max(event.wait, 0.0), config.wait_max)
        pending = PendingReserve(
            self, event, namespace, namespace.mask(event.region), reservation, books.now + wait
        )
        self.pending[event.ticket] = pending
        session.requests.add(event.ticket)
        self.advance(pending)

    def advance(self, pending: PendingReserve) -> None:
        """Go on with a Reserve as far as there is space, for one turn; answer it when it has come
        to its end."""
        event, books = pending.event, self._books
        taken = 0
        while pending.next < len(event.hashes):
            pending.wants = 0
            if taken == books.config.reserve_turn and pending.slots_left == _UNLIMITED:
                self.unfinished[event.ticket] = pending
                return
            verdict = self._try_block(pending)
            if verdict is None:
                if books.now < pending.deadline:
                    self._enqueue(pending)
                    return
                pending.wants = 0
                verdict = NO_SPACE
                books.counters["reserve_no_space"] += 1
            pending.verdicts.append(verdict)
            if verdict is WRITE:
                taken += 1
                gathered = books.now + books.config.reserve_gather
                pending.deadline = min(pending.deadline, gathered)
            else:
                pending.places.append(None)
            pending.next += 1
        pending.wants = 0
        self._finish(pending)

    def go_on(self) -> None:
        """A turn for the Reserve that has waited longest for one."""
        if self.unfinished:
            self.advance(self.unfinished.pop(next(iter(self.unfinished))))

    def _enqueue(self, pending: PendingReserve) -> None:
        self._books.timers.set(Kind.RESERVE_WAIT, pending.event.ticket, pending.deadline)
        if pending.wants == _LAG:
            self._lag_waiting[pending.event.ticket] = pending
        elif pending.slots_left == _UNLIMITED or not self._space.stands(
            pending.wants, pending.event.ticket
        ):
            self._space.wait(pending.wants, pending.event.ticket, pending)

    def _try_block(self, pending: PendingReserve) -> ReserveVerdict | None:
        """The verdict on the next block; None when there is no room, `wants` says for what."""
        event, at, blocks = pending.event, pending.next, self._books.blocks
        row = blocks.find(pending.namespace.handle, event.hashes[at])
        if row and blocks.state[row] == COMPLETE:
            return self._try_present(pending, row)
        filling = blocks.fillings.get(row)
        if filling is not None:
            return self._try_join(pending, filling)
        tokens = event.tokens[at] if event.tokens else pending.namespace.grid.block_tokens
        slot_bytes = pending.namespace.slot_bytes(tokens)
        if event.durable and not self._spills.has_room(slot_bytes):
            pending.wants = _LAG
            return None
        slot = self._take_slot(pending, slot_bytes, tokens)
        if not slot:
            pending.wants = slot_bytes
            return None
        if event.durable:
            self._spills.promise(slot_bytes)
        self._fill(pending, slot, tokens)
        return WRITE

    def _take_slot(self, pending: PendingReserve, slot_bytes: int, tokens: int) -> int:
        if not pending.slots_left:
            return 0
        tail = tokens < pending.namespace.grid.block_tokens and not pending.event.durable
        if tail and not self._tails.make_room(slot_bytes):
            return 0
        if pending.slots_left == _UNLIMITED and self._space.crowded(slot_bytes):
            return 0
        patient = self._books.now < pending.deadline
        slot = self._space.obtain(HOST, slot_bytes, SlotAction.RESERVE, patient=patient)
        pending.slots_left -= bool(slot) and pending.slots_left != _UNLIMITED
        return slot

    def _try_present(self, pending: PendingReserve, row: int) -> ReserveVerdict | None:
        if pending.event.durable and not self._spills.on_disk(row):
            if not self._spills.force(row):
                pending.wants = _LAG
                return None
            pending.forced[row] = pending.next
        return PRESENT

    def _try_join(self, pending: PendingReserve, filling: Filling) -> ReserveVerdict | None:
        """Further cells of a block that others are filling."""
        mask, client = pending.mask, pending.event.client
        if not mask & ~filling.committed:
            return PRESENT
        live = set(filling.writers.values()) | {client}
        crowded = len(live) > self._books.config.writers_per_block_max
        if mask & (filling.committed | filling.reserved) or crowded:
            self._books.counters["reserve_busy"] += 1
            return BUSY
        if pending.event.durable and not filling.durable:
            if not self._spills.promise(self._books.host.bytes_of(filling.slot)):
                pending.wants = _LAG
                return None
            filling.durable = True
            self._tails.forget(filling.row)
        self._add_part(pending, filling)
        return WRITE

    def _fill(self, pending: PendingReserve, slot: int, tokens: int) -> None:
        """A new block begins in a new slot."""
        event, at = pending.event, pending.next
        filling = self._naming.begin(
            pending.namespace.handle, event.hashes[at], event.parents[at],
            tokens=tokens, slot=slot, durable=event.durable,
        )  # fmt: skip
        self._add_part(pending, filling)

    def _add_part(self, pending: PendingReserve, filling: Filling) -> None:
        books, client = self._books, pending.event.client
        reservation = pending.reservation
        books.timers.cancel(Kind.PARTIAL, filling.slot)
        filling.parts[reservation.ident] = pending.mask
        filling.writers[reservation.ident] = client
        filling.reserved |= pending.mask
        reservation.blocks[pending.next] = filling
        place = books.host.place(filling.slot)
        if client not in filling.clients:
            filling.clients = tuple(sorted(set(filling.writers.values())))
            books.out.append(EntryReserved(place, filling.clients))
        pending.places.append(place)

    def _finish(self, pending: PendingReserve) -> None:
        """Every position has its verdict: answer, once the forced spills are through."""
        self._leave_queues(pending)
        books, event, reservation = self._books, pending.event, pending.reservation
        granted = WRITE in pending.verdicts
        ttl = books.clamp("reservation_ttl_max", event.ttl)
        if not granted:
            self._holds.end_reservation(reservation, remember=False)
        ident = reservation.ident if granted else 0

        def answer(failed: set[int]) -> None:
            reservation.pending = False
            if granted:
                if ident not in self._holds.reservations:  # its slots are somebody else's by now
                    error = CoreError(ErrorKind.NOT_FOUND, "the client has left", field="client")
                    books.refuse(event.ticket, error)
                    return
                books.timers.set(Kind.RESERVATION, ident, books.now + ttl)
            for row, at in pending.forced.items():
                if row in failed:
                    pending.verdicts[at] = NO_SPACE
            result = ReserveResult(ident, ttl, pending.verdicts, pending.places)
            books.answer(event.ticket, result)

        self._spills.when_durable(set(pending.forced), answer)

    def _leave_queues(self, pending: PendingReserve) -> None:
        ticket = pending.event.ticket
        del self.pending[ticket]
        self._holds.sessions[pending.event.session].requests.discard(ticket)
        self._books.timers.cancel(Kind.RESERVE_WAIT, ticket)
        self._lag_waiting.pop(ticket, None)
        self.unfinished.pop(ticket, None)
        self._space.leave(ticket)

    def give_up_waiting(self, ticket: int) -> None:
        """The wait is over: what has found no space by now gets none."""
        pending = self.pending[ticket]
        self._space.leave(ticket)
        self._lag_waiting.pop(ticket, None)
        pending.slots_left = _UNLIMITED
        self.advance(pending)

    def cancel(self, ticket: int, error: CoreError) -> None:
        """A waiting Reserve has lost its session, client or namespace. Nobody writes for it yet."""
        pending = self.pending[ticket]
        self._leave_queues(pending)
        self.end(pending.reservation, drained=True)
        self._books.refuse(ticket, error)

    def serve_lag(self) -> None:
        """There may be room in the spill lag again."""
        while self._lag_waiting:
            ticket, pending = next(iter(self._lag_waiting.items()))
            pending.slots_left = _UNLIMITED
            self.advance(pending)
            if pending.wants == _LAG:
                return
            self._lag_waiting.pop(ticket, None)

    # ---- commit

    def commit(self, event: Commit) -> None:
        reservation, mask = self._committing(event)
        if reservation is None:
            gone = [CommitVerdict.GONE] * len(event.indices)
            self._books.answer(event.ticket, CommitResult(gone, 0))
            return
        check_commit(event, reservation, mask, self._books)
        self._books.stamp += 1
        verdicts, completed, durable = [], 0, set()
        for position, at in enumerate(event.indices):
            filling = reservation.blocks.get(at)
            if filling is None:
                verdicts.append(self._commit_again(event, position, reservation.done[at]))
            elif filling.gone:
                self._commit_gone(reservation, at, filling, mask)
                verdicts.append(CommitVerdict.GONE)
            elif event.hashes and not self._naming.name(
                filling, event.hashes[position], event.parents[position]
            ):
                verdicts.append(CommitVerdict.TAKEN)
            else:
                verdicts.append(CommitVerdict.OK)
                if mask & filling.parts[reservation.ident]:
                    self._commit_cells(event, position, reservation, filling, mask)
                else:
                    self._present(event, position, filling.row, filling.slot)
                if filling.row not in self._books.blocks.fillings:
                    completed += 1
                    if filling.durable:
                        durable.add(filling.row)
        if not reservation.blocks:
            self._holds.end_reservation(reservation, remember=False)

        def answer(failed: set[int]) -> None:
            if failed:
                error = CoreError(ErrorKind.UNAVAILABLE, "not written to disk", field="durable")
                self._books.refuse(event.ticket, error)
            else:
                self._books.answer(event.ticket, CommitResult(verdicts, completed))

        self._spills.when_durable(durable, answer)

    def check_commit(self, event: Commit) -> None:
        """CoreError when a Commit is wrong, as it stands now."""
        reservation, mask = self._committing(event)
        if reservation is not None:
            check_commit(event, reservation, mask, self._books)

    def _committing(self, event: Commit) -> tuple[Reservation | None, int]:
        """The reservation, None of one that expired; and which cells are meant."""
        self._holds.session(event.session)
        reservation = self._holds.reservations.get(event.reservation)
        if reservation is None or reservation.session != event.session or reservation.pending:
            if self._holds.expired.get(event.reservation) != event.session:
                raise CoreError(ErrorKind.NOT_FOUND, "no such reservation", field="reservation")
            return None, 0
        namespace = self._books.namespaces.get(reservation.namespace)
        if namespace is None:  # dropped: every block is gone, whatever its cells were
            return reservation, -1
        return reservation, namespace.mask(namespace.grid.check(event.region))

    def _commit_gone(self, reservation: Reservation, at: int, filling: Filling, mask: int) -> None:
        """The writer has finished with these cells of a slot whose block has left."""
        left = filling.parts[reservation.ident] & ~mask
        filling.parts[reservation.ident] = left
        if not left:
            del reservation.blocks[at], filling.parts[reservation.ident]
            reservation.done[at] = None
            if self._books.quarantine.lift(filling.slot, reservation.ident):
                self._books.unhold(HOST, filling.slot)

    def _commit_again(self, event: Commit, position: int, written: Written | None) -> CommitVerdict:
        """The writer had come to the end of this position before."""
        if written is None:
            return CommitVerdict.GONE
        if stands(written, self._books):
            self._present(event, position, written.row, written.slot)
        return CommitVerdict.OK  # the first commit stays

    def _present(self, event: Commit, position: int, row: int, slot: int) -> None:
        books = self._books
        place, info = books.host.place(slot), books.info(row)
        books.out.append(CellsPresent(event.ticket, position, place, event.region, info))

    def _commit_cells(
        self, event: Commit, position: int, reservation: Reservation, filling: Filling, mask: int
    ) -> None:
        books, row, ident = self._books, filling.row, reservation.ident
        namespace = books.namespaces[reservation.namespace]
        filling.committed |= mask
        filling.reserved &= ~mask
        filling.parts[ident] &= ~mask
        if not filling.parts[ident]:
            at = event.indices[position]
            del filling.parts[ident], filling.writers[ident], reservation.blocks[at]
            place = books.host.place(filling.slot)
            reservation.done[at] = Written(row, filling.slot, place)
        complete = filling.committed == namespace.grid.full_mask
        place = books.host.place(filling.slot)
        info = books.info(row)
        books.out.append(
            CellsCommitted(event.ticket, position, place, event.region, info, complete)
        )
        books.counters["commits"] += 1
        if complete:
            self._complete(filling, namespace)
        else:
            if not filling.parts:
                self._linger(filling)
            books.wake(row)

    def _complete(self, filling: Filling, namespace: Namespace) -> None:
        books, row = self._books, filling.row
        del books.blocks.fillings[row]
        books.blocks.move(row, Action.FILL)
        books.blocks.stamp[row] = books.stamp
        namespace.blocks += 1
        books.counters["completed"] += 1
        books.wake(row)
        if not self._tails.complete(row):
            self._spills.add(row, durable=filling.durable)
        books.settle(row, HOST)

    # ---- ends

    def end(self, reservation: Reservation, *, drained: bool) -> None:
        """A reservation is over. `drained`: none of its copies still runs."""
        self._holds.end_reservation(reservation, remember=not drained)
        for filling in list(reservation.blocks.values()):
            if filling.gone:
                if drained and self._books.quarantine.lift(filling.slot, reservation.ident):
                    self._books.unhold(HOST, filling.slot)
            elif drained:
                filling.reserved &= ~filling.parts.pop(reservation.ident)
                del filling.writers[reservation.ident]
                if not filling.parts:
                    self._linger(filling)
            else:
                self._books.leave(filling.row, Action.EXPIRE)

    def _linger(self, filling: Filling) -> None:
        """Nobody writes a partial block: other ranks may come; an empty one leaves at once."""
        books = self._books
        if filling.committed:
            deadline = books.now + books.config.partial_ttl
            books.timers.set(Kind.PARTIAL, filling.slot, deadline)
        else:
            books.leave(filling.row, Action.LAPSE)

    def lapse(self, slot: int) -> None:
        """No other rank came for a partial block."""
        self._books.counters["lapsed_blocks"] += 1
        self._books.leave(self._books.host.row[slot], Action.LAPSE)

    def fence(self, ident: int, session: int) -> int:
        """A writer's copies have drained. Returns the number of slots that left quarantine."""
        reservation = self._holds.reservations.get(ident)
        owner = self._holds.expired.get(ident) if reservation is None else reservation.session
        if owner != session:
            return 0
        if reservation is not None:
            gone = [at for at, filling in reservation.blocks.items() if filling.gone]
            for at in gone:
                del reservation.blocks[at].parts[ident], reservation.blocks[at]
                reservation.done[at] = None
            if not reservation.blocks and not reservation.pending:
                self._holds.end_reservation(reservation, remember=False)
        return self.lift(self._books.quarantine.lift_reservation(ident))

    def lift(self, slots: list[int]) -> int:
        """These slots have no fence any more. Returns how many became free."""
        return sum(self._books.unhold(HOST, slot) for slot in slots)

    def _forget_filling(self, row: int) -> None:
        """Before a FILLING block leaves: whoever might still write its slot is fenced off."""
        books = self._books
        filling = books.blocks.fillings.pop(row, None)
        if filling is None:
            return
        filling.gone = True
        books.timers.cancel(Kind.PARTIAL, filling.slot)
        for reservation, client in filling.writers.items():
            books.quarantine.hold(filling.slot, reservation, client)
        if filling.durable:
            self._spills.break_promise(books.host.bytes_of(filling.slot))
