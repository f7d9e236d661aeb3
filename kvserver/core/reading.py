"""Lookup and leases: what a reader is told, and what it may hold.

A Lookup is a pure read of up to thousands of keys: one dictionary access per key, the rest in
NumPy. It makes what it hits more recent and warmer, but renews nobody's lease.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError
from kvproto.grid import Region
from kvproto.needs import Mask, usable_prefix
from kvserver.core.blocks import ABSENT, COMPLETE, FILLING, bit
from kvserver.core.books import HOST, Books, Namespace
from kvserver.core.events import Lookup, Need, Release
from kvserver.core.fetches import Fetches, Start
from kvserver.core.holds import Holds, Session
from kvserver.core.instructions import LookupResult
from kvserver.core.streams import Streams
from kvserver.core.verifies import Verifies

# The fastest tier of a set of resident bits.
_FASTEST = np.array([0] + [(bits & -bits).bit_length() for bits in range(1, 8)], dtype=np.uint8)
_NEEDS = ("every", "last", "state")
_EVERY = (Need("every"),)
Rows = npt.NDArray[np.intp]


class Reading:
    def __init__(
        self, books: Books, holds: Holds, fetches: Fetches, verifies: Verifies, streams: Streams
    ) -> None:
        self._books = books
        self._holds = holds
        self._fetches = fetches
        self._verifies = verifies
        self._streams = streams

    def lookup(self, event: Lookup, namespace: Namespace) -> None:
        books, blocks = self._books, self._books.blocks
        session = self._holds.session(event.session)
        for need in event.need:
            _check_need(need, namespace)
        if event.pin > 0:
            books.limit("leases_max", len(self._holds.leases))
        rows = self.rows(namespace, event.hashes)
        here = blocks.resident_view[rows] & books.up_bits
        states = blocks.state_view[rows]
        complete = here != 0
        states = np.where((states == COMPLETE) & ~complete, np.uint8(ABSENT), states)
        needs = event.need or _EVERY
        have = [self._covered(namespace, rows, complete, need.region) for need in needs]
        usable = usable_prefix(have, needs)
        live = usable_prefix([states != ABSENT] * len(needs), needs)
        missed = np.flatnonzero(~complete)
        hits = int(missed[0]) if missed.size else len(rows)
        self._count(namespace, hits, len(rows) - hits)
        self.touch(rows[complete])
        lease, life = 0, 0.0
        if event.pin > 0 and usable:
            life = books.clamp("lease_max", event.pin)
            start = 0 if _needs_all(event.need) else usable - _last_needed(event.need, usable)
            held = np.logical_or.reduce([complete, *have])
            chosen = np.arange(start, usable)[held[start:usable]]
            lease = self._pin(session, rows[chosen].tolist(), life)
        result = LookupResult(
            usable,
            live,
            states.tobytes(),
            _FASTEST[here].tobytes(),
            lease,
            life if lease else 0.0,
            self._committed(namespace, rows, complete),
        )
        books.answer(event.ticket, result)

    def _covered(
        self, namespace: Namespace, rows: Rows, complete: Mask, region: Region | None
    ) -> Mask:
        """Which blocks have every cell of a region: complete ones, and some that still fill."""
        blocks = self._books.blocks
        if region is None or not self._books.host.up:
            return complete
        mask, covered = namespace.mask(region), complete.copy()
        for at in np.flatnonzero(blocks.state_view[rows] == FILLING).tolist():
            covered[at] = not mask & ~blocks.fillings[int(rows[at])].committed
        return covered

    def _committed(self, namespace: Namespace, rows: Rows, complete: Mask) -> int:
        """Cells that are there, of complete blocks and of those that are still being written."""
        blocks = self._books.blocks
        filling = rows[(blocks.state_view[rows] == FILLING) & ~complete].tolist()
        partly = sum(blocks.fillings[row].committed.bit_count() for row in filling)
        return int(complete.sum()) * namespace.grid.cells + partly

    def rows(self, namespace: Namespace, hashes: list[bytes]) -> Rows:
        """The blocks' rows; 0, which is ABSENT, where there is none."""
        index = self._books.blocks.index[namespace.handle]
        return np.array(list(map(index.get, hashes, repeat(0))), dtype=np.intp)

    def touch_all(self, namespace: Namespace, hashes: list[bytes]) -> None:
        """These blocks are asked for: those that are here count as used."""
        rows = self.rows(namespace, hashes)
        self.touch(rows[self._books.blocks.resident_view[rows] != 0])

    def touch(self, rows: Rows) -> None:
        """These blocks were used."""
        if rows.size:
            self._books.stamp += 1
            self._books.blocks.touch(rows, self._books.stamp)
            self._fetches.warm(rows)

    def _count(self, namespace: Namespace, hits: int, misses: int) -> None:
        counters = self._books.counters
        counters["hits"] += hits
        counters["misses"] += misses
        namespace.hits += hits
        namespace.misses += misses

    def _pin(self, session: Session, rows: list[int], life: float) -> int:
        """One lease over blocks: those on the host are pinned, others are fetched and pinned."""
        books, blocks, config = self._books, self._books.blocks, self._books.config
        lease = self._holds.grant(session, 0, [], 0, life)
        room, fetchable = config.pin_bytes_max, config.pin_promote_bytes_max
        for row in rows:
            filling = row in blocks.fillings
            if not filling and not blocks.resident[row] & books.up_bits:
                continue  # evicted by a fetch that this very lease has started
            if filling or blocks.resident[row] & bit(HOST):
                slot = blocks.slot[HOST][row]
                room -= books.host.bytes_of(slot)
                if room < 0:
                    break
                books.pin(HOST, slot)
                lease.pins.append((HOST, slot))
                if blocks.suspect[row] & bit(HOST):
                    self._verifies.want(row)
                continue
            tier = blocks.fastest(row, books.up_bits)
            assert tier is not None
            slot_bytes = books.slots[tier].bytes_of(blocks.slot[tier][row])
            room -= slot_bytes
            fetchable -= slot_bytes
            if room < 0 or fetchable < 0:
                break
            if self._fetches.begin(row, patient=False) is Start.RUNNING:
                self._fetches.want_for_lease(row, lease.ident)
        return lease.ident

    # ---- leases

    def release(self, event: Release) -> int:
        """Returns how many leases were given back."""
        released = 0
        for ident in event.leases:
            lease = self._holds.leases.get(ident)
            if lease is not None and lease.session == event.session:
                self.end_lease(ident)
                released += 1
        return released

    def end_lease(self, ident: int) -> None:
        lease = self._holds.leases[ident]
        self._holds.end_lease(lease)
        if lease.stream:
            self._streams.lease_ended(lease)

    def expire_lease(self, ident: int) -> None:
        """Its reader is slow or gone; it compares generations, so the slot needs no quarantine."""
        self._books.counters["expired_leases"] += 1
        self.end_lease(ident)


def _needs_all(needs: tuple[Need, ...]) -> bool:
    return not needs or any(need.kind == "every" for need in needs)


def _last_needed(needs: tuple[Need, ...], usable: int) -> int:
    wanted = max(need.blocks if need.kind == "last" else 1 for need in needs)
    return min(wanted, usable)


def _check_need(need: Need, namespace: Namespace) -> None:
    if need.kind not in _NEEDS:
        raise FieldError("need.kind", need.kind, f"one of {', '.join(_NEEDS)}")
    if need.kind == "last" and need.blocks < 1:
        raise FieldError("need.blocks", need.blocks, "at least 1")
    if need.region is not None:
        namespace.grid.check(need.region)
