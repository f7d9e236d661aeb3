"""An engine that is told to stop or start producing or consuming, with requests in flight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from tests.support.scheduler_world import FakeHub, FakeRequest, World, start_load


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while FakeHub.opened:
        FakeHub.opened.pop().close()


def test_pushes_stop_what_was_announced_is_taken_back_and_pins_go(world: World) -> None:
    request = world.new(FakeRequest("a", 500), usable=0)
    assert world.match(request) == (0, False)
    table = world.alloc(request)
    (job,) = world.step(a=256).saves
    assert len(job.blocks) == 2
    request.num_computed_tokens = 256
    world.half.obey(loads=True, saves=False)
    assert not world.step(a=200).saves
    world.hub.turn()
    assert world.hub.withdrawn == [request.hashes()[2:]]
    assert world.pinned(table), "the push that was ordered goes on"
    world.report(saved={job.job: 1})
    assert world.pinned(table) == []
    assert not world.half.has_pending_work


def test_a_request_in_flight_is_pushed_on_when_producing_resumes(world: World) -> None:
    request = world.new(FakeRequest("a", 500), usable=0)
    world.match(request)
    world.alloc(request)
    world.half.obey(loads=True, saves=False)
    assert not world.step(a=256).saves
    request.num_computed_tokens = 256
    world.half.obey(loads=True, saves=True)
    (job,) = world.step(a=200).saves
    assert [block.hash for block in job.blocks] == request.hashes()[:3], "nothing is left out"


def test_lookups_stop_and_a_load_under_way_ends_as_it_would(world: World) -> None:
    loading = world.new(FakeRequest("a", 300), usable=2)
    (job,) = start_load(world, loading).loads
    answered = world.new(FakeRequest("b", 400, seed=2), usable=3)
    world.half.obey(loads=False, saves=True)
    assert world.match(answered) == (0, False), "an answer is not taken any more"
    asked = len(world.hub.lookups)
    later = world.new(FakeRequest("c", 400, seed=3))
    assert len(world.hub.lookups) == asked
    assert world.match(later) == (0, False)
    world.report(received={job.request})
    world.half.obey(loads=True, saves=True)
    again = world.new(FakeRequest("d", 300, seed=4), usable=2)
    assert world.match(again) == (256, True)


def test_a_prefill_leg_gives_no_hint_once_the_engine_has_stopped_producing(world: World) -> None:
    params = {"do_remote_decode": True}
    request = world.new(FakeRequest("a", 300, kv_transfer_params=params), usable=0)
    world.half.obey(loads=True, saves=False)
    assert world.half.finished(request, whole=True) is None
