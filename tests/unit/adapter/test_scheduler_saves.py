"""Saves of the scheduler half: many blocks at once, and those of requests that are over."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.messages import BlockPages
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
    assert not world.step(a=0).saves


def test_a_step_names_so_many_blocks_of_all_requests_that_the_engine_had_itself() -> None:
    """Sixteen prompts that vLLM had cached came beside a hub that did not answer: one step named 24
    blocks of each, 0.6 ms of the engine's thread."""
    world, half = World(blocks=2400), STEP_BLOCKS // 2
    names = [f"r{n}" for n in range(16)]
    requests = [
        world.new(FakeRequest(name, STEP_BLOCKS * BLOCK, seed=n), usable=0)
        for n, name in enumerate(names)
    ]
    for request in requests:
        world.alloc(request)
        request.num_computed_tokens = half * BLOCK
    computed = dict.fromkeys(names, 2 * BLOCK)
    named: list[bytes] = []
    for scheduled in (computed, *[dict.fromkeys(names, 0)] * 10):
        new = [block.hash for job in world.step(**scheduled).saves for block in job.blocks]
        assert len(new) <= STEP_BLOCKS + sum(scheduled.values()) // BLOCK
        for request in requests:
            request.num_computed_tokens += scheduled[request.request_id]
        named += new
    wanted = [key for request in requests for key in request.hashes()[: half + 2]]
    assert sorted(named) == sorted(wanted), "later steps named the rest"


def test_a_step_that_has_named_enough_still_names_what_it_computes_and_hands_off() -> None:
    """Of those that come after it looks at nobody else."""
    world = World(blocks=2400)
    had = FakeRequest("had", (STEP_BLOCKS + 2) * BLOCK, seed=1)
    behind = FakeRequest("behind", 4 * BLOCK, seed=2)
    prefilled = FakeRequest("prefilled", 4 * BLOCK, seed=3)
    handed = FakeRequest("handed", BLOCK + 9, seed=4, kv_transfer_params={"do_remote_decode": True})
    for request in (had, behind, prefilled, handed):
        world.new(request, usable=0)
        world.alloc(request)
    for request in (had, behind, handed):
        request.num_computed_tokens = request.num_prompt_tokens - 1
    named = [
        block.hash
        for job in world.step(had=1, behind=1, prefilled=2 * BLOCK, handed=1).saves
        for block in job.blocks
    ]
    wanted = [*had.hashes()[:STEP_BLOCKS], *prefilled.hashes()[:2], *handed.hashes(tail=True)]
    assert named == wanted


def end(world: World, request: FakeRequest) -> list[int]:
    """As vLLM does: it frees the blocks at once."""
    table = world.tables[request.request_id]
    world.half.finished(request, whole=True, tables=[table])
    world.pool.free_blocks([world.pool.blocks[b] for b in reversed(table)])
    return table


def taken(world: World) -> int:
    """Blocks of the pool that somebody holds."""
    return world.blocks - 1 - int(world.pool.get_num_free_blocks())


def test_what_a_request_leaves_when_it_ends_is_named_by_the_next_steps() -> None:
    """A little by each. An idle engine keeps stepping for it, nothing of it is given away
    meanwhile, and nothing of it stays taken."""
    world = World(blocks=400)
    request = long_prompt(world)
    world.report(saved={1: 1})
    table = end(world, request)
    assert taken(world) == 4 * (STEP_BLOCKS + 5), "of what was named already nothing"
    left, named = request.hashes()[STEP_BLOCKS:], list[BlockPages]()
    while len(named) < len(left):
        assert world.half.has_pending_work
        (job,) = world.step().saves
        assert len(job.blocks) <= STEP_BLOCKS
        named += job.blocks
        assert taken(world) == 4 * (STEP_BLOCKS + 5), "named or not, until they are pushed"
    assert [block.hash for block in named] == left
    assert [page for block in named for page in block.pages] == table[4 * STEP_BLOCKS :]
    assert not world.step().saves
    assert world.hub.withdrawn == []
    world.report(saved={2: 1, 3: 1})
    assert taken(world) == 0
    assert not world.half.has_pending_work


def test_what_has_been_named_and_pushed_comes_back_while_the_rest_waits() -> None:
    world = World(blocks=400)
    end(world, long_prompt(world))
    (job,) = world.step().saves
    world.report(saved={1: 1, job.job: 1})
    assert taken(world) == 4 * 5


def test_what_is_held_of_a_request_that_is_over_is_touched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its jobs take it over: each block was touched twice, and freed in the step that named it."""
    world = World(blocks=400)
    request = long_prompt(world)
    world.report(saved={1: 1})
    touched: list[int] = []
    touch = world.pool.touch

    def note(blocks: Sequence[Any]) -> None:
        touched.extend(block.block_id for block in blocks)
        touch(blocks)

    monkeypatch.setattr(world.pool, "touch", note)
    table = end(world, request)
    left = table[4 * STEP_BLOCKS :]
    assert touched == left
    jobs = [job for _ in range(2) for job in world.step().saves]
    assert touched == left
    assert taken(world) == len(left)
    world.report(saved={job.job: 1 for job in jobs})
    assert taken(world) == 0


def test_what_a_request_leaves_and_another_pushes_is_let_go_of() -> None:
    """The job that has it pins it; what is left of the second request pins nothing more."""
    world = World(blocks=4000)
    first, second = long_prompt(world), FakeRequest("b", (2 * STEP_BLOCKS + 5) * BLOCK)
    world.report(saved={1: 1})
    world.new(second, usable=STEP_BLOCKS)
    world.match(second)
    world.alloc(second)
    second.num_computed_tokens = second.num_prompt_tokens
    jobs = list(world.step(b=0).saves)
    end(world, first)
    end(world, second)
    jobs += [job for _ in range(5) for job in world.step().saves]
    named = [block.hash for job in jobs for block in job.blocks]
    assert sorted(named) == sorted(first.hashes()[STEP_BLOCKS:])
    world.report(saved={job.job: 1 for job in jobs})
    assert taken(world) == 0
    assert not world.half.has_pending_work


@pytest.mark.parametrize("engine_block", [256, 96])
def test_an_engine_block_of_several_hub_blocks_stays_until_its_last_one(engine_block: int) -> None:
    world = World(blocks=400, options={"group_tokens": [engine_block]})
    request = long_prompt(world)
    table = world.tables["a"][: -(-request.num_prompt_tokens // engine_block)]
    world.report(saved={1: 1})
    spare = world.tables["a"][len(table) :]
    world.tables["a"] = table
    world.pool.free_blocks([world.pool.blocks[b] for b in reversed(spare)])
    end(world, request)
    jobs = [job for _ in range(2) for job in world.step().saves]
    pages = {page // (engine_block // 32) for job in jobs for b in job.blocks for page in b.pages}
    assert pages == set(table[STEP_BLOCKS * BLOCK // engine_block :])
    assert taken(world) == len(pages)
    world.report(saved={job.job: 1 for job in jobs})
    assert taken(world) == 0


def test_requests_that_go_on_are_named_before_those_that_ended() -> None:
    """So many blocks in all, and whoever waits behind them is named in time."""
    world = World(blocks=4000)
    ended = long_prompt(world)
    world.report(saved={1: 1})
    end(world, ended)
    going = world.new(FakeRequest("b", 4 * STEP_BLOCKS * BLOCK, seed=5), usable=0)
    world.alloc(going)
    for _ in range(3):
        jobs = world.step(b=STEP_BLOCKS * BLOCK).saves
        assert [b.request for job in jobs for b in job.blocks] == ["b"] * STEP_BLOCKS
        going.num_computed_tokens += STEP_BLOCKS * BLOCK
        world.now += 0.05
    world.now += 0.25
    first, late = world.step(b=STEP_BLOCKS * BLOCK).saves
    assert [block.hash for block in late.blocks] == ended.hashes()[STEP_BLOCKS : 2 * STEP_BLOCKS]
    assert [block.request for block in first.blocks] == ["b"] * STEP_BLOCKS


def test_many_requests_whose_time_is_over_are_named_a_little_by_each_step() -> None:
    """Where a step took longer than pins live, the next one named all that had ended in it."""
    world = World(blocks=20_000)
    requests = []
    for number in range(4):
        tokens = (2 * STEP_BLOCKS + 5) * BLOCK
        request = world.new(FakeRequest(f"r{number}", tokens, seed=number), usable=0)
        world.alloc(request)
        requests.append(request)
    computed = {request.request_id: request.num_prompt_tokens for request in requests}
    jobs = world.step(**computed).saves
    for request in requests:
        request.num_computed_tokens = request.num_prompt_tokens
        request.all_token_ids.append(7)
        end(world, request)
    left = [key for request in requests for key in request.hashes()[STEP_BLOCKS:]]
    world.now += 1.0
    named: list[bytes] = []
    while len(named) < len(left):
        new = world.step().saves
        count = sum(len(job.blocks) for job in new)
        assert 0 < count <= STEP_BLOCKS
        named += [block.hash for job in new for block in job.blocks]
        jobs += new
    assert named == left, "in the order in which requests ended"
    world.report(saved={job.job: 1 for job in jobs})
    assert taken(world) == 0
    assert not world.half.has_pending_work


def test_of_what_a_request_leaves_an_equal_push_is_not_made_twice() -> None:
    world = World(blocks=4000)
    request = long_prompt(world)
    world.report(saved={1: 1})
    equal = world.new(FakeRequest("b", request.num_prompt_tokens), usable=STEP_BLOCKS)
    world.match(equal)
    world.tables["b"] = world.tables["a"]
    world.alloc(equal)
    end(world, request)
    (job,) = world.step(b=equal.num_prompt_tokens).saves
    assert [block.request for block in job.blocks] == ["b"] * STEP_BLOCKS
    equal.num_computed_tokens = equal.num_prompt_tokens
    equal.all_token_ids.append(7)
    jobs = [job, *world.step(b=0).saves, *world.step(b=0).saves, *world.step(b=0).saves]
    named = [block.hash for job in jobs for block in job.blocks]
    assert sorted(named) == sorted(request.hashes()[STEP_BLOCKS:])
    world.report(saved={job.job: 1 for job in jobs})
    assert taken(world) == 0
    assert not world.half.has_pending_work


def test_what_a_request_leaves_stays_announced_until_it_is_named() -> None:
    world = World(blocks=4000)
    request = long_prompt(world)
    keys = request.hashes()
    assert world.hub.announced == [keys]
    end(world, request)
    other = world.new(FakeRequest("b", request.num_prompt_tokens))
    world.hub.answer(STEP_BLOCKS, live=len(keys))
    assert world.match(other) == (STEP_BLOCKS * BLOCK, True), "it does not wait for its own"


def test_blocks_that_many_decode_to_their_ends_are_all_named_by_that_step() -> None:
    """One each: a step that has named half of what it may goes on as long as they are single."""
    world = World(blocks=2400)
    requests = [FakeRequest(f"r{n}", BLOCK, seed=n) for n in range(STEP_BLOCKS)]
    for request in requests:
        world.new(request, usable=0)
        world.alloc(request)
        request.num_computed_tokens = BLOCK - 1
    jobs = world.step(**dict.fromkeys((request.request_id for request in requests), 1)).saves
    named = [block.hash for job in jobs for block in job.blocks]
    assert named == [request.hashes()[0] for request in requests]


def test_a_request_that_no_step_came_to_look_at_leaves_what_it_computed() -> None:
    world = World(blocks=2400)
    requests = [FakeRequest(f"r{n}", STEP_BLOCKS * BLOCK, seed=n) for n in range(2)]
    for request in requests:
        world.new(request, usable=0)
        world.alloc(request)
        request.num_computed_tokens = request.num_prompt_tokens - 1
    assert [b.request for job in world.step(r0=1, r1=1).saves for b in job.blocks] == (
        ["r0"] * STEP_BLOCKS
    )
    requests[1].num_computed_tokens += 1
    requests[1].all_token_ids.append(7)
    end(world, requests[1])
    (job,) = world.step().saves
    assert [block.hash for block in job.blocks] == requests[1].hashes()


def test_a_request_that_was_preempted_when_it_ended_leaves_nothing() -> None:
    """vLLM has freed its blocks."""
    world = World(blocks=400)
    request = long_prompt(world)
    world.report(saved={1: 1})
    world.pool.free_blocks([world.pool.blocks[b] for b in reversed(world.tables["a"])])
    world.half.finished(request, whole=True, tables=[[]])
    assert not world.step().saves
    assert world.hub.withdrawn == [request.hashes()[STEP_BLOCKS:]]
    assert taken(world) == 0
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


def test_what_a_request_leaves_does_not_keep_the_request() -> None:
    """Whoever lets go of the last reference to 8,000 token ids spends up to a millisecond on it:
    that was the step that named the last block. A reply's blocks are hashed from what is kept."""
    world = World(blocks=800)
    request = long_prompt(world)
    request.all_token_ids += range(BLOCK - 1)
    world.tables["a"] += [block.block_id for block in world.pool.get_new_blocks(4)]
    assert len(world.step(a=BLOCK).saves) == 1
    request.num_computed_tokens += BLOCK
    left, held = request.hashes()[2 * STEP_BLOCKS :], weakref.ref(request)
    end(world, request)
    del request
    assert held() is None
    (job,) = world.step().saves
    assert [block.hash for block in job.blocks] == left
    assert len(left) == 6, "one of them is the reply's, and was not hashed"


def test_what_a_request_leaves_is_dropped_where_others_have_left_too_much() -> None:
    world = World(blocks=800)
    request = long_prompt(world)
    over = world.new(FakeRequest("over", 3000, seed=3), usable=0)
    world.alloc(over)
    assert len(world.step(over=3000).saves) == 1
    world.half.finished(over, whole=True)
    assert "saves_dropped.pins" not in world.half.counters
    world.half.finished(request, whole=True, tables=[world.tables["a"]])
    assert not world.step().saves
    assert world.half.counters["saves_dropped.pins"] == 1


def test_what_a_request_leaves_is_let_go_of_with_the_namespace() -> None:
    world = World(blocks=400)
    request = long_prompt(world)
    end(world, request)
    assert len(world.step().saves) == 1
    world.half.forget()
    assert not world.step().saves
    world.report(saved={1: 1, 2: 1})
    assert taken(world) == 0
    assert not world.half.has_pending_work


def test_of_an_aborted_request_nothing_more_is_named() -> None:
    world = World(blocks=400)
    request = long_prompt(world)
    world.half.finished(request, whole=False, tables=[world.tables["a"]])
    assert not world.step().saves
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
    assert not world.step(lost=128, late=128).saves
    for request in (lost, late):
        request.num_computed_tokens = 128
    assert not world.step(lost=172, late=172).saves
    world.half.finished(lost, whole=True)
    assert world.half.counters["saves_dropped.pins"] == 1
    world.report(saved={job.job: 1 for job in over})
    late.num_computed_tokens = 300
    late.all_token_ids.append(7)
    (job,) = world.step(late=1).saves
    assert [block.hash for block in job.blocks] == late.hashes()[:2]
    world.half.finished(late, whole=True)
    assert world.half.counters["saves_dropped.pins"] == 1
