"""Reservations, commits, fences: who may write where, and when a slot is reused."""

from __future__ import annotations

from typing import Any

import pytest

from kvproto.grid import Region
from kvserver.core import events as ev
from kvserver.core import instructions as ins
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.core.events import BlockState, CommitVerdict, ReserveVerdict
from kvserver.core.hub import HubConfig
from tests.support.world import DISK, HOST, UNIT, World, chain, make_spec, parents_of

WHOLE = Region(0, 2, 0, 2)
TOP, BOTTOM = Region(0, 1, 0, 2), Region(1, 2, 0, 2)
LEFT, RIGHT = Region(0, 2, 0, 1), Region(0, 2, 1, 2)
WRITE, PRESENT, BUSY, NO_SPACE = ReserveVerdict


@pytest.fixture
def world() -> World:
    world = World(HubConfig(host_bytes=32 * UNIT))
    world.session(1, 10, 11, 12)
    world.namespace()
    return world


def states(world: World, keys: list[bytes]) -> list[BlockState]:
    return [BlockState(state) for state in world.lookup(1, keys).states]


def commit(world: World, result: ins.ReserveResult, key: bytes, region: Region) -> ins.CommitResult:
    place = result.places[0]
    assert place is not None
    world.write(place, key, world.grid_of(1).cell_indices(region))
    answer = world.ask(
        ev.Commit, session=1, reservation=result.reservation, indices=[0], region=region
    )
    assert isinstance(answer, ins.CommitResult), answer
    return answer


def test_layers_committed_one_by_one_make_a_block_whole(world: World) -> None:
    keys = chain("a", 1)
    result = world.reserve(1, keys)
    assert result.verdicts == [WRITE]
    assert states(world, keys) == [BlockState.FILLING]
    assert commit(world, result, keys[0], TOP).completed == 0
    assert world.lookup(1, keys).usable_blocks == 0
    assert commit(world, result, keys[0], BOTTOM).completed == 1
    looked = world.lookup(1, keys)
    assert (looked.usable_blocks, looked.tiers) == (1, bytes([HOST]))
    assert world.hub.stats(world.now).reservations == 0


def test_ranks_share_a_slot_and_each_new_writer_is_recorded(world: World) -> None:
    keys = chain("a", 1)
    first = world.reserve(1, keys, region=LEFT)
    second = world.reserve(1, keys, region=RIGHT, client=11)
    assert second.verdicts == [WRITE]
    assert first.places == second.places
    assert world.entries[0].clients == (10, 11)
    assert world.reserve(1, keys, region=TOP, client=12).verdicts == [BUSY]
    commit(world, first, keys[0], LEFT)
    assert world.reserve(1, keys, region=LEFT, client=12).verdicts == [PRESENT]
    assert commit(world, second, keys[0], RIGHT).completed == 1
    assert world.reserve(1, keys, client=12).verdicts == [PRESENT]


def test_writers_per_block_are_bounded() -> None:
    world = World(HubConfig(host_bytes=32 * UNIT, writers_per_block_max=2))
    world.session(1, 10, 11, 12)
    handle = world.namespace(spec=make_spec(kv_heads=4, page_bytes=500))
    keys = chain("a", 1)
    for head, client in enumerate((10, 11, 12)):
        region = Region(0, 2, head, head + 1)
        verdict = world.reserve(handle, keys, region=region, client=client).verdicts[0]
        assert verdict is (WRITE if head < 2 else BUSY)


def test_expiry_takes_the_block_from_every_writer_and_fences_the_slot(world: World) -> None:
    """A rank that vanishes while another has committed its cells."""
    keys = chain("a", 1)
    gone = world.reserve(1, keys, region=LEFT, ttl=2.0)
    other = world.reserve(1, keys, region=RIGHT, client=11, ttl=30.0)
    commit(world, other, keys[0], RIGHT)
    world.advance(2.0)
    assert states(world, keys) == [BlockState.ABSENT]
    assert world.tier(HOST).quarantined == 1
    assert world.hub.suspects() == {10}
    late = world.ask(ev.Commit, session=1, reservation=gone.reservation, indices=[0], region=LEFT)
    assert late.verdicts == [CommitVerdict.GONE]
    fresh = world.reserve(1, keys)
    assert fresh.verdicts == [WRITE]
    assert fresh.places[0].offset != gone.places[0].offset
    assert world.ask(ev.Fence, session=1, reservation=gone.reservation) == 1
    assert world.tier(HOST).quarantined == 0
    world.hub.validate()


def test_a_slot_with_two_writers_waits_for_both_fences(world: World) -> None:
    keys = chain("a", 1)
    first = world.reserve(1, keys, region=LEFT, ttl=2.0)
    second = world.reserve(1, keys, region=RIGHT, client=11, ttl=30.0)
    world.advance(2.0)
    assert world.ask(ev.Fence, session=1, reservation=first.reservation) == 0
    assert world.hub.suspects() == {11}
    assert commit(world, second, keys[0], RIGHT).verdicts == [CommitVerdict.GONE]
    assert world.tier(HOST).quarantined == 0, "a writer that commits has stopped writing"


@pytest.mark.parametrize("how", ["dead", "closed", "session"])
def test_death_and_drained_ends_lift_a_quarantine(world: World, how: str) -> None:
    world.reserve(1, chain("a", 3), ttl=2.0)
    world.advance(2.0)
    assert world.tier(HOST).quarantined == 3
    if how == "dead":
        world.send(ev.ClientDead(10))
    elif how == "closed":
        world.ask(ev.CloseClient, session=1, client=10, drained=True)
    else:
        world.ask(ev.CloseSession, session=1, drained=True)
    assert world.tier(HOST).quarantined == 0
    assert world.entries == {}


def test_a_drained_client_lives_on_with_what_it_has_reserved(world: World) -> None:
    """Its connections were dropped: nothing of before can write, and it may begin anew."""
    world.reserve(1, chain("a", 3), ttl=2.0)
    keys = chain("b", 1)
    living = world.reserve(1, keys, ttl=30.0)
    world.advance(2.0)
    assert world.tier(HOST).quarantined == 3
    assert world.hub.suspects() == {10}
    world.send(ev.ClientDrained(10))
    assert world.tier(HOST).quarantined == 0
    assert world.hub.suspects() == set()
    assert commit(world, living, keys[0], WHOLE).completed == 1
    assert world.reserve(1, chain("c", 1)).reservation
    world.hub.validate()


def test_a_session_that_ends_undrained_leaves_its_slots_fenced(world: World) -> None:
    world.reserve(1, chain("a", 2))
    world.ask(ev.CloseSession, session=1, drained=False)
    assert world.tier(HOST).quarantined == 2
    world.send(ev.ClientDead(10))
    assert world.tier(HOST).quarantined == 0
    world.hub.validate()


def test_a_silent_session_ends(world: World) -> None:
    world.reserve(1, chain("a", 1), ttl=60.0)
    world.advance(29.0)
    assert world.ask(ev.Heartbeat, session=1) is None
    world.advance(29.5)
    assert world.tier(HOST).filling == 1
    world.advance(0.6)
    assert world.tier(HOST).quarantined == 1
    assert world.ask(ev.Heartbeat, session=1).kind is ErrorKind.NOT_FOUND


def test_a_stall_of_the_server_expires_nothing(world: World) -> None:
    keys = chain("a", 1)
    result = world.reserve(1, keys, ttl=5.0)
    world.now += 500.0
    world.send(ev.Stalled(500.0))
    assert commit(world, result, keys[0], WHOLE).completed == 1
    assert world.hub.next_deadline() is not None
    assert world.hub.next_deadline() > world.now


def test_drained_abort_frees_and_a_partial_block_lingers(world: World) -> None:
    keys = chain("a", 1)
    first = world.reserve(1, keys, region=LEFT)
    second = world.reserve(1, keys, region=RIGHT, client=11)
    commit(world, first, keys[0], LEFT)
    assert world.ask(ev.Abort, session=1, reservation=second.reservation, drained=True) is None
    assert states(world, keys) == [BlockState.FILLING]
    again = world.reserve(1, keys, region=RIGHT, client=12)
    assert again.verdicts == [WRITE]
    assert again.places == first.places
    world.ask(ev.Abort, session=1, reservation=again.reservation, drained=True)
    world.advance(4.9)
    assert states(world, keys) == [BlockState.FILLING]
    world.advance(0.2)
    assert states(world, keys) == [BlockState.ABSENT]
    assert world.tier(HOST).bytes_used == 0


def test_an_abort_with_nothing_committed_frees_at_once(world: World) -> None:
    result = world.reserve(1, chain("a", 3))
    world.ask(ev.Abort, session=1, reservation=result.reservation, drained=True)
    assert world.tier(HOST).bytes_used == 0
    assert world.hub.stats(world.now).filling == 0


def test_a_lease_on_committed_cells_outlives_the_block(world: World) -> None:
    keys = chain("a", 1)
    first = world.reserve(1, keys, region=LEFT, ttl=2.0)
    world.reserve(1, keys, region=RIGHT, client=11, ttl=2.0)
    commit(world, first, keys[0], LEFT)
    ticket = world.acquire(1, keys, region=LEFT, lease=20.0)
    assert not world.grants[ticket][0].blocks[0].complete
    world.advance(2.0)
    world.send(ev.ClientDead(11))
    assert world.tier(HOST).quarantined == 1, "a reader still reads it"
    world.check_leases()
    world.release(*world.leases_of(ticket))
    assert world.tier(HOST).quarantined == 0


def test_a_fence_outlives_the_last_reader(world: World) -> None:
    keys = chain("a", 1)
    first = world.reserve(1, keys, region=LEFT, ttl=2.0)
    world.reserve(1, keys, region=RIGHT, client=11, ttl=2.0)
    commit(world, first, keys[0], LEFT)
    ticket = world.acquire(1, keys, region=LEFT, lease=20.0)
    world.advance(2.0)
    world.release(*world.leases_of(ticket))
    assert world.tier(HOST).quarantined == 1, "a writer may still write it"
    world.send(ev.ClientDead(11))
    assert world.tier(HOST).quarantined == 0


def test_a_wrong_commit_changes_nothing(world: World) -> None:
    keys = chain("a", 2)
    result = world.reserve(1, keys, region=LEFT)
    ask = {"session": 1, "reservation": result.reservation}
    assert world.ask(ev.Commit, **ask, indices=[0, 7], region=LEFT).field == "indices"
    assert world.ask(ev.Commit, **ask, indices=[0], region=WHOLE).field == "region"
    assert world.ask(ev.Commit, **ask, indices=[0], region=Region(0, 3, 0, 1)).field
    other = {**ask, "reservation": 999}
    assert world.ask(ev.Commit, **other, indices=[0], region=LEFT).kind is ErrorKind.NOT_FOUND
    assert world.counter("commits") == 0


def test_a_commit_of_anothers_reservation_is_not_found(world: World) -> None:
    world.session(2, 20)
    result = world.reserve(1, chain("a", 1))
    ask = {"session": 2, "reservation": result.reservation}
    answer = world.ask(ev.Commit, **ask, indices=[0], region=WHOLE)
    assert answer.kind is ErrorKind.NOT_FOUND
    assert world.ask(ev.Abort, **ask, drained=True).kind is ErrorKind.NOT_FOUND
    assert world.ask(ev.Fence, **ask) == 0


def test_tails_take_the_class_of_their_own_length() -> None:
    world = World(HubConfig(host_bytes=64 * UNIT))
    world.session()
    handle = world.namespace(spec=make_spec(slot_units=4))
    result = world.put(handle, chain("a", 3), tokens=[64, 64, 16])
    assert [place.slot_bytes // UNIT for place in result.places] == [4, 4, 2]
    refused = world.reserve(handle, chain("a", 3), tokens=[64, 64, 17])
    assert refused.field == "tokens"
    assert world.reserve(handle, chain("b", 1), tokens=[65]).field == "tokens"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"parents": []}, "parents"),
        ({"tokens": [64, 64]}, "tokens"),
        ({"parents": chain("a", 1)}, "parents"),
        ({"hashes": [bytes(32)]}, "hashes"),
        ({"hashes": [b"short"]}, "hashes"),
        ({"client": 99}, "client"),
        ({"session": 9}, "session"),
        ({"namespace": 9}, "namespace"),
        ({"region": Region(0, 0, 0, 1)}, "region.layers"),
    ],
)
def test_a_reserve_that_is_wrong_names_the_field(
    world: World, fields: dict[str, object], name: str
) -> None:
    values = {
        "session": 1, "client": 10, "namespace": 1, "hashes": chain("a", 1),
        "parents": parents_of(chain("a", 1)), "tokens": [], "region": WHOLE, "ttl": 1.0,
    }  # fmt: skip
    answer = world.ask(ev.Reserve, **{**values, **fields})
    assert isinstance(answer, CoreError)
    assert answer.field == name
    world.hub.validate()


def test_waiting_reserves_are_served_in_order() -> None:
    world = World(HubConfig(host_bytes=8 * UNIT, reserve_gather=10.0))
    world.session(1, 10)
    world.namespace()
    holders = [world.reserve(1, chain(f"h{i}", 1), ttl=60.0) for i in range(8)]
    assert world.reserve(1, chain("x", 1)).verdicts == [NO_SPACE]
    tickets = []
    for name in "pqr":
        assert world.reserve(1, chain(name, 1), wait=20.0) is None
        tickets.append(world.ticket)
    for freed, ticket in zip(holders, tickets, strict=False):
        assert ticket not in world.answers
        world.ask(ev.Abort, session=1, reservation=freed.reservation, drained=True)
        assert world.answers[ticket].verdicts == [WRITE]
    world.hub.validate()


def test_a_waiting_reserve_gives_up_in_time() -> None:
    world = World(HubConfig(host_bytes=8 * UNIT))
    world.session(1, 10)
    world.namespace()
    world.reserve(1, chain("h", 6), ttl=60.0)
    ticket_keys = chain("w", 4)
    assert world.reserve(1, ticket_keys, wait=3.0) is None
    ticket = world.ticket
    world.advance(3.0)
    assert world.answers[ticket].verdicts == [WRITE, WRITE, NO_SPACE, NO_SPACE]
    world.hub.validate()


def test_a_durable_reserve_that_waits_for_a_slot_does_not_wake_itself() -> None:
    """The hub span for ever: each try in vain looked like room for another try."""
    world = World(HubConfig(host_bytes=8 * UNIT, disk_bytes=64 * UNIT))
    world.session(1, 10)
    world.namespace()
    holder = world.reserve(1, chain("h", 8), ttl=60.0)
    assert world.reserve(1, chain("d", 1), wait=30.0, durable=True) is None
    ticket = world.ticket
    world.advance(1.0)
    world.ask(ev.Abort, session=1, reservation=holder.reservation, drained=True)
    assert world.answers[ticket].verdicts == [WRITE]
    world.hub.validate()


def test_a_reserve_that_waits_is_cancelled_with_its_client() -> None:
    world = World(HubConfig(host_bytes=8 * UNIT))
    world.session(1, 10, 11)
    world.namespace()
    world.reserve(1, chain("h", 6), ttl=60.0)
    assert world.reserve(1, chain("w", 4), wait=3.0, client=11) is None
    ticket = world.ticket
    world.ask(ev.CloseClient, session=1, client=11, drained=False)
    assert world.answers[ticket].kind is ErrorKind.NOT_FOUND
    assert world.tier(HOST).quarantined == 0, "nobody was told where to write"
    assert world.tier(HOST).filling == 6


def test_announcements_are_seen_until_they_end(world: World) -> None:
    keys = chain("a", 3)
    assert world.ask(ev.Announce, session=1, namespace=1, hashes=keys, ttl=5.0) == 3
    world.put(1, keys[:1])
    looked = world.lookup(1, keys)
    assert [BlockState(s) for s in looked.states] == [
        BlockState.COMPLETE, BlockState.ANNOUNCED, BlockState.ANNOUNCED,
    ]  # fmt: skip
    assert (looked.usable_blocks, looked.live_blocks) == (1, 3)
    world.advance(5.0)
    assert world.lookup(1, keys).live_blocks == 1
    world.hub.validate()


def test_durable_without_a_disk_is_refused(world: World) -> None:
    answer = world.reserve(1, chain("a", 1), durable=True)
    assert (answer.kind, answer.field) == (ErrorKind.UNAVAILABLE, "durable")


def test_durable_answers_after_the_disk() -> None:
    world = World(HubConfig(host_bytes=32 * UNIT, disk_bytes=64 * UNIT))
    world.session()
    world.namespace()
    keys = chain("a", 2)
    world.put(1, keys, durable=True)
    ticket = world.ticket
    assert ticket not in world.answers
    assert all(isinstance(job, ins.Copy) and job.durable for job in world.jobs.values())
    world.finish()
    assert ticket not in world.answers
    world.finish()
    assert world.answers[ticket].completed == 2
    world.put(1, chain("b", 1), durable=True)
    world.finish(error="EIO")
    assert world.answers[world.ticket].kind is ErrorKind.UNAVAILABLE
    world.hub.validate()


def test_durable_forces_the_spill_of_a_present_block() -> None:
    world = World(HubConfig(host_bytes=32 * UNIT, disk_bytes=64 * UNIT))
    world.session()
    world.namespace()
    keys = chain("a", 1)
    world.put(1, keys)
    world.finish(error="EIO")
    assert world.tier(DISK).committed == 0
    assert world.reserve(1, keys, durable=True) is None
    ticket = world.ticket
    world.finish()
    assert world.answers[ticket].verdicts == [PRESENT]
    assert world.tier(DISK).committed == 1
    assert world.reserve(1, keys, durable=True).verdicts == [PRESENT]


def test_a_durable_reserve_that_outlives_its_session_grants_nothing() -> None:
    """Its slots went back with the session; the answer, held up by a spill, came later."""
    world = World(HubConfig(host_bytes=32 * UNIT, disk_bytes=64 * UNIT))
    world.session()
    world.namespace()
    here, new = chain("a", 2)
    world.put(1, [here])
    assert world.reserve(1, [here, new], durable=True) is None
    ticket = world.ticket
    assert world.tier(HOST).filling == 1
    world.ask(ev.CloseSession, session=1, drained=True)
    assert world.tier(HOST).filling == 0
    world.finish_all()
    assert world.answers[ticket].kind is ErrorKind.NOT_FOUND
    world.hub.validate()


def test_durable_is_not_promised_beyond_the_lag_limit() -> None:
    world = World(HubConfig(host_bytes=32 * UNIT, disk_bytes=64 * UNIT))
    world.session()
    world.namespace()
    result = world.put(1, chain("a", 10), durable=True)
    assert result.verdicts == [WRITE] * 8 + [NO_SPACE] * 2
    assert world.hub.stats(world.now).spill_queue_bytes == 8 * UNIT
    assert world.reserve(1, chain("b", 1), durable=True, wait=5.0) is None
    ticket = world.ticket
    world.finish()
    assert world.answers[ticket].verdicts == [WRITE]
    world.hub.validate()


def test_committed_again_is_compared_where_it_stands(world: World) -> None:
    """The core has no checksums: it tells which cells were there, and where, before the Answer."""
    keys = chain("a", 2)
    result = world.reserve(1, keys)
    commit(world, result, keys[0], TOP)
    assert world.compared == []
    for index, region in ((0, TOP), (0, Region(0, 1, 1, 2))):  # still filling
        again = recommit(world, result, index, region)
        assert again.verdicts == [CommitVerdict.OK]
        assert world.compared.pop() == (result.places[0], region, keys[0])
    assert commit(world, result, keys[0], BOTTOM).completed == 1
    again = recommit(world, result, 0, WHOLE)  # complete: its position is done
    assert (again.verdicts, again.completed) == ([CommitVerdict.OK], 0)
    assert world.compared.pop() == (result.places[0], WHOLE, keys[0])
    assert world.counter("commits") == 2
    evicted = world.ask(ev.Evict, namespace_id=make_spec().id, hashes=keys[:1])
    assert evicted.blocks == 1
    assert recommit(world, result, 0, WHOLE).verdicts == [CommitVerdict.OK]
    assert world.compared == [], "nothing stands there any more"


def test_cells_of_another_rank_are_not_committed_again(world: World) -> None:
    keys = chain("a", 2)
    result = world.reserve(1, keys, region=LEFT)
    world.reserve(1, keys, region=RIGHT, client=11)
    commit(world, result, keys[0], LEFT)
    refused = recommit(world, result, 0, WHOLE)
    assert isinstance(refused, CoreError)
    assert refused.field == "region"


def test_a_block_that_was_gone_stays_gone_for_its_writer(world: World) -> None:
    keys = chain("a", 2)
    first = world.reserve(1, keys, region=LEFT, ttl=2.0)
    second = world.reserve(1, keys, region=RIGHT, client=11, ttl=9.0)
    world.advance(3.0)
    assert first.verdicts == second.verdicts == [WRITE] * 2
    assert recommit(world, second, 0, RIGHT).verdicts == [CommitVerdict.GONE]
    assert recommit(world, second, 0, RIGHT).verdicts == [CommitVerdict.GONE], "told again"


def recommit(world: World, result: ins.ReserveResult, index: int, region: Region) -> Any:
    return world.ask(
        ev.Commit, session=1, reservation=result.reservation, indices=[index], region=region
    )
