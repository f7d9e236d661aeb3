"""Fetches of the worker half: parts as they are committed, held in bounds, and given back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvserver_vllm.messages import FetchJob, FetchProgress, LoadJob, SaveJob
from tests.support.worker_world import LAYERS, PAGES, TOKENS, FakeLink, Rank, block, key


@pytest.fixture
def link() -> Iterator[FakeLink]:
    link = FakeLink()
    yield link
    link.close()


@pytest.fixture
def rank(link: FakeLink) -> Rank:
    """Blocks 1 and 2 are at the hub as they stand in its pages 0 ... 7."""
    rank = Rank(link)
    rank.bind(saves=[SaveJob(1, (block(1, 0), block(2, 4)))])
    rank.half.step_saved()
    link.turn()
    rank.half.take_report()
    return rank


def fetch(rank: Rank, link: FakeLink) -> None:
    job = FetchJob("a", (key(1), key(2)), (PAGES * TOKENS, PAGES * TOKENS), 5.0)
    rank.bind(fetches=[job])
    rank.half.start_loads()
    link.turn()


def progress(rank: Rank) -> FetchProgress | None:
    report = rank.half.take_report()
    return report.fetched["a"][0] if report is not None and report.fetched else None


def load(rank: Rank, link: FakeLink, deadline_s: float = 5.0, **options: float) -> None:
    job = LoadJob("a", (block(1, 8), block(2, 12)), deadline_s, fetched=True, **options)
    rank.bind(loads=[job])
    rank.half.start_loads()
    link.turn()


def test_layers_are_held_as_they_are_committed_and_land_when_blocks_are_there(
    link: FakeLink, rank: Rank
) -> None:
    hub = link.opened
    hub.filling = {key(1): 1, key(2): 0}
    fetch(rank, link)
    first = progress(rank)
    assert first is not None
    assert (first.whole, first.cells, first.near, first.ended) == (0, 1, False, False)
    hub.wrote(key(1), LAYERS)
    link.turn()
    second = progress(rank)
    assert second is not None
    assert (second.whole, second.cells, second.near) == (1, LAYERS, False)
    load(rank, link)
    assert rank.half.take_received() == set(), "the second block is not written yet"
    hub.wrote(key(2), LAYERS)
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set()
    assert np.array_equal(rank.cells(range(8, 16)), rank.cells(range(8)))
    assert hub.held == 0


def test_all_that_is_there_is_near_and_ended(link: FakeLink, rank: Rank) -> None:
    fetch(rank, link)
    assert progress(rank) == FetchProgress(whole=2, cells=2 * LAYERS, near=True, ended=True)
    assert link.opened.held == 2 * LAYERS


def test_a_dropped_fetch_gives_everything_back(link: FakeLink, rank: Rank) -> None:
    link.opened.filling = {key(2): 2}
    fetch(rank, link)
    assert link.opened.held == LAYERS + 2
    rank.bind(drops=["a"])
    rank.half.start_loads()
    link.turn()
    assert link.opened.held == 0
    rank.bind(drops=["a"])
    rank.half.start_loads()
    link.turn()


def test_a_writer_that_is_gone_ends_the_fetch_with_what_is_whole(
    link: FakeLink, rank: Rank
) -> None:
    link.opened.filling = {key(2): 2}
    fetch(rank, link)
    link.opened.wrote(key(2), -1)
    link.turn()
    last = progress(rank)
    assert last is not None
    assert (last.whole, last.near, last.ended) == (1, False, True)
    load(rank, link)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {12, 13, 14, 15}, "the block that was lost is computed"
    assert np.array_equal(rank.cells(range(8, 12)), rank.cells(range(4)))
    assert link.opened.held == 0


def test_a_load_that_is_aborted_while_a_part_is_verified_gives_all_of_the_block_back(
    link: FakeLink, rank: Rank
) -> None:
    fetch(rank, link)
    link.judging.clear()
    load(rank, link)
    assert link.opened.held == 2 * LAYERS
    rank.bind(aborts=["a"])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert link.opened.held == 0


def test_a_short_wait_for_a_writer_is_no_short_deadline_for_the_hub(
    link: FakeLink, rank: Rank
) -> None:
    """A hub that needed longer to answer, or whose bytes did to come, counted as gone: this engine
    neither looked up nor pushed anything until it had answered a probe."""
    rank.bind(fetches=[FetchJob("a", (key(1), key(2)), (PAGES * TOKENS,) * 2, 0.01)])
    rank.half.start_loads()
    link.turn()
    assert len(link.opened.waits) == LAYERS
    for wait_s, deadline_s in link.opened.waits:
        assert wait_s >= 1.0, "who ends the wait is the scheduler half"
        assert deadline_s >= 1.0


def test_a_corrupt_part_fails_its_block_only(link: FakeLink, rank: Rank) -> None:
    fetch(rank, link)
    link.opened.corrupt.add(key(1))
    rank.bind(drops=["a"])
    rank.half.start_loads()
    link.turn()
    fetch(rank, link)
    load(rank, link)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {8, 9, 10, 11}


def test_a_load_of_a_fetch_ends_at_its_deadline(link: FakeLink, rank: Rank) -> None:
    link.opened.filling = {key(2): 2}
    fetch(rank, link)
    load(rank, link, deadline_s=60.0, stall_s=600.0)
    assert rank.half.take_received() == set()
    link.turn(60.1)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {12, 13, 14, 15}
    assert link.opened.held == 0


def test_what_fetches_hold_is_a_figure(link: FakeLink, rank: Rank) -> None:
    def told() -> float:
        figures = rank.half.figures.take()
        assert figures is not None
        return figures.gauge("fetched_bytes")

    assert told() == 0
    fetch(rank, link)
    assert told() == rank.cells(range(2 * PAGES)).nbytes
    rank.bind(drops=["a"])
    rank.half.start_loads()
    link.turn()
    assert told() == 0


def test_a_landing_in_which_nothing_arrives_ends_before_its_deadline(
    link: FakeLink, rank: Rank
) -> None:
    link.opened.filling = {key(2): 2}
    fetch(rank, link)
    job = LoadJob("a", (block(1, 8), block(2, 12)), 600.0, fetched=True, stall_s=60.0)
    rank.bind(loads=[job])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == set()
    link.turn(60.1)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {12, 13, 14, 15}
    assert link.opened.held == 0


def test_staging_is_bounded_and_what_does_not_fit_is_refused(link: FakeLink) -> None:
    rank = Rank(link)
    size = rank.cells(range(2 * PAGES)).nbytes
    for room, refused in ((size, False), (size - 1, True)):
        rank = Rank(link, staging_bytes=room)
        fetch(rank, link)
        told = progress(rank)
        assert told is not None
        assert told.refused is refused
    rank = Rank(link, staging_bytes=size)
    fetch(rank, link)
    rank.bind(fetches=[FetchJob("b", (key(1),), (PAGES * TOKENS,), 5.0)])
    rank.half.start_loads()
    link.turn()
    report = rank.half.take_report()
    assert report is not None
    assert report.fetched["b"][0].refused
    rank.bind(drops=["a"], fetches=[])
    rank.half.start_loads()
    link.turn()
    rank.bind(fetches=[FetchJob("b", (key(1),), (PAGES * TOKENS,), 5.0)])
    rank.half.start_loads()
    link.turn()
    report = rank.half.take_report()
    assert report is not None
    assert not report.fetched["b"][0].refused
