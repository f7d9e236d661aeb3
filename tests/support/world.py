"""A world around the pure hub: clock, arena, directory, journal and mover, all in memory.

`World.send` hands one event to the hub and carries its instructions out. Payload is symbolic: a
cell of a slot holds the key of the block that was last written there. So every grant can be
checked: `check_leases` demands that each leased cell still holds the key that was asked for.
Jobs stay open until the test ends them with `finish`.

The world objects (AssertionError) when the hub breaks its word: an entry's generation that does
not grow, two entries that overlap, a ticket that is answered twice, a job on a slot that is reused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvproto.grid import Region
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.hub import Hub, HubConfig
from kvserver.core.slots import COMMITTED

DEVICE, HOST, DISK = ev.Tier.DEVICE, ev.Tier.HOST, ev.Tier.DISK
UNIT = 16 << 10


def make_spec(model: str = "m", *, slot_units: int = 1, **fields: Any) -> NamespaceSpec:
    """A namespace of 2 layers x 2 heads whose full block takes `slot_units` x 16 KiB."""
    pages = 4
    page_bytes = (slot_units * UNIT - 32) // (4 * pages)
    values: dict[str, Any] = {
        "weights": bytes(32), "kv_dtype": "float16", "encoding": "test/1", "layers": 2,
        "kv_heads": 2, "page_bytes": page_bytes, "block_tokens": 64, "page_tokens": 16,
    }  # fmt: skip
    return NamespaceSpec(model=model, **{**values, **fields})


def key_of(name: int | str) -> bytes:
    return f"{name!s:>32}".encode()[-32:]


def chain(name: str, count: int) -> list[bytes]:
    return [key_of(f"{name}.{i}") for i in range(count)]


def parents_of(keys: Sequence[bytes]) -> list[bytes]:
    return [ROOT, *keys[:-1]]


@dataclass
class Entry:
    """A directory entry (host) or journal record (disk)."""

    slot_bytes: int
    generation: int
    clients: tuple[int, ...] = ()
    info: ins.BlockInfo | None = None


@dataclass
class LeaseView:
    """What a reader knows of a lease."""

    ticket: int
    blocks: list[tuple[bytes, ins.GrantedBlock]]
    region: Region
    until: float


@dataclass
class Watcher:
    """What somebody knows who hears where blocks are, and walks the table piece by piece."""

    known: dict[bytes, dict[bytes, ins.Residence]] = field(default_factory=dict)
    row: int = 0  # where the walk goes on
    through: bool = False
    tiers_up: int = 0
    restarts: int = 0

    def hear(self, moved: ins.Moved) -> None:
        assert not (moved.forgotten and moved.blocks)
        if moved.forgotten:
            self.known.pop(moved.spec.id, None)
        blocks = self.known.setdefault(moved.spec.id, {})
        for block in moved.blocks:
            assert bool(block.tiers) == bool(block.tokens), block
            if block.tiers:
                blocks[block.key] = block
            else:
                blocks.pop(block.key, None)

    def restart(self) -> None:
        self.known, self.row, self.through = {}, 0, False
        self.restarts += 1


@dataclass
class World:
    config: HubConfig
    ready: bool = True
    now: float = 100.0
    answers: dict[int, Any] = field(default_factory=dict)
    grants: dict[int, list[ins.Granted]] = field(default_factory=dict)
    jobs: dict[int, ins.Copy | ins.Verify] = field(default_factory=dict)
    entries: dict[int, Entry] = field(default_factory=dict)  # host, by offset
    records: dict[int, Entry] = field(default_factory=dict)  # disk, by offset
    cells: dict[tuple[ev.Tier, int], dict[int, bytes]] = field(default_factory=dict)
    leases: dict[int, LeaseView] = field(default_factory=dict)
    asked: dict[int, ev.Acquire] = field(default_factory=dict)
    compared: list[tuple[ev.Place, Region, bytes]] = field(default_factory=list)
    generations: dict[tuple[ev.Tier, int], int] = field(default_factory=dict)
    ticket: int = 0
    watch: Watcher | None = None
    turns_by_hand: bool = False  # else `send` goes on until nothing is unfinished
    unfinished: int = 0  # Continues that are asked for

    def __post_init__(self) -> None:
        self._units = {
            (tier, unit): offset
            for tier, table in ((HOST, self.entries), (DISK, self.records))
            for offset, entry in table.items()
            for unit in range(offset // UNIT, (offset + entry.slot_bytes) // UNIT)
        }
        self.hub = Hub(self.config)
        if self.ready:
            self.send(ev.TierGrew(HOST, self.config.host_bytes))

    # ---- events

    def send(self, event: Any) -> list[Any]:
        if isinstance(event, ev.Acquire):
            self.asked[event.ticket] = event
        if isinstance(event, ev.CancelAcquire):
            self.leases = {
                i: v for i, v in self.leases.items() if v.ticket != event.ticket_of_acquire
            }
        if isinstance(event, ev.Release):
            for lease in event.leases:
                self.leases.pop(lease, None)
        out = self.hub.handle(event, self.now)
        for instruction in out:
            self._carry_out(instruction)
        assert self.unfinished <= 1, "a second Continue is asked for before the first came"
        # Leases end with their time, and with their session.
        sessions = self.hub._holds.sessions
        self.leases = {
            i: v
            for i, v in self.leases.items()
            if v.until > self.now and self.asked[v.ticket].session in sessions
        }
        if self.unfinished and not self.turns_by_hand:
            out = out + self.turn()
        return out

    def turn(self) -> list[Any]:
        """What is unfinished goes on, for one turn."""
        if not self.unfinished:
            return []
        self.unfinished = 0
        return self.send(ev.Continue())

    def ask(self, kind: type, **fields: Any) -> Any:
        """Send a request; its result, the CoreError that refused it, or None while it waits."""
        self.ticket += 1
        self.send(kind(ticket=self.ticket, **fields))
        return self.answers.get(self.ticket)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.send(ev.Tick())

    # ---- instructions

    def _carry_out(self, instruction: Any) -> None:
        match instruction:
            case ins.Answer(ticket, result):
                assert ticket not in self.answers, "answered twice"
                self.answers[ticket] = result
            case ins.Refusal(ticket, error):
                assert ticket not in self.answers, "answered twice"
                self.answers[ticket] = error
            case ins.Granted():
                self._granted(instruction)
            case ins.EntryReserved(place, clients):
                self._stamp(place, same=self._is_written(place))
                self._write(place, Entry(place.slot_bytes, place.generation, clients))
            case ins.EntryInvalid(place):
                known = self.generations.get((place.tier, place.offset), 0)
                self._stamp(place, same=place.generation == known)  # what is read on keeps its own
                self._erase(place.tier, place.offset)
            case ins.CellsCommitted():
                self._committed(instruction)
            case ins.CellsPresent():
                self._present(instruction)
            case ins.Copy() | ins.Verify():
                self._start(instruction)
            case ins.Moved():
                assert self.watch is not None, "told while nobody watches"
                self.watch.hear(instruction)
            case ins.MovedTooMuch():
                assert self.watch is not None, "told while nobody watches"
                self.watch.restart()
            case ins.TiersUp(tiers):
                assert self.watch is not None, "told while nobody watches"
                self.watch.tiers_up = tiers
            case ins.Unfinished():
                self.unfinished += 1
            case _:
                raise AssertionError(f"unknown instruction {instruction}")

    def _is_written(self, place: ev.Place) -> bool:
        table = self.entries if place.tier == HOST else self.records
        entry = table.get(place.offset)
        return entry is not None and entry.generation == place.generation

    def _stamp(self, place: ev.Place, *, same: bool) -> None:
        known = self.generations.get((place.tier, place.offset), 0)
        grows = place.generation == known if same else place.generation > known
        assert grows, f"generation {place.generation} after {known} at {place}"
        self.generations[place.tier, place.offset] = place.generation

    def _write(self, place: ev.Place, entry: Entry) -> None:
        table = self.entries if place.tier == HOST else self.records
        self._erase(place.tier, place.offset)
        for unit in range(place.offset // UNIT, (place.offset + place.slot_bytes) // UNIT):
            other = self._units.setdefault((place.tier, unit), place.offset)
            assert other == place.offset, f"entry at {place} overlaps one at {other}"
        table[place.offset] = entry

    def _erase(self, tier: ev.Tier, offset: int) -> None:
        table = self.entries if tier == HOST else self.records
        entry = table.pop(offset, None)
        if entry is not None:
            for unit in range(offset // UNIT, (offset + entry.slot_bytes) // UNIT):
                self._units.pop((tier, unit), None)

    def _granted(self, granted: ins.Granted) -> None:
        self.grants.setdefault(granted.ticket, []).append(granted)
        event = self.asked[granted.ticket]
        blocks = [(event.hashes[block.index], block) for block in granted.blocks]
        until = self.now + granted.lease_seconds
        self.leases[granted.lease] = LeaseView(granted.ticket, blocks, event.region, until)

    def _committed(self, event: ins.CellsCommitted) -> None:
        entry = self.entries[event.place.offset]
        assert entry.generation == event.place.generation
        held = self.cells.get((HOST, event.place.offset), {})
        for cell in self.grid_of(event.info.namespace).cell_indices(event.region):
            assert held.get(cell) == event.info.key, "a commit of cells that hold other bytes"
        if event.complete:
            entry.clients, entry.info = (), event.info

    def _present(self, event: ins.CellsPresent) -> None:
        assert self.entries[event.place.offset].generation == event.place.generation
        held = self.cells.get((HOST, event.place.offset), {})
        for cell in self.grid_of(event.info.namespace).cell_indices(event.region):
            assert held.get(cell) == event.info.key, "compared with cells that hold other bytes"
        self.compared.append((event.place, event.region, event.info.key))

    def _start(self, job: ins.Copy | ins.Verify) -> None:
        assert job.job not in self.jobs
        if isinstance(job, ins.Copy):
            assert job.source.generation == self.generation_at(job.source)
            if job.target.tier == DISK:
                self._erase(DISK, job.target.offset)
            self._stamp(job.target, same=False)
        self.jobs[job.job] = job

    def generation_at(self, place: ev.Place) -> int:
        return self.generations.get((place.tier, place.offset), place.generation)

    def grid_of(self, handle: int) -> Any:
        return self.hub.spec_of(handle).grid

    # ---- jobs

    def finish(
        self, job: int | None = None, *, error: str = "", corrupt: bool | None = None
    ) -> ins.Copy | ins.Verify:
        """End a job, the oldest by default. A sound mover finds corruption by itself."""
        ident = min(self.jobs) if job is None else job
        what = self.jobs.pop(ident)
        source = what.source if isinstance(what, ins.Copy) else what.place
        cells = self.cells.get((source.tier, source.offset), {})
        count = self.grid_of(what.info.namespace).cells
        sound = all(cells.get(cell) == what.info.key for cell in range(count))
        checked = not isinstance(what, ins.Copy) or what.kind is ins.JobKind.PROMOTE
        bad = (checked and not sound) if corrupt is None else corrupt
        if isinstance(what, ins.Copy) and not error and not bad:
            self.cells[what.target.tier, what.target.offset] = dict(cells)
            if what.target.tier != DEVICE:
                entry = Entry(what.target.slot_bytes, what.target.generation, info=what.info)
                self._write(what.target, entry)
        self.send(ev.JobDone(ident, error or ("corrupt" if bad else ""), bad))
        return what

    def finish_all(self) -> int:
        """End jobs, and those that they lead to, until none is left."""
        count = 0
        while self.jobs:
            self.finish()
            count += 1
            assert count < 100_000, "jobs without end"
        return count

    # ---- watching

    def start_watch(self) -> None:
        self.watch = Watcher(tiers_up=self.hub.tiers_up)
        self.send(ev.Watch(on=True))

    def stop_watch(self) -> None:
        self.send(ev.Watch(on=False))
        self.watch = None

    def walk(self, rows: int = 1 << 20) -> None:
        """One piece of the walk."""
        assert self.watch is not None
        if self.watch.through:
            return
        told, self.watch.row = self.hub.walk(self.watch.row, rows, lambda spec: True)
        for moved in told:
            self.watch.hear(moved)
        self.watch.through = not self.watch.row

    def check_watch(self) -> None:
        """A watcher whose walk is through knows the table."""
        if self.watch is None or not self.watch.through:
            return
        assert self.watch.tiers_up == self.hub.tiers_up
        assert {i: known for i, known in self.watch.known.items() if known} == self.table()

    def table(self) -> dict[bytes, dict[bytes, ins.Residence]]:
        """Every whole block, by namespace and key, from the books themselves."""
        books = self.hub._books
        blocks, table = books.blocks, dict[bytes, dict[bytes, ins.Residence]]()
        for handle, index in blocks.index.items():
            for key, row in index.items():
                if blocks.state[row] == ev.BlockState.COMPLETE:
                    tiers = sum(1 << (tier - 1) for tier in ev.Tier if self.holds(row, tier))
                    parent, tokens = blocks.keys[blocks.parent[row]], blocks.tokens[row]
                    found = table.setdefault(books.namespaces[handle].spec.id, {})
                    found[key] = ins.Residence(key, parent, tokens, tiers)
        return table

    def holds(self, row: int, tier: ev.Tier) -> bool:
        """The block's slot on this tier is committed."""
        books = self.hub._books
        slot = books.blocks.slot[tier][row]
        return bool(slot) and books.slots[tier].state[slot] == COMMITTED

    # ---- memory

    def write(self, place: ev.Place, key: bytes, cells: Iterable[int]) -> None:
        """A client writes into a slot, whether it still may or not."""
        slot = self.cells.setdefault((place.tier, place.offset), {})
        for cell in cells:
            slot[cell] = key

    def check_leases(self) -> None:
        """P1 and P3: every leased cell holds the key that it was granted for."""
        for lease, view in self.leases.items():
            handle = self.asked[view.ticket].namespace
            for key, block in view.blocks:
                held = self.cells.get((block.place.tier, block.place.offset), {})
                for cell in self.grid_of(handle).cell_indices(view.region):
                    assert held.get(cell) == key, f"lease {lease} on {block} reads other bytes"

    # ---- short forms

    def session(self, ident: int = 1, *clients: int, tenant: str = "") -> int:
        assert self.ask(ev.OpenSession, session=ident, tenant=tenant) is None
        for client in clients or (ident * 10,):
            assert self.ask(ev.JoinSession, session=ident, client=client) is None
        return ident

    def namespace(self, session: int = 1, spec: NamespaceSpec | None = None) -> int:
        handle = self.ask(ev.OpenNamespace, session=session, spec=spec or make_spec())
        assert isinstance(handle, int), handle
        return handle

    def reserve(self, namespace: int, keys: Sequence[bytes], **fields: Any) -> Any:
        values: dict[str, Any] = {
            "session": 1, "client": 10, "parents": parents_of(keys), "tokens": [], "ttl": 10.0,
            "region": self.grid_of(namespace).whole,
        }  # fmt: skip
        return self.ask(ev.Reserve, namespace=namespace, hashes=list(keys), **{**values, **fields})

    def put(self, namespace: int, keys: Sequence[bytes], **fields: Any) -> Any:
        """Reserve, write and commit; the ReserveResult."""
        result = self.reserve(namespace, keys, **fields)
        assert isinstance(result, ins.ReserveResult), result
        region = fields.get("region", self.grid_of(namespace).whole)
        indices = [i for i, v in enumerate(result.verdicts) if v is ev.ReserveVerdict.WRITE]
        for index in indices:
            place = result.places[index]
            assert place is not None
            self.write(place, keys[index], self.grid_of(namespace).cell_indices(region))
        if indices:
            self.ask(
                ev.Commit, session=fields.get("session", 1), reservation=result.reservation,
                indices=indices, region=region,
            )  # fmt: skip
        return result

    def lookup(self, namespace: int, keys: Sequence[bytes], **fields: Any) -> Any:
        values: dict[str, Any] = {"session": 1}
        return self.ask(ev.Lookup, namespace=namespace, hashes=list(keys), **{**values, **fields})

    def acquire(self, namespace: int, keys: Sequence[bytes], **fields: Any) -> int:
        """Opens a stream; its ticket."""
        values: dict[str, Any] = {
            "session": 1, "wait": 0.0, "window": 0, "lease": 0.0,
            "region": self.grid_of(namespace).whole,
        }  # fmt: skip
        self.ask(ev.Acquire, namespace=namespace, hashes=list(keys), **{**values, **fields})
        return self.ticket

    def granted(self, ticket: int) -> list[int]:
        """Positions granted so far, in order."""
        return [b.index for granted in self.grants.get(ticket, []) for b in granted.blocks]

    def leases_of(self, ticket: int) -> list[int]:
        return [granted.lease for granted in self.grants.get(ticket, [])]

    def release(self, *leases: int, session: int = 1) -> Any:
        return self.ask(ev.Release, session=session, leases=list(leases))

    def tier(self, tier: ev.Tier) -> Any:
        return self.hub.stats(self.now).tiers[tier]

    def tiers_of(self, namespace: int, key: bytes) -> set[ev.Tier]:
        """Where a block is, without using it."""
        blocks = self.hub._books.blocks
        bits = blocks.resident[blocks.find(namespace, key)]
        return {tier for tier in ev.Tier if bits >> (tier - 1) & 1}

    def counter(self, name: str) -> int:
        return self.hub.stats(self.now).counters[name]
