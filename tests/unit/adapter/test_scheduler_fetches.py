"""Fetches of the scheduler half: waiting for the hub without holding blocks of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.messages import STALL_S, FetchProgress, RankReport
from tests.support.scheduler_world import BLOCK, FakeHub, FakeRequest, World

DECODE_LEG = {"do_remote_prefill": True, "do_remote_decode": False}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while FakeHub.opened:
        FakeHub.opened.pop().close()


def streaming(world: World, name: str = "d", tokens: int = 900) -> FakeRequest:
    """A request whose first two blocks are there and whose others another engine is writing."""
    request = world.new(FakeRequest(name, tokens, kv_transfer_params=dict(DECODE_LEG)))
    world.hub.answer(2, live=8)
    assert world.match(request) == (None, False)
    return request


def test_a_prefix_that_is_being_written_is_fetched_without_blocks(world: World) -> None:
    request = streaming(world)
    (job,) = world.step().fetches
    assert list(job.hashes) == request.hashes(tail=True)
    assert job.tokens == (BLOCK,) * 7 + (900 - 7 * BLOCK,)
    assert not world.tables
    assert not world.step().fetches
    for cells in range(1, 20):
        world.now += 0.5
        world.report(fetched={"d": FetchProgress(whole=cells // 4, cells=cells)})
        assert world.match(request) == (None, False)
    world.report(fetched={"d": FetchProgress(whole=7, cells=31, near=True)})
    assert world.match(request) == (900, True)
    world.alloc(request, 900)
    meta = world.step()
    (load,) = meta.loads
    assert load.fetched
    assert not meta.drops
    assert [block.hash for block in load.blocks] == request.hashes(tail=True)
    assert len(world.hub.lookups) == 1, "the hub is not asked again meanwhile"
    assert world.half.tiers_of(request) == {2: 900}


def test_without_progress_what_is_whole_is_loaded(world: World) -> None:
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(whole=3, cells=14)})
    world.now += STALL_S - 0.01
    assert world.match(request) == (None, False)
    world.now += 0.02
    assert world.match(request) == (3 * BLOCK, True)
    world.alloc(request, 3 * BLOCK)
    (load,) = world.step().loads
    assert (load.fetched, len(load.blocks)) == (True, 3)


def test_a_slow_writer_is_waited_for_while_the_hub_gets_anything_of_it(world: World) -> None:
    """A layer of a chunk takes it most of a second, and what arrives here are several at a time."""
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(whole=2, cells=8)})
    began, committed = world.now, 10
    while world.now < began + 6.0:
        world.now += 0.05
        if round(20 * (world.now - began)) % 16 == 0:
            committed += 1
        assert world.match(request) == (None, False), world.now - began
        world.hub.turn()
        if not world.hub.lookups[-1][2].done():
            world.hub.answer(2, live=8, committed=committed)
    assert len(world.hub.lookups) < 70, "it asks now and then"
    stopped = world.now
    while world.match(request) == (None, False):
        world.hub.turn()
        if not world.hub.lookups[-1][2].done():
            world.hub.answer(2, live=8, committed=committed)
        world.now += 0.05
    assert world.now - stopped < 1.2 * STALL_S
    assert world.match(request) == (2 * BLOCK, True)


def test_a_hub_that_does_not_say_leaves_a_fetch_to_what_arrives(world: World) -> None:
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(whole=2, cells=8)})
    for _ in range(9):
        world.now += STALL_S / 10
        assert world.match(request) == (None, False)
        world.hub.turn()
    assert len(world.hub.lookups) == 2, "one question at a time"
    world.hub.fail()
    world.now += STALL_S / 5
    assert world.match(request) == (2 * BLOCK, True)


def at_the_end_of_its_wait(world: World) -> FakeRequest:
    """A request that may wait for 0.3 s, which are over: three of its blocks have come."""
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(whole=3, cells=14)})
    world.now += 0.29
    assert world.match(request) == (None, False)
    world.hub.answer(3, live=8, committed=14)  # nothing had come for a while
    world.now += 0.02
    assert world.match(request) == (None, False), "the hub is asked for its last word"
    return request


@pytest.fixture
def hasty() -> World:
    return World(settings={"handoff_wait_ms": 300})


def test_what_is_complete_at_the_hub_when_the_wait_ends_is_taken(hasty: World) -> None:
    """Over a transport that takes as long as the wait it was computed, and was there."""
    request = at_the_end_of_its_wait(hasty)
    hasty.hub.answer(8)
    assert hasty.match(request) == (None, False)
    hasty.now += 0.5
    hasty.report(fetched={"d": FetchProgress(whole=6, cells=27)})
    assert hasty.match(request) == (None, False)
    hasty.report(fetched={"d": FetchProgress(whole=8, cells=32, near=True, ended=True)})
    assert hasty.match(request) == (900, True)


def test_a_writer_is_not_waited_for_when_the_wait_ends(hasty: World) -> None:
    request = at_the_end_of_its_wait(hasty)
    hasty.hub.answer(5, live=8)
    assert hasty.match(request) == (None, False)
    hasty.report(fetched={"d": FetchProgress(whole=5, cells=22)})
    assert hasty.match(request) == (5 * BLOCK, True)


def test_where_no_more_is_complete_what_is_whole_is_loaded(hasty: World) -> None:
    request = at_the_end_of_its_wait(hasty)
    hasty.hub.answer(3, live=8)
    assert hasty.match(request) == (3 * BLOCK, True)


def test_a_hub_that_has_no_last_word_leaves_what_is_whole(hasty: World) -> None:
    request = at_the_end_of_its_wait(hasty)
    hasty.hub.fail()
    assert hasty.match(request) == (3 * BLOCK, True)


def test_what_is_complete_and_does_not_come_is_computed(hasty: World) -> None:
    request = at_the_end_of_its_wait(hasty)
    hasty.hub.answer(8)
    assert hasty.match(request) == (None, False)
    hasty.now += STALL_S
    assert hasty.match(request) == (3 * BLOCK, True)


def test_a_fetch_of_complete_blocks_ends_with_the_time_of_a_load() -> None:
    world = World(blocks=40, settings={"load_deadline_ms": 500})
    request = world.new(FakeRequest("a", 600), usable=4)
    assert world.match(request) == (None, False)
    world.step()
    world.report(fetched={"a": FetchProgress(whole=3, cells=13)})
    world.now += 0.51
    assert world.match(request) == (3 * BLOCK, True)


def test_a_writer_that_is_gone_ends_it_at_once(world: World) -> None:
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(whole=2, cells=8, ended=True)})
    assert world.match(request) == (2 * BLOCK, True)


def test_where_nothing_came_the_request_computes_and_the_fetch_is_dropped(world: World) -> None:
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(ended=True)})
    assert world.match(request) == (0, False)
    assert world.step().drops == ["d"]
    assert world.match(request) == (0, False)


def test_ranks_that_cannot_be_heard_are_not_waited_for(world: World) -> None:
    request = streaming(world)
    world.step()
    world.now += STALL_S
    assert world.match(request) == (0, False)
    assert world.half.has_pending_work
    assert world.step().drops == ["d"]
    assert not world.half.has_pending_work


def test_who_may_wait_long_is_patient_with_a_slow_writer() -> None:
    world = World(settings={"handoff_wait_ms": 60_000})
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(cells=8)})
    world.now += 5.9
    assert world.match(request)[0] is None
    world.now += 0.2
    assert world.match(request) == (0, False)


def test_all_ranks_count() -> None:
    world = World(options={"ranks": 2})
    request = streaming(world)
    world.step()
    near = FetchProgress(whole=7, cells=31, near=True)
    world.half.ranks_reported(RankReport(fetched={"d": {0: near}}), set())
    assert world.match(request) == (None, False)
    slow = FetchProgress(whole=5, cells=20, ended=True)
    merged = RankReport(fetched={"d": {1: slow}}).aggregate(RankReport(fetched={"d": {0: near}}))
    world.half.ranks_reported(merged, set())
    assert world.match(request) == (None, False)
    done = FetchProgress(whole=8, cells=32, near=True, ended=True)
    world.half.ranks_reported(RankReport(fetched={"d": {0: done}}), set())
    assert world.match(request) == (5 * BLOCK, True)


def test_an_aborted_request_gives_its_fetch_up_and_followers_go_on(world: World) -> None:
    request = streaming(world)
    world.step()
    follower = world.new(FakeRequest("e", 900))
    world.hub.answer(2, live=7)
    assert world.match(follower) == (None, False)
    assert not world.step().fetches, "one fetch per prefix"
    world.half.finished(request, whole=False)
    world.hub.turn()
    world.now += 0.1
    if not world.hub.lookups[-1][2].done():
        world.hub.answer(2, live=7)
    assert world.match(follower) == (None, False)
    meta = world.step()
    assert (meta.drops, [job.request for job in meta.fetches]) == (["d"], ["e"])


def test_what_staging_has_no_room_for_waits_for_complete_blocks(world: World) -> None:
    request = streaming(world)
    world.step()
    world.report(fetched={"d": FetchProgress(ended=True, refused=True)})
    assert world.match(request) == (None, False)
    meta = world.step()
    assert (meta.drops, meta.fetches) == (["d"], [])
    world.now += 0.1
    assert world.match(request) == (None, False)
    world.hub.answer(8)
    assert world.match(request) == (900, True)
    world.alloc(request, 900)
    assert [load.fetched for load in world.step().loads] == [False]


def test_a_load_that_would_take_much_of_the_free_blocks_is_fetched_first() -> None:
    world = World(blocks=40)
    request = world.new(FakeRequest("a", 600), usable=4)
    assert world.match(request) == (None, False)
    assert [len(job.hashes) for job in world.step().fetches] == [4]
    assert world.pool.get_num_free_blocks() == 39
    small = world.new(FakeRequest("b", 200, seed=3), usable=1)
    assert world.match(small) == (BLOCK, True), "4 of 39 blocks may wait for the hub"
    world.report(fetched={"a": FetchProgress(whole=4, cells=16, near=True, ended=True)})
    assert world.match(request) == (512, True)


def test_what_the_engine_has_itself_is_not_fetched(world: World) -> None:
    request = world.new(FakeRequest("d", 900, kv_transfer_params=dict(DECODE_LEG)))
    world.hub.answer(2, live=8)
    assert world.match(request, 160) == (None, False)
    (job,) = world.step().fetches
    assert list(job.hashes) == request.hashes(tail=True)[1:]
    world.report(fetched={"d": FetchProgress(whole=7, cells=28, near=True, ended=True)})
    assert world.match(request, 160) == (740, True)


def test_a_fetch_that_begins_too_late_for_a_shrunken_cache_is_asked_for_anew(world: World) -> None:
    """The engine's own blocks, which the fetch left out, were evicted meanwhile."""
    request = world.new(FakeRequest("d", 900, kv_transfer_params=dict(DECODE_LEG)))
    world.hub.answer(2, live=8)
    assert world.match(request, 256) == (None, False)
    world.step()
    assert world.match(request, 0) == (None, False)
    assert world.step().drops == ["d"]
    world.hub.answer(8)
    assert world.match(request, 0) == (900, True)
    world.alloc(request, 900)
    assert [load.fetched for load in world.step().loads] == [False]
