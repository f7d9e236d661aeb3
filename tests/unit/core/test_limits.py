"""Everything is bounded: limits are answered by name; memory follows what is alive."""

from __future__ import annotations

import gc

import pytest

from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import RestoredBlock
from kvserver.core.hub import Hub, HubConfig
from kvserver.core.quarantine import Quarantine
from kvserver.core.timers import Kind, Timers
from tests.support.world import HOST, UNIT, World, chain, key_of, make_spec


def small(**limits: int) -> World:
    world = World(HubConfig(host_bytes=32 * UNIT, **limits))
    world.session(1, 10)
    world.namespace()
    return world


def refused(answer: object, name: str, limit: int) -> None:
    assert isinstance(answer, CoreError), answer
    assert (answer.kind, answer.field, answer.limit) == (ErrorKind.LIMIT, name, limit)


def test_sessions_and_clients() -> None:
    world = small(sessions_max=2, clients_per_session_max=1)
    world.session(2, 20)
    refused(world.ask(ev.OpenSession, session=3), "sessions_max", 2)
    refused(world.ask(ev.JoinSession, session=2, client=21), "clients_per_session_max", 1)
    assert world.ask(ev.OpenSession, session=2).kind is ErrorKind.CONFLICT
    world.ask(ev.CloseSession, session=2, drained=True)
    assert world.ask(ev.OpenSession, session=3) is None
    assert world.ask(ev.JoinSession, session=3, client=10).kind is ErrorKind.CONFLICT


def test_namespaces_are_limited_and_idle_ones_make_room() -> None:
    world = small(namespaces_max=3)
    world.put(1, chain("a", 1))
    handles = [world.namespace(1, make_spec(f"m{i}")) for i in range(2)]
    refused(world.ask(ev.OpenNamespace, session=1, spec=make_spec("x")), "namespaces_max", 3)
    world.session(2, 20)
    world.ask(ev.CloseSession, session=1, drained=True)
    world.namespace(2, make_spec("x"))
    stats = world.hub.stats(world.now)
    assert {n.handle for n in stats.namespaces} == {1, handles[1], 4}, "the oldest empty one went"
    world.hub.validate()


def test_keys_reservations_streams_leases_announcements() -> None:
    world = small(
        keys_per_call_max=4, reservations_max=2, streams_max=1, leases_max=1, announcements_max=3
    )
    refused(world.lookup(1, chain("a", 5)), "keys_per_call_max", 4)
    refused(world.reserve(1, chain("a", 5)), "keys_per_call_max", 4)
    announce = {"session": 1, "namespace": 1, "ttl": 5.0}
    assert world.ask(ev.Announce, **announce, hashes=chain("z", 3)) == 3
    refused(world.ask(ev.Announce, **announce, hashes=chain("y", 1)), "announcements_max", 3)
    world.reserve(1, chain("b", 1))
    world.reserve(1, chain("c", 1))
    refused(world.reserve(1, chain("d", 1)), "reservations_max", 2)
    world.acquire(1, chain("b", 1), wait=50.0)
    refused(world.answers[world.acquire(1, chain("b", 1))], "streams_max", 1)
    world = small(leases_max=1)
    world.put(1, chain("a", 1))
    world.lookup(1, chain("a", 1), pin=5.0)
    refused(world.lookup(1, chain("a", 1), pin=5.0), "leases_max", 1)
    refused(world.answers[world.acquire(1, chain("a", 1))], "leases_max", 1)


def test_reports_and_waiting_reserves() -> None:
    world = small(reports_max=1, reserve_waits_max=1)
    world.put(1, chain("a", 1))
    report = {"session": 1, "namespace": 1, "hashes": chain("a", 1)}
    assert world.ask(ev.ReportCorrupt, **report) is None
    refused(world.ask(ev.ReportCorrupt, **report), "reports_max", 1)
    world.reserve(1, chain("b", 31), ttl=60.0)
    assert world.reserve(1, chain("c", 2), wait=50.0) is None
    refused(world.reserve(1, chain("d", 1), wait=50.0), "reserve_waits_max", 1)


def test_durations_are_clamped() -> None:
    world = small()
    keys = chain("a", 1)
    assert world.reserve(1, keys, ttl=1e9).ttl == 60.0
    assert world.reserve(1, chain("b", 1), ttl=0.0).ttl == 60.0


def test_remembered_reservations_are_bounded_and_their_fences_stay() -> None:
    world = small(expired_max=2)
    reservations = [world.reserve(1, chain(f"r{i}", 1), ttl=1.0).reservation for i in range(3)]
    world.advance(1.0)
    fences = [world.ask(ev.Fence, session=1, reservation=r) for r in reservations]
    assert fences == [0, 1, 1], "the oldest is forgotten: only its client's end lifts it"
    world.send(ev.ClientDead(10))
    assert world.tier(HOST).quarantined == 0


def test_a_limit_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="promotions_max"):
        HubConfig(host_bytes=UNIT, promotions_max=0)
    with pytest.raises(ValueError, match="session_ttl"):
        HubConfig(host_bytes=UNIT, session_ttl=0.0)


def test_near_misses_name_the_field_and_the_namespace() -> None:
    world = small()
    handle = world.namespace(1, make_spec(weights=b"w" * 32))
    (near,) = world.hub.near_misses(handle)
    assert near.startswith(f"weights differs from namespace {make_spec().id.hex()[:8]}")
    handle = world.namespace(1, make_spec(weights=b"x" * 32, kv_dtype="bfloat16"))
    assert world.hub.near_misses(handle) == []
    assert world.namespace(1, make_spec(attributes={"rope": "1e6"})) == 4
    (near,) = world.hub.near_misses(4)
    assert near.startswith("attributes[rope] differs from")
    other = world.namespace(1, make_spec(attributes={"rope": "5e5"}))
    assert len(world.hub.near_misses(other)) == 2
    assert world.namespace() == 1
    assert world.hub.namespace_of(make_spec().id) == 1


def test_timers_keep_memory_of_what_is_alive_only() -> None:
    timers = Timers()
    for i in range(10_000):
        timers.set(Kind.LEASE, i, 1000.0 - i % 7)
        timers.cancel(Kind.LEASE, i)
    timers.set(Kind.LEASE, 5, 3.0)
    timers.set(Kind.STREAM_WAIT, 5, 2.0)
    timers.set(Kind.LEASE, 5, 4.0)
    assert len(timers._heap) < 300
    assert timers.next() == 2.0
    assert timers.pop_due(1.9) is None
    assert timers.pop_due(9.0) == (Kind.STREAM_WAIT, 5)
    assert timers.pop_due(9.0) == (Kind.LEASE, 5)
    assert timers.pop_due(9.0) is None
    assert timers.next() is None


def test_quarantine_needs_every_fence_lifted() -> None:
    quarantine = Quarantine()
    quarantine.hold(1, 100, 7)
    quarantine.hold(1, 101, 8)
    quarantine.hold(2, 100, 7)
    assert quarantine.lift_reservation(100) == [2]
    assert quarantine.clients() == {8}
    assert quarantine.lift_client(8) == [1]
    assert not quarantine.holds(1)
    assert quarantine.lift_client(8) == []
    assert not quarantine.lift(1, 100)
    assert quarantine.reservations() == frozenset()


def test_blocks_are_no_objects_of_the_garbage_collector() -> None:
    count = 50_000
    spec = make_spec()
    hub = Hub(HubConfig(host_bytes=count * UNIT))
    hub.handle(ev.RestoreNamespace(spec), 0.0)
    gc.collect()
    before = len(gc.get_objects())
    for start in range(0, count, 1000):
        blocks = [
            RestoredBlock(spec.tag, key_of(i), ROOT, 64, i * UNIT, UNIT, i + 1)
            for i in range(start, start + 1000)
        ]
        hub.handle(ev.RestoreBlocks(HOST, blocks), 0.0)
    hub.handle(ev.RestoreDone(HOST), 0.0)
    del blocks
    gc.collect()
    assert hub.stats(0.0).blocks == count
    assert len(gc.get_objects()) - before < count // 5
