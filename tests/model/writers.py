"""The state machine's clients: sessions, and writers that go on when the hub has given them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvproto.grid import Region
from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import CoreError
from kvserver.core.hub import HubConfig
from tests.model.reference import ModelReservation, Name, Reference
from tests.support.world import UNIT, World, chain, make_spec, parents_of

CHAINS = [chain(name, 6) for name in "abc"]
REGIONS = [
    Region(0, 2, 0, 2), Region(0, 1, 0, 2), Region(1, 2, 0, 2), Region(0, 2, 0, 1),
    Region(0, 2, 1, 2), Region(0, 1, 0, 1),
]  # fmt: skip
TAILS = {keys[-1]: 20 for keys in CHAINS}  # tokens of the blocks that hold fewer than 64
SESSION_TTL = 25.0
SPECS = [make_spec("small"), make_spec("large", slot_units=3)]
WRITE = ev.ReserveVerdict.WRITE

pick = st.integers(0, 1 << 16)
regions = st.sampled_from(REGIONS)
spans = st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 6))


@dataclass(eq=False)
class Writing:
    """A part of a slot that a client may write, or still writes though it may not."""

    reservation: int
    client: int
    place: ev.Place
    key: bytes
    cells: set[int]


def op(weight: int, **strategies: Any) -> Callable[[Any], Any]:
    """A method is an operation of the machine, chosen `weight` times as often as one of weight 1.

    Hypothesis chooses its rules evenly, and leaves some out in each run: then most of what happens
    is refused or ends what there is. So there is one rule, which draws an operation.
    """

    def mark(method: Any) -> Any:
        method.op = (weight, strategies)
        return method

    return mark


class WriterMachine(RuleBasedStateMachine):
    @classmethod
    def operations(cls) -> list[str]:
        """Names of the operations, each as often as it weighs."""
        found = [(name, getattr(cls, name)) for name in dir(cls) if name != "TestCase"]
        return [name for name, m in found for _ in range(getattr(m, "op", (0,))[0])]

    @rule(data=st.data())
    def step(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.operations()), label="operation")
        _, strategies = getattr(self, name).op
        drawn = {key: data.draw(strategy, label=key) for key, strategy in strategies.items()}
        getattr(self, name)(**drawn)

    @initialize(
        host=st.sampled_from([24, 32, 48]),
        disk=st.sampled_from([0, 32, 96]),
        device=st.sampled_from([0, 16]),
        tails=st.sampled_from([2, 4]),
        warm=st.lists(st.tuples(pick, spans), max_size=8),
        watched=st.booleans(),
        turn=st.sampled_from([1, 2, 8]),
        by_hand=st.booleans(),
    )
    def start(
        self, host: int, disk: int, device: int, tails: int,
        warm: list[tuple[int, tuple[int, int, int]]], watched: bool, turn: int, by_hand: bool,
    ) -> None:  # fmt: skip
        self.config = HubConfig(
            host_bytes=host * UNIT, disk_bytes=disk * UNIT, device_bytes=device * UNIT,
            session_ttl=SESSION_TTL, starve_max=20.0, promotions_max=3, spill_copies_max=2,
            upload_heat=2, verifies_max=2, writers_per_block_max=3, eviction_scan_max=3,
            moved_max=8, tail_bytes_max=tails * UNIT, tail_ttl=9.0, reserve_turn=turn,
        )  # fmt: skip
        self.world = World(self.config)
        self.reset_clients()
        self.next_session = self.next_client = 1
        self.zombies: list[Writing] = []
        self.live: list[Writing] = []
        self.private: set[bytes] = set()  # keys of slots that were reserved ahead
        self.stalled = 0.0
        self.disk_up = self.device_up = True
        self.open_session()
        self.handles = [self.world.namespace(1, spec) for spec in SPECS]
        for ns, span in warm:
            self.push(0, ns, span)
            self.world.finish_all()
        self.world.turns_by_hand = by_hand
        if watched:
            self.world.start_watch()
            self.world.walk()

    def reset_clients(self) -> None:
        self.model = Reference(4, partial_ttl=5.0, session_ttl=SESSION_TTL)
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

    @op(1)
    def open_session(self) -> None:
        if len(self.model.sessions) < 4:
            self.ask(ev.OpenSession, session=self.next_session)
            self.model.sessions[self.next_session] = self.now + SESSION_TTL
            self.next_session += 1
            self.join_client(0)

    @op(1, at=pick)
    def join_client(self, at: int) -> None:
        session = self.choose(self.model.sessions, at if at else -1)
        if session is not None:
            assert self.ask(ev.JoinSession, session=session, client=self.next_client) is None
            self.clients.append((session, self.next_client))
            self.next_client += 1

    @op(2)
    def heartbeats(self) -> None:
        for session in list(self.model.sessions):
            self.model.sessions[session] = self.now + SESSION_TTL
            assert self.ask(ev.Heartbeat, session=session) is None

    @op(1, at=pick, drained=st.booleans())
    def close_client(self, at: int, drained: bool) -> None:
        chosen = self.choose(self.clients, at)
        if chosen is None or chosen[0] not in self.model.sessions:
            return
        session, client = chosen
        self.stop_writing(client, drained=drained)
        self.clients.remove(chosen)
        self.model.end_client(session, client, self.now, drained=drained)
        assert self.ask(ev.CloseClient, session=session, client=client, drained=drained) is None

    @op(1, at=pick, drained=st.booleans())
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

    @op(1, at=pick)
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

    @op(2, at=pick, ns=pick, span=spans, ttl=st.floats(1, 30))
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

    @op(2, at=pick, ns=pick, span=spans)
    def withdraw(self, at: int, ns: int, span: tuple[int, int, int]) -> None:
        session = self.choose(self.model.sessions, at)
        if session is None:
            return
        handle, keys = self.choose(self.handles, ns), self.keys_of(span)
        self.model.withdraw(session, self.names(handle, keys))
        self.ask(
            ev.Announce, session=session, namespace=handle, hashes=keys, ttl=1.0, withdraw=True
        )

    @op(6,
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
            tokens=[TAILS.get(key, 64) for key in keys],
            region=region, ttl=ttl, wait=wait, durable=durable,
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

    @op(8)
    def turn(self) -> None:
        self.world.turn()
        self.settle()

    @op(10, at=pick, ns=pick, span=spans)
    def push(self, at: int, ns: int, span: tuple[int, int, int]) -> None:
        """A writer as writers mostly are: reserves whole blocks, fills them, commits."""
        before = set(self.model.reservations)
        self.reserve(at, ns, span, REGIONS[0], 20.0, 0.0, False)
        for ident in set(self.model.reservations) - before:
            self.commit(list(self.model.reservations).index(ident), REGIONS[0], 0)

    @op(5, at=pick, ns=pick, span=spans, left=st.floats(1, 20), right=st.floats(1, 20))
    def two_ranks_write(
        self, at: int, ns: int, span: tuple[int, int, int], left: float, right: float
    ) -> None:
        """Each its heads of the same blocks; only one commits, the other may vanish."""
        before = set(self.model.reservations)
        self.reserve(at, ns, span, REGIONS[3], left, 0.0, False)
        for ident in set(self.model.reservations) - before:
            self.commit(list(self.model.reservations).index(ident), REGIONS[3], 0)
        self.reserve(at + 1, ns, span, REGIONS[4], right, 0.0, False)

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

    @op(4, at=pick, ns=pick, region=regions, ttl=st.floats(1, 20))
    def reserve_ahead(self, at: int, ns: int, region: Region, ttl: float) -> None:
        """A slot under a key that nobody else knows."""
        chosen = self.choose([c for c in self.clients if c[0] in self.model.sessions], at)
        if chosen is None:
            return
        key = sha256(f"private {len(self.private)}".encode()).digest()
        self.private.add(key)
        self.world.ticket += 1
        event = ev.Reserve(
            ticket=self.world.ticket, session=chosen[0], client=chosen[1],
            namespace=self.choose(self.handles, ns), hashes=[key],
            parents=[self.choose([ROOT, CHAINS[0][at % 6]], at)], tokens=[64], region=region,
            ttl=ttl, wait=0.0, durable=False,
        )  # fmt: skip
        self.world.send(event)
        answer = self.world.answers[event.ticket]
        self.settle()
        self.take_in(event, answer, exact=True)

    @op(6, at=pick, span=spans, part=regions)
    def commit_named(self, at: int, span: tuple[int, int, int], part: Region) -> None:
        """What was reserved ahead is committed as a block of a chain, all of it or a part."""
        found = self.choose([
            (reservation, index, name, left)
            for reservation in self.model.reservations.values()
            for index, (name, left) in reservation.blocks.items()
            if name[1] in self.private and name not in self.model.loose
            and (index in reservation.gone or not self.model.filling[name].committed)
        ], at)  # fmt: skip
        key = CHAINS[span[0]][min(span[1], 4)]  # not a tail
        if found is None:
            return
        reservation, index, old, left = found
        cells = set(SPECS[0].grid.cell_indices(part))
        if not cells <= left:
            part = self.whole_part(reservation)
            cells = set(left)
        new = (old[0], key)
        mine = [w for w in self.live if w.reservation == reservation.ident]
        for writing in mine:
            self.world.write(writing.place, key, writing.cells & cells)
        gone = index in reservation.gone
        result = self.ask(
            ev.Commit, session=reservation.session, reservation=reservation.ident,
            indices=[index], region=part, hashes=[key],
            parents=[parents_of(CHAINS[span[0]])[min(span[1], 4)]],
        )  # fmt: skip
        assert isinstance(result, ins.CommitResult), result
        verdict = result.verdicts[0]
        unsure = new in self.model.loose or new in self.model.complete
        if not gone and verdict is ev.CommitVerdict.TAKEN:
            assert unsure or new in self.model.filling
            return
        assert gone or unsure or new not in self.model.filling
        if not gone:
            self.model.rename(reservation, index, new)
        assert verdict is self.model.commit(reservation, index, cells, self.now)
        for writing in mine + [w for w in self.zombies if w.reservation == reservation.ident]:
            writing.key = key
            writing.cells -= cells

    @op(2, at=pick)
    def write(self, at: int) -> None:
        """Anyone who may write, or might still, writes now."""
        part = self.choose(self.live + self.zombies, at)
        if part is not None:
            self.world.write(part.place, part.key, part.cells)

    @op(2)
    def zombies_write(self) -> None:
        for part in self.zombies:
            self.world.write(part.place, part.key, part.cells)

    @op(6, at=pick, region=st.one_of(st.none(), regions), some=st.integers(0, 63))
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

    @op(2, at=pick, drained=st.booleans())
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

    @op(3, at=pick)
    def fence(self, at: int) -> None:
        part = self.choose(self.zombies, at)
        if part is None:
            return
        session = next((s for s, c in self.clients if c == part.client), None)
        if session is not None:
            self.zombies = [w for w in self.zombies if w.reservation != part.reservation]
            self.ask(ev.Fence, session=session, reservation=part.reservation)
