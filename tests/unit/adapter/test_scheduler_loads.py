"""Loads and saves of the scheduler half: pages, failures, single flight, pins."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.common import Answer
from kvserver_vllm.layout import SKIP
from tests.support.scheduler_world import (
    BLOCK,
    ENGINE_BLOCK,
    PAGE,
    SECTIONS,
    FakeHub,
    FakeRequest,
    World,
    start_load,
)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while FakeHub.opened:
        FakeHub.opened.pop().close()


# ---- loads -----------------------------------------------------------------------------------


def test_a_load_names_the_pages_of_its_own_blocks_once(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=2)
    meta = start_load(world, request)
    (job,) = meta.loads
    assert (job.request, meta.sections) == ("a", SECTIONS)
    assert [block.hash for block in job.blocks] == request.hashes()
    assert [page for block in job.blocks for page in block.pages] == world.tables["a"][:8]
    assert not world.step().loads
    world.alloc(request, 0)
    assert not world.step().loads


def test_vllm_may_take_less_than_it_is_offered(world: World) -> None:
    """0.33 does where it lacks other outputs of a prefix's tokens, as the experts they went to."""
    request = world.new(FakeRequest("a", 900), usable=7)
    assert world.match(request) == (7 * BLOCK, True)
    table = world.alloc(request, 300)
    (job,) = world.step().loads
    assert [block.hash for block in job.blocks] == request.hashes()[:3]
    assert [page for block in job.blocks for page in block.pages] == table[:12]
    assert world.half.tiers_of(request) == {2: 300}


def test_pages_that_the_engine_has_itself_are_skipped(world: World) -> None:
    request = world.new(FakeRequest("a", 400), usable=3)
    (job,) = start_load(world, request, computed=160).loads
    table = world.tables["a"]
    assert [block.hash for block in job.blocks] == request.hashes()[1:]
    assert job.blocks[0].pages == (SKIP, *table[5:8])
    assert job.blocks[1].pages == tuple(table[8:12])


def test_less_than_a_block_is_computed_instead(world: World) -> None:
    """A local hit leaves out the last block of a prompt that is cached whole."""
    request = world.new(FakeRequest("a", 512), usable=4)
    assert world.match(request, 480) == (0, False)
    assert world.match(request, 384) == (128, True)


def test_the_null_block_is_never_touched(world: World) -> None:
    null = world.pool.null_block.block_id
    request = world.new(FakeRequest("a", 300), usable=2)
    world.tables["a"] = [null, null, *(b.block_id for b in world.pool.get_new_blocks(8))]
    (job,) = start_load(world, request).loads
    assert job.blocks[0].pages[:2] == (SKIP, SKIP)
    assert null not in [page for block in job.blocks for page in block.pages]


@pytest.mark.parametrize("engine_block", [64, 128, 256])
def test_engine_blocks_of_other_sizes_are_whole_pages(engine_block: int) -> None:
    world = World(options={"group_tokens": [engine_block]})
    request = world.new(FakeRequest("a", 512), usable=4)
    tokens, _ = world.match(request)
    assert tokens == 512
    table = [9, 4, 7, 2, 11, 5, 3, 8][: 512 // engine_block]
    world.half.after_alloc(request, [table], tokens)
    (job,) = world.step().loads
    per_block = engine_block // PAGE
    pages = [page for block in job.blocks for page in block.pages]
    assert pages == [b * per_block + i for b in table for i in range(per_block)]


def test_after_a_failed_load_the_retry_is_a_miss_forever(world: World) -> None:
    request = world.new(FakeRequest("a", 900), usable=7)
    start_load(world, request)
    world.report(failed={"a": 3}, received={"a"})
    for _ in range(3):
        assert world.match(request) == (0, False)
        world.now += 5
    assert len(world.hub.lookups) == 1


def test_blocks_that_failed_are_pushed_again_once_computed(world: World) -> None:
    request = world.new(FakeRequest("a", 900), usable=7)
    start_load(world, request)
    world.report(failed={"a": 3}, received={"a"})
    request.num_computed_tokens = 3 * BLOCK
    (job,) = world.step(a=900 - 3 * BLOCK).saves
    assert [block.hash for block in job.blocks] == request.hashes()[3:]


def test_loaded_blocks_are_not_pushed_back(world: World) -> None:
    request = world.new(FakeRequest("a", 900), usable=7)
    start_load(world, request)
    world.report(received={"a"})
    request.num_computed_tokens = 896
    assert not world.step(a=4).saves


def test_a_key_that_failed_is_avoided_for_a_moment_by_others(world: World) -> None:
    request = world.new(FakeRequest("a", 900), usable=7)
    start_load(world, request)
    world.report(failed={"a": 3}, received={"a"})
    other = world.new(FakeRequest("b", 900), usable=7)
    assert world.match(other) == (3 * BLOCK, True)
    world.now += 4
    third = world.new(FakeRequest("c", 900), usable=7)
    assert world.match(third) == (7 * BLOCK, True)


def test_equal_prefixes_load_once_and_followers_wait_for_the_leader(world: World) -> None:
    leader = world.new(FakeRequest("a", 900), usable=7)
    start_load(world, leader)
    followers = [world.new(FakeRequest(name, 900), usable=7) for name in "bcd"]
    assert [world.match(f) for f in followers] == [(None, False)] * 3
    world.report(received={"a"})
    assert [world.match(f, 896) for f in followers] == [(0, False)] * 3
    assert not world.step().loads


def test_followers_load_for_themselves_without_prefix_caching() -> None:
    world = World(options={"prefix_caching": False})
    start_load(world, world.new(FakeRequest("a", 300), usable=2))
    assert world.match(world.new(FakeRequest("b", 300), usable=2)) == (256, True)


def test_followers_of_a_failed_leader_compute(world: World) -> None:
    start_load(world, world.new(FakeRequest("a", 300), usable=2))
    follower = world.new(FakeRequest("b", 300), usable=2)
    assert world.match(follower) == (None, False)
    world.report(failed={"a": 0}, received={"a"})
    assert world.match(follower) == (0, False)


def test_nobody_waits_longer_than_the_load_deadline_in_all() -> None:
    world = World(settings={"load_deadline_ms": 3000})
    start_load(world, world.new(FakeRequest("a", 300), usable=2))
    follower = world.new(FakeRequest("b", 300), usable=2)
    waited = 0.0
    while world.match(follower) == (None, False):
        world.now += 0.1
        waited += 0.1
        world.hub.turn()
        if not world.hub.lookups[-1][2].done():
            world.hub.answer(2)
        assert waited < 5
    assert waited == pytest.approx(3, abs=0.3)
    assert world.match(follower) == (0, False)


def test_time_spent_waiting_comes_off_the_loads_deadline(world: World) -> None:
    start_load(world, world.new(FakeRequest("a", 300), usable=2))
    follower = world.new(FakeRequest("b", 600), usable=4)
    assert world.match(follower) == (None, False)
    world.now += 0.9
    world.report(received={"a"})
    (job,) = start_load(world, follower, computed=256).loads
    assert job.deadline_s == pytest.approx(9.1)


def test_loads_hold_at_most_their_share_of_the_pool() -> None:
    world = World(blocks=60, settings={"staging_bytes": 0})
    start_load(world, world.new(FakeRequest("a", 640, seed=1), usable=5))
    second = world.new(FakeRequest("b", 640, seed=2), usable=5)
    assert world.match(second) == (None, False)
    world.report(received={"a"})
    world.now += 0.1
    assert world.match(second) == (640, True)


def test_an_aborted_load_is_cancelled_and_ends_when_the_ranks_say_so(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=2)
    start_load(world, request)
    world.half.finished(request, whole=True)
    assert world.half.has_pending_work
    assert world.step().aborts == ["a"]
    follower = world.new(FakeRequest("b", 300), usable=2)
    assert world.match(follower) == (None, False)
    world.report(received={"a"})
    assert world.match(follower) == (256, True)


def test_hits_are_told_by_tier(world: World) -> None:
    request = world.new(FakeRequest("a", 900))
    world.hub.turn()
    world.hub.lookups[-1][2].set_result(Answer(4, 4, (2, 3, 3, 2)))
    world.hub.turn()
    start_load(world, request, computed=160)
    assert world.half.tiers_of(request) == {3: 224, 2: 128}


def hit_tokens(world: World) -> dict[str, int]:
    found = world.half.counters.items()
    return {name: value for name, value in found if name.startswith("hit_tokens")}


def test_tokens_count_as_hits_once_a_load_has_brought_them(world: World) -> None:
    """They used to count when it began, also those that it never brought."""
    start_load(world, world.new(FakeRequest("a", 900), usable=7))
    assert hit_tokens(world) == {}
    world.report(failed={"a": 3}, received={"a"})
    assert hit_tokens(world) == {"hit_tokens.host": 3 * BLOCK}
    start_load(world, world.new(FakeRequest("b", 300, seed=2), usable=2))
    world.report(received={"b"})
    assert hit_tokens(world) == {"hit_tokens.host": 5 * BLOCK}


def test_a_load_that_nobody_waits_for_any_more_is_no_hit(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=2)
    start_load(world, request)
    world.half.finished(request, whole=False)
    world.report(received={"a"})
    assert hit_tokens(world) == {}


def test_with_several_cache_groups_a_load_that_came_short_brought_nothing() -> None:
    """vLLM starts such a request from its first token."""
    world = World(options={"group_tokens": [ENGINE_BLOCK, ENGINE_BLOCK]})
    for name, failed, tokens in (("a", {"a": 1}, 0), ("b", None, 256)):
        request = world.new(FakeRequest(name, 300, seed=ord(name)), usable=2)
        assert world.match(request) == (256, True)
        tables = [[b.block_id for b in world.pool.get_new_blocks(10)] for _ in range(2)]
        world.half.after_alloc(request, tables, 256)
        world.step()
        world.report(failed=failed, received={name})
        assert hit_tokens(world) == ({"hit_tokens.host": tokens} if tokens else {})


@pytest.mark.parametrize(("deadline_ms", "stall_s"), [(10_000, 1.0), (3_000, 1.0), (60_000, 6.0)])
def test_a_load_may_stand_still_for_a_second_or_a_tenth_of_its_deadline(
    deadline_ms: int, stall_s: float
) -> None:
    world = World(settings={"load_deadline_ms": deadline_ms})
    (job,) = start_load(world, world.new(FakeRequest("a", 300), usable=2)).loads
    assert job.stall_s == stall_s


# ---- saves -----------------------------------------------------------------------------------


def test_a_block_is_saved_in_the_step_that_completes_it(world: World) -> None:
    request = world.new(FakeRequest("a", 900), usable=0)
    world.match(request)
    table = world.alloc(request)
    saved = []
    for step in (100, 300, 500):
        jobs = world.step(a=step).saves
        saved.append([block.hash for job in jobs for block in job.blocks])
        pages = [page for job in jobs for block in job.blocks for page in block.pages]
        first = sum(len(s) for s in saved[:-1]) * 4
        assert pages == table[first : first + len(pages)]
        request.num_computed_tokens += step
    hashes = request.hashes()
    assert saved == [[], hashes[:3], hashes[3:7]]


def test_while_the_hub_is_away_nothing_is_pinned_and_later_steps_make_up_for_it(
    world: World,
) -> None:
    request = world.new(FakeRequest("a", 300), usable=0)
    table = world.alloc(request)
    world.hub.responsive = False
    assert not world.step(a=256).saves
    assert world.pinned(table) == []
    request.num_computed_tokens = 256
    world.hub.responsive = True
    (job,) = world.step(a=44).saves
    assert [block.hash for block in job.blocks] == request.hashes()


def test_parents_are_the_chain(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=0)
    world.alloc(request)
    (job,) = world.step(a=300).saves
    assert [block.parent for block in job.blocks] == [bytes(32), request.hashes()[0]]


def test_decoded_blocks_are_saved_without_rejected_drafts(world: World) -> None:
    request = world.new(FakeRequest("a", 250), usable=0)
    world.alloc(request)
    assert len(world.step(a=250).saves[0].blocks) == 1
    request.num_computed_tokens = 250
    request.all_token_ids += [1, 2, 3, 4]
    # Eight positions are scheduled, of which four are drafts that may be rejected.
    assert not world.step(a=8).saves
    request.num_computed_tokens = 254
    request.all_token_ids += [5, 6]
    (job,) = world.step(a=2).saves
    assert [block.hash for block in job.blocks] == request.hashes()[1:]


def test_pages_are_pinned_until_every_rank_has_let_go() -> None:
    world = World(options={"ranks": 2})
    request = world.new(FakeRequest("a", 300), usable=0)
    table = world.alloc(request)
    (job,) = world.step(a=300).saves
    assert world.pinned(table) == table[:8]
    assert world.half.has_pending_work
    world.half.finished(request, whole=True)
    world.pool.free_blocks([world.pool.blocks[b] for b in reversed(table)])
    assert all(world.pool.blocks[b].ref_cnt == 1 for b in table[:8])
    world.report(saved={job.job: 1})
    assert all(world.pool.blocks[b].ref_cnt == 1 for b in table[:8])
    world.report(saved={job.job: 1})
    assert world.pool.get_num_free_blocks() == world.blocks - 1
    assert not world.half.has_pending_work


def test_the_table_of_the_step_counts_not_that_of_the_allocation(world: World) -> None:
    """A request preempted and resumed has other blocks."""
    request = world.new(FakeRequest("a", 300), usable=0)
    world.alloc(request)
    world.tables["a"] = [b.block_id for b in world.pool.get_new_blocks(10)]
    (job,) = world.step(a=300).saves
    assert [p for block in job.blocks for p in block.pages] == world.tables["a"][:8]


def test_one_block_is_saved_once_at_a_time(world: World) -> None:
    for name in "ab":
        world.alloc(world.new(FakeRequest(name, 300), usable=0))
    (job,) = world.step(a=300, b=300).saves
    assert {block.request for block in job.blocks} == {"a"}
    assert len(job.blocks) == 2
    third = world.new(FakeRequest("c", 300), usable=0)
    world.alloc(third)
    assert not world.step(c=300).saves


def test_a_consumer_saves_and_announces_nothing() -> None:
    world = World(options={"saves": False})
    request = world.new(FakeRequest("a", 300), usable=0)
    world.match(request)
    world.alloc(request)
    assert not world.step(a=300).saves
    assert world.hub.announced == []


def test_only_what_the_hub_lacks_is_announced(world: World) -> None:
    request = world.new(FakeRequest("a", 900), usable=3)
    start_load(world, request)
    world.report(received={"a"})
    world.alloc(request)
    world.step()
    assert world.hub.announced == [request.hashes()[3:]]


def test_after_a_reset_requests_at_hand_are_neither_saved_nor_loaded(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=2)
    world.alloc(request)
    world.half.forget()
    assert world.match(request) == (0, False)
    world.half.open(SECTIONS, PAGE, tails=True)
    assert not world.step(a=300).saves


def test_the_engines_output_is_only_read(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=0)
    world.alloc(request)
    output = SimpleNamespace(num_scheduled_tokens={"a": 300}, kv_connector_block_state=None)
    world.half.build_meta(output)
    assert vars(output) == {"num_scheduled_tokens": {"a": 300}, "kv_connector_block_state": None}


def test_loads_on_their_way_are_void_after_a_reset(world: World) -> None:
    start_load(world, world.new(FakeRequest("a", 300), usable=2))
    world.half.forget()
    assert world.step().voids == ["a"]
    assert not world.step().voids
