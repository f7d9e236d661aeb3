"""Tails live short, in a quota of their own, and drive out nothing but older tails."""

from __future__ import annotations

from typing import Any

from kvproto.grid import Region
from kvserver.core import events as ev
from kvserver.core.events import BlockState, ReserveVerdict
from kvserver.core.hub import HubConfig
from tests.support.world import DISK, HOST, UNIT, World, chain

WRITE, PRESENT, BUSY, NO_SPACE = ReserveVerdict
TOKENS = 20
TTL = 10.0


def make(*, host: int = 64, disk: int = 0, tails: int = 4, **fields: Any) -> World:
    config = HubConfig(
        host_bytes=host * UNIT,
        disk_bytes=disk * UNIT,
        tail_ttl=TTL,
        tail_bytes_max=tails * UNIT,
        **fields,
    )
    world = World(config)
    world.session(1, 10)
    world.namespace()
    return world


def tail(world: World, name: str, **fields: Any) -> list[bytes]:
    """A chain of one block, a tail, pushed."""
    keys = chain(name, 1)
    assert world.put(1, keys, tokens=[TOKENS], **fields).verdicts == [WRITE], name
    return keys


def state(world: World, keys: list[bytes]) -> BlockState:
    world.hub.validate()
    return BlockState(world.lookup(1, keys).states[0])


def test_a_tail_leaves_after_its_time_and_other_blocks_stay() -> None:
    world = make()
    short, whole = tail(world, "a"), chain("b", 1)
    world.put(1, whole)
    world.advance(TTL - 0.1)
    assert state(world, short) is BlockState.COMPLETE
    world.advance(0.2)
    assert state(world, short) is BlockState.ABSENT
    assert state(world, whole) is BlockState.COMPLETE
    assert world.counter("tails_expired") == 1
    assert world.hub.stats(world.now).tiers[HOST].committed == 1


def test_a_tail_that_is_read_at_its_end_leaves_when_it_is_not() -> None:
    world = make()
    keys = tail(world, "a")
    world.advance(TTL - 1)
    (lease,) = world.leases_of(world.acquire(1, keys, lease=20.0))
    world.advance(3)
    assert state(world, keys) is BlockState.COMPLETE
    world.check_leases()
    world.release(lease)
    world.advance(1.1)
    assert state(world, keys) is BlockState.ABSENT


def test_new_tails_displace_the_oldest_and_nothing_else() -> None:
    world = make(tails=2)
    whole = chain("w", 4)
    world.put(1, whole)
    names = [tail(world, name) for name in "abcdef"]
    kept = 2  # a tail of this namespace takes one unit
    states = [state(world, keys) for keys in names]
    gone = len(names) - kept
    assert states == [BlockState.ABSENT] * gone + [BlockState.COMPLETE] * kept
    assert world.counter("tails_displaced") == gone
    assert world.lookup(1, whole).usable_blocks == len(whole)


def test_where_no_tail_can_make_way_a_new_one_gets_no_space() -> None:
    world = make(tails=2)
    held = []
    while True:
        keys = chain(f"t{len(held)}", 1)
        result = world.put(1, keys, tokens=[TOKENS])
        if result.verdicts == [NO_SPACE]:
            break
        (lease,) = world.leases_of(world.acquire(1, keys, lease=20.0))
        held.append(lease)
    assert held
    assert world.tier(HOST).free, "there is room for anything else"
    assert world.put(1, chain("w", 1)).verdicts == [WRITE]
    world.release(held[0])
    assert world.put(1, keys, tokens=[TOKENS]).verdicts == [WRITE]


def test_a_writer_that_waits_gets_the_space_of_a_tail_whose_time_is_over() -> None:
    world = make(tails=2)
    for number in range(2):
        keys = tail(world, f"t{number}")
        world.acquire(1, keys, lease=TTL / 2)
    world.reserve(1, chain("late", 1), tokens=[TOKENS], wait=30.0)
    waiting = world.ticket
    assert waiting not in world.answers
    world.advance(TTL + 0.1)
    assert world.answers[waiting].verdicts == [WRITE]


def test_tails_are_not_written_to_disk_unless_they_are_to_be_durable() -> None:
    world = make(disk=64)
    short, durable = tail(world, "a"), tail(world, "b", durable=True)
    world.put(1, chain("w", 1))
    world.finish_all()
    assert world.tiers_of(1, short[0]) == {HOST}
    assert world.tiers_of(1, durable[0]) == {HOST, DISK}
    world.advance(TTL + 0.1)
    assert state(world, short) is BlockState.ABSENT
    assert state(world, durable) is BlockState.COMPLETE


def test_a_tail_that_turns_durable_while_it_fills_is_kept() -> None:
    world = make(disk=64)
    world.ask(ev.JoinSession, session=1, client=11)
    keys = chain("a", 1)
    left, right = Region(0, 2, 0, 1), Region(0, 2, 1, 2)
    world.put(1, keys, tokens=[TOKENS], region=left)
    world.put(1, keys, tokens=[TOKENS], region=right, client=11, durable=True)
    world.finish_all()
    world.advance(TTL + 0.1)
    assert state(world, keys) is BlockState.COMPLETE
    assert world.tiers_of(1, keys[0]) == {HOST, DISK}


def test_a_tail_larger_than_the_quota_is_refused_at_once() -> None:
    world = World(HubConfig(host_bytes=64 * UNIT, tail_bytes_max=UNIT - 1))
    world.session(1, 10)
    world.namespace()
    assert world.put(1, chain("a", 1), tokens=[TOKENS]).verdicts == [NO_SPACE]
    assert world.put(1, chain("b", 1)).verdicts == [WRITE]
