"""Lookups of the scheduler half: never blocking, bounded, and remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvserver_vllm import lookups
from kvserver_vllm.lookups import FRESH_S
from tests.support.scheduler_world import (
    PAGE,
    SECTION,
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


# ---- lookups ---------------------------------------------------------------------------------


def test_none_until_the_answer_then_the_tokens_beyond_the_local_hit(world: World) -> None:
    request = world.new(FakeRequest("a", 900))
    assert world.match(request) == (None, False)
    world.hub.answer(5)
    assert world.match(request) == (640, True)
    assert world.match(request, 64) == (576, True)
    assert world.match(request, 640) == (0, False)
    assert world.match(request, 896) == (0, False)
    assert world.hub.lookups[0][0] == request.hashes()


def test_the_lookups_of_a_moment_wake_the_hubs_thread_once_with_the_step(world: World) -> None:
    """To wake it took longer than the rest of `on_new_request`, and each of a crowd did so. The
    engine keeps stepping until the hub has been asked, also one that is paused."""
    requests = [FakeRequest(f"r{n}", 300, seed=n) for n in range(16)]
    for request in requests:
        world.half.on_new_request(request)
        assert world.half.matched_tokens(request, 0) == (None, False)
    assert world.hub.woken == 0
    assert world.half.has_pending_work
    world.step()
    assert world.hub.woken == 1
    assert not world.half.has_pending_work
    assert [asked for asked, _, _ in world.hub.lookups] == [r.hashes() for r in requests]


def test_a_namespace_that_is_left_before_the_step_is_not_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[object] = []
    monkeypatch.setattr(lookups.logger, "exception", errors.append)
    world.half.on_new_request(FakeRequest("a", 300))
    world.half.forget()
    world.step()
    assert (errors, world.hub.lookups) == ([], [])


def test_a_late_answer_is_a_miss_that_is_remembered(world: World) -> None:
    request = world.new(FakeRequest("a", 300))
    world.now += 0.099
    assert world.match(request) == (None, False)
    world.now += 0.002
    assert world.match(request) == (0, False)
    world.hub.answer(2)
    assert world.match(request) == (0, False)


def test_no_answer_is_a_miss_at_once(world: World) -> None:
    request = world.new(FakeRequest("a", 300))
    world.hub.fail()
    assert world.match(request) == (0, False)


def test_a_hub_known_to_be_away_is_not_asked(world: World) -> None:
    world.hub.responsive = False
    request = world.new(FakeRequest("a", 300))
    assert world.hub.lookups == []
    assert world.match(request) == (0, False)


def test_before_the_namespace_is_known_nothing_is_asked(world: World) -> None:
    world.half.open((), PAGE, tails=True)
    request = world.new(FakeRequest("a", 300))
    assert world.match(request) == (0, False)
    assert world.hub.lookups == []


def test_ranks_are_told_the_namespace_once_before_there_is_work(world: World) -> None:
    assert [world.step().sections for _ in range(3)] == [SECTIONS, (), ()]
    another = (replace(SECTION, spec=b"another"),)
    world.half.open(another, PAGE, tails=True)
    assert world.step().sections == another


@pytest.mark.parametrize(
    "attributes",
    [
        {"skip_reading_prefix_cache": True},
        {"sampling_params": SimpleNamespace(prompt_logprobs=3)},
    ],
)
def test_requests_that_want_every_token_computed_are_not_looked_up_but_saved(
    world: World, attributes: dict[str, Any]
) -> None:
    request = world.new(FakeRequest("a", 300, **attributes))
    assert world.hub.lookups == []
    assert world.match(request) == (0, False)
    world.alloc(request)
    assert [len(job.blocks) for job in world.step(a=300).saves] == [2]


@pytest.mark.parametrize(
    "attributes", [{"abort_immediately": True}, {"finished": True}, {"resumable": True}]
)
def test_rejected_and_streamed_requests_are_left_alone(
    world: World, attributes: dict[str, Any]
) -> None:
    request = world.new(FakeRequest("a", 300, **attributes))
    assert world.match(request) == (0, False)
    world.alloc(request)
    assert world.hub.lookups == world.hub.announced == []
    assert not world.step(a=300).saves
    world.half.finished(request, whole=True)


def test_prompts_shorter_than_a_block_ask_nothing(world: World) -> None:
    request = world.new(FakeRequest("a", 127))
    assert world.hub.lookups == []
    assert world.match(request) == (0, False)


def test_an_old_answer_is_asked_for_again(world: World) -> None:
    request = world.new(FakeRequest("a", 300), usable=2)
    assert world.match(request) == (256, True)
    world.now += FRESH_S + 0.1
    assert world.match(request) == (None, False)
    world.hub.answer(1)
    assert world.match(request) == (128, True)


def test_lookups_pin_only_with_an_expiry(world: World) -> None:
    world.new(FakeRequest("a", 300))
    assert 0 < world.hub.lookups[0][1] <= 5


def test_a_producer_looks_nothing_up_and_waits_only_for_its_hashes() -> None:
    world = World(options={"loads": False})
    request = FakeRequest("a", 300)
    world.half.on_new_request(request)
    assert world.match(request) == (None, False)
    world.hub.turn()
    assert world.match(request) == (0, False)
    assert world.hub.lookups == []


def test_extra_keys_change_the_chain(world: World) -> None:
    def item(name: str, offset: int, length: int) -> SimpleNamespace:
        position = SimpleNamespace(offset=offset, length=length)
        return SimpleNamespace(identifier=name, mm_position=position)

    variants: list[dict[str, Any]] = [
        {},
        {"cache_salt": "s"},
        {"cache_salt": "t"},
        {"lora_request": SimpleNamespace(digest=b"x" * 32)},
        {"lora_request": SimpleNamespace(digest=b"y" * 32)},
        {"mm_features": [item("cat", 140, 10)]},
        {"mm_features": [item("dog", 140, 10)]},
        {"mm_features": [item("cat", 141, 10)]},
        {"mm_features": [item("cat", 120, 30)]},
    ]
    chains = []
    for number, attributes in enumerate(variants):
        world.new(FakeRequest(str(number), 300, **attributes))
        chains.append(tuple(world.hub.lookups[-1][0]))
    assert len(set(chains)) == len(chains)
    assert len({chain[1] for chain in chains}) == len(chains)
    # Items that begin in the second block leave the first alone.
    assert chains[5][0] == chains[6][0] == chains[0][0]


def test_prompt_embeddings_are_keyed_by_their_bytes(world: World) -> None:
    torch = pytest.importorskip("torch")
    base = torch.zeros(256, 4)
    other = base.clone()
    other[200, 2] = 1
    for number, embeds in enumerate((base, base.clone(), other)):
        world.new(FakeRequest(str(number), 256, prompt_embeds=embeds))
    first, same, changed = (keys for keys, _, _ in world.hub.lookups)
    assert first == same
    assert first[0] == changed[0]
    assert first[1] != changed[1]


# ---- waiting for another writer --------------------------------------------------------------


def test_waits_for_blocks_that_another_engine_writes_holding_nothing() -> None:
    world = World(settings={"staging_bytes": 0})
    request = world.new(FakeRequest("a", 900))
    world.hub.answer(2, live=7)
    assert world.match(request) == (None, False)
    world.now += 0.03
    assert world.match(request) == (None, False)
    world.hub.answer(7)
    assert world.hub.lookups[-1][1] == 0.0
    assert world.match(request) == (896, True)
    assert world.tables == {}


def test_does_not_wait_for_its_own_announcements(world: World) -> None:
    first = world.new(FakeRequest("a", 900), usable=0)
    world.match(first)
    world.alloc(first)
    world.step()
    assert world.hub.announced == [first.hashes()]
    second = world.new(FakeRequest("b", 900))
    world.hub.answer(0, live=7)
    assert world.match(second) == (0, False)
    world.half.finished(first, whole=True)
    third = world.new(FakeRequest("c", 900))
    world.hub.answer(0, live=7)
    assert world.match(third) == (None, False)


# ---- whether a hit pays ----------------------------------------------------------------------


def measured(world: World, *, prefill_s: float, load_s: float) -> None:
    """The engine has computed 1,000 tokens in one step, and loaded 512."""
    warm = world.new(FakeRequest("warm", 1000, seed=90), usable=0)
    world.match(warm)
    world.alloc(warm)
    world.step(warm=1000)
    world.now += prefill_s
    world.report()
    world.half.finished(warm, whole=True)
    load = world.new(FakeRequest("load", 600, seed=91), usable=4)
    start_load(world, load)
    world.now += load_s
    world.report(received={"load"})


def hits(world: World, count: int, **attributes: Any) -> list[bool]:
    """Whether each of so many requests with a hit of 512 tokens takes it."""
    taken = []
    for number in range(count):
        request = world.new(FakeRequest(f"r{number}", 600, seed=number, **attributes), usable=4)
        tokens, _ = world.match(request)
        assert world.match(request)[0] == tokens, "decided once"
        taken.append(tokens == 512)
    return taken


def test_a_hit_that_costs_more_than_computing_it_is_not_taken(world: World) -> None:
    measured(world, prefill_s=0.1, load_s=0.4)
    taken = hits(world, 40)
    assert [at for at, took in enumerate(taken) if took] == [15, 31], "to go on measuring"
    assert world.half.counters["hits_declined"] == 38


def test_a_hit_that_costs_less_is_taken(world: World) -> None:
    measured(world, prefill_s=0.4, load_s=0.1)
    assert all(hits(world, 20))


def test_before_both_are_measured_every_hit_is_taken(world: World) -> None:
    assert all(hits(world, 3))


def test_configuration_can_force_every_hit() -> None:
    world = World(settings={"hits": "always"})
    measured(world, prefill_s=0.1, load_s=0.4)
    assert all(hits(world, 20))


def test_a_hand_off_is_always_taken(world: World) -> None:
    measured(world, prefill_s=0.1, load_s=0.4)
    hint = {"do_remote_prefill": True, "do_remote_decode": False}
    request = world.new(FakeRequest("d", 600, kv_transfer_params=hint), usable=5)
    assert world.match(request) == (600, True)


def test_hits_below_the_configured_floor_are_computed() -> None:
    world = World(settings={"min_hit_tokens": 513})
    assert hits(world, 2) == [False, False]
    assert world.match(world.new(FakeRequest("b", 700, seed=7), usable=5)) == (640, True)


def test_a_step_that_computes_one_token_each_of_many_prompts_says_nothing_of_prefilling(
    world: World,
) -> None:
    """Whole hits: what the step takes is what decoding takes."""
    requests = [world.new(FakeRequest(f"r{n}", 2, seed=n)) for n in range(100)]
    scheduled = {request.request_id: 1 for request in requests}
    world.step(**scheduled)
    world.now += 5.0
    world.report()
    assert world.half._common.pace.prefill_s(1000) is None
    world.new(FakeRequest("long", 100))
    world.step(long=100)
    world.now += 5.0
    world.report()
    assert world.half._common.pace.prefill_s(1000) == pytest.approx(50.0)
