"""Where blocks are, as a watcher is told."""

from __future__ import annotations

import pytest

from kvproto.grid import Region
from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.hub import HubConfig
from tests.support.world import DISK, UNIT, World, chain, make_spec

HOST_BIT, DISK_BIT = 2, 4


@pytest.fixture
def world() -> World:
    world = World(HubConfig(host_bytes=64 * UNIT, disk_bytes=64 * UNIT, moved_max=4))
    world.session()
    return world


def moved(out: list[object]) -> list[ins.Moved]:
    return [one for one in out if isinstance(one, ins.Moved)]


def told(world: World) -> dict[bytes, ins.Residence]:
    assert world.watch is not None
    (known,) = world.watch.known.values()
    return known


def test_nothing_is_told_while_nobody_watches(world: World) -> None:
    namespace = world.namespace()
    world.put(namespace, chain("a", 2))  # World objects to what it did not ask for
    world.start_watch()
    world.stop_watch()
    world.put(namespace, chain("b", 2))
    assert world.finish_all() == 4


def test_a_walk_finds_what_was_there_and_what_comes_is_told(world: World) -> None:
    namespace, (first, second) = world.namespace(), chain("a", 2)
    world.put(namespace, [first])
    world.start_watch()
    world.walk()
    assert told(world) == {first: ins.Residence(first, ROOT, 64, HOST_BIT)}
    world.put(namespace, [second], parents=[first])
    assert told(world)[second] == ins.Residence(second, first, 64, HOST_BIT)
    world.finish_all()
    assert {block.tiers for block in told(world).values()} == {HOST_BIT | DISK_BIT}
    world.check_watch()


def test_a_block_is_told_of_once_it_is_whole(world: World) -> None:
    namespace, keys = world.namespace(), chain("a", 1)
    world.start_watch()
    world.walk()
    world.put(namespace, keys, region=Region(0, 1, 0, 2))
    assert world.watch is not None
    assert world.watch.known == {}
    world.put(namespace, keys, region=Region(1, 2, 0, 2))
    assert set(told(world)) == set(keys)


def test_of_one_event_a_block_is_told_once_as_it_stands_at_the_end(world: World) -> None:
    namespace, keys = world.namespace(), chain("a", 1)
    world.put(namespace, keys)
    world.finish_all()
    world.start_watch()
    out = world.send(ev.Evict(world.ticket + 1, make_spec().id, keys))
    assert moved(out) == [ins.Moved(make_spec(), [ins.Residence(keys[0], ROOT, 0, 0)])]


def test_a_forgotten_namespace_is_told_as_such(world: World) -> None:
    world.put(world.namespace(), chain("a", 2))
    world.start_watch()
    world.walk()
    out = world.send(ev.DropNamespace(world.ticket + 1, make_spec().id))
    assert moved(out) == [ins.Moved(make_spec(), [], forgotten=True)]
    world.check_watch()


def test_more_than_moved_max_at_once_is_told_as_too_much(world: World) -> None:
    namespace, keys = world.namespace(), chain("a", 5)
    world.put(namespace, keys)
    world.finish_all()
    world.start_watch()
    world.walk()
    out = world.send(ev.Evict(world.ticket + 1, make_spec().id, []))
    assert out[-1:] == [ins.MovedTooMuch()]
    assert not moved(out)
    assert world.watch is not None
    assert world.watch.restarts == 1
    world.walk()
    world.check_watch()


def test_a_walk_in_pieces_among_changes_ends_with_the_table(world: World) -> None:
    namespace = world.namespace()
    for name in "abcd":
        world.put(namespace, chain(name, 3))
    world.start_watch()
    pieces = 0
    while not (world.watch and world.watch.through):
        world.walk(rows=2)
        pieces += 1
        world.ask(ev.Evict, namespace_id=make_spec().id, hashes=[chain("a", 3)[pieces % 3]])
        world.put(namespace, chain(f"e{pieces % 2}", 2))
    assert pieces > 5
    world.check_watch()


def test_a_walk_is_of_the_wanted_namespaces_only(world: World) -> None:
    for name in ("one", "two"):
        world.put(world.namespace(spec=make_spec(name)), chain("a", 2))
    found, more = world.hub.walk(0, 1000, lambda spec: spec.model == "two")
    assert [one.spec.model for one in found] == ["two"]
    assert not more


def test_a_tier_that_goes_down_is_told(world: World) -> None:
    world.start_watch()
    assert ins.TiersUp(3) in world.send(ev.TierDown(DISK, "EIO"))
    assert ins.TiersUp(7) in world.send(ev.TierUp(DISK))
