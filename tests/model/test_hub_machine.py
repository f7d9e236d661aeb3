"""The hub against the reference model: random events, the books audited after every step.

Writers that the hub has given up go on writing (`zombies`) until they are fenced; every leased cell
is compared with its key after every step. `KVSERVER_MODEL_EXAMPLES` and `KVSERVER_MODEL_STEPS` make
long runs (20,000 x 200); the normal run is 200 x 50.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant

from kvproto.grid import Region
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.hub import HubConfig
from tests.model.writers import (
    CHAINS,
    REGIONS,
    SESSION_TTL,
    SPECS,
    WriterMachine,
    op,
    pick,
    regions,
    spans,
)
from tests.support.world import DEVICE, DISK, HOST, UNIT, Entry, World

EXAMPLES = int(os.environ.get("KVSERVER_MODEL_EXAMPLES", "200"))
PHASES = [Phase.generate] if os.environ.get("KVSERVER_MODEL_NOSHRINK") else list(Phase)
STEPS = int(os.environ.get("KVSERVER_MODEL_STEPS", "50"))


NEEDS: list[tuple[ev.Need, ...]] = [
    (),
    (ev.Need("last", 2),),
    (ev.Need("every"), ev.Need("state")),
    (ev.Need("every", region=REGIONS[1]),),
    (ev.Need("every", region=REGIONS[2]), ev.Need("last", 2, region=REGIONS[1])),
]


class HubMachine(WriterMachine):
    # ---- reading

    @op(10,
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

    @op(8, at=pick, which=pick, window=st.sampled_from([0, 1, 30_000, 100_000]))
    def read_back(self, at: int, which: int, window: int) -> None:
        """Reads a chain that was complete once, as far as that is known."""
        known = sorted(name for name in self.model.complete if name[1] not in self.private)
        name = self.choose(known, which)
        if name is not None and name[0] in self.handles:
            chosen = next(i for i, keys in enumerate(CHAINS) if name[1] in keys)
            span = (chosen, 0, CHAINS[chosen].index(name[1]) + 1)
            ns = self.handles.index(name[0])
            self.acquire(at, ns, span, REGIONS[0], 0.0, window, 8.0, {HOST})

    @op(6, at=pick, count=st.integers(1, 3))
    def release(self, at: int, count: int) -> None:
        for _ in range(count):
            lease = self.choose(self.world.leases, at)
            if lease is None:
                return
            event = self.world.asked[self.world.leases[lease].ticket]
            if event.session in self.model.sessions:
                assert self.ask(ev.Release, session=event.session, leases=[lease]) == 1

    @op(1, at=pick)
    def cancel(self, at: int) -> None:
        ticket = self.choose([t for t in self.streams if t not in self.world.answers], at)
        if ticket is not None:
            self.streams.remove(ticket)
            self.world.send(ev.CancelAcquire(ticket))
            self.settle()

    @op(6,
        at=pick, ns=pick, span=spans, pin=st.sampled_from([0.0, 0.0, 5.0]),
        need=st.sampled_from(NEEDS),
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
        if any(n.region for n in need) and {*self.names(handle, keys)} & self.model.loose:
            return
        grid = SPECS[self.handles.index(handle)].grid
        have = []
        for one in need or (ev.Need("every"),):
            cells = set(grid.cell_indices(one.region or grid.whole))
            filling = [self.model.filling.get(n) for n in self.names(handle, keys)]
            have.append([
                s is ev.BlockState.COMPLETE or (f is not None and cells <= f.committed)
                for s, f in zip(states, filling, strict=True)
            ])  # fmt: skip
        assert result.usable_blocks == usable(have, need)

    # ---- the world

    @op(6, at=pick, how=st.sampled_from(["ok"] * 6 + ["error", "corrupt"]))
    def job_ends(self, at: int, how: str) -> None:
        job = self.choose(self.world.jobs, at)
        if job is not None:
            fields: Any = {"error": "EIO"} if how == "error" else {}
            if how == "corrupt":
                fields = {"corrupt": True}
            self.world.finish(job, **fields)
            self.settle()

    @op(8)
    def jobs_end(self) -> None:
        self.world.finish_all()
        self.settle()

    @op(4, seconds=st.floats(0.01, 12))
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

    @op(1, seconds=st.floats(1, 100))
    def server_stalls(self, seconds: float) -> None:
        """Nothing expires by a stall of the server."""
        self.world.now += seconds
        self.stalled += seconds
        for view in self.world.leases.values():
            view.until += seconds
        self.world.send(ev.Stalled(seconds))
        self.settle()

    @op(1)
    def disk_goes_or_comes(self) -> None:
        if not self.config.disk_bytes:
            return
        self.disk_up = not self.disk_up
        self.world.send(ev.TierUp(DISK) if self.disk_up else ev.TierDown(DISK, "EIO"))
        self.settle()

    @op(1)
    def device_fails(self) -> None:
        """Once, and for good: what is on it alone is lost, all the rest stays."""
        if self.config.device_bytes and self.device_up:
            self.device_up = False
            self.world.send(ev.TierDown(DEVICE, "cudaErrorIllegalAddress"))
            self.settle()

    @op(1, on=st.sampled_from([True, True, False]))
    def watch(self, on: bool) -> None:
        if on:
            self.world.start_watch()
        elif self.world.watch is not None:
            self.world.stop_watch()

    @op(3, rows=st.sampled_from([3, 10, 1000]))
    def walk(self, rows: int) -> None:
        if self.world.watch is not None:
            self.world.walk(rows)

    @op(1, at=pick)
    def disk_rots(self, at: int) -> None:
        offset = self.choose(self.world.records, at)
        if offset is not None:
            self.world.cells[DISK, offset] = {}

    @op(1, ns=pick, span=spans, every=st.booleans())
    def evict(self, ns: int, span: tuple[int, int, int], every: bool) -> None:
        spec = self.choose(SPECS, ns)
        keys = [] if every else self.keys_of(span)
        result = self.ask(ev.Evict, namespace_id=spec.id, hashes=keys)
        assert isinstance(result, ins.Evicted)

    @op(2, at=pick, ns=pick, span=spans)
    def report_corrupt(self, at: int, ns: int, span: tuple[int, int, int]) -> None:
        session = self.choose(self.model.sessions, at)
        if session is not None:
            handle = self.choose(self.handles, ns)
            self.ask(ev.ReportCorrupt, session=session, namespace=handle, hashes=self.keys_of(span))

    @op(1, ns=st.integers(0, 9))
    def drop_namespace(self, ns: int) -> None:
        session = self.choose(self.model.sessions, 0)
        if session is None or ns >= len(SPECS):
            return  # rarely
        handle = self.handles[ns]
        self.model.drop_namespace(handle)
        assert isinstance(self.ask(ev.DropNamespace, namespace_id=SPECS[ns].id), ins.Evicted)
        self.handles[ns] = self.world.namespace(session, SPECS[ns])
        assert self.handles[ns] != handle

    @op(1, rot=pick, resize=st.sampled_from([0, 0, -8, 8]))
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
            ticket=old.ticket, turns_by_hand=old.turns_by_hand,
        )  # fmt: skip
        self.stalled, self.disk_up, self.device_up = 0.0, True, True
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
            size = min(entry.slot_bytes, self.config.host_bytes - offset)  # as HostArena.scan does
            if entry.info is None and size > 0:
                clients = [c for c in entry.clients if c in writing]
                world.send(ev.RestoreQuarantined(offset, size, entry.generation, clients))
        for tier, table in ((HOST, world.entries), (DISK, world.records)):
            blocks = [restored(old, o, e) for o, e in table.items() if e.info is not None]
            world.send(ev.RestoreBlocks(tier, blocks))
            last = max((g for (t, _), g in old.generations.items() if t == tier), default=0)
            world.send(ev.RestoreDone(tier, last))
        world.send(ev.TierGrew(HOST, self.config.host_bytes))
        self.model.sessions[self.next_session] = self.now + SESSION_TTL
        assert self.ask(ev.OpenSession, session=self.next_session) is None
        self.handles = [world.namespace(self.next_session, spec) for spec in SPECS]
        self.rename_namespaces(old)
        self.next_session += 1
        self.join_client(0)

    def rename_namespaces(self, old: World) -> None:
        """Directories name namespaces by their specs; entries here, by handles of this epoch."""
        handle_of = dict(zip((spec.tag for spec in SPECS), self.handles, strict=True))
        for table in (self.world.entries, self.world.records):
            for offset, entry in table.items():
                if entry.info is not None:
                    handle = handle_of[old.hub.spec_of(entry.info.namespace).tag]
                    table[offset] = replace(entry, info=replace(entry.info, namespace=handle))

    # ---- what always holds

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.hub.validate()
            self.world.check_leases()
            self.world.check_watch()
            self.check_streams()
            self.check_fences()

    def check_fences(self) -> None:
        """A slot that someone may still write is nobody else's, and says who writes it."""
        for part in self.live + self.zombies:
            if part.cells:
                entry = self.world.entries.get(part.place.offset)
                assert entry is not None, f"{part} is free and may be written"
                assert entry.generation == part.place.generation, f"{part} is reused"
                assert part.client in entry.clients, f"{part} is not in the directory"

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
        self.world.turns_by_hand = False
        self.world.turn()
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


def usable(have: list[list[bool]], needs: tuple[ev.Need, ...]) -> int:
    """The definition, word by word; `have[i]` is which blocks need i could use."""
    for count in range(len(have[0]), 0, -1):
        lasting = {"every": count, "state": 1}
        if all(
            all(mine[max(0, count - lasting.get(need.kind, need.blocks)) : count])
            for mine, need in zip(have, needs or (ev.Need("every"),), strict=True)
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
