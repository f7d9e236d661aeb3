"""Write-behind, eviction, the device tier, a disk that goes and comes back, draining."""

from __future__ import annotations

import pytest

from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import ErrorKind
from kvserver.core.events import BlockState, ReserveVerdict
from kvserver.core.hub import HubConfig
from tests.support.world import DEVICE, DISK, HOST, UNIT, World, chain, make_spec


def make_world(host: int = 32, disk: int = 64, device: int = 0, **fields: object) -> World:
    world = World(
        HubConfig(
            host_bytes=host * UNIT, disk_bytes=disk * UNIT, device_bytes=device * UNIT, **fields
        )
    )
    world.session(1, 10)
    world.namespace()
    return world


def put_one_by_one(world: World, keys: list[bytes]) -> None:
    for at, key in enumerate(keys):
        world.put(1, [key], parents=[keys[at - 1] if at else bytes(32)])
        world.finish_all()


# ---- write-behind


def test_completed_blocks_go_to_disk_in_order_and_few_at_a_time() -> None:
    world = make_world(spill_copies_max=2)
    keys = chain("a", 5)
    world.put(1, keys)
    started = []
    while world.jobs:
        assert len(world.jobs) <= 2
        job = world.finish()
        assert isinstance(job, ins.Copy)
        assert (job.kind, job.source.tier, job.target.tier) == (ins.JobKind.SPILL, HOST, DISK)
        started.append(job.info.key)
    assert started == keys
    assert all(world.tiers_of(1, key) == {HOST, DISK} for key in keys)


def test_at_the_lag_limit_ordinary_blocks_lose_their_copy() -> None:
    world = make_world()
    world.put(1, chain("a", 12))
    stats = world.hub.stats(world.now)
    assert stats.spill_queue_bytes == 8 * UNIT
    assert stats.counters["spill_skipped"] == 4
    world.finish_all()
    assert world.tier(DISK).committed == 8
    assert world.hub.stats(world.now).spill_queue_bytes == 0


def test_a_block_is_not_evicted_before_its_spill() -> None:
    world = make_world(host=8, disk=64, spill_lag_bytes_max=8 * UNIT)
    world.put(1, chain("a", 2))
    world.put(1, chain("b", 6), ttl=60.0)
    dirty = {key for key in chain("a", 2) if world.tiers_of(1, key) == {HOST}}
    assert len(dirty) == 2
    assert world.put(1, chain("c", 6)).verdicts == [ReserveVerdict.WRITE] * 6
    assert world.reserve(1, chain("d", 8), wait=9.0) is None
    waiting = world.ticket
    world.hub.validate()
    world.finish_all()
    assert world.answers[waiting].verdicts[0] is ReserveVerdict.WRITE


def test_the_disk_evicts_its_own_and_blocks_nowhere_else_leave() -> None:
    world = make_world(host=16, disk=32)
    for i in range(60):
        world.put(1, chain(f"c{i}", 1))
        world.finish_all()
        world.hub.validate()
    assert world.tier(DISK).committed == 32
    assert world.counter("evicted_disk") == 28
    assert world.hub.stats(world.now).blocks == 32


# ---- eviction


def test_a_chain_goes_from_its_end() -> None:
    world = make_world(host=8, disk=0)
    keys = chain("a", 6)
    world.put(1, keys)
    for i in range(4):
        world.put(1, chain(f"b{i}", 1))
    here = [bool(world.tiers_of(1, key)) for key in keys]
    assert here == sorted(here, reverse=True), "a prefix is never cut in its middle"
    assert 0 < sum(here) < 6


def test_a_chain_that_grew_block_by_block_goes_from_its_end() -> None:
    world = make_world(host=8, disk=0)
    keys = chain("a", 6)
    put_one_by_one(world, keys)
    for i in range(4):
        world.put(1, chain(f"b{i}", 1))
    here = [bool(world.tiers_of(1, key)) for key in keys]
    assert here == sorted(here, reverse=True)
    assert 0 < sum(here) < 6


def test_the_longest_unused_chain_goes_first_and_whole() -> None:
    world = make_world(host=12, disk=0)
    old, new = chain("old", 5), chain("new", 5)
    world.put(1, old)
    world.put(1, new)
    world.put(1, chain("x", 7))
    assert not any(world.tiers_of(1, key) for key in old)
    assert all(world.tiers_of(1, key) for key in new)


def test_a_parent_used_by_another_branch_outlives_its_child() -> None:
    world = make_world(host=8, disk=0)
    keys = chain("a", 3)
    world.put(1, keys)
    world.lookup(1, keys[:2])
    world.put(1, chain("b", 4))
    world.put(1, chain("c", 3))
    assert [bool(world.tiers_of(1, key)) for key in keys] == [True, True, False]


def test_a_scan_does_not_drive_out_what_is_used() -> None:
    world = make_world(host=16, disk=0)
    hot = chain("hot", 4)
    world.put(1, hot)
    for i in range(200):
        world.put(1, chain(f"scan{i}", 2))
        if i % 4 == 0:
            world.lookup(1, hot)
    assert all(world.tiers_of(1, key) for key in hot)


def test_a_parent_is_evicted_when_every_leaf_is_leased() -> None:
    world = make_world(host=8, disk=0)
    keys = chain("a", 8)
    world.put(1, keys)
    world.acquire(1, keys[4:])
    assert world.put(1, chain("b", 2)).verdicts == [ReserveVerdict.WRITE] * 2
    world.check_leases()
    world.hub.validate()


def test_evict_spares_what_is_leased_and_other_namespaces() -> None:
    world = make_world()
    other = world.namespace(1, make_spec("other"))
    keys = chain("a", 4)
    world.put(1, keys)
    world.put(other, keys)
    world.finish_all()
    world.acquire(1, keys[:1])
    evicted = world.ask(ev.Evict, namespace_id=make_spec().id, hashes=[])
    assert (evicted.blocks, evicted.bytes, evicted.in_use) == (3, 6 * UNIT, 1)
    assert world.lookup(other, keys).usable_blocks == 4
    assert world.lookup(1, keys).usable_blocks == 1
    evicted = world.ask(ev.Evict, namespace_id=make_spec("other").id, hashes=keys[2:3])
    assert (evicted.blocks, evicted.in_use) == (1, 0)
    world.hub.validate()


def test_a_block_dropped_under_a_lease_is_not_found_by_a_restart() -> None:
    world = make_world()
    keys = chain("a", 2)
    world.put(1, keys)
    world.finish_all()
    ticket = world.acquire(1, keys[:1])
    assert len(world.entries) == len(world.records) == 2
    world.ask(ev.DropNamespace, namespace_id=make_spec().id)
    assert not world.entries
    assert not world.records
    world.check_leases()  # its reader goes on under the generation that it was granted
    assert world.tier(HOST).quarantined == 1
    world.release(*world.leases_of(ticket))
    assert world.tier(HOST).quarantined == 0


def test_a_dropped_namespace_is_gone_and_its_leases_finish() -> None:
    world = make_world()
    keys = chain("a", 3)
    world.put(1, keys)
    writing = world.reserve(1, chain("w", 1))
    ticket = world.acquire(1, [*keys[:1], *chain("w", 1)], wait=50.0)
    assert world.granted(ticket) == [0]
    waiting = world.acquire(1, chain("w", 1), wait=50.0)
    dropped = world.ask(ev.DropNamespace, namespace_id=make_spec().id)
    assert dropped.blocks == 3
    assert world.answers[waiting].kind is ErrorKind.NOT_FOUND
    assert world.lookup(1, keys).kind is ErrorKind.NOT_FOUND
    assert world.hub.spec_of(1) == make_spec()
    world.check_leases()
    late = world.ask(
        ev.Commit, session=1, reservation=writing.reservation, indices=[0],
        region=make_spec().grid.whole,
    )  # fmt: skip
    assert late.verdicts == [ev.CommitVerdict.GONE]
    world.release(*world.leases_of(ticket))
    world.finish_all()
    assert world.tier(HOST).bytes_used == 0
    assert world.tier(DISK).bytes_used == 0
    assert world.entries == {}
    assert world.records == {}
    assert world.namespace() == 2
    world.hub.validate()


# ---- device


def test_hot_blocks_go_to_the_device_and_are_granted_from_there() -> None:
    world = make_world(device=16, upload_heat=3)
    keys = chain("a", 2)
    world.put(1, keys)
    world.finish_all()
    world.lookup(1, keys)
    world.lookup(1, keys)
    assert not world.jobs
    assert world.lookup(1, keys).tiers == bytes([HOST, HOST])
    assert {job.kind for job in world.jobs.values()} == {ins.JobKind.UPLOAD}
    world.finish_all()
    assert world.lookup(1, keys).tiers == bytes([DEVICE, DEVICE])
    ticket = world.acquire(1, keys, readable=frozenset({HOST, DEVICE}))
    assert {block.place.tier for block in world.grants[ticket][0].blocks} == {DEVICE}
    ticket = world.acquire(1, keys)
    assert {block.place.tier for block in world.grants[ticket][0].blocks} == {HOST}
    world.check_leases()
    world.hub.validate()


def test_what_the_host_lost_is_downloaded_from_the_device() -> None:
    world = make_world(host=8, disk=0, device=16, upload_heat=1)
    keys = chain("a", 2)
    world.put(1, keys)
    world.lookup(1, keys)
    world.finish_all()
    for i in range(30):
        world.put(1, chain(f"b{i}", 2))
    assert [world.tiers_of(1, key) for key in keys] == [{DEVICE}, {DEVICE}]
    ticket = world.acquire(1, keys)
    assert {job.kind for job in world.jobs.values()} == {ins.JobKind.DOWNLOAD}
    world.finish_all()
    assert world.granted(ticket) == [0, 1]
    assert {block.came_from for block in world.grants[ticket][0].blocks} == {DEVICE}
    world.check_leases()
    world.hub.validate()


def test_a_failed_upload_changes_nothing() -> None:
    world = make_world(device=16, disk=0, upload_heat=1)
    keys = chain("a", 1)
    world.put(1, keys)
    world.lookup(1, keys)
    world.finish(error="out of memory")
    assert world.tiers_of(1, keys[0]) == {HOST}
    assert world.tier(DEVICE).bytes_used == 0
    world.hub.validate()


def test_a_device_that_fails_is_left_without_blocks_and_the_others_serve_on() -> None:
    world = make_world(host=8, disk=0, device=16, upload_heat=1)
    kept, lost = chain("a", 2), chain("b", 2)
    world.put(1, lost)
    world.lookup(1, lost)
    world.finish_all()
    for i in range(30):
        world.put(1, chain(f"c{i}", 2))
    world.put(1, kept)
    world.lookup(1, kept)
    world.finish_all()
    assert [world.tiers_of(1, key) for key in lost] == [{DEVICE}, {DEVICE}]
    assert [world.tiers_of(1, key) for key in kept] == [{DEVICE, HOST}, {DEVICE, HOST}]
    world.send(ev.TierDown(DEVICE, "cudaErrorIllegalAddress"))
    world.hub.validate()
    looked = world.lookup(1, [*kept, *lost])
    assert list(looked.tiers) == [HOST, HOST, 0, 0]
    assert not world.jobs  # nothing more goes there
    assert world.tier(DEVICE).bytes_used == 0
    world.put(1, lost)  # a writer is not told that they are present
    assert [world.tiers_of(1, key) for key in lost] == [{HOST}, {HOST}]
    world.hub.validate()


@pytest.mark.parametrize("error", ["cudaErrorIllegalAddress", ""])
def test_copies_that_run_when_the_device_fails_leave_nothing_on_it(error: str) -> None:
    world = make_world(host=8, disk=0, device=16, upload_heat=1)
    coming, going = chain("a", 1), chain("b", 1)
    world.put(1, coming)
    world.lookup(1, coming)
    world.finish_all()
    for i in range(30):
        world.put(1, chain(f"c{i}", 2))
    world.put(1, going)
    world.lookup(1, going)
    ticket = world.acquire(1, coming)
    kinds = {job.kind for job in world.jobs.values()}
    assert kinds == {ins.JobKind.UPLOAD, ins.JobKind.DOWNLOAD}
    world.send(ev.TierDown(DEVICE, "cudaErrorIllegalAddress"))
    while world.jobs:
        world.finish(error=error)  # also a copy that ended before the failure was told
    assert world.granted(ticket) == []
    assert world.answers[ticket].missing == [0]
    assert world.tiers_of(1, going[0]) == {HOST}
    assert world.tier(DEVICE).bytes_used == 0
    world.hub.validate()


# ---- the disk goes and comes back


def test_memory_keeps_serving_while_the_disk_is_down() -> None:
    world = make_world(host=8, disk=64)
    keys = chain("a", 2)
    put_one_by_one(world, keys)
    put_one_by_one(world, chain("b", 8))
    assert world.tiers_of(1, keys[0]) == {DISK}
    world.send(ev.TierDown(DISK, "EIO"))
    looked = world.lookup(1, keys)
    assert [BlockState(s) for s in looked.states] == [BlockState.ABSENT] * 2
    ticket = world.acquire(1, keys)
    assert world.answers[ticket] == ins.AcquireResult(0, [0, 1])
    assert world.put(1, chain("c", 4)).verdicts == [ReserveVerdict.WRITE] * 4
    assert not world.jobs
    assert world.tier(DISK).note == "EIO"
    world.send(ev.TierUp(DISK))
    assert world.lookup(1, keys).usable_blocks == 2
    world.put(1, chain("d", 1))
    assert world.jobs
    world.hub.validate()


def test_a_disk_that_goes_down_fails_its_durable_writers() -> None:
    world = make_world(spill_copies_max=1)
    world.put(1, chain("a", 2), durable=True)
    ticket = world.ticket
    world.send(ev.TierDown(DISK, "ENOSPC"))
    assert ticket not in world.answers, "the first copy is still running"
    world.finish(error="ENOSPC")
    assert world.answers[ticket].kind is ErrorKind.UNAVAILABLE
    assert world.reserve(1, chain("b", 1), durable=True).kind is ErrorKind.UNAVAILABLE
    assert world.counter("spill_failed") == 2
    world.hub.validate()


def test_a_job_that_ends_late_touches_no_new_block() -> None:
    """The block is dropped while it is copied; its slots wait for the job."""
    world = make_world()
    world.put(1, chain("a", 1))
    (job,) = world.jobs.values()
    assert isinstance(job, ins.Copy)
    world.ask(ev.DropNamespace, namespace_id=make_spec().id)
    assert world.tier(HOST).quarantined == 1
    assert world.tier(DISK).quarantined == 1
    world.namespace()
    fresh = world.put(2, chain("b", 4))
    assert job.source.offset not in [place.offset for place in fresh.places]
    world.finish(job.job)
    assert world.tier(HOST).quarantined == 0
    world.finish_all()
    assert all(entry.info and entry.info.namespace == 2 for entry in world.records.values())
    world.hub.validate()


# ---- drain and readiness


def test_drain_answers_when_the_write_behind_is_empty() -> None:
    world = make_world()
    world.put(1, chain("a", 3))
    assert world.ask(ev.Drain) is None
    ticket = world.ticket
    assert ticket not in world.answers
    assert world.reserve(1, chain("b", 1)).kind is ErrorKind.UNAVAILABLE
    world.finish_all()
    assert ticket in world.answers
    assert world.hub.stats(world.now).draining


def test_slots_appear_as_the_host_tier_is_prefaulted() -> None:
    world = World(HubConfig(host_bytes=32 * UNIT), ready=False)
    world.session()
    world.namespace()
    assert world.reserve(1, chain("a", 1)).verdicts == [ReserveVerdict.NO_SPACE]
    assert world.reserve(1, chain("a", 1), wait=9.0) is None
    ticket = world.ticket
    world.send(ev.TierGrew(HOST, 8 * UNIT))
    assert world.answers[ticket].verdicts == [ReserveVerdict.WRITE]
    assert world.put(1, chain("b", 7)).verdicts == [ReserveVerdict.WRITE] * 7
    assert world.tier(HOST).bytes_ready == 8 * UNIT
    assert world.reserve(1, chain("c", 8)).verdicts.count(ReserveVerdict.WRITE) == 7
