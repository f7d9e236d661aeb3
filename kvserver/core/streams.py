"""Read streams: an Acquire, granted block by block within a window.

Theory of operation. `pump` grants from the head of a stream as far as it can, in order. The head is
then granted, missing, or waits for exactly one thing: window (a lease ends), its block (a commit,
a fetch, a Verify: the stream watches the row), or a host slot (it stands in the queue of a size
class). Behind the head, blocks that are on disk only are fetched ahead within what is left of the
window, and pinned for the stream when they arrive.

No deadlock: a stream that waits for a slot gives up everything it holds ahead of its head, so
slots are kept only by leases (readers release them, or they expire), by running jobs, and by
streams whose head waits for a writer, for `wait` seconds at most. A head that starves for longer
than `starve_max` is missing.

Invariants: granted bytes of a stream stay within its window unless it holds a single block;
`leased` is the sum of its leases' bytes; a stream watches at most one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvproto.errors import FieldError
from kvserver.core.blocks import ABSENT, COMPLETE, FILLING, bit
from kvserver.core.books import HOST, Books, Namespace
from kvserver.core.errors import CoreError
from kvserver.core.events import Acquire, Tier
from kvserver.core.fetches import Fetches, Start
from kvserver.core.holds import Holds, Lease
from kvserver.core.instructions import AcquireResult, Granted, GrantedBlock
from kvserver.core.space import Retry, Space
from kvserver.core.timers import Kind
from kvserver.core.verifies import Verifies


@dataclass(eq=False, slots=True)
class Stream:
    streams: Streams
    event: Acquire
    namespace: Namespace
    mask: int
    cost_full: int  # bytes of the region in a full block
    readable: int  # bits of the tiers that the reader can reach
    window: int
    life: float
    deadline: float  # for blocks that are not complete
    next: int = 0
    ahead: int = 0  # the next position that read-ahead looks at
    granted: int = 0
    leased: int = 0
    leases: set[int] = field(default_factory=set)
    missing: list[int] = field(default_factory=list)
    pins: dict[int, int] = field(default_factory=dict)  # position -> host slot that arrived for it
    wants: dict[int, int] = field(default_factory=dict)  # row on its way -> position
    costs: dict[int, int] = field(default_factory=dict)  # of positions from next to ahead
    cost_ahead: int = 0  # their sum
    came_from: dict[int, Tier] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    watching: int = 0
    starving: int = 0  # the size class that it stands in the queue of
    serving: bool = False  # it is at the head of that queue, and it is its turn

    def retry(self) -> Retry:
        self.serving = True
        self.streams.pump(self)
        self.serving = False
        return Retry.STUCK if self.starving else Retry.DONE


class Streams:
    def __init__(
        self, books: Books, holds: Holds, space: Space, fetches: Fetches, verifies: Verifies
    ) -> None:
        self._books = books
        self._holds = holds
        self._space = space
        self._fetches = fetches
        self._verifies = verifies
        self.open: dict[int, Stream] = {}  # by ticket
        fetches.arrived = self._arrived
        fetches.failed = self._failed
        verifies.failed = self._verify_failed

    # ---- opening and closing

    def acquire(self, event: Acquire, namespace: Namespace) -> None:
        books, config = self._books, self._books.config
        session = self._holds.session(event.session)
        grid = namespace.grid
        grid.check(event.region)
        if not event.readable:
            raise FieldError("readable", event.readable, "at least one tier")
        books.limit("streams_max", len(self.open))
        books.limit("leases_max", len(self._holds.leases))
        window = event.window if event.window > 0 else config.window_bytes_max
        stream = Stream(
            streams=self,
            event=event,
            namespace=namespace,
            mask=namespace.mask(event.region),
            cost_full=grid.region_bytes(event.region),
            readable=sum(bit(tier) for tier in event.readable),
            window=min(window, config.window_bytes_max),
            life=books.clamp("lease_max", event.lease),
            deadline=books.now + min(max(event.wait, 0.0), config.wait_max),
        )
        self.open[event.ticket] = stream
        session.requests.add(event.ticket)
        books.counters["streams"] += 1
        self._inherit(stream)
        self.pump(stream)

    def _inherit(self, stream: Stream) -> None:
        """The Lookup's pins stand at least as long as a first grant would, within lease_max."""
        books, lease = self._books, self._holds.leases.get(stream.event.inherit)
        if lease is None or lease.session != stream.event.session or lease.stream:
            return
        latest = lease.born + books.config.lease_max
        deadline = min(latest, books.now + stream.life)
        if deadline > (books.timers.get(Kind.LEASE, lease.ident) or latest):
            books.timers.set(Kind.LEASE, lease.ident, deadline)

    def cancel(self, ticket: int) -> None:
        """The reader is gone: its leases end, and nobody is answered."""
        stream = self.open[ticket]
        self._close(stream)
        for ident in list(stream.leases):
            self._holds.end_lease(self._holds.leases[ident])

    def refuse(self, ticket: int, error: CoreError) -> None:
        """The stream's session or namespace has ended. Its leases go on."""
        self._close(self.open[ticket])
        self._books.refuse(ticket, error)

    def _close(self, stream: Stream) -> None:
        ticket = stream.event.ticket
        del self.open[ticket]
        self._holds.sessions[stream.event.session].requests.discard(ticket)
        self._books.ready.pop(ticket, None)
        self._books.timers.cancel(Kind.STREAM_WAIT, ticket)
        self._unwatch(stream)
        self._sate(stream)
        self._drop_ahead(stream)

    def lease_ended(self, lease: Lease) -> None:
        """A lease was released or has expired: the stream's window has room."""
        stream = self.open.get(lease.stream)
        if stream is not None:
            stream.leases.discard(lease.ident)
            stream.leased -= lease.bytes
            self._books.ready[lease.stream] = None

    # ---- granting

    def pump(self, stream: Stream) -> None:
        """Grant what can be granted; leave the stream waiting, or end it."""
        if stream.event.ticket not in self.open:
            return
        self._unwatch(stream)
        blocks: list[GrantedBlock] = []
        pins: list[tuple[Tier, int]] = []
        before = stream.leased
        while stream.next < len(stream.event.hashes) and self._step(stream, blocks, pins):
            pass
        if blocks:
            self._grant(stream, blocks, pins, stream.leased - before)
        if stream.next == len(stream.event.hashes):
            self._close(stream)
            self._books.answer(stream.event.ticket, AcquireResult(stream.granted, stream.missing))
        elif not stream.starving:
            self._read_ahead(stream)

    def _grant(
        self,
        stream: Stream,
        blocks: list[GrantedBlock],
        pins: list[tuple[Tier, int]],
        size: int,
    ) -> None:
        session = self._holds.session(stream.event.session)
        lease = self._holds.grant(session, stream.event.ticket, pins, size, stream.life)
        stream.leases.add(lease.ident)
        stream.granted += len(blocks)
        self._books.counters["blocks_granted"] += len(blocks)
        missing, stream.missing = stream.missing, []
        self._books.out.append(
            Granted(stream.event.ticket, lease.ident, stream.life, blocks, missing)
        )

    def _step(
        self, stream: Stream, granted: list[GrantedBlock], pins: list[tuple[Tier, int]]
    ) -> bool:
        """Deal with the head. False: it has to wait."""
        blocks = self._books.blocks
        row = blocks.find(stream.namespace.handle, stream.event.hashes[stream.next])
        state = blocks.state[row]
        if not row or state == ABSENT:
            return self._miss(stream)
        if state == COMPLETE:
            bits = blocks.resident[row] & self._books.up_bits
            able = bits & stream.readable & ~blocks.suspect[row]
            if not able:
                return self._step_absent(stream, row, bits)
            tier = Tier((able & -able).bit_length())
        else:
            filling = blocks.fillings.get(row)
            covered = filling is not None and not stream.mask & ~filling.committed
            if state != FILLING or not covered or not stream.readable & bit(HOST):
                return self._step_unwritten(stream, row)
            tier = HOST
        cost = self._cost(stream, row)
        if self._full(stream, cost):
            return False
        self._sate(stream)
        slot = blocks.slot[tier][row]
        self._books.pin(tier, slot)
        pins.append((tier, slot))
        stream.leased += cost
        granted.append(
            GrantedBlock(
                stream.next,
                self._books.slots[tier].place(slot),
                blocks.tokens[row],
                state == COMPLETE,
                stream.came_from.get(stream.next, tier),
            )
        )
        blocks.stamp[row] = self._books.stamp
        return self._pass_by(stream)

    def _step_absent(self, stream: Stream, row: int, bits: int) -> bool:
        """The head is complete, but not where the reader could take it."""
        if stream.next in stream.failed or not stream.readable & bit(HOST) or not bits:
            return self._miss(stream)
        if self._full(stream, self._cost(stream, row)):
            return False
        if bits & bit(HOST):
            self._sate(stream)
            self._verifies.want(row)
            self._watch(stream, row)
            return False
        slot_bytes = self._slot_bytes(row)
        if not stream.serving and not self._fetches.coming(row) and self._space.crowded(slot_bytes):
            start = Start.NO_ROOM
        else:
            start = self._fetches.begin(row, patient=True)
        if start is Start.NOWHERE:
            return self._miss(stream)
        self._watch(stream, row)
        if start is Start.NO_ROOM:
            self._starve(stream, slot_bytes)
        else:
            self._sate(stream)
            self._want(stream, row, stream.next)
        return False

    def _step_unwritten(self, stream: Stream, row: int) -> bool:
        """The head is announced, or its cells are not all there yet."""
        books = self._books
        if books.now >= stream.deadline:
            return self._miss(stream)
        self._sate(stream)
        if books.timers.get(Kind.STREAM_WAIT, stream.event.ticket) is None:
            books.timers.set(Kind.STREAM_WAIT, stream.event.ticket, stream.deadline)
        self._watch(stream, row)
        return False

    def _miss(self, stream: Stream) -> bool:
        self._sate(stream)
        self._books.counters["blocks_missing"] += 1
        stream.missing.append(stream.next)
        return self._pass_by(stream)

    def _pass_by(self, stream: Stream) -> bool:
        """The head is dealt with: on to the next."""
        at = stream.next
        slot = stream.pins.pop(at, 0)
        if slot:
            self._books.unpin(HOST, slot)
        stream.cost_ahead -= stream.costs.pop(at, 0)
        stream.came_from.pop(at, None)
        stream.failed.discard(at)
        stream.next += 1
        return True

    def _full(self, stream: Stream, cost: int) -> bool:
        """The window, or the number of leases, allows no more now."""
        leases = len(stream.leases) >= self._books.config.leases_per_stream_max
        full = stream.leased > 0 and stream.leased + cost > stream.window
        if full or leases:
            self._sate(stream)
        return full or leases

    def _cost(self, stream: Stream, row: int) -> int:
        tokens, grid = self._books.blocks.tokens[row], stream.namespace.grid
        if tokens == grid.block_tokens:
            return stream.cost_full
        return grid.region_bytes(stream.event.region, tokens)

    def _slot_bytes(self, row: int) -> int:
        namespace = self._books.namespaces[self._books.blocks.namespace[row]]
        return namespace.slot_bytes(self._books.blocks.tokens[row])

    # ---- waiting

    def _watch(self, stream: Stream, row: int) -> None:
        stream.watching = row
        self._books.watch(row, stream.event.ticket)

    def _unwatch(self, stream: Stream) -> None:
        watchers = self._books.watchers.get(stream.watching)
        if watchers is not None:
            watchers.pop(stream.event.ticket, None)
            if not watchers:
                del self._books.watchers[stream.watching]
        stream.watching = 0

    def _starve(self, stream: Stream, slot_bytes: int) -> None:
        """Wait for a host slot, and hold nothing ahead of the head meanwhile."""
        ticket = stream.event.ticket
        if stream.starving != slot_bytes:
            if not stream.starving:
                self._books.counters["streams_starved"] += 1
                deadline = self._books.now + self._books.config.starve_max
                self._books.timers.set(Kind.STREAM_STARVE, ticket, deadline)
            stream.starving = slot_bytes
            self._space.wait(slot_bytes, ticket, stream)
        self._drop_ahead(stream)

    def _sate(self, stream: Stream) -> None:
        """It needs no slot any more, or not now."""
        if stream.starving:
            stream.starving = 0
            self._space.leave(stream.event.ticket)
            self._books.timers.cancel(Kind.STREAM_STARVE, stream.event.ticket)

    def starved(self, ticket: int) -> None:
        """No slot came in time: the head is missing."""
        stream = self.open[ticket]
        stream.failed.add(stream.next)
        self._sate(stream)
        self._books.ready[ticket] = None

    # ---- read-ahead

    def _read_ahead(self, stream: Stream) -> None:
        """Fetch what stands on disk only behind the head, within what the window leaves."""
        blocks = self._books.blocks
        if not stream.readable & bit(HOST):
            return
        stream.ahead = max(stream.ahead, stream.next)
        budget = stream.window - stream.leased - stream.cost_ahead
        index = blocks.index[stream.namespace.handle]
        while stream.ahead < len(stream.event.hashes):
            at = stream.ahead
            row = index.get(stream.event.hashes[at], 0)
            if row and blocks.state[row] == COMPLETE:
                cost = self._cost(stream, row)
                if cost > budget or not self._fetch_ahead(stream, row, at):
                    return
                stream.costs[at] = cost
                stream.cost_ahead += cost
                budget -= cost
            stream.ahead += 1

    def _fetch_ahead(self, stream: Stream, row: int, at: int) -> bool:
        """False when there is no room for it now."""
        blocks = self._books.blocks
        bits = blocks.resident[row] & self._books.up_bits
        if bits & stream.readable & ~blocks.suspect[row]:
            return True
        if bits & bit(HOST):
            self._verifies.want(row)
            return True
        if not self._fetches.coming(row) and self._space.crowded(self._slot_bytes(row)):
            return False
        start = self._fetches.begin(row, patient=False)
        if start is Start.RUNNING:
            self._want(stream, row, at)
        return start is not Start.NO_ROOM

    def _want(self, stream: Stream, row: int, at: int) -> None:
        stream.wants[row] = at
        stream.came_from[at] = self._fetches.source(row) or HOST
        self._fetches.want_for_stream(row, stream.event.ticket, at)

    def _drop_ahead(self, stream: Stream) -> None:
        for row in stream.wants:
            self._fetches.unwant(row, stream.event.ticket)
        pins = list(stream.pins.values())
        stream.wants.clear()
        stream.pins.clear()
        stream.costs.clear()
        stream.cost_ahead = 0
        stream.ahead = stream.next
        for slot in pins:
            self._books.unpin(HOST, slot)

    def _arrived(self, ticket: int, at: int, slot: int) -> None:
        """A block was fetched that the stream had asked for."""
        stream = self.open.get(ticket)
        if stream is not None:
            stream.wants.pop(self._books.host.row[slot], None)
            if at >= stream.next and at not in stream.pins:
                stream.pins[at] = slot
                self._books.pin(HOST, slot)

    def _failed(self, ticket: int, at: int) -> None:
        """A block could not be fetched that the stream had asked for."""
        stream = self.open.get(ticket)
        if stream is not None:
            stream.failed.add(at)
            stream.wants = {row: index for row, index in stream.wants.items() if index != at}

    def _verify_failed(self, row: int) -> None:
        """A block could not be checked: those that wait for it do without."""
        for ticket in self._books.watchers.get(row, ()):
            stream = self.open[ticket]
            stream.failed.add(stream.next)
