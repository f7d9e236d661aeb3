"""Loads and reports of the worker half against a hub that holds, delays or fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")


from kvclient import Unavailable
from kvserver_vllm.layout import SKIP
from kvserver_vllm.messages import LoadJob, RankReport, SaveJob, StepMeta
from tests.support.worker_world import HEADS, LAYERS, NAMES, PAGES, FakeLink, Rank, block, key


@pytest.fixture
def link() -> Iterator[FakeLink]:
    link = FakeLink()
    yield link
    link.close()


@pytest.fixture
def rank(link: FakeLink) -> Rank:
    return Rank(link)


# ---- loads -----------------------------------------------------------------------------------


def store(link: FakeLink, rank: Rank, count: int) -> list[np.ndarray]:
    shape = (LAYERS, HEADS, PAGES, rank.pages.format.page_bytes)
    source = np.random.default_rng(5)
    data = [source.integers(0, 256, shape, np.uint8) for _ in range(count)]
    link.opened.stored = {key(i): one for i, one in enumerate(data)}
    return data


def load(rank: Rank, count: int, **options: Any) -> LoadJob:
    blocks = tuple(block(i, 4 * i) for i in range(count))
    return LoadJob("a", blocks, **{"deadline_s": 5.0, **options})


def test_a_load_fills_the_pages_and_is_reported_once(link: FakeLink, rank: Rank) -> None:
    data = store(link, rank, 4)
    rank.bind(loads=[load(rank, 4)])
    assert rank.half.take_received() == set()
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set()
    assert rank.half.take_report() is None
    for number, one in enumerate(data):
        assert np.array_equal(rank.cells(block(number, 4 * number).pages), one)
    assert rank.half.take_received() == set()


def test_missing_and_corrupt_blocks_are_named(link: FakeLink, rank: Rank) -> None:
    store(link, rank, 4)
    del link.opened.stored[key(3)]
    link.opened.corrupt = {key(1)}
    rank.bind(loads=[load(rank, 4)])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {4, 5, 6, 7, 12, 13, 14, 15}
    assert rank.half.take_report() == RankReport({}, {"a": 1})
    assert rank.half.take_invalid() == set()


def test_skipped_pages_are_neither_written_nor_named(link: FakeLink, rank: Rank) -> None:
    store(link, rank, 1)
    before = rank.cells([4, 5])
    part = block(0, 4)._replace(pages=(SKIP, SKIP, 6, 7))
    gone = block(9, 8)._replace(pages=(SKIP, 9, 10, 11))
    rank.bind(loads=[LoadJob("a", (part, gone), 5.0)])
    rank.half.start_loads()
    link.turn()
    rank.half.take_received()
    assert rank.half.take_invalid() == {9, 10, 11}
    assert np.array_equal(rank.cells([4, 5]), before)


def test_a_load_ends_at_its_deadline_with_what_did_not_arrive(link: FakeLink, rank: Rank) -> None:
    store(link, rank, 4)
    link.opened.gate.clear()
    rank.bind(loads=[load(rank, 2, deadline_s=60.0, stall_s=600.0)])
    rank.half.start_loads()
    link.turn(30.0)
    assert rank.half.take_received() == set()
    link.turn(30.1)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set(range(8))
    before = rank.cells(range(8))
    link.opened.gate.set()
    link.turn()
    assert np.array_equal(rank.cells(range(8)), before), "nothing is written after the report"


def test_a_hub_that_hangs_in_mid_load_ends_it_before_its_deadline(
    link: FakeLink, rank: Rank
) -> None:
    """The load holds blocks of the engine; it used to wait for all of `load_deadline_ms`."""
    store(link, rank, 2)
    link.opened.filling = {key(1): 0}
    rank.bind(loads=[load(rank, 2, deadline_s=600.0, stall_s=60.0)])
    rank.half.start_loads()
    link.turn(30.0)
    assert rank.half.take_received() == set()
    link.turn(30.1)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {4, 5, 6, 7}, "what has arrived by then is kept"
    (doubt,) = link.doubts
    assert isinstance(doubt, TimeoutError)


def test_a_load_that_makes_progress_may_take_its_whole_time(link: FakeLink, rank: Rank) -> None:
    store(link, rank, 4)
    link.opened.filling = {key(number): 0 for number in range(4)}
    rank.bind(loads=[load(rank, 4, deadline_s=600.0, stall_s=60.0)])
    rank.half.start_loads()
    for number in range(4):
        link.turn(30.0)
        assert rank.half.take_received() == set()
        link.opened.wrote(key(number), LAYERS)
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set()


@pytest.mark.parametrize("error", [Unavailable("gone"), ValueError("a bug")])
def test_a_load_that_fails_is_reported_like_any_other(
    link: FakeLink, rank: Rank, error: Exception
) -> None:
    store(link, rank, 1)
    link.opened.error = error
    rank.bind(loads=[load(rank, 1)])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == {0, 1, 2, 3}


@pytest.mark.parametrize("started", [False, True])
def test_an_aborted_load_is_reported_without_failed_blocks(
    link: FakeLink, rank: Rank, started: bool
) -> None:
    """Also one whose abort comes while the link's thread has yet to begin it."""
    store(link, rank, 1)
    link.opened.gate.clear()
    rank.bind(loads=[load(rank, 1)])
    rank.half.start_loads()
    if started:
        link.turn()
    rank.bind(aborts=["a"])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set()
    assert rank.half.take_report() is None


def test_a_load_that_is_aborted_while_a_block_is_verified_gives_it_back(
    link: FakeLink, rank: Rank
) -> None:
    store(link, rank, 1)
    link.judging.clear()
    rank.bind(loads=[load(rank, 1)])
    rank.half.start_loads()
    link.turn()
    assert link.opened.held == 1
    rank.bind(aborts=["a"])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert link.opened.held == 0


def test_steps_without_orders_do_nothing(link: FakeLink, rank: Rank) -> None:
    rank.half.bind(StepMeta())
    for name in NAMES:
        rank.half.layer_saved(name)
    rank.half.start_loads()
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_received() == set()
    assert rank.half.take_report() is None


def test_a_namespace_is_opened_as_soon_as_it_is_told(link: FakeLink, rank: Rank) -> None:
    rank.bind()
    rank.bind()
    link.turn()
    assert link.greeted == [b"spec"]


def test_the_event_log_hashes_what_stands_in_the_engines_pages(
    link: FakeLink, tmp_path: Path
) -> None:
    source = Rank(link, tmp_path / "p.jsonl")
    source.bind(saves=[SaveJob(1, (block(1, 4),))])
    source.half.layer_saved(NAMES[0])
    source.half.step_saved()
    link.turn()
    target = Rank(link, tmp_path / "d.jsonl")
    for tensor in target.kv:
        tensor.zero_()
    target.bind(loads=[LoadJob("b", (block(1, 8),), 5.0)])
    target.half.start_loads()
    link.turn()
    (pushed,) = source.events("pushed")
    (pulled,) = target.events("pulled")
    assert pushed["cells"] == pulled["cells"]
    hashes = {page for layer in pushed["cells"] for cell in layer for page in cell}
    assert len(hashes) == LAYERS * HEADS * PAGES
    assert pushed["at"] == list(range(PAGES))
    assert pulled["bytes"] == LAYERS * HEADS * PAGES * target.pages.format.page_bytes
    assert [e["layer"] for e in source.events("save_layer")] == [0]
    assert [e["layers"] for e in source.events("commit")][-1][1] == LAYERS


def test_reports_of_ranks_add_up() -> None:
    one = RankReport({1: 1, 2: 1}, {"a": 5})
    other = RankReport({2: 1}, {"a": 3, "b": 0})
    assert one.aggregate(other) == RankReport({1: 1, 2: 2}, {"a": 3, "b": 0})


@pytest.mark.parametrize("started", [False, True])
def test_nothing_is_used_of_a_load_whose_namespace_was_left(
    link: FakeLink, rank: Rank, started: bool
) -> None:
    """Two blocks, one of which may have arrived: both are reported as failed."""
    store(link, rank, 2)
    link.opened.gate.clear()
    rank.bind(loads=[load(rank, 2)])
    rank.half.start_loads()
    if started:
        link.turn()
    rank.bind(voids=["a"])
    rank.half.start_loads()
    link.opened.gate.set()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set(range(8))
    report = rank.half.take_report()
    assert report is not None
    assert report.failed == {"a": 0}
    rank.bind(loads=[load(rank, 1)])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set(), "the next load of that name is its own"
