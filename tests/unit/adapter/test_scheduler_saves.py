"""Saves of the scheduler half: many blocks at once, and those of requests that are over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.saves import JOB_BLOCKS_MAX, STEP_BLOCKS
from tests.support.scheduler_world import BLOCK, ENGINE_BLOCK, FakeHub, FakeRequest, World


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while FakeHub.opened:
        FakeHub.opened.pop().close()


def test_many_blocks_become_several_jobs() -> None:
    tokens = BLOCK * (JOB_BLOCKS_MAX + 5)
    world = World(blocks=tokens // ENGINE_BLOCK + 10)
    hands_off = {"do_remote_decode": True}
    request = world.new(FakeRequest("a", tokens, kv_transfer_params=hands_off), usable=0)
    world.alloc(request)
    assert [len(job.blocks) for job in world.step(a=tokens).saves] == [JOB_BLOCKS_MAX, 5]


def long_prompt(world: World) -> FakeRequest:
    """Computed by one step, which names the first of its blocks."""
    tokens = (2 * STEP_BLOCKS + 5) * BLOCK
    request = world.new(FakeRequest("a", tokens), usable=0)
    world.alloc(request)
    (job,) = world.step(a=tokens).saves
    assert [block.hash for block in job.blocks] == request.hashes()[:STEP_BLOCKS]
    request.num_computed_tokens = tokens
    request.all_token_ids.append(7)
    return request


def test_a_step_names_so_many_blocks_of_a_request_and_the_next_ones_the_rest() -> None:
    world = World(blocks=400)
    request = long_prompt(world)
    (second,), (third,) = world.step(a=1).saves, world.step(a=0).saves
    assert [block.hash for block in second.blocks] == request.hashes()[STEP_BLOCKS:-5]
    assert [block.hash for block in third.blocks] == request.hashes()[-5:]
    assert world.step(a=0).saves == []


def test_what_a_request_leaves_when_it_ends_is_named_by_the_next_step() -> None:
    world = World(blocks=400)
    request = long_prompt(world)
    table = world.tables["a"]
    world.half.finished(request, whole=True, tables=[table])
    world.pool.free_blocks([world.pool.blocks[b] for b in reversed(table)])
    assert world.half.has_pending_work
    (job,) = world.step().saves
    assert [block.hash for block in job.blocks] == request.hashes()[STEP_BLOCKS:]
    assert [page for block in job.blocks for page in block.pages] == table[4 * STEP_BLOCKS :]
    world.hub.turn()
    assert world.hub.withdrawn == []
    world.report(saved={1: 1, 2: 1})
    assert world.pool.get_num_free_blocks() == world.blocks - 1
    assert not world.half.has_pending_work


def test_a_reply_that_completes_a_block_is_part_of_what_a_request_leaves() -> None:
    """Its hash is worked out then."""
    world = World(blocks=400)
    tokens = (2 * STEP_BLOCKS + 6) * BLOCK + BLOCK - 1
    request = world.new(FakeRequest("a", tokens), usable=0)
    world.alloc(request)
    assert len(world.step(a=tokens).saves) == 1
    request.num_computed_tokens = tokens
    request.all_token_ids.append(7)
    assert len(world.step(a=1).saves) == 1
    request.num_computed_tokens += 1
    request.all_token_ids.append(8)
    world.half.finished(request, whole=True, tables=[world.tables["a"]])
    (job,) = world.step().saves
    assert [block.hash for block in job.blocks] == request.hashes()[2 * STEP_BLOCKS :]
    assert len(job.blocks) == 7


def test_what_a_request_leaves_is_dropped_where_others_have_left_too_much() -> None:
    world = World(blocks=800)
    request = long_prompt(world)
    over = world.new(FakeRequest("over", 3000, seed=3), usable=0)
    world.alloc(over)
    assert len(world.step(over=3000).saves) == 1
    world.half.finished(over, whole=True)
    assert "saves_dropped.pins" not in world.half.counters
    world.half.finished(request, whole=True, tables=[world.tables["a"]])
    assert world.step().saves == []
    assert world.half.counters["saves_dropped.pins"] == 1


def test_what_a_request_leaves_is_let_go_of_with_the_namespace() -> None:
    world = World(blocks=400)
    request = long_prompt(world)
    world.half.finished(request, whole=True, tables=[world.tables["a"]])
    world.pool.free_blocks([world.pool.blocks[b] for b in reversed(world.tables["a"])])
    world.half.forget()
    assert world.step().saves == []
    world.report(saved={1: 1})
    assert world.pool.get_num_free_blocks() == world.blocks - 1


def test_of_an_aborted_request_nothing_more_is_named() -> None:
    world = World(blocks=400)
    request = long_prompt(world)
    world.half.finished(request, whole=False, tables=[world.tables["a"]])
    assert world.step().saves == []
    world.hub.turn()
    assert world.hub.withdrawn == [request.hashes()[STEP_BLOCKS:]]


def test_blocks_of_finished_requests_may_pin_only_their_share() -> None:
    world = World(blocks=300)
    jobs = []
    for number in range(6):
        request = world.new(FakeRequest(str(number), 640, seed=number), usable=0)
        world.alloc(request)
        jobs += world.step(**{str(number): 640}).saves
        world.half.finished(request, whole=True)
        world.pool.free_blocks([world.pool.blocks[b] for b in reversed(world.tables[str(number)])])
    assert len(jobs) == 4
    assert world.half.counters["saves_dropped.pins"] == 2


def test_a_save_that_is_put_off_step_by_step_is_dropped_once_or_not_at_all() -> None:
    world = World(blocks=300)
    over = []
    for number in range(4):
        request = world.new(FakeRequest(str(number), 640, seed=number), usable=0)
        world.alloc(request)
        over += world.step(**{str(number): 640}).saves
        world.half.finished(request, whole=True)
    lost = world.new(FakeRequest("lost", 300, seed=8), usable=0)
    late = world.new(FakeRequest("late", 300, seed=9), usable=0)
    for request in (lost, late):
        world.alloc(request)
    assert world.step(lost=128, late=128).saves == []
    for request in (lost, late):
        request.num_computed_tokens = 128
    assert world.step(lost=172, late=172).saves == []
    world.half.finished(lost, whole=True)
    assert world.half.counters["saves_dropped.pins"] == 1
    world.report(saved={job.job: 1 for job in over})
    late.num_computed_tokens = 300
    late.all_token_ids.append(7)
    (job,) = world.step(late=1).saves
    assert [block.hash for block in job.blocks] == late.hashes()[:2]
    world.half.finished(late, whole=True)
    assert world.half.counters["saves_dropped.pins"] == 1
