"""Layers of several kinds: which namespaces they are, and what is pushed, needed and pulled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from kvproto.grid import Region
from kvserver_vllm.config import Settings
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.events import EventLog
from kvserver_vllm.grouped import GroupedPages
from kvserver_vllm.layout import CPU_ENCODING, SKIP
from kvserver_vllm.messages import (
    BlockPages,
    LoadJob,
    RankHolds,
    RankInfo,
    RankReport,
    SaveJob,
    Section,
    StepMeta,
)
from kvserver_vllm.rank import RankSection
from kvserver_vllm.sections import by_section, kinds, section_attribute
from kvserver_vllm.worker import WorkerHalf
from tests.support.scheduler_world import BLOCK, ENGINE_BLOCK, FakeHub, FakeRequest, World
from tests.support.worker_world import FakeLink, FakeNamespace, key

FULL = Section(b"full", {0: 0}, groups=(0,))
WINDOW = Section(b"window", {0: 0}, window=64, trimmed=True, groups=(1, 2))
PAGES = BLOCK // ENGINE_BLOCK


def info(layers: range, window: int = 0, **changes: Any) -> RankInfo:
    values: dict[str, Any] = {
        "head_start": 0,
        "heads": 2,
        "encoding": "cpu-attn-kt/1",
        "kv_dtype": "float32",
        "page_tokens": 32,
        "page_bytes": 8192,
        "trimmed": window > 0,
        **changes,
    }
    return RankInfo(layers=tuple(layers), window=window, **values)


# ---- which sections there are ----------------------------------------------------------------


def test_full_attention_comes_first_then_the_wider_window() -> None:
    assert kinds([64, 0, 128, 64, 0]) == [0, 128, 64]
    assert kinds([64, 64]) == [64]


def test_ranks_are_joined_section_by_section_though_one_has_no_layer_of_it() -> None:
    ranks = {
        (0, 0): RankHolds((info(range(3), 64),)),
        (1, 0): RankHolds((info(range(3, 4)), info(range(4, 7), 64))),
    }
    full, window = by_section(ranks)
    assert {rank: held.layers for rank, held in full.items()} == {(1, 0): (3,)}
    assert {rank: held.layers for rank, held in window.items()} == {
        (0, 0): (0, 1, 2),
        (1, 0): (4, 5, 6),
    }
    assert section_attribute(full, 2) == {"section": "full"}
    assert section_attribute(window, 2) == {"section": "window 64"}
    assert section_attribute(window, 1) == {}


def test_pages_of_different_tokens_are_refused_by_name() -> None:
    held = RankHolds((info(range(1)), info(range(1, 2), 64, page_tokens=16)))
    with pytest.raises(UnsupportedError, match=r"pages of different tokens: \[16, 32\]"):
        by_section({(0, 0): held})


@pytest.mark.parametrize(
    ("window", "blocks"), [(1, 1), (64, 1), (129, 1), (130, 2), (257, 2), (4096, 32)]
)
def test_a_window_needs_the_blocks_that_hold_the_tokens_before_the_next(
    window: int, blocks: int
) -> None:
    section = replace(WINDOW, window=window)
    assert section.blocks_needed(BLOCK) == blocks
    assert section.blocks_needed(BLOCK, tail=True) == blocks + 1


def test_an_engine_that_keeps_all_kv_of_a_window_needs_all_of_it() -> None:
    assert replace(WINDOW, trimmed=False).blocks_needed(BLOCK) == 0
    assert FULL.blocks_needed(BLOCK) == 0


# ---- the scheduler half ----------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    world = World(options={"group_tokens": [ENGINE_BLOCK] * 3})
    world.half.open((FULL, WINDOW), ENGINE_BLOCK, tails=True)
    yield world
    for hub in FakeHub.opened:
        hub.close()
    FakeHub.opened.clear()


def tables_of(world: World, request: FakeRequest, nulls: int = 0) -> list[list[int]]:
    """Block tables of the three groups; the windowed ones begin with `nulls` null blocks."""
    count = -(-request.num_tokens // ENGINE_BLOCK)
    null = world.pool.null_block.block_id
    tables = [[b.block_id for b in world.pool.get_new_blocks(count)] for _ in range(3)]
    for table in tables[1:]:
        table[:nulls] = [null] * nulls
    return tables


def step(world: World, request: FakeRequest, tables: list[list[int]]) -> list[SaveJob]:
    state = SimpleNamespace(get_block_ids=lambda name: tuple(tables))
    scheduled = {request.request_id: request.num_tokens}
    output = SimpleNamespace(num_scheduled_tokens=scheduled, kv_connector_block_state=state)
    return world.half.build_meta(output).saves


def groups_of(block: BlockPages) -> list[list[int]]:
    return [list(block.pages[g * PAGES : (g + 1) * PAGES]) for g in range(3)]


def test_a_block_names_the_pages_of_each_group_and_pins_them_all(world: World) -> None:
    request = world.new(FakeRequest("a", 2 * BLOCK), usable=0)
    tables = tables_of(world, request)
    world.half.after_alloc(request, tables, 0)
    (job,) = step(world, request, tables)
    assert groups_of(job.blocks[1]) == [table[PAGES:] for table in tables]
    everything = [block for table in tables for block in table]
    assert sorted(world.pinned(everything)) == sorted(everything)
    world.report(saved={job.job: 1})
    assert world.pinned(everything) == []


def test_blocks_whose_window_was_given_up_are_saved_for_the_full_layers(world: World) -> None:
    """The null block is never pinned, nor is its page named."""
    request = world.new(FakeRequest("a", 3 * BLOCK), usable=0)
    tables = tables_of(world, request, nulls=PAGES + 1)
    world.half.after_alloc(request, tables, 0)
    (job,) = step(world, request, tables)
    gone, cut, whole = (groups_of(block) for block in job.blocks)
    assert gone[1] == gone[2] == [SKIP] * PAGES
    assert (cut[1][0], cut[1][1:]) == (SKIP, tables[1][PAGES + 1 : 2 * PAGES])
    assert [group[0] for group in whole] == [table[2 * PAGES] for table in tables]
    null = world.pool.null_block.block_id
    assert null not in {page for block in job.blocks for page in block.pages}


def test_a_load_leaves_out_what_the_window_has_left_behind(world: World) -> None:
    request = world.new(FakeRequest("a", 3 * BLOCK + 5), usable=3)
    assert world.match(request) == (3 * BLOCK, True)
    tables = tables_of(world, request, nulls=2 * PAGES + 2)
    world.half.after_alloc(request, tables, 3 * BLOCK)
    (job,) = world.step().loads
    first, _, last = (groups_of(block) for block in job.blocks)
    assert first == [tables[0][:PAGES], [SKIP] * PAGES, [SKIP] * PAGES]
    assert last[1] == [SKIP, SKIP, *tables[1][2 * PAGES + 2 : 3 * PAGES]]
    assert world.half.tiers_of(request) == {2: 3 * BLOCK}


def test_a_prompt_that_is_there_to_its_last_token_is_told_short_of_it(world: World) -> None:
    """That token is computed again, and its window begins one token before the next one's."""
    request = world.new(FakeRequest("a", 2 * BLOCK), usable=2)
    assert world.match(request) == (2 * BLOCK - 1, True)
    tables = tables_of(world, request, nulls=PAGES + 1)
    world.half.after_alloc(request, tables, 2 * BLOCK - 1)
    (job,) = world.step().loads
    assert [block.hash for block in job.blocks] == request.hashes()
    assert groups_of(job.blocks[1])[0] == tables[0][PAGES:]
    world.half.open((FULL,), ENGINE_BLOCK, tails=True)
    other = world.new(FakeRequest("b", 2 * BLOCK, seed=1), usable=2)
    assert world.match(other) == (2 * BLOCK, True)


# ---- pages of several groups -----------------------------------------------------------------

HEADS, TOKENS, DIMS, BLOCKS = 2, 32, 4, 8


def tensors(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (BLOCKS, HEADS, TOKENS, 2 * DIMS)
    return [torch.rand(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dealt", [[0, 1, 2, 0, 1, 2], [1, 1, 0, 2, 0, 2], [0, 0, 0, 0, 0, 2]])
@pytest.mark.parametrize("stretch", [(0, 6), (1, 5), (2, 3)])
def test_layers_of_several_groups_are_gathered_in_their_own_order(
    dealt: list[int], stretch: tuple[int, int]
) -> None:
    """vLLM deals the layers of a kind out in turn; each group has its own block table."""
    kv = tensors(6)
    pages = GroupedPages(CPU_ENCODING, list(zip(dealt, kv, strict=True)), 3)
    tables = [[1, 2, 5], [3, 4, 0], [7, 6, 1]]
    ids = [page for table in tables for page in table]
    start, stop = stretch
    out = np.zeros((stop - start, HEADS, 3, pages.format.page_bytes), np.uint8)
    pages.gather(start, stop, ids, out)
    for layer in range(start, stop):
        alone = GroupedPages(CPU_ENCODING, [(0, kv[layer])], 1)
        want = np.zeros((1, *out.shape[1:]), np.uint8)
        alone.gather(0, 1, tables[dealt[layer]], want)
        assert np.array_equal(out[layer - start], want[0]), layer
    copies = [torch.zeros_like(one) for one in kv]
    GroupedPages(CPU_ENCODING, list(zip(dealt, copies, strict=True)), 3).scatter(
        start, stop, ids, out
    )
    for layer in range(6):
        chosen = tables[dealt[layer]] if start <= layer < stop else []
        left = [b for b in range(BLOCKS) if b not in chosen]
        assert torch.equal(copies[layer][chosen], kv[layer][chosen])
        assert not copies[layer][left].any()


def test_a_section_looks_at_its_own_groups_only() -> None:
    kv = tensors(2)
    full = RankSection(0, GroupedPages(CPU_ENCODING, [(0, kv[0])], 2), ("a.0",), 0)
    window = RankSection(64, GroupedPages(CPU_ENCODING, [(1, kv[1])], 2), ("a.1",), 0)
    ids = (4, 5, SKIP, 7)
    assert (full.whole(ids), window.whole(ids)) == (True, False)
    assert full.select(ids, 2) == ids
    assert window.select(ids, 2) == (5, 7)
    assert full.pages.present((SKIP, SKIP, 1, 2)) == []


# ---- the worker half -------------------------------------------------------------------------


def test_sections_are_pushed_pulled_and_failed_apart() -> None:
    """A trimmed block goes to the full section only; a lost one fails the request, not a block."""
    link = FakeLink()
    spaces = {b"full": FakeNamespace(), b"window": FakeNamespace()}

    async def namespace(spec: bytes, deadline_s: float = 5.0) -> FakeNamespace:
        return spaces[spec]

    link.namespace = namespace  # type: ignore[method-assign]
    kv = tensors(3)
    sections_here = [
        RankSection(0, GroupedPages(CPU_ENCODING, [(0, kv[0])], 3), ("a.0",), 0),
        RankSection(64, GroupedPages(CPU_ENCODING, [(1, kv[1]), (2, kv[2])], 3), ("a.1", "a.2"), 0),
    ]
    half = WorkerHalf(
        Settings.parse({"address": "hub:1"}),
        link,  # type: ignore[arg-type]
        EventLog(""),
        sections_here,
        stage=0,
        pushes=True,
        group_tokens=[TOKENS] * 3,
    )
    a = BlockPages(key(1), bytes(32), (0, 1, 2, 3, 1, 2, 3, 4, SKIP, SKIP, SKIP, SKIP), "r", BLOCK)
    b = BlockPages(key(2), key(1), (4, 5, 6, 7, 5, 6, 7, 0, 1, 2, 3, 4), "r", BLOCK)
    half.bind(StepMeta(sections=(FULL, WINDOW), saves=[SaveJob(1, (a, b))]))
    link.turn()
    half.layer_saved("a.1")
    link.turn()
    assert spaces[b"full"].commits == []
    assert spaces[b"window"].commits == [([0], Region(0, 1, 0, HEADS))]
    assert half.take_report() is None
    half.layer_saved("a.0")
    half.step_saved()
    link.turn()
    assert half.take_report() == RankReport({1: 1}, {})
    assert set(spaces[b"full"].stored) == {key(1), key(2)}
    assert set(spaces[b"window"].stored) == {key(2)}
    half.bind(StepMeta(sections=(FULL, WINDOW), loads=[LoadJob("r", (a, b), 5.0)]))
    half.start_loads()
    link.turn()
    assert (half.take_received(), half.take_lost(), half.take_invalid()) == ({"r"}, set(), set())
    del spaces[b"window"].stored[key(2)]
    half.bind(StepMeta(sections=(FULL, WINDOW), loads=[LoadJob("r", (a, b), 5.0)]))
    half.start_loads()
    link.turn()
    assert (half.take_received(), half.take_lost(), half.take_invalid()) == ({"r"}, {"r"}, set())
    assert half.take_report() == RankReport({}, {"r": 1})
    link.close()
