"""The simplest model of what the hub promises writers and readers: dictionaries of cells.

It knows no slots, no tiers, no masks and no eviction. A complete block may vanish at any time; what
is being written may not: its states, verdicts and ends are predicted exactly. Keys of a Reserve
that had to wait are `loose`: when it got its slots is not observable, so nothing is predicted of
them any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvserver.core.events import BlockState, CommitVerdict, ReserveVerdict

Name = tuple[int, bytes]  # namespace handle, key


@dataclass(eq=False)
class ModelReservation:
    ident: int
    session: int
    client: int
    deadline: float
    blocks: dict[int, tuple[Name, set[int]]]  # position -> block and cells still to be committed
    gone: set[int] = field(default_factory=set)  # positions whose block has left the table


@dataclass(eq=False)
class ModelBlock:
    committed: set[int] = field(default_factory=set)
    parts: dict[int, set[int]] = field(default_factory=dict)
    lapse: float | None = None

    def reserved(self) -> set[int]:
        return set().union(*self.parts.values()) if self.parts else set()


class Reference:
    def __init__(self, cells: int, *, partial_ttl: float, session_ttl: float) -> None:
        self.cells = set(range(cells))
        self.partial_ttl = partial_ttl
        self.session_ttl = session_ttl
        self.filling: dict[Name, ModelBlock] = {}
        self.complete: set[Name] = set()
        self.announced: dict[Name, list[tuple[int, float]]] = {}  # session, deadline
        self.reservations: dict[int, ModelReservation] = {}
        self.sessions: dict[int, float] = {}  # deadline
        self.loose: set[Name] = set()

    # ---- time

    def run_to(self, now: float) -> None:
        """Expire everything that is due, in order."""
        while True:
            due = [(r.deadline, 1, r.ident) for r in self.reservations.values()]
            due += [(deadline, 0, ident) for ident, deadline in self.sessions.items()]
            lapses = [(b.lapse, name) for name, b in self.filling.items() if b.lapse is not None]
            first = min(due, default=(float("inf"), 0, 0))
            first_lapse = min(lapses, default=(float("inf"), (0, b"")))
            if min(first[0], first_lapse[0]) > now:
                break
            if first_lapse[0] < first[0]:
                del self.filling[first_lapse[1]]
            elif first[1]:
                self.end(self.reservations[first[2]], first[0], drained=False)
            else:
                self.end_session(first[2], first[0], drained=False)
        for name, callers in list(self.announced.items()):
            self.announced[name] = [c for c in callers if c[1] > now]
            if not self.announced[name]:
                del self.announced[name]

    # ---- predictions

    def state(self, name: Name) -> BlockState | None:
        """What a lookup must say; None when an evicted block may be ABSENT or COMPLETE."""
        if name in self.filling:
            return BlockState.FILLING
        if name in self.complete:
            return None
        return BlockState.ANNOUNCED if name in self.announced else BlockState.ABSENT

    def verdict(self, name: Name, cells: set[int]) -> ReserveVerdict:
        block = self.filling.get(name)
        if block is not None:
            if cells <= block.committed:
                return ReserveVerdict.PRESENT
            if cells & (block.committed | block.reserved()):
                return ReserveVerdict.BUSY
            return ReserveVerdict.WRITE
        return ReserveVerdict.PRESENT if name in self.complete else ReserveVerdict.WRITE

    # ---- events

    def reserve(self, reservation: ModelReservation) -> None:
        self.reservations[reservation.ident] = reservation
        for name, cells in reservation.blocks.values():
            self.announced.pop(name, None)
            block = self.filling.setdefault(name, ModelBlock())
            block.parts[reservation.ident] = set(cells)
            block.lapse = None

    def commit(
        self, reservation: ModelReservation, at: int, cells: set[int], now: float
    ) -> CommitVerdict:
        name, left = reservation.blocks[at]
        left -= cells
        if not left:
            del reservation.blocks[at]
        gone = at in reservation.gone
        if not gone:
            block = self.filling[name]
            block.committed |= cells
            block.parts[reservation.ident] -= cells
            if not block.parts[reservation.ident]:
                del block.parts[reservation.ident]
            if block.committed == self.cells:
                del self.filling[name]
                self.complete.add(name)
            elif not block.parts:
                block.lapse = now + self.partial_ttl
        if not reservation.blocks:
            del self.reservations[reservation.ident]
        return CommitVerdict.GONE if gone else CommitVerdict.OK

    def rename(self, reservation: ModelReservation, at: int, name: Name) -> None:
        """The block is this one, which nobody else has."""
        old, left = reservation.blocks[at]
        reservation.blocks[at] = (name, left)
        self.filling[name] = self.filling.pop(old)
        self.announced.pop(name, None)
        self.complete.discard(name)

    def end(self, reservation: ModelReservation, now: float, *, drained: bool) -> None:
        del self.reservations[reservation.ident]
        for at, (name, _) in reservation.blocks.items():
            if at in reservation.gone:
                continue
            if not drained:
                self.leave(name)
                continue
            block = self.filling[name]
            del block.parts[reservation.ident]
            if not block.parts:
                if block.committed:
                    block.lapse = now + self.partial_ttl
                else:
                    del self.filling[name]

    def leave(self, name: Name) -> None:
        """A block that is being written is gone for all its writers."""
        self.filling.pop(name, None)
        for reservation in self.reservations.values():
            for at, (other, _) in reservation.blocks.items():
                if other == name:
                    reservation.gone.add(at)

    def withdraw(self, session: int, names: list[Name]) -> None:
        for name in names:
            left = [caller for caller in self.announced.get(name, []) if caller[0] != session]
            self.announced.pop(name, None)
            if left:
                self.announced[name] = left

    def drop_namespace(self, handle: int) -> None:
        for name in [name for name in self.filling if name[0] == handle]:
            self.leave(name)
        self.complete = {name for name in self.complete if name[0] != handle}
        self.announced = {n: c for n, c in self.announced.items() if n[0] != handle}

    def fence(self, reservation: ModelReservation) -> None:
        for at in reservation.gone:
            reservation.blocks.pop(at, None)
        reservation.gone.clear()
        if not reservation.blocks:
            del self.reservations[reservation.ident]

    def end_client(self, session: int, client: int, now: float, *, drained: bool) -> None:
        for reservation in list(self.reservations.values()):
            if (reservation.session, reservation.client) == (session, client):
                self.end(reservation, now, drained=drained)

    def end_session(self, session: int, now: float, *, drained: bool) -> None:
        del self.sessions[session]
        for reservation in list(self.reservations.values()):
            if reservation.session == session:
                self.end(reservation, now, drained=drained)
        for name, callers in list(self.announced.items()):
            self.announced[name] = [c for c in callers if c[0] != session]
            if not self.announced[name]:
                del self.announced[name]
