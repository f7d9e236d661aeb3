"""Pushes of the worker half: layer by layer, pinned for a bounded time, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("vllm")


from kvclient import Unavailable
from kvproto.grid import Region
from kvserver_vllm.messages import RankReport, SaveJob
from tests.support.worker_world import (
    DIMS,
    HEADS,
    NAMES,
    REGION,
    TOKENS,
    FakeLink,
    Rank,
    block,
    key,
    tail,
)

PIN_MS = 60_000


@pytest.fixture
def link() -> Iterator[FakeLink]:
    link = FakeLink()
    yield link
    link.close()


@pytest.fixture
def rank(link: FakeLink) -> Rank:
    return Rank(link)


# ---- pushes ----------------------------------------------------------------------------------


def test_layers_are_committed_while_the_forward_pass_goes_on(link: FakeLink, rank: Rank) -> None:
    rank.bind(saves=[SaveJob(7, (block(1, 4), block(2, 8)))])
    link.turn()
    assert link.opened.commits == []
    for layer, name in enumerate(NAMES[:-1]):
        rank.half.layer_saved(name)
        link.turn()
        done = Region(layer, layer + 1, 0, HEADS)
        assert link.opened.commits[-1] == ([0, 1], done)
        assert rank.half.take_report() is None
    rank.half.layer_saved(NAMES[-1])
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_report() == RankReport({7: 1})
    assert np.array_equal(link.opened.stored[key(1)], rank.cells([4, 5, 6, 7]))
    assert np.array_equal(link.opened.stored[key(2)], rank.cells([8, 9, 10, 11]))


def test_two_pushes_of_one_tail_after_different_traffic_are_byte_equal(link: FakeLink) -> None:
    """Positions of a tail's last page behind its tokens hold another request's KV: zeroed."""
    stored, unzeroed = [], []
    for traffic in (1.0, 2.0):
        rank = Rank(link)
        for layer in rank.kv:
            # Two pages of 32 tokens, K as [D, N] then V as [N, D]; the tail ends 5 tokens into the
            # second.
            layer[5].view(HEADS, 2, -1)[:, 0].view(HEADS, DIMS, TOKENS)[:, :, 5:] = traffic
            layer[5].view(HEADS, 2, -1)[:, 1].view(HEADS, TOKENS, DIMS)[:, 5:] = traffic
        rank.bind(saves=[SaveJob(1, (tail(1, 4, TOKENS + 5),))])
        rank.half.step_saved()
        link.turn()
        stored.append(link.opened.stored.pop(key(1)))
        unzeroed.append(rank.cells([4, 5]))
    assert stored[0].shape[2] == 2
    assert np.array_equal(*stored)
    assert not np.array_equal(*unzeroed), "the control: as they stand in the engine they differ"


def test_layers_that_no_hook_took_are_pushed_after_the_step(link: FakeLink, rank: Rank) -> None:
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    rank.half.layer_saved(NAMES[2])
    link.turn()
    assert link.opened.commits == []
    rank.half.step_saved()
    link.turn()
    assert link.opened.commits == [([0], REGION)]
    assert np.array_equal(link.opened.stored[key(1)], rank.cells([4, 5, 6, 7]))


def test_the_hooks_only_enqueue_even_when_the_hub_hangs(link: FakeLink, rank: Rank) -> None:
    link.opened.gate.clear()
    taken = []
    for step in range(50):
        began = time.monotonic()
        rank.bind(saves=[SaveJob(step, (block(step, 4),))])
        for name in NAMES:
            rank.half.layer_saved(name)
        rank.half.step_saved()
        taken.append(time.monotonic() - began)
    assert sorted(taken)[40] < 0.01, "a pause of the machine is none of the hooks'"


def test_pages_are_let_go_pin_ms_after_the_step_whatever_the_hub_does(link: FakeLink) -> None:
    rank = Rank(link, pin_ms=PIN_MS)
    link.opened.gate.clear()
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    link.turn(2 * PIN_MS / 1e3)
    assert rank.half.take_report() is None, "the step still runs"
    rank.half.step_saved()
    link.turn(0.9 * PIN_MS / 1e3)
    assert rank.half.take_report() is None
    link.turn(0.2 * PIN_MS / 1e3)
    assert rank.half.take_report() == RankReport({1: 1}, lost=[key(1)])
    assert rank.half.counters["saves_dropped.late"] == 1
    link.opened.gate.set()
    link.turn()
    assert link.opened.stored == {}


def test_pages_are_let_go_in_time_while_a_hub_that_hangs_is_told_of_the_end(
    link: FakeLink,
) -> None:
    """What was reserved is given back at the hub, which may take as long as a call may."""
    rank = Rank(link, pin_ms=PIN_MS)
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    link.turn()
    link.opened.gate.clear()
    rank.half.layer_saved(NAMES[0])
    link.turn()
    for name in NAMES[1:]:
        rank.half.layer_saved(name)
    rank.half.step_saved()
    link.turn(1.1 * PIN_MS / 1e3)
    assert rank.half.take_report() == RankReport({1: 1}, lost=[key(1)])
    assert rank.half.counters["saves_dropped.late"] == 1
    rank.kv[1].zero_()  # the pages are another's now
    link.opened.gate.set()
    link.turn()
    assert rank.half.take_report() is None
    assert link.opened.stored == {}
    assert link.opened.aborted == 1


def test_pages_are_let_go_before_the_last_commit_is_answered(link: FakeLink, rank: Rank) -> None:
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    link.turn()
    link.opened.gate.clear()
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_report() == RankReport({1: 1})
    link.opened.gate.set()
    link.turn()
    assert key(1) in link.opened.stored


def test_a_failed_push_lets_its_pages_go_and_is_no_error(link: FakeLink, rank: Rank) -> None:
    link.opened.error = Unavailable("gone")
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    link.turn()
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_report() == RankReport({1: 1}, lost=[key(1)])
    assert link.doubts == [link.opened.error]


def test_pages_that_cannot_be_copied_are_given_up(
    link: FakeLink, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the device that they are on has failed."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(rank.pages, "gather", fail)
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_report() == RankReport({1: 1}, lost=[key(1)])
    assert rank.half.counters["saves_dropped.copy"] == 1
    assert link.opened.aborted == 1


def test_blocks_that_the_hub_has_are_not_written(link: FakeLink, rank: Rank) -> None:
    link.opened.refused = {key(1)}
    rank.bind(saves=[SaveJob(1, (block(1, 4), block(2, 8)))])
    rank.half.step_saved()
    link.turn()
    assert link.opened.commits == [([1], REGION)]
    link.opened.refused = {key(3)}
    rank.bind(saves=[SaveJob(2, (block(3, 4),))])
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_report() == RankReport({1: 1, 2: 1})


def test_blocks_that_the_hub_has_no_room_for_are_given_up(link: FakeLink, rank: Rank) -> None:
    link.opened.no_space = {key(1)}
    rank.bind(saves=[SaveJob(1, (block(1, 4), block(2, 8)))])
    rank.half.step_saved()
    link.turn()
    assert link.opened.commits == [([1], REGION)]
    assert rank.half.counters["saves_dropped.hub"] == 1
    assert rank.half.take_report() == RankReport({1: 1}, lost=[key(1)])


def test_a_full_queue_drops_the_save_and_counts_it(link: FakeLink) -> None:
    rank = Rank(link, jobs_max=2)
    link.opened.gate.clear()
    for job in range(4):
        rank.bind(saves=[SaveJob(job, (block(job, 4),))])
    assert rank.half.counters["saves_dropped.queue"] == 2
    assert rank.half.take_report() == RankReport({2: 1, 3: 1}, lost=[key(2), key(3)])


def test_a_replica_pushes_nothing_and_reports_all_the_same(link: FakeLink, rank: Rank) -> None:
    rank.half._pushes.on = False
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    rank.half.step_saved()
    link.turn()
    assert link.opened.commits == []
    assert rank.half.take_report() == RankReport({1: 1})
