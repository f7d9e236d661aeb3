"""Hand-offs in the scheduler half: the prompt's tail, the hint, and how long a request waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvserver_vllm.messages import STALL_S, RankReport
from tests.support.scheduler_world import BLOCK, PAGE, SECTIONS, FakeHub, FakeRequest, World

PREFILL_LEG = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None}
DECODE_LEG = {"do_remote_prefill": True, "do_remote_decode": False}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while FakeHub.opened:
        FakeHub.opened.pop().close()


def prefill(name: str, tokens: int) -> FakeRequest:
    return FakeRequest(name, tokens, kv_transfer_params=dict(PREFILL_LEG))


def decode(name: str, tokens: int) -> FakeRequest:
    return FakeRequest(name, tokens, kv_transfer_params=dict(DECODE_LEG))


# ---- the prefill leg -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 31, 127, 128, 129, 300, 384])
def test_a_prompt_that_is_handed_off_is_saved_to_its_last_token(world: World, tokens: int) -> None:
    request = world.new(prefill("p", tokens), usable=0 if tokens > 127 else None)
    if tokens < BLOCK:
        world.hub.turn()
    world.match(request)
    table = world.alloc(request)
    saves = world.step(p=tokens).saves
    blocks = [block for job in saves for block in job.blocks]
    assert [block.hash for block in blocks] == request.hashes(tail=True)
    assert [block.tokens for block in blocks][-1] == (tokens % BLOCK or BLOCK)
    assert sum(block.tokens for block in blocks) == tokens
    pages = [page for block in blocks for page in block.pages]
    assert pages == table[: -(-tokens // PAGE)]
    assert world.hub.announced == [request.hashes(tail=True)]


def test_the_tail_is_saved_once_and_by_the_step_that_completes_it(world: World) -> None:
    request = world.new(prefill("p", 300), usable=0)
    world.match(request)
    world.alloc(request)
    first = world.step(p=290).saves
    assert [b.tokens for job in first for b in job.blocks] == [BLOCK, BLOCK]
    request.num_computed_tokens = 290
    second = world.step(p=10).saves
    assert [b.tokens for job in second for b in job.blocks] == [300 - 2 * BLOCK]
    request.num_computed_tokens = 300
    request.all_token_ids.append(7)
    assert not world.step(p=1).saves


def test_other_requests_push_no_tail(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=0)
    world.match(request)
    world.alloc(request)
    assert [b.tokens for job in world.step(a=300).saves for b in job.blocks] == [BLOCK, BLOCK]


def test_pages_that_cannot_be_filled_in_part_make_no_tail(world: World) -> None:
    world.half.open(SECTIONS, PAGE, tails=False)
    request = world.new(prefill("p", 300), usable=0)
    world.match(request)
    world.alloc(request)
    assert [b.tokens for job in world.step(p=300).saves for b in job.blocks] == [BLOCK, BLOCK]


def test_the_answer_of_a_prefill_leg_is_the_hint_and_the_params_stay_as_they_were(
    world: World,
) -> None:
    request = world.new(prefill("p", 300), usable=0)
    shared = request.kv_transfer_params
    assert world.half.finished(request, whole=True) == DECODE_LEG
    assert request.kv_transfer_params is shared
    assert shared == PREFILL_LEG


def test_an_aborted_prefill_leg_and_other_requests_return_no_params(world: World) -> None:
    assert world.half.finished(world.new(prefill("p", 300)), whole=False) is None
    assert world.half.finished(world.new(FakeRequest("a", 300)), whole=True) is None
    consumer = World(options={"saves": False})
    assert consumer.half.finished(consumer.new(prefill("p", 300)), whole=True) is None


def test_an_abort_withdraws_what_was_not_computed(world: World) -> None:
    request = world.new(prefill("p", 300), usable=0)
    world.match(request)
    world.alloc(request)
    world.step(p=150)
    world.half.finished(request, whole=False)
    world.step()
    assert world.hub.withdrawn == [request.hashes(tail=True)[1:]]
    again = world.new(prefill("q", 300))
    world.hub.answer(1, live=3)
    assert world.match(again) == (None, False), "what others announced is waited for again"


def test_an_engine_steps_once_more_to_take_back_what_it_announced(world: World) -> None:
    request = world.new(prefill("p", 300), usable=0)
    world.match(request)
    world.alloc(request)
    world.step()
    world.half.finished(request, whole=False)
    assert world.half.has_pending_work
    world.step()
    assert not world.half.has_pending_work
    assert world.hub.announced == world.hub.withdrawn == [request.hashes(tail=True)]


def test_a_save_that_a_rank_gives_up_is_withdrawn_at_once() -> None:
    """Whoever waits for it would wait for the second that a writer may be silent."""
    world = World(options={"ranks": 2})
    request = world.new(prefill("p", 300), usable=0)
    world.match(request)
    world.alloc(request)
    (job,) = world.step(p=150).saves
    keys = [block.hash for block in job.blocks]
    world.half.ranks_reported(RankReport({job.job: 1}, lost=keys), set())
    world.step()
    assert world.hub.withdrawn == [keys], "while the other rank still pushes"
    request.num_computed_tokens = 150
    assert len(world.step(p=150).saves) == 1
    world.half.finished(request, whole=True)
    world.step()
    assert world.hub.withdrawn == [keys]


def test_a_request_that_computed_everything_withdraws_nothing(world: World) -> None:
    request = world.new(prefill("p", 300), usable=0)
    world.match(request)
    world.alloc(request)
    world.step(p=300)
    world.half.finished(request, whole=True)
    world.step()
    assert world.hub.withdrawn == []


def test_the_announcement_of_a_long_prompt_is_renewed(world: World) -> None:
    request = world.new(prefill("p", 10 * BLOCK), usable=0)
    world.match(request)
    world.alloc(request)
    for done in range(0, 10 * BLOCK, BLOCK):
        request.num_computed_tokens = done
        world.step(p=BLOCK)
        world.hub.turn()
        world.now += 2.0
    said = [len(hashes) for hashes in world.hub.announced]
    assert said == [10, 6, 3]


# ---- the decode leg --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 31, 127, 128, 129, 300, 384])
def test_after_a_hand_off_all_tokens_come_from_the_hub(world: World, tokens: int) -> None:
    """The scheduler then rewinds one, and one is computed."""
    request = world.new(decode("d", tokens))
    assert world.hub.lookups[-1][0] == request.hashes(tail=True)
    world.hub.answer(len(request.hashes(tail=True)))
    assert world.match(request) == (tokens, True)
    table = world.alloc(request, tokens)
    (job,) = world.step().loads
    assert [block.hash for block in job.blocks] == request.hashes(tail=True)
    assert sum(block.tokens for block in job.blocks) == tokens
    assert [page for block in job.blocks for page in block.pages] == table


def test_a_writer_that_comes_late_has_its_second_from_there_on(world: World) -> None:
    """It was taken for one that stands still: the clock ran since the request had begun to wait."""
    world.settings["intent_wait_ms"] = 3000
    world.__post_init__()
    request = world.new(decode("d", 300), usable=0)
    for live in [0] * 15 + [3]:
        world.now += 0.1
        assert world.match(request) == (None, False)
        world.hub.answer(0, live=live)
    assert world.match(request) == (None, False)
    assert len(world.step().fetches) == 1


def test_a_tail_is_asked_for_on_the_hint_only(world: World) -> None:
    request = world.new(FakeRequest("a", 300))
    assert world.hub.lookups[-1][0] == request.hashes()


def test_a_hand_off_whose_tail_is_gone_takes_the_whole_blocks(world: World) -> None:
    world.settings["intent_wait_ms"] = 0
    world.__post_init__()
    request = world.new(decode("d", 300), usable=2)
    assert world.match(request) == (2 * BLOCK, True)


def test_what_the_engines_own_cache_has_is_not_loaded_again(world: World) -> None:
    request = world.new(decode("d", 300), usable=3)
    assert world.match(request, 160) == (140, True)
    world.alloc(request, 140)
    (job,) = world.step().loads
    assert [block.tokens for block in job.blocks] == [BLOCK, 300 - 2 * BLOCK]
    other = world.new(decode("e", 300), usable=3)
    assert world.match(other, 288) == (0, False), "fewer than an engine block are computed"


def test_the_next_block_is_saved_although_the_tail_was_loaded(world: World) -> None:
    request = world.new(decode("d", 300), usable=3)
    tokens, _ = world.match(request)
    world.alloc(request, tokens or 0)
    world.step()
    world.report(received={"d"})
    request.all_token_ids += list(range(100))
    world.tables["d"] += [b.block_id for b in world.pool.get_new_blocks(4)]
    request.num_computed_tokens = 299
    blocks = [b for job in world.step(d=100).saves for b in job.blocks]
    assert [b.hash for b in blocks] == request.hashes()[2:]


# ---- how long it waits -----------------------------------------------------------------------


def waited(world: World, request: FakeRequest, usable: int, live: int) -> float:
    """Seconds until the request is no longer told to ask again; the hub's answer stays the same."""
    began = world.now
    while world.match(request)[0] is None:
        world.now += 0.025
        world.hub.turn()
        if not world.hub.lookups[-1][2].done():
            world.hub.answer(usable, live=live)
        assert world.now - began < 30
    return world.now - began


def test_an_absent_key_is_waited_for_intent_wait_ms_on_the_hint(world: World) -> None:
    request = world.new(decode("d", 300), usable=0)
    assert waited(world, request, 0, 0) == pytest.approx(0.5, abs=0.06)
    assert world.tables == {}


def test_without_the_hint_an_absent_key_is_a_miss_at_once(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=0)
    assert waited(world, request, 0, 0) == 0


@pytest.mark.parametrize(("longest_ms", "stall_s"), [(10_000, STALL_S), (30_000, 3.0)])
def test_a_live_writer_is_waited_for_until_it_makes_no_progress(
    longest_ms: int, stall_s: float
) -> None:
    world = World(settings={"handoff_wait_ms": longest_ms, "staging_bytes": 0})
    request = world.new(FakeRequest("a", 900))
    world.hub.answer(2, live=7)
    assert waited(world, request, 2, 7) == pytest.approx(stall_s, abs=0.06)
    assert world.match(request) == (256, True)


def test_progress_prolongs_the_wait_up_to_handoff_wait_ms() -> None:
    world = World(settings={"handoff_wait_ms": 3000, "staging_bytes": 0})
    request = world.new(FakeRequest("a", 20 * BLOCK))
    world.hub.answer(0, live=20)
    began, usable = world.now, 0
    while world.match(request)[0] is None:
        world.now += 0.3
        usable = min(usable + 1, 19)
        world.hub.turn()
        if not world.hub.lookups[-1][2].done():
            world.hub.answer(usable, live=20)
    assert world.now - began == pytest.approx(3.0, abs=0.31)


def test_handoff_wait_ms_of_0_never_waits() -> None:
    world = World(settings={"handoff_wait_ms": 0})
    request = world.new(FakeRequest("a", 900))
    world.hub.answer(2, live=7)
    assert world.match(request) == (256, True)


def test_a_wait_costs_at_most_one_and_a_half_times_the_own_prefill() -> None:
    world = World(settings={"staging_bytes": 0})
    warm = world.new(FakeRequest("w", 1000, seed=5), usable=0)
    world.match(warm)
    world.alloc(warm)
    world.step(w=1000)
    world.now += 0.4
    world.report()
    request = world.new(FakeRequest("a", 500))
    world.hub.answer(0, live=3)
    # 384 tokens at 0.4 ms each, times 1.5.
    assert waited(world, request, 0, 3) == pytest.approx(0.23, abs=0.03)


def test_a_reservation_holder_never_waits(world: World) -> None:
    first = world.new(prefill("p", 300), usable=0)
    world.match(first)
    world.alloc(first)
    second = world.new(decode("d", 300))
    world.hub.answer(0, live=3)
    assert world.match(second) == (0, False)


def test_a_step_of_decodes_says_nothing_about_prefilling() -> None:
    world = World(settings={"staging_bytes": 0})
    request = world.new(FakeRequest("a", 300), usable=0)
    world.match(request)
    world.alloc(request)
    request.num_computed_tokens = 300
    world.step(a=1)
    world.now += 5
    world.report()
    other = world.new(FakeRequest("b", 900, seed=1))
    world.hub.answer(0, live=7)
    assert waited(world, other, 0, 7) == pytest.approx(STALL_S, abs=0.06)
