"""The hub against the reference model: random events, the books audited after every step.

Writers that the hub has given up go on writing (`zombies`) until they are fenced; every leased cell
is compared with its key after every step. `KVSERVER_MODEL_EXAMPLES` and `KVSERVER_MODEL_STEPS` make
long runs (20,000 x 200); the normal run is 200 x 50.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvproto.grid import Region
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import CoreError
from kvserver.core.hub import HubConfig
from tests.model.reference import ModelReservation, Name, Reference
from tests.support.world import (
    DEVICE,
    DISK,
    HOST,
    UNIT,
    Entry,
    World,
    chain,
    make_spec,
    parents_of,
)

EXAMPLES = int(os.environ.get("KVSERVER_MODEL_EXAMPLES", "200"))
PHASES = [Phase.generate] if os.environ.get("KVSERVER_MODEL_NOSHRINK") else list(Phase)
STEPS = int(os.environ.get("KVSERVER_MODEL_STEPS", "50"))

CHAINS = [chain(name, 6) for name in "abcd"]
REGIONS = [
    Region(0, 2, 0, 2), Region(0, 1, 0, 2), Region(1, 2, 0, 2), Region(0, 2, 0, 1),
    Region(0, 2, 1, 2), Region(0, 1, 0, 1),
]  # fmt: skip
SPECS = [make_spec("small"), make_spec("large", slot_units=3)]
WRITE = ev.ReserveVerdict.WRITE

pick = st.integers(0, 1 << 16)
regions = st.sampled_from(REGIONS)
spans = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 5))


@dataclass(eq=False)
class Writing:
    """A part of a slot that a client may write, or still writes though it may not."""

    reservation: int
    client: int
    place: ev.Place
    key: bytes
    cells: set[int]


class HubMachine(RuleBasedStateMachine):
    @initialize(
        host=st.sampled_from([24, 32, 48]),
        disk=st.sampled_from([0, 32, 96]),
        device=st.sampled_from([0, 16]),
    )
    def start(self, host: int, disk: int, device: int) -> None:
        self.config = HubConfig(
            host_bytes=host * UNIT, disk_bytes=disk * UNIT, device_bytes=device * UNIT,
            session_ttl=40.0, starve_max=20.0, promotions_max=3, spill_copies_max=2,
            upload_heat=2, verifies_max=2, writers_per_block_max=3, eviction_scan_max=3,
        )  # fmt: skip
        self.world = World(self.config)
        self.reset_clients()
        self.next_session = self.next_client = 1
        self.zombies: list[Writing] = []
        self.live: list[Writing] = []
        self.stalled = 0.0
        self.disk_up = True
        self.open_session()
        self.handles = [self.world.namespace(1, spec) for spec in SPECS]

    def reset_clients(self) -> None:
        self.model = Reference(4, partial_ttl=5.0, session_ttl=40.0)
        self.clients: list[tuple[int, int]] = []  # session, client
        self.streams: list[int] = []
        self.pending: dict[int, ev.Reserve] = {}

    # ---- helpers

    @property
    def now(self) -> float:
        return self.world.now - self.stalled

    def ask(self, kind: type, **fields: Any) -> Any:
        result = self.world.ask(kind, **fields)
        self.settle()
        return result

    def settle(self) -> None:
        """Let the model's time pass, and take in Reserves that were answered late."""
        self.model.run_to(self.now)
        for ticket, event in list(self.pending.items()):
            if ticket in self.world.answers:
                del self.pending[ticket]
                self.take_in(event, self.world.answers[ticket])

    def keys_of(self, span: tuple[int, int, int]) -> list[bytes]:
        return CHAINS[span[0]][span[1] : span[1] + span[2]]

    def names(self, handle: int, keys: list[bytes]) -> list[Name]:
        return [(handle, key) for key in keys]

    def choose(self, items: Any, at: int) -> Any:
        items = list(items)
        return items[at % len(items)] if items else None

    def forget_writing(self, reservation: int) -> None:
        self.live = [w for w in self.live if w.reservation != reservation]
        self.zombies = [w for w in self.zombies if w.reservation != reservation]

    # ---- sessions

    @rule()
    def open_session(self) -> None:
        if len(self.model.sessions) < 4:
            self.ask(ev.OpenSession, session=self.next_session)
            self.model.sessions[self.next_session] = self.now + 40.0
            self.next_session += 1
            self.join_client(0)

    @rule(at=pick)
    def join_client(self, at: int) -> None:
        session = self.choose(self.model.sessions, at if at else -1)
        if session is not None:
            assert self.ask(ev.JoinSession, session=session, client=self.next_client) is None
            self.clients.append((session, self.next_client))
            self.next_client += 1

    @rule()
    def heartbeats(self) -> None:
        for session in list(self.model.sessions):
            self.model.sessions[session] = self.now + 40.0
            assert self.ask(ev.Heartbeat, session=session) is None

    @rule(at=pick, drained=st.booleans())
    def close_client(self, at: int, drained: bool) -> None:
        chosen = self.choose(self.clients, at)
        if chosen is None or chosen[0] not in self.model.sessions:
            return
        session, client = chosen
        self.stop_writing(client, drained=drained)
        self.clients.remove(chosen)
        self.model.end_client(session, client, self.now, drained=drained)
        assert self.ask(ev.CloseClient, session=session, client=client, drained=drained) is None

    @rule(at=pick, drained=st.booleans())
    def close_session(self, at: int, drained: bool) -> None:
        session = self.choose(self.model.sessions, at)
        if session is None:
            return
        for owner, client in self.clients:
            if owner == session:
                self.stop_writing(client, drained=drained)
        self.model.end_session(session, self.now, drained=drained)
        assert self.ask(ev.CloseSession, session=session, drained=drained) is None

    def stop_writing(self, client: int, *, drained: bool) -> None:
        if drained:
            self.live = [w for w in self.live if w.client != client]
            self.zombies = [w for w in self.zombies if w.client != client]
        else:
            self.zombies += [w for w in self.live if w.client == client]
            self.live = [w for w in self.live if w.client != client]

    @rule(at=pick)
    def client_dies(self, at: int) -> None:
        known = sorted({c for _, c in self.clients} | {w.client for w in self.zombies})
        client = self.choose(known, at)
        if client is None:
            return
        self.stop_writing(client, drained=True)
        for session, other in list(self.clients):
            if other == client and session in self.model.sessions:
                self.model.end_client(session, client, self.now, drained=True)
        self.clients = [c for c in self.clients if c[1] != client]
        self.world.send(ev.ClientDead(client))
        self.settle()

    # ---- writing

    @rule(at=pick, ns=pick, span=spans, ttl=st.floats(1, 30))
    def announce(self, at: int, ns: int, span: tuple[int, int, int], ttl: float) -> None:
        session = self.choose(self.model.sessions, at)
        if session is None:
            return
        handle, keys = self.choose(self.handles, ns), self.keys_of(span)
        for name in self.names(handle, keys):
            if name not in self.model.filling:
                self.model.loose.add(name) if name in self.model.complete else None
                callers = self.model.announced.setdefault(name, [])
                callers.append((session, self.now + ttl))
        self.ask(
            ev.Announce, session=session, namespace=handle, hashes=keys, ttl=ttl
        )  # fmt: skip

    @rule(
        at=pick, ns=pick, span=spans, region=regions, ttl=st.floats(1, 20),
        wait=st.sampled_from([0.0, 0.0, 0.0, 4.0]), durable=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def reserve(
        self, at: int, ns: int, span: tuple[int, int, int], region: Region, ttl: float,
        wait: float, durable: bool,
    ) -> None:  # fmt: skip
        chosen = self.choose([c for c in self.clients if c[0] in self.model.sessions], at)
        if chosen is None:
            return
        handle = self.choose(self.handles, ns)
        keys = self.keys_of(span)
        self.world.ticket += 1
        event = ev.Reserve(
            ticket=self.world.ticket, session=chosen[0], client=chosen[1], namespace=handle,
            hashes=keys, parents=parents_of(CHAINS[span[0]])[span[1] : span[1] + span[2]],
            tokens=[], region=region, ttl=ttl, wait=wait, durable=durable,
        )  # fmt: skip
        self.world.send(event)
        answer = self.world.answers.get(event.ticket)
        if answer is None:
            self.model.loose.update(self.names(handle, keys))
            self.pending[event.ticket] = event
            self.settle()
            return
        self.settle()
        self.take_in(event, answer, exact=True)

    def take_in(self, event: ev.Reserve, answer: Any, *, exact: bool = False) -> None:
        """Compare a Reserve's answer with the model, and begin to write."""
        if isinstance(answer, CoreError):
            assert not exact or (event.durable and answer.field == "durable"), answer
            return
        cells = set(self.world.grid_of(event.namespace).cell_indices(event.region))
        blocks: dict[int, tuple[Name, set[int]]] = {}
        for at, verdict in enumerate(answer.verdicts):
            name = (event.namespace, event.hashes[at])
            expected = self.model.verdict(name, cells)
            if exact and name not in self.model.loose:
                present = expected is ev.ReserveVerdict.PRESENT
                evicted = name in self.model.complete and verdict is not ev.ReserveVerdict.BUSY
                refused = verdict is ev.ReserveVerdict.NO_SPACE and (
                    expected is WRITE or (present and event.durable)
                )
                many = expected is WRITE and verdict is ev.ReserveVerdict.BUSY
                crowded = many and len(self.model.filling[name].parts) >= 3
                assert verdict is expected or evicted or refused or crowded, (verdict, expected)
            if verdict is not WRITE:
                continue
            self.model.complete.discard(name)
            blocks[at] = (name, set(cells))
            place = answer.places[at]
            self.live.append(Writing(answer.reservation, event.client, place, name[1], set(cells)))
        if blocks:
            self.model.reserve(
                ModelReservation(
                    answer.reservation, event.session, event.client,
                    self.now + answer.ttl, blocks,
                )
            )  # fmt: skip
            if not exact:
                self.model.loose.update(name for name, _ in blocks.values())

    @rule(at=pick)
    def write(self, at: int) -> None:
        """Anyone who may write, or might still, writes now."""
        part = self.choose(self.live + self.zombies, at)
        if part is not None:
            self.world.write(part.place, part.key, part.cells)

    @rule()
    def zombies_write(self) -> None:
        for part in self.zombies:
            self.world.write(part.place, part.key, part.cells)

    @rule(at=pick, region=st.one_of(st.none(), regions), some=st.integers(0, 63))
    def commit(self, at: int, region: Region | None, some: int) -> None:
        reservation = self.choose(self.model.reservations.values(), at)
        if reservation is None:
            return
        handle = next(iter(reservation.blocks.values()))[0][0]
        grid = SPECS[self.handles.index(handle)].grid if handle in self.handles else SPECS[0].grid
        if region is None:
            region = self.whole_part(reservation)
        cells = set(grid.cell_indices(region))
        indices = [
            i
            for n, (i, (_, left)) in enumerate(reservation.blocks.items())
            if cells <= left and not some >> n & 1
        ]
        if not indices:
            return
        names = {reservation.blocks[i][0] for i in indices}
        loose = bool(names & self.model.loose)
        for part in self.live:
            if part.reservation == reservation.ident and (handle, part.key) in names:
                self.world.write(part.place, part.key, part.cells & cells)
        now = self.now
        expected = [self.model.commit(reservation, i, cells, now) for i in indices]
        for part in self.live + self.zombies:
            if part.reservation == reservation.ident and (handle, part.key) in names:
                part.cells -= cells
        result = self.ask(
            ev.Commit, session=reservation.session, reservation=reservation.ident,
            indices=indices, region=region,
        )  # fmt: skip
        if isinstance(result, ins.CommitResult) and not loose:
            assert result.verdicts == expected
        elif isinstance(result, CoreError):
            assert result.field == "durable" or loose, result

    def whole_part(self, reservation: ModelReservation) -> Region:
        left = next(iter(reservation.blocks.values()))[1]
        grid = SPECS[0].grid
        return next((r for r in REGIONS if set(grid.cell_indices(r)) == left), REGIONS[-1])

    @rule(at=pick, drained=st.booleans())
    def abort(self, at: int, drained: bool) -> None:
        reservation = self.choose(self.model.reservations.values(), at)
        if reservation is None:
            return
        loose = any(name in self.model.loose for name, _ in reservation.blocks.values())
        if drained:
            self.forget_writing(reservation.ident)
        else:
            self.retire(reservation.ident)
        self.model.end(reservation, self.now, drained=drained)
        result = self.ask(
            ev.Abort, session=reservation.session, reservation=reservation.ident, drained=drained
        )
        assert result is None or loose, result

    def retire(self, reservation: int) -> None:
        """What a reservation allowed is forbidden now; its writer goes on."""
        self.zombies += [w for w in self.live if w.reservation == reservation]
        self.live = [w for w in self.live if w.reservation != reservation]

    @rule(at=pick)
    def fence(self, at: int) -> None:
        part = self.choose(self.zombies, at)
        if part is None:
            return
        session = next((s for s, c in self.clients if c == part.client), None)
        if session is not None:
            self.zombies = [w for w in self.zombies if w.reservation != part.reservation]
            self.ask(ev.Fence, session=session, reservation=part.reservation)

    # ---- reading

    @rule(
        at=pick, ns=pick, span=spans, region=regions, wait=st.sampled_from([0.0, 3.0, 30.0]),
        window=st.sampled_from([0, 1, 30_000, 100_000]), lease=st.floats(0.5, 15),
        readable=st.sampled_from([{HOST}, {HOST}, {HOST, DEVICE}, {DEVICE}]),
    )  # fmt: skip
    def acquire(
        self, at: int, ns: int, span: tuple[int, int, int], region: Region, wait: float,
        window: int, lease: float, readable: set[ev.Tier],
    ) -> None:  # fmt: skip
        session = self.choose(self.model.sessions, at)
        if session is None:
            return
        ticket = self.world.acquire(
            self.choose(self.handles, ns), self.keys_of(span), session=session, region=region,
            wait=wait, window=window, lease=lease, readable=frozenset(readable),
        )  # fmt: skip
        self.settle()
        self.streams.append(ticket)

    @rule(at=pick, count=st.integers(1, 3))
    def release(self, at: int, count: int) -> None:
        for _ in range(count):
            lease = self.choose(self.world.leases, at)
            if lease is None:
                return
            event = self.world.asked[self.world.leases[lease].ticket]
            if event.session in self.model.sessions:
                assert self.ask(ev.Release, session=event.session, leases=[lease]) == 1

    @rule(at=pick)
    def cancel(self, at: int) -> None:
        ticket = self.choose([t for t in self.streams if t not in self.world.answers], at)
        if ticket is not None:
            self.streams.remove(ticket)
            self.world.send(ev.CancelAcquire(ticket))
            self.settle()

    @rule(
        at=pick, ns=pick, span=spans, pin=st.sampled_from([0.0, 0.0, 5.0]),
        need=st.sampled_from([(), (ev.Need("last", 2),), (ev.Need("every"), ev.Need("state"))]),
    )  # fmt: skip
    def lookup(
        self, at: int, ns: int, span: tuple[int, int, int], pin: float, need: tuple[ev.Need, ...]
    ) -> None:
        session = self.choose(self.model.sessions, at)
        if session is None:
            return
        handle, keys = self.choose(self.handles, ns), self.keys_of(span)
        result = self.ask(
            ev.Lookup, session=session, namespace=handle, hashes=keys, need=need, pin=pin
        )
        assert isinstance(result, ins.LookupResult)
        states = [ev.BlockState(s) for s in result.states]
        for name, state, tier in zip(self.names(handle, keys), states, result.tiers, strict=True):
            assert (tier > 0) == (state is ev.BlockState.COMPLETE)
            if name in self.model.loose:
                continue
            expected = self.model.state(name)
            possible = (ev.BlockState.ABSENT, ev.BlockState.COMPLETE)
            assert state is expected or (expected is None and state in possible), (name, state)
        whole = [s is ev.BlockState.COMPLETE for s in states]
        assert result.usable_blocks == usable(whole, need)

    # ---- the world

    @rule(at=pick, how=st.sampled_from(["ok"] * 6 + ["error", "corrupt"]))
    def job_ends(self, at: int, how: str) -> None:
        job = self.choose(self.world.jobs, at)
        if job is not None:
            fields: Any = {"error": "EIO"} if how == "error" else {}
            if how == "corrupt":
                fields = {"corrupt": True}
            self.world.finish(job, **fields)
            self.settle()

    @rule()
    def jobs_end(self) -> None:
        self.world.finish_all()
        self.settle()

    @rule(seconds=st.floats(0.01, 12))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        for reservation in list(self.model.reservations.values()):
            session = self.model.sessions.get(reservation.session, 0)
            if min(reservation.deadline, session) <= self.now:
                self.retire(reservation.ident)
        ended = {s for s, deadline in self.model.sessions.items() if deadline <= self.now}
        for session, client in self.clients:
            if session in ended:
                self.stop_writing(client, drained=False)
        self.model.run_to(self.now)
        self.world.send(ev.Tick())
        self.settle()

    @rule(seconds=st.floats(1, 100))
    def server_stalls(self, seconds: float) -> None:
        """Nothing expires by a stall of the server."""
        self.world.now += seconds
        self.stalled += seconds
        for view in self.world.leases.values():
            view.until += seconds
        self.world.send(ev.Stalled(seconds))
        self.settle()

    @precondition(lambda self: self.config.disk_bytes)
    @rule()
    def disk_goes_or_comes(self) -> None:
        self.disk_up = not self.disk_up
        self.world.send(ev.TierUp(DISK) if self.disk_up else ev.TierDown(DISK, "EIO"))
        self.settle()

    @rule(at=pick)
    def disk_rots(self, at: int) -> None:
        offset = self.choose(self.world.records, at)
        if offset is not None:
            self.world.cells[DISK, offset] = {}

    @rule(ns=pick, span=spans, every=st.booleans())
    def evict(self, ns: int, span: tuple[int, int, int], every: bool) -> None:
        spec = self.choose(SPECS, ns)
        keys = [] if every else self.keys_of(span)
        result = self.ask(ev.Evict, namespace_id=spec.id, hashes=keys)
        assert isinstance(result, ins.Evicted)

    @rule(at=pick, ns=pick, span=spans)
    def report_corrupt(self, at: int, ns: int, span: tuple[int, int, int]) -> None:
        session = self.choose(self.model.sessions, at)
        if session is not None:
            handle = self.choose(self.handles, ns)
            self.ask(ev.ReportCorrupt, session=session, namespace=handle, hashes=self.keys_of(span))

    @rule(ns=st.integers(0, 9))
    def drop_namespace(self, ns: int) -> None:
        session = self.choose(self.model.sessions, 0)
        if session is None or ns >= len(SPECS):
            return  # rarely
        handle = self.handles[ns]
        self.model.drop_namespace(handle)
        assert isinstance(self.ask(ev.DropNamespace, namespace_id=SPECS[ns].id), ins.Evicted)
        self.handles[ns] = self.world.namespace(session, SPECS[ns])
        assert self.handles[ns] != handle

    @rule(rot=pick, resize=st.sampled_from([0, 0, -8, 8]))
    def restart(self, rot: int, resize: int) -> None:
        """The server is killed and comes back; clients' processes live on and still write."""
        old = self.world
        self.zombies += self.live
        self.live = []
        for job in old.jobs.values():
            if isinstance(job, ins.Copy):
                old.cells.pop((job.target.tier, job.target.offset), None)
        if rot % 3 == 0 and old.entries:
            old.cells[HOST, self.choose(old.entries, rot)] = {}
        units = max(24, self.config.host_bytes // UNIT + resize)
        self.config = HubConfig(
            **{n: getattr(self.config, n) for n in self.config.__slots__ if n != "host_bytes"},
            host_bytes=units * UNIT,
        )
        complete = self.model.complete
        self.reset_clients()
        self.world = World(
            self.config, ready=False, now=old.now, entries=old.entries, records=old.records,
            cells={k: v for k, v in old.cells.items() if k[0] != DEVICE},
            generations={k: g for k, g in old.generations.items() if k[0] != DEVICE},
            ticket=old.ticket,
        )  # fmt: skip
        self.stalled, self.disk_up = 0.0, True
        self.restore(old)
        self.model.complete = {
            (self.handles[h], key)
            for h, handle in enumerate(self.old_handles)
            for owner, key in complete
            if owner == handle
        }
        self.zombies = [w for w in self.zombies if w.place.offset in self.world.entries]

    def restore(self, old: World) -> None:
        world = self.world
        self.old_handles = self.handles
        for spec in SPECS:
            world.send(ev.RestoreNamespace(spec))
        writing = {w.client for w in self.zombies}
        for offset, entry in list(world.entries.items()):
            if entry.info is None:
                clients = [c for c in entry.clients if c in writing]
                event = ev.RestoreQuarantined(offset, entry.slot_bytes, entry.generation, clients)
                world.send(event)
        for tier, table in ((HOST, world.entries), (DISK, world.records)):
            blocks = [restored(old, o, e) for o, e in table.items() if e.info is not None]
            world.send(ev.RestoreBlocks(tier, blocks))
            last = max((g for (t, _), g in old.generations.items() if t == tier), default=0)
            world.send(ev.RestoreDone(tier, last))
        world.send(ev.TierGrew(HOST, self.config.host_bytes))
        self.model.sessions[self.next_session] = self.now + 40.0
        assert self.ask(ev.OpenSession, session=self.next_session) is None
        self.handles = [world.namespace(self.next_session, spec) for spec in SPECS]
        self.next_session += 1
        self.join_client(0)

    # ---- what always holds

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.hub.validate()
            self.world.check_leases()
            self.check_streams()

    def check_streams(self) -> None:
        """In order, each once; at the end every position was granted or is missing."""
        for ticket in self.streams:
            granted = self.world.granted(ticket)
            assert granted == sorted(set(granted))
            result = self.world.answers.get(ticket)
            if isinstance(result, ins.AcquireResult):
                missing = [i for g in self.world.grants.get(ticket, []) for i in g.missing]
                missing += result.missing
                count = len(self.world.asked[ticket].hashes)
                assert sorted(granted + missing) == list(range(count))
                assert result.granted == len(granted)

    def teardown(self) -> None:
        """Everything comes to an end: nobody waits for ever, nothing stays held."""
        if not hasattr(self, "world"):
            return
        for _ in range(60):
            self.world.finish_all()
            for session in list(self.model.sessions):
                self.model.sessions[session] = self.now + 100.0
                self.ask(ev.Heartbeat, session=session)
            for lease, view in list(self.world.leases.items()):
                session = self.world.asked[view.ticket].session
                self.ask(ev.Release, session=session, leases=[lease])
            self.world.now += 3.0
            self.world.send(ev.Tick())
        self.settle()
        waiting = [t for t in self.streams if t not in self.world.answers]
        assert not waiting
        assert not self.pending
        for client in self.world.hub.suspects():
            self.world.send(ev.ClientDead(client))
        for session in list(self.model.sessions):
            self.ask(ev.CloseSession, session=session, drained=True)
        self.world.hub.validate()
        host = self.world.tier(HOST)
        assert (host.filling, host.target, host.quarantined) == (0, 0, 0)


def usable(have: list[bool], needs: tuple[ev.Need, ...]) -> int:
    """The definition, word by word."""
    for count in range(len(have), 0, -1):
        lasting = {"every": count, "state": 1}
        if all(
            all(have[max(0, count - lasting.get(need.kind, need.blocks)) : count])
            for need in needs or (ev.Need("every"),)
        ):
            return count
    return 0


def restored(world: World, offset: int, entry: Entry) -> ev.RestoredBlock:
    info = entry.info
    assert info is not None
    tag = world.hub.spec_of(info.namespace).tag
    return ev.RestoredBlock(
        tag, info.key, info.parent, info.tokens, offset, entry.slot_bytes, entry.generation
    )


HubMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=PHASES,
)
TestHubMachine = pytest.mark.timeout(0)(HubMachine.TestCase)
