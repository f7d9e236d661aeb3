"""Which clients might still write into a host slot whose block has left the table.

A fence names a slot, the reservation that allowed the writing and the client that held it. It is
lifted when that writer says that its copies have drained, or is proven dead. Only then is the slot
reusable: no deadline is a fence.

Invariant: the three maps say the same; none holds an empty set.
"""

from __future__ import annotations

RESTORED = 0  # the reservation of a fence that recovery found in the arena's directory


class Quarantine:
    def __init__(self) -> None:
        self._fences: dict[int, set[tuple[int, int]]] = {}  # slot -> (reservation, client)
        self._by_reservation: dict[int, set[int]] = {}
        self._by_client: dict[int, set[tuple[int, int]]] = {}  # client -> (slot, reservation)

    def hold(self, slot: int, reservation: int, client: int) -> None:
        self._fences.setdefault(slot, set()).add((reservation, client))
        if reservation != RESTORED:
            self._by_reservation.setdefault(reservation, set()).add(slot)
        self._by_client.setdefault(client, set()).add((slot, reservation))

    def holds(self, slot: int) -> bool:
        return slot in self._fences

    def fences(self) -> dict[int, set[tuple[int, int]]]:
        return self._fences

    def clients(self) -> frozenset[int]:
        """Whose death would lift something."""
        return frozenset(self._by_client)

    def reservations(self) -> frozenset[int]:
        return frozenset(self._by_reservation)

    def lift(self, slot: int, reservation: int) -> bool:
        """One writer has left one slot. True when the slot has no fence any more."""
        fences = self._fences.get(slot)
        if fences is None:
            return False
        for fence in [fence for fence in fences if fence[0] == reservation]:
            fences.discard(fence)
            self._forget(slot, *fence)
        if fences:
            return False
        del self._fences[slot]
        return True

    def lift_reservation(self, reservation: int) -> list[int]:
        """The slots that lost their last fence."""
        slots = sorted(self._by_reservation.get(reservation, ()))
        return [slot for slot in slots if self.lift(slot, reservation)]

    def lift_client(self, client: int) -> list[int]:
        """The slots that lost their last fence."""
        lifted = []
        for slot, reservation in sorted(self._by_client.get(client, ())):
            fences = self._fences[slot]
            fences.discard((reservation, client))
            self._forget(slot, reservation, client)
            if not fences:
                del self._fences[slot]
                lifted.append(slot)
        return lifted

    def _forget(self, slot: int, reservation: int, client: int) -> None:
        held = self._by_client[client]
        held.discard((slot, reservation))
        if not held:
            del self._by_client[client]
        slots = self._by_reservation.get(reservation)
        if slots is not None:
            slots.discard(slot)
            if not slots:
                del self._by_reservation[reservation]
