"""The auditor: recomputes every book from the others and says what does not agree.

Reads everything, changes nothing, costs O(all). For tests, and for an operator who suspects a bug.
"""

from __future__ import annotations

from collections import Counter

from kvserver.core.blocks import ABSENT, ANNOUNCED, COMPLETE, FILLING, bit
from kvserver.core.books import DEVICE, DISK, HOST, Books
from kvserver.core.errors import InvariantError
from kvserver.core.events import BlockState, Tier
from kvserver.core.holds import Holds
from kvserver.core.jobs import Jobs
from kvserver.core.slots import COMMITTED, SlotState, SlotTable
from kvserver.core.space import Space
from kvserver.core.spills import Spill, Spills
from kvserver.core.streams import Streams
from kvserver.core.tails import Tails
from kvserver.core.writing import Writing


def validate(
    books: Books,
    holds: Holds,
    jobs: Jobs,
    spills: Spills,
    streams: Streams,
    space: Space,
    writing: Writing,
    tails: Tails,
) -> None:
    """InvariantError with everything that is wrong."""
    wrong: list[str] = []
    for tier in Tier:
        _extents(books.slots[tier], wrong)
        _slots(books, tier, wrong)
        wrong += books.policy[tier].check()
    wrong += tails.check()
    _rows(books, wrong)
    _kids(books, wrong)
    _namespaces(books, wrong)
    _fillings(books, holds, wrong)
    _pins(books, holds, jobs, streams, wrong)
    _spills(books, spills, wrong)
    _device(books, wrong)
    _holds(books, holds, wrong)
    _streams(books, streams, holds, wrong)
    waiting = set(space.waiting())
    known = set(writing.pending) | {t for t, s in streams.open.items() if s.starving}
    _check(wrong, waiting <= known, "someone unknown waits for a slot")
    turns = set(writing.unfinished)
    _check(wrong, turns <= set(writing.pending), "a Reserve goes on that nobody waits for")
    _check(wrong, not turns & waiting, "a Reserve goes on while it waits for a slot")
    if wrong:
        raise InvariantError("\n".join(wrong[:20]))


def _check(wrong: list[str], right: bool, what: str) -> None:
    if not right:
        wrong.append(what)


def _extents(table: SlotTable, wrong: list[str]) -> None:
    """Slabs and free runs cover the tier without gap or overlap; free runs never touch."""
    extents = [(start, stop, True) for start, stop in table.map.runs()]
    extents += [(slab.start, slab.stop, False) for slab in table.map.slabs.values()]
    reach, was_run = 0, False
    for start, stop, is_run in sorted(extents):
        _check(wrong, start == reach and stop > start, f"{table.tier.name}: bytes at {start}")
        _check(wrong, not (is_run and was_run), f"{table.tier.name}: two runs meet at {start}")
        reach, was_run = stop, is_run
    _check(wrong, reach == table.map.total, f"{table.tier.name}: extents end at {reach}")


def _slots(books: Books, tier: Tier, wrong: list[str]) -> None:
    table, blocks = books.slots[tier], books.blocks
    counts: Counter[int] = Counter()
    used = 0
    for slab in table.map.slabs.values():
        free, busy, stuck = [], 0, 0
        for at, slot in enumerate(slab.slots):
            name = f"{tier.name} slot {slot}"
            state, row = SlotState(table.state[slot]), table.row[slot]
            counts[state] += 1
            _check(wrong, table.slab[slot] is slab, f"{name} has another slab")
            _check(wrong, table.offset[slot] == slab.start + at * slab.slot_bytes, f"{name} offset")
            owned = state in (SlotState.FILLING, SlotState.TARGET, SlotState.COMMITTED)
            _check(wrong, owned == bool(row), f"{name} is {state.name} with block {row}")
            _check(wrong, not row or blocks.slot[tier][row] == slot, f"{name} is not its block's")
            evictable = state == SlotState.COMMITTED and not table.pins[slot]
            _check(wrong, not (evictable and slab.closing), f"{name} should have left")
            busy += state != SlotState.FREE and not evictable
            stuck += state == SlotState.QUARANTINED
            used += slab.slot_bytes if state != SlotState.FREE else 0
            if state == SlotState.FREE:
                free.append(slot)
                _check(wrong, not table.pins[slot], f"{name} is FREE and pinned")
            fenced = tier == HOST and books.quarantine.holds(slot)
            held = fenced or table.pins[slot] > 0
            _check(wrong, state != SlotState.QUARANTINED or held, f"{name} is held by nobody")
            _check(
                wrong,
                not fenced or state == SlotState.QUARANTINED,
                f"{name} is fenced, {state.name}",
            )
        _check(wrong, sorted(slab.free) == sorted(free), f"{tier.name} slab {slab.start}: free")
        _check(wrong, slab.busy == busy, f"{tier.name} slab {slab.start}: busy {slab.busy}")
        _check(wrong, slab.stuck == stuck, f"{tier.name} slab {slab.start}: stuck {slab.stuck}")
    for state in list(SlotState)[1:]:
        _check(
            wrong,
            counts[state] == table.counts[state],
            f"{tier.name}: {table.counts[state]} slots counted {state.name}, are {counts[state]}",
        )
    _check(
        wrong, used == table.bytes_used, f"{tier.name}: bytes_used {table.bytes_used}, is {used}"
    )
    _check(wrong, used <= table.map.total, f"{tier.name}: more bytes used than configured")


def _rows(books: Books, wrong: list[str]) -> None:
    blocks = books.blocks
    counts: Counter[int] = Counter()
    found = 0
    for handle, index in blocks.index.items():
        for key, row in index.items():
            found += 1
            state = BlockState(blocks.state[row])
            counts[state] += 1
            name = f"block {key.hex()[:16]} ({state.name})"
            _check(wrong, blocks.keys[row] == key, f"{name} has another key")
            _check(wrong, blocks.namespace[row] == handle, f"{name} is in another namespace")
            for tier in Tier:
                slot = blocks.slot[tier][row]
                table = books.slots[tier]
                slot_state = table.state[slot] if slot else SlotState.FREE
                whole = slot_state == SlotState.COMMITTED
                _check(wrong, not slot or table.row[slot] == row, f"{name}: slot of another")
                resident = bool(blocks.resident[row] & bit(tier))
                _check(wrong, resident == whole, f"{name}: resident on {tier.name}?")
            bits, suspect = blocks.resident[row], blocks.suspect[row]
            _check(wrong, not suspect & ~bits, f"{name}: suspect where it is not")
            _check(wrong, (state == COMPLETE) == (bits > 0), f"{name}: resident bits {bits}")
            slots = [blocks.slot[tier][row] for tier in Tier]
            if state == FILLING:
                _check(wrong, slots[1] > 0 and not slots[0] and not slots[2], f"{name}: {slots}")
            if state in (ABSENT, ANNOUNCED):
                _check(wrong, not any(slots) and not blocks.parent[row], f"{name} holds on")
            if state == ABSENT:
                _check(wrong, blocks.links[row] > 0, f"{name} is nobody's parent")
            _check(wrong, (row in blocks.fillings) == (state == FILLING), f"{name}: filling?")
    _check(wrong, found == blocks.rows, f"{blocks.rows} rows in use, {found} found by key")
    for state in BlockState:
        known = blocks.counts[state]
        _check(wrong, known == counts[state], f"{known} blocks counted {state.name}")


def _kids(books: Books, wrong: list[str]) -> None:
    blocks = books.blocks
    links: Counter[int] = Counter()
    kids: Counter[tuple[int, int]] = Counter()
    for index in blocks.index.values():
        for row in index.values():
            parent = blocks.parent[row]
            if blocks.state[row] in (FILLING, COMPLETE):
                links[parent] += 1
            for tier in Tier:
                kids[tier, parent] += bool(blocks.slot[tier][row])
    for row in range(1, blocks.length):
        _check(wrong, blocks.links[row] == links[row], f"row {row}: links {blocks.links[row]}")
        for tier in Tier:
            known = blocks.kids[tier][row]
            _check(wrong, known == kids[tier, row], f"row {row}: {known} kids on {tier.name}")


def _namespaces(books: Books, wrong: list[str]) -> None:
    blocks = books.blocks
    for handle, namespace in books.namespaces.items():
        rows = [r for r in blocks.index[handle].values() if blocks.state[r] == COMPLETE]
        _check(wrong, namespace.blocks == len(rows), f"namespace {handle}: {namespace.blocks}")
        size = sum(
            books.slots[tier].bytes_of(blocks.slot[tier][row])
            for row in rows
            for tier in Tier
            if blocks.resident[row] & bit(tier)
        )
        _check(wrong, namespace.bytes == size, f"namespace {handle}: {namespace.bytes} bytes")


def _fillings(books: Books, holds: Holds, wrong: list[str]) -> None:
    blocks = books.blocks
    for row, filling in blocks.fillings.items():
        full = books.namespaces[blocks.namespace[row]].grid.full_mask
        name = f"filling {blocks.keys[row].hex()[:16]}"
        union = 0
        for ident, mask in filling.parts.items():
            _check(wrong, not mask & union and mask > 0, f"{name}: parts overlap")
            union |= mask
            reservation = holds.reservations.get(ident)
            mine = reservation is not None and filling in reservation.blocks.values()
            _check(wrong, mine, f"{name}: reservation {ident} does not know it")
        _check(wrong, union == filling.reserved, f"{name}: reserved mask")
        _check(wrong, not union & filling.committed, f"{name}: reserved and committed")
        _check(wrong, (union | filling.committed) <= full, f"{name}: outside the grid")
        _check(wrong, filling.committed != full, f"{name}: should be complete")
        _check(wrong, set(filling.parts) == set(filling.writers), f"{name}: writers")
        _check(wrong, set(filling.writers.values()) <= set(filling.clients), f"{name}: entry")
        most = books.config.writers_per_block_max
        _check(wrong, len(filling.clients) <= most, f"{name}: too many writers")
        _check(wrong, bool(filling.parts) or filling.committed > 0, f"{name}: empty")


def _pins(books: Books, holds: Holds, jobs: Jobs, streams: Streams, wrong: list[str]) -> None:
    """Every pin has a holder: lease, stream, job, queued or running spill."""
    pins: Counter[tuple[Tier, int]] = Counter()
    for lease in holds.leases.values():
        pins.update(lease.pins)
    for stream in streams.open.values():
        pins.update((HOST, slot) for slot in stream.pins.values())
    for job in jobs.running.values():
        pins[job.source] += 1
        if job.target:
            pins[job.target] += 1
    blocks = books.blocks
    for row in range(1, blocks.length):
        if blocks.spill[row]:
            pins[HOST, blocks.slot[HOST][row]] += 1
    for tier in Tier:
        table = books.slots[tier]
        for slot in range(table.length):
            known = table.pins[slot]
            _check(wrong, known == pins[tier, slot], f"{tier.name} slot {slot}: {known} pins")


def _spills(books: Books, spills: Spills, wrong: list[str]) -> None:
    blocks = books.blocks
    queued = [row for row in range(blocks.length) if blocks.spill[row] == Spill.QUEUED]
    _check(wrong, len(queued) == spills.queued, f"{spills.queued} spills counted")
    promised = [f for f in blocks.fillings.values() if f.durable]
    least = sum(books.host.bytes_of(blocks.slot[HOST][row]) for row in queued)
    least += sum(books.host.bytes_of(filling.slot) for filling in promised)
    lag = spills.lag_bytes
    _check(wrong, least <= lag <= books.config.lag_bytes_max, f"spill lag {lag}, queued {least}")
    idle = spills.idle and not promised
    _check(wrong, not idle or lag == 0, f"spill lag {lag} with nothing to spill")
    _check(wrong, spills.running <= books.config.spill_copies_max, "too many spills")
    up = books.slots[DISK].up
    _check(wrong, up or not queued, "spills are queued for a tier that is down")


def _device(books: Books, wrong: list[str]) -> None:
    table = books.slots[DEVICE]
    _check(wrong, table.up or not table.counts[COMMITTED], "a device that is down holds blocks")


def _holds(books: Books, holds: Holds, wrong: list[str]) -> None:
    for name, table in (("reservations", holds.reservations), ("leases", holds.leases)):
        owned = sorted(i for s in holds.sessions.values() for i in getattr(s, name))
        _check(wrong, owned == sorted(table), f"{name} of sessions differ")
    for reservation in holds.reservations.values():
        _check(
            wrong,
            reservation.pending or bool(reservation.blocks),
            f"reservation {reservation.ident} holds nothing",
        )
        for filling in reservation.blocks.values():
            if filling.gone:
                fences = books.quarantine.fences().get(filling.slot, set())
                fence = (reservation.ident, reservation.client)
                _check(wrong, fence in fences, f"reservation {reservation.ident} is not fenced")
            else:
                known = books.blocks.fillings.get(filling.row)
                _check(wrong, known is filling, f"reservation {reservation.ident}: stale block")
    announced = {row for a in holds.announcements.values() for row in a.rows}
    _check(wrong, announced == set(holds.announced), "announced rows differ")
    total = sum(len(idents) for idents in holds.announced.values())
    _check(wrong, total == holds.announced_count, f"{holds.announced_count} announcements")
    for row in holds.announced:
        state = books.blocks.state[row]
        _check(wrong, state == ANNOUNCED, f"row {row} is announced and {state}")
    _check(
        wrong, books.blocks.counts[ANNOUNCED] == len(holds.announced), "ANNOUNCED without caller"
    )


def _streams(books: Books, streams: Streams, holds: Holds, wrong: list[str]) -> None:
    for ticket, stream in streams.open.items():
        leases = [holds.leases[ident] for ident in stream.leases]
        leased = sum(lease.bytes for lease in leases)
        _check(wrong, leased == stream.leased, f"stream {ticket}: leased {stream.leased}")
        single = len(leases) == 1 and len(leases[0].pins) == 1
        _check(wrong, leased <= stream.window or single, f"stream {ticket}: beyond its window")
        watched = ticket in books.watchers.get(stream.watching, {})
        _check(wrong, watched == bool(stream.watching), f"stream {ticket}: watches nothing")
        ahead = sum(stream.costs.values())
        _check(wrong, ahead == stream.cost_ahead, f"stream {ticket}: {stream.cost_ahead} ahead")
        _check(wrong, ticket not in books.ready, f"stream {ticket} was left ready")
    for row, tickets in books.watchers.items():
        for ticket in tickets:
            known = streams.open.get(ticket)
            _check(wrong, known is not None and known.watching == row, f"watcher {ticket}")
