"""What a restart finds becomes the books again."""

from __future__ import annotations

import random
import time

from kvproto.prefix import ROOT
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.events import ReserveVerdict, RestoredBlock
from kvserver.core.hub import HubConfig
from tests.support.world import DISK, HOST, UNIT, World, chain, key_of, make_spec, parents_of

SPEC, LARGE = make_spec(), make_spec("large", slot_units=3)


def block(
    key: bytes,
    at: int,
    generation: int,
    *,
    parent: bytes = ROOT,
    spec: object = SPEC,
    units: int = 1,
) -> RestoredBlock:
    tag = getattr(spec, "tag", spec)
    return RestoredBlock(tag, key, parent, 64, at * UNIT, units * UNIT, generation)


def restart(
    host: list[RestoredBlock],
    disk: list[RestoredBlock] = (),
    fenced: list[ev.RestoreQuarantined] = (),
    *,
    generation: int = 0,
    host_units: int = 32,
) -> World:
    """A hub that found this; its memory holds the blocks' bytes."""
    config = HubConfig(host_bytes=host_units * UNIT, disk_bytes=64 * UNIT)
    world = World(config, ready=False)
    for spec in (SPEC, LARGE):
        world.send(ev.RestoreNamespace(spec))
    for tier, blocks in ((HOST, host), (DISK, disk)):
        for item in blocks:
            world.cells[tier, item.offset] = dict.fromkeys(range(4), item.key)
        world.send(ev.RestoreBlocks(tier, list(blocks)))
        if tier == HOST:
            for event in fenced:
                world.send(event)
        world.send(ev.RestoreDone(tier, generation))
    world.send(ev.TierGrew(HOST, config.host_bytes))
    world.session()
    world.namespace()
    world.hub.validate()
    return world


def test_a_restored_block_is_verified_before_its_first_lease() -> None:
    keys = chain("a", 2)
    world = restart([block(keys[0], 0, 1), block(keys[1], 1, 2, parent=keys[0])])
    assert world.lookup(1, keys).usable_blocks == 2
    ticket = world.acquire(1, keys)
    assert world.granted(ticket) == []
    assert all(isinstance(job, ins.Verify) for job in world.jobs.values())
    world.finish_all()
    assert world.granted(ticket) == [0, 1]
    world.check_leases()
    assert world.granted(world.acquire(1, keys)) == [0, 1]
    assert not world.jobs


def test_a_corrupt_restored_block_falls_back_to_the_disk_or_is_dropped() -> None:
    keys = chain("a", 2)
    host = [block(keys[0], 0, 1), block(keys[1], 1, 2, parent=keys[0])]
    world = restart(host, [block(keys[0], 5, 9)])
    assert world.hub.stats(world.now).blocks == 2
    for at in (0, 1):
        world.cells[HOST, at * UNIT] = {}
    ticket = world.acquire(1, keys)
    world.finish_all()
    assert world.granted(ticket) == [0]
    assert world.counter("corrupt_host") == 2
    assert world.lookup(1, keys).usable_blocks == 1
    world.hub.validate()


def test_a_block_on_both_tiers_is_one_block() -> None:
    key = key_of("a")
    world = restart([block(key, 3, 7)], [block(key, 9, 2)])
    assert world.tiers_of(1, key) == {HOST, DISK}
    assert world.hub.stats(world.now).namespaces[0].blocks == 1
    assert world.hub.stats(world.now).namespaces[0].bytes == 2 * UNIT


def test_slabs_are_laid_around_what_is_found() -> None:
    blocks = [block(key_of(f"s{i}"), i, i + 1) for i in (0, 2, 3)]
    blocks += [block(key_of(f"l{i}"), i, i + 40, spec=LARGE, units=3) for i in (4, 10, 16, 19)]
    world = restart(blocks)
    tier = world.tier(HOST)
    assert tier.committed == 7
    assert tier.bytes_used == 15 * UNIT
    result = world.put(1, chain("n", 17))
    assert result.verdicts.count(ReserveVerdict.WRITE) == 17
    assert min(place.generation for place in result.places) > 59
    world.hub.validate()


def test_generations_go_on_above_all_that_ever_were() -> None:
    world = restart([block(key_of("a"), 0, 5)], generation=1000)
    assert world.reserve(1, chain("b", 1)).places[0].generation == 1001


def test_parents_are_restored_whatever_the_order() -> None:
    keys = chain("a", 6)
    blocks = [
        block(key, at, at + 1, parent=parent)
        for at, (key, parent) in enumerate(zip(keys, parents_of(keys), strict=True))
    ]
    random.Random(3).shuffle(blocks)
    world = restart(blocks, host_units=8)
    world.put(1, chain("b", 4))
    here = [bool(world.tiers_of(1, key)) for key in keys]
    assert here == sorted(here, reverse=True)
    assert sum(here) == 4


def test_what_cannot_be_right_is_dropped_and_made_invalid() -> None:
    unknown = make_spec("unknown")
    good = block(key_of("good"), 0, 9)
    bad = [
        block(key_of("tenancy"), 1, 1, spec=unknown),
        block(key_of("outside"), 32, 2),
        RestoredBlock(SPEC.tag, key_of("crooked"), ROOT, 64, UNIT + 512, UNIT, 3),
        block(key_of("class"), 4, 4, units=2),
        RestoredBlock(SPEC.tag, key_of("tokens"), ROOT, 65, 6 * UNIT, UNIT, 5),
        block(key_of("good"), 7, 6),  # an older record of the same block
        RestoredBlock(SPEC.tag, key_of("self"), key_of("self"), 64, 8 * UNIT, UNIT, 7),
        RestoredBlock(SPEC.tag, b"short", ROOT, 64, 9 * UNIT, UNIT, 8),
    ]
    world = World(HubConfig(host_bytes=32 * UNIT), ready=False)
    world.send(ev.RestoreNamespace(SPEC))
    world.send(ev.RestoreBlocks(HOST, [good, *bad]))
    out = world.send(ev.RestoreDone(HOST))
    invalid = {i.place.offset for i in out if isinstance(i, ins.EntryInvalid)}
    assert invalid == {item.offset for item in bad}
    assert world.counter("restore_dropped") == len(bad)
    assert world.counter("restored_host") == 1
    world.hub.validate()


def test_of_overlapping_records_the_later_one_stands() -> None:
    world = restart(
        [
            block(key_of("old"), 0, 1, spec=LARGE, units=3),
            block(key_of("new"), 1, 9),
            block(key_of("older"), 2, 3, spec=LARGE, units=3),
        ]
    )
    handles = {n.spec.model: n.handle for n in world.hub.stats(world.now).namespaces}
    assert world.tiers_of(handles["m"], key_of("new")) == {HOST}
    assert world.tiers_of(handles["large"], key_of("old")) == set()
    assert world.tiers_of(handles["large"], key_of("older")) == {HOST}


def test_slots_of_living_writers_stay_out_of_use() -> None:
    fenced = [
        ev.RestoreQuarantined(0, UNIT, 4, [7, 8]),
        ev.RestoreQuarantined(2 * UNIT, 3 * UNIT, 5, [8]),
        ev.RestoreQuarantined(4 * UNIT, UNIT, 6, [9]),
        ev.RestoreQuarantined(9 * UNIT, UNIT, 7, []),
    ]
    world = restart([block(key_of("under"), 3, 99)], fenced=fenced)
    assert world.hub.suspects() == {7, 8, 9}
    assert world.tier(HOST).quarantined == 2
    assert world.counter("restore_dropped") == 1
    result = world.put(1, chain("a", 28))
    offsets = {place.offset // UNIT for place in result.places if place}
    assert offsets == set(range(32)) - {0, 2, 3, 4}
    world.send(ev.ClientDead(8))
    assert world.tier(HOST).quarantined == 2
    world.send(ev.ClientDead(7))
    world.send(ev.ClientDead(9))
    assert world.tier(HOST).quarantined == 0
    world.hub.validate()


def test_a_smaller_tier_keeps_what_fits() -> None:
    blocks = [block(key_of(i), i, i + 1) for i in range(32)]
    world = restart(blocks, host_units=16)
    assert world.tier(HOST).committed == 16
    assert world.counter("restore_dropped") == 16


def test_a_namespace_that_no_longer_fits_is_dropped_not_fatal() -> None:
    world = World(HubConfig(host_bytes=16 * UNIT), ready=False)
    world.send(ev.RestoreNamespace(LARGE))
    world.send(ev.RestoreBlocks(HOST, [block(key_of("l"), 0, 1, spec=LARGE, units=3)]))
    world.send(ev.RestoreDone(HOST))
    assert world.counter("restore_namespaces_dropped") == 1
    assert world.counter("restore_dropped") == 1
    world.hub.validate()


def test_a_hundred_thousand_blocks_are_restored_quickly() -> None:
    count = 100_000
    keys = [key_of(i) for i in range(count)]
    blocks = [
        block(keys[i], i, i + 1, parent=keys[i - 1] if i % 512 else ROOT) for i in range(count)
    ]
    world = World(HubConfig(host_bytes=count * UNIT), ready=False)
    world.send(ev.RestoreNamespace(SPEC))
    start = time.process_time()
    world.send(ev.RestoreBlocks(HOST, blocks))
    world.send(ev.RestoreDone(HOST))
    took = time.process_time() - start
    assert world.tier(HOST).committed == count
    assert took < 5.0, f"{took:.1f} s; about one is expected on an idle core"
