"""Lookups, leases and read streams."""

from __future__ import annotations

import random

import pytest

from kvproto.grid import Region
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import ErrorKind
from kvserver.core.events import BlockState
from kvserver.core.hub import HubConfig
from tests.support.world import DISK, HOST, UNIT, World, chain, key_of, make_spec

WHOLE = Region(0, 2, 0, 2)
LEFT, RIGHT = Region(0, 2, 0, 1), Region(0, 2, 1, 2)
PAYLOAD = make_spec().grid.region_bytes(WHOLE)


def make_world(host: int = 32, disk: int = 128, **fields: object) -> World:
    world = World(HubConfig(host_bytes=host * UNIT, disk_bytes=disk * UNIT, **fields))
    world.session(1, 10)
    world.namespace()
    return world


def to_disk(world: World, keys: list[bytes]) -> None:
    """Have blocks on disk only."""
    world.put(1, keys)
    world.finish_all()
    filler = 0
    while any(HOST in world.tiers_of(1, key) for key in keys):
        world.put(1, chain(f"filler{world.now}{filler}", 4))
        world.finish_all()
        filler += 1
        assert filler < 100
    assert all(world.tiers_of(1, key) == {DISK} for key in keys)


# ---- lookup


def test_a_lookup_tells_how_many_cells_are_there() -> None:
    """Of complete blocks and of those that still fill: so a reader sees its writer's progress."""
    world = make_world()
    keys = chain("a", 3)
    world.put(1, keys[:1])
    world.ask(ev.Announce, session=1, namespace=1, hashes=keys, ttl=5.0)
    seen = [world.lookup(1, keys).committed_cells]
    reserved = world.reserve(1, keys, ttl=3.0)
    for layer in (0, 1):
        region = Region(layer, layer + 1, 0, 2)
        cells = world.grid_of(1).cell_indices(region)
        world.write(reserved.places[1], keys[1], cells)
        world.ask(
            ev.Commit, session=1, reservation=reserved.reservation, indices=[1], region=region
        )  # fmt: skip
        seen.append(world.lookup(1, keys).committed_cells)
    assert seen == [4, 6, 8]


def test_a_need_is_judged_on_its_region_and_its_pin_holds_the_cells() -> None:
    """A block that is still filling is usable for a group of layers whose cells are all there."""
    world = make_world()
    keys = chain("a", 3)
    top, bottom = Region(0, 1, 0, 2), Region(1, 2, 0, 2)
    world.put(1, keys[:1])
    reserved = world.reserve(1, keys, ttl=3.0)
    for index in (1, 2):
        world.write(reserved.places[index], keys[index], world.grid_of(1).cell_indices(top))
    world.ask(
        ev.Commit, session=1, reservation=reserved.reservation, indices=[1, 2], region=top
    )  # fmt: skip
    assert world.lookup(1, keys).usable_blocks == 1
    assert world.lookup(1, keys, need=(ev.Need("every", region=bottom),)).usable_blocks == 1
    both = (ev.Need("every", region=top), ev.Need("state", region=bottom))
    assert world.lookup(1, keys, need=both).usable_blocks == 1
    looked = world.lookup(1, keys, need=(ev.Need("every", region=top),), pin=9.0)
    assert (looked.usable_blocks, looked.live_blocks) == (3, 3)
    place = reserved.places[2]
    assert world.tier(HOST).filling == 2
    world.advance(3.0)  # their writer is lost: the cells stay where they are for the lease
    world.ask(ev.Fence, session=1, reservation=reserved.reservation)
    assert world.lookup(1, keys).usable_blocks == 1
    fresh = world.reserve(1, keys)
    assert place not in fresh.places
    assert {p.offset for p in reserved.places if p} & {p.offset for p in fresh.places if p} == set()
    world.release(looked.lease)
    world.hub.validate()


def test_lookup_counts_and_renews_no_lease() -> None:
    world = make_world()
    keys = chain("a", 4)
    world.put(1, keys)
    looked = world.lookup(1, keys, pin=5.0)
    assert (looked.usable_blocks, looked.lease_seconds) == (4, 5.0)
    world.advance(4.0)
    world.lookup(1, [*keys, key_of("nowhere")])
    assert (world.counter("hits"), world.counter("misses")) == (8, 1)
    world.advance(1.0)
    assert world.hub.stats(world.now).leases == 0
    assert world.counter("expired_leases") == 1


def test_a_pin_is_bounded_by_lease_max_and_keeps_blocks() -> None:
    world = make_world(host=8, disk=0, lease_max=7.0)
    keys = chain("a", 4)
    world.put(1, keys)
    assert world.lookup(1, keys, pin=100.0).lease_seconds == 7.0
    for i in range(20):
        world.put(1, chain(f"b{i}", 2))
    assert world.lookup(1, keys).usable_blocks == 4
    world.advance(7.0)
    for i in range(20):
        world.put(1, chain(f"c{i}", 2))
    assert world.lookup(1, keys).usable_blocks < 4
    world.hub.validate()


def test_a_pin_promotes_what_is_on_disk() -> None:
    world = make_world()
    keys = chain("a", 3)
    to_disk(world, keys)
    lease = world.lookup(1, keys, pin=30.0)
    assert [job.kind for job in world.jobs.values()] == [ins.JobKind.PROMOTE] * 3
    world.finish_all()
    for i in range(20):
        world.put(1, chain(f"b{i}", 3))
        world.finish_all()
    assert world.lookup(1, keys).tiers == bytes([HOST] * 3)
    assert world.release(lease.lease) == 1
    assert world.release(lease.lease) == 0
    world.hub.validate()


def test_pins_are_bounded_in_bytes() -> None:
    world = make_world(pin_bytes_max=2 * UNIT)
    keys = chain("a", 4)
    world.put(1, keys)
    world.finish_all()
    world.lookup(1, keys, pin=5.0)
    table = world.hub._books.host
    assert sum(table.pins) == 2


def test_a_lookup_of_another_tenants_namespace_finds_none() -> None:
    world = make_world()
    world.put(1, chain("a", 1))
    world.session(2, 20, tenant="other")
    assert world.lookup(1, chain("a", 1), session=2).kind is ErrorKind.NOT_FOUND
    answer = world.ask(ev.OpenNamespace, session=2, spec=make_spec())
    assert answer.field == "tenant"
    world.namespace(2, make_spec(tenant="other"))


# ---- streams


def test_blocks_in_memory_come_in_one_grant() -> None:
    world = make_world()
    keys = chain("a", 5)
    world.put(1, keys)
    ticket = world.acquire(1, [*keys, key_of("nowhere")])
    assert len(world.grants[ticket]) == 1
    assert world.granted(ticket) == [0, 1, 2, 3, 4]
    assert world.grants[ticket][0].missing == [5]
    assert world.answers[ticket] == ins.AcquireResult(5, [])


def test_the_window_bounds_what_is_leased() -> None:
    world = make_world()
    keys = chain("a", 5)
    world.put(1, keys)
    ticket = world.acquire(1, keys, window=2 * PAYLOAD, lease=5.0)
    assert world.granted(ticket) == [0, 1]
    world.release(*world.leases_of(ticket))
    assert world.granted(ticket) == [0, 1, 2, 3]
    assert ticket not in world.answers
    world.advance(5.0)
    assert world.granted(ticket) == [0, 1, 2, 3, 4], "an expired lease is room, too"
    assert world.answers[ticket].granted == 5


def test_a_window_below_a_block_grants_one_at_a_time() -> None:
    world = make_world()
    keys = chain("a", 3)
    world.put(1, keys)
    ticket = world.acquire(1, keys, window=1)
    for expected in ([0], [0, 1], [0, 1, 2]):
        assert world.granted(ticket) == expected
        world.release(world.leases_of(ticket)[-1])
    assert world.answers[ticket].granted == 3


def test_a_window_counts_bytes_of_the_region() -> None:
    world = make_world()
    keys = chain("a", 4)
    world.put(1, keys)
    ticket = world.acquire(1, keys, region=LEFT, window=PAYLOAD)
    assert world.granted(ticket) == [0, 1]


def test_cells_are_granted_while_others_are_still_written() -> None:
    world = make_world()
    keys = chain("a", 2)
    result = world.reserve(1, keys)
    ticket = world.acquire(1, keys, region=LEFT, wait=10.0)
    assert world.granted(ticket) == []
    world.advance(1.0)

    def commit(index: int, region: Region) -> None:
        cells = world.grid_of(1).cell_indices(region)
        world.write(result.places[index], keys[index], cells)
        ask = {"session": 1, "reservation": result.reservation}
        world.ask(ev.Commit, **ask, indices=[index], region=region)

    commit(0, Region(0, 1, 0, 2))
    assert world.granted(ticket) == [], "only half of the region is there"
    commit(0, Region(1, 2, 0, 1))
    block = world.grants[ticket][0].blocks[0]
    assert (block.index, block.complete) == (0, False)
    commit(1, WHOLE)
    assert world.granted(ticket) == [0, 1]
    assert world.answers[ticket].missing == []
    world.check_leases()
    world.hub.validate()


def test_who_waits_for_a_writer_waits_no_longer_than_told() -> None:
    world = make_world()
    keys = chain("a", 2)
    world.reserve(1, keys[:1], ttl=60.0)
    world.ask(ev.Announce, session=1, namespace=1, hashes=keys[1:], ttl=60.0)
    ticket = world.acquire(1, keys, wait=3.0)
    world.advance(2.9)
    assert ticket not in world.answers
    world.advance(0.1)
    assert world.answers[ticket] == ins.AcquireResult(0, [0, 1])
    assert world.acquire(1, keys, wait=0.0) in world.answers


def test_a_writer_that_aborts_wakes_its_readers() -> None:
    world = make_world()
    keys = chain("a", 1)
    result = world.reserve(1, keys)
    ticket = world.acquire(1, keys, wait=100.0)
    world.ask(ev.Abort, session=1, reservation=result.reservation, drained=True)
    assert world.answers[ticket] == ins.AcquireResult(0, [0])


def test_streams_that_want_one_block_share_its_copy() -> None:
    world = make_world()
    keys = chain("a", 2)
    to_disk(world, keys)
    tickets = [world.acquire(1, keys) for _ in range(5)]
    assert len(world.jobs) == 2
    world.finish_all()
    for ticket in tickets:
        assert world.granted(ticket) == [0, 1]
        assert {b.came_from for b in world.grants[ticket][0].blocks} == {DISK}
    world.check_leases()
    world.hub.validate()


def test_read_ahead_stays_within_the_window() -> None:
    world = make_world()
    keys = chain("a", 8)
    to_disk(world, keys)
    ticket = world.acquire(1, keys, window=3 * PAYLOAD)
    assert len(world.jobs) == 3
    world.finish()
    assert world.granted(ticket) == [0]
    assert len(world.jobs) == 2
    world.finish()
    world.finish()
    assert len(world.jobs) == 0
    world.release(world.leases_of(ticket)[0])
    assert len(world.jobs) == 1
    world.hub.validate()


def test_what_arrives_ahead_of_the_head_is_kept_for_the_stream() -> None:
    world = make_world(host=8)
    keys = chain("a", 2)
    to_disk(world, keys)
    ticket = world.acquire(1, keys)
    head, second = sorted(world.jobs)
    world.finish(second)
    for i in range(20):
        world.put(1, chain(f"pressure{i}", 2))
    assert HOST in world.tiers_of(1, keys[1])
    world.finish(head)
    assert world.granted(ticket) == [0, 1]
    world.check_leases()
    world.hub.validate()


def test_promotions_in_flight_are_bounded() -> None:
    world = make_world(promotions_max=4, disk=512)
    for name in "abcdef":
        to_disk(world, chain(name, 3))
    tickets = [world.acquire(1, chain(name, 3)) for name in "abcdef"]
    world.send(ev.Tick())
    assert len(world.jobs) == 4
    while world.jobs:
        assert len(world.jobs) <= 4
        world.finish()
        world.hub.validate()
    assert all(world.granted(ticket) == [0, 1, 2] for ticket in tickets)


def test_a_failed_promotion_is_missing_and_a_corrupt_one_dropped() -> None:
    world = make_world()
    keys = chain("a", 3)
    to_disk(world, keys)
    ticket = world.acquire(1, keys)
    first, second, third = sorted(world.jobs)
    world.finish(first, error="EIO")
    world.finish(second, corrupt=True)
    world.finish(third)
    assert world.granted(ticket) == [2]
    assert world.answers[ticket].granted == 1
    assert world.grants[ticket][0].missing == [0, 1]
    looked = world.lookup(1, keys)
    assert [BlockState(s) for s in looked.states] == [
        BlockState.COMPLETE, BlockState.ABSENT, BlockState.COMPLETE,
    ]  # fmt: skip
    assert world.counter("corrupt_disk") == 1
    world.hub.validate()


def test_a_cancelled_stream_gives_everything_back() -> None:
    world = make_world()
    keys = chain("a", 4)
    to_disk(world, keys[2:])
    world.put(1, keys[:2])
    world.finish_all()
    ticket = world.acquire(1, keys)
    assert world.granted(ticket) == [0, 1]
    world.send(ev.CancelAcquire(ticket))
    assert ticket not in world.answers
    world.finish_all()
    assert sum(world.hub._books.host.pins) == 0
    world.hub.validate()


def test_a_session_that_ends_refuses_its_streams() -> None:
    world = make_world()
    world.reserve(1, chain("a", 1))
    world.session(2, 20)
    ticket = world.acquire(1, chain("a", 1), wait=50.0, session=2)
    world.ask(ev.CloseSession, session=2, drained=True)
    assert world.answers[ticket].kind is ErrorKind.NOT_FOUND
    world.hub.validate()


def test_a_prompt_larger_than_the_host_tier_streams_through() -> None:
    world = make_world(host=8, disk=256)
    keys = chain("long", 40)
    for at in range(40):
        world.put(1, keys[at : at + 1], parents=[keys[at - 1] if at else bytes(32)])
        world.finish_all()
    ticket = world.acquire(1, keys)
    for _ in range(500):
        world.finish_all()
        world.check_leases()
        if ticket in world.answers:
            break
        world.release(*[lease for lease in world.leases_of(ticket) if lease in world.leases])
    assert world.answers[ticket].granted == 40
    world.hub.validate()


@pytest.mark.parametrize("seed", range(6))
def test_readers_whose_windows_exceed_the_tier_do_not_deadlock(seed: int) -> None:
    """Twenty readers with unlimited windows on eight slots, each slow and out of step."""
    rng = random.Random(seed)
    world = make_world(host=8, disk=512, promotions_max=rng.choice([1, 4, 32]))
    chains = [chain(f"c{i}", 10) for i in range(8)]
    for keys in chains:
        for at in range(10):
            world.put(1, keys[at : at + 1], parents=[keys[at - 1] if at else bytes(32)])
            world.finish_all()
    tickets = [
        world.acquire(1, rng.choice(chains), lease=30.0, window=rng.choice([0, PAYLOAD]))
        for _ in range(20)
    ]
    steps = 0
    while not all(ticket in world.answers for ticket in tickets):
        if world.jobs and rng.random() < 0.6:
            world.finish(rng.choice(sorted(world.jobs)))
        elif world.leases:
            world.release(rng.choice(sorted(world.leases)))
        world.now += 0.01
        world.send(ev.Tick())
        world.check_leases()
        steps += 1
        assert steps < 5000, "the readers wait for each other"
    assert world.counter("streams_starved") > 0
    assert all(world.answers[ticket].granted == 10 for ticket in tickets)
    world.hub.validate()


def test_a_stream_that_starves_too_long_goes_without() -> None:
    world = make_world(host=8, disk=64, starve_max=5.0)
    keys = chain("a", 1)
    to_disk(world, keys)
    world.reserve(1, chain("w", 8), ttl=60.0)
    ticket = world.acquire(1, keys)
    world.advance(4.9)
    assert ticket not in world.answers
    world.advance(0.1)
    assert world.answers[ticket] == ins.AcquireResult(0, [0])
    world.hub.validate()


def test_an_inherited_lease_stands_until_the_stream_could_grant() -> None:
    world = make_world(lease_max=20.0)
    keys = chain("a", 2)
    world.put(1, keys)
    lease = world.lookup(1, keys, pin=2.0).lease
    world.acquire(1, keys, inherit=lease, lease=10.0)
    world.advance(9.0)
    assert world.release(lease) == 1


def test_a_tenants_leases_cannot_be_released_by_another() -> None:
    world = make_world()
    world.put(1, chain("a", 1))
    ticket = world.acquire(1, chain("a", 1))
    world.session(2, 20)
    assert world.release(*world.leases_of(ticket), session=2) == 0
    assert world.release(*world.leases_of(ticket)) == 1


# ---- corruption


def test_a_reported_block_is_checked_before_it_is_granted_again() -> None:
    world = make_world(disk=0)
    keys = chain("a", 2)
    world.put(1, keys)
    assert world.ask(ev.ReportCorrupt, session=1, namespace=1, hashes=keys) is None
    report = world.ticket
    ticket = world.acquire(1, keys)
    assert world.granted(ticket) == []
    world.finish(corrupt=True)
    world.finish()
    assert world.answers[report] == 1
    assert world.granted(ticket) == [1]
    assert world.counter("corrupt_host") == 1
    world.hub.validate()


def test_a_corrupt_host_copy_falls_back_to_the_disk() -> None:
    world = make_world()
    keys = chain("a", 1)
    world.put(1, keys)
    world.finish_all()
    world.ask(ev.ReportCorrupt, session=1, namespace=1, hashes=keys)
    ticket = world.acquire(1, keys)
    world.finish(corrupt=True)
    assert [job.kind for job in world.jobs.values()] == [ins.JobKind.PROMOTE]
    world.finish_all()
    assert world.granted(ticket) == [0]
    world.check_leases()
    world.hub.validate()


def test_a_report_about_nothing_is_answered_at_once() -> None:
    world = make_world()
    assert world.ask(ev.ReportCorrupt, session=1, namespace=1, hashes=chain("a", 1)) == 0
