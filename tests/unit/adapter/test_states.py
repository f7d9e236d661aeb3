"""Recurrent states: keyed by the exact position, handed over as they were before the last token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from kvproto.grid import Region
from kvserver_vllm.common import Answer
from kvserver_vllm.config import Settings
from kvserver_vllm.errors import UnsupportedError
from kvserver_vllm.events import EventLog
from kvserver_vllm.grouped import GroupedPages, StatePages
from kvserver_vllm.identity import require_states, state_info
from kvserver_vllm.layout import CPU_ENCODING, SKIP, STATE_PREFIX, has_tails
from kvserver_vllm.link import HubLink, _need
from kvserver_vllm.messages import (
    STATE,
    BlockPages,
    FetchProgress,
    LoadJob,
    RankHolds,
    RankInfo,
    RankReport,
    SaveJob,
    Section,
    StepMeta,
)
from kvserver_vllm.rank import RankSection
from kvserver_vllm.sections import (
    by_section,
    kinds,
    section_attribute,
    section_of,
    state_dtypes,
)
from kvserver_vllm.worker import WorkerHalf
from tests.support.scheduler_world import BLOCK, ENGINE_BLOCK, FakeHub, FakeRequest, World
from tests.support.worker_world import FakeLink, FakeNamespace, key

FULL = Section(b"full", {0: 0}, groups=(0,))
STATES = Section(b"state", {0: 0}, window=STATE, groups=(1,))
STATE_TOKENS = 1024
PAGES = BLOCK // ENGINE_BLOCK
LAYERS, BLOCKS, HEADS, TOKENS, DIMS, STATE_BYTES = 2, 9, 2, 32, 4, 200


# ---- the scheduler half ----------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    """An engine without prefix caching, as vLLM has it with states that are not cached."""
    world = World(options={"group_tokens": [ENGINE_BLOCK, STATE_TOKENS], "prefix_caching": False})
    world.half.open((FULL, STATES), ENGINE_BLOCK, tails=True)
    yield world
    for hub in FakeHub.opened:
        hub.close()
    FakeHub.opened.clear()


def leg(name: str, tokens: int, *, prefill: bool) -> FakeRequest:
    request = FakeRequest(name, tokens)
    request.prompt_token_ids = list(request.all_token_ids)
    request._all_token_ids = request.all_token_ids  # vLLM's `all_token_ids` is a view of it
    request.max_tokens = 7
    request.kv_transfer_params = {"do_remote_decode": prefill, "do_remote_prefill": not prefill}
    return request


def tables_of(world: World, request: FakeRequest) -> list[list[int]]:
    count = -(-request.num_tokens // ENGINE_BLOCK)
    return [
        [b.block_id for b in world.pool.get_new_blocks(count)],
        [world.pool.get_new_blocks(1)[0].block_id],
    ]


def step(world: World, request: FakeRequest, tables: list[list[int]], tokens: int) -> list[SaveJob]:
    state = SimpleNamespace(get_block_ids=lambda name: tuple(tables))
    output = SimpleNamespace(
        num_scheduled_tokens={request.request_id: tokens}, kv_connector_block_state=state
    )
    jobs = world.half.build_meta(output).saves
    request.num_computed_tokens += tokens
    return jobs


def of_states(block: BlockPages) -> set[int]:
    return set(block.pages[len(block.pages) // 2 :])


@pytest.mark.parametrize("length", [2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 45, 40])
def test_a_prefill_leg_stops_before_the_last_token_and_saves_that_state(
    world: World, length: int
) -> None:
    request = leg("a", length, prefill=True)
    names = FakeRequest("b", length - 1).hashes(tail=True)
    world.new(request, usable=0 if length > BLOCK else None)
    assert (request.num_tokens, request.num_prompt_tokens) == (length - 1, length - 1)
    assert request.max_tokens == 1
    tables = tables_of(world, request)
    world.half.after_alloc(request, tables, 0)
    first = min(BLOCK, length - 1)
    jobs = step(world, request, tables, first)
    world.hub.turn()
    assert world.hub.announced == [names]
    if length - 1 > first:
        jobs += step(world, request, tables, length - 1 - first)
    blocks = [block for job in jobs for block in job.blocks]
    assert [block.hash for block in blocks] == names
    assert [of_states(block) for block in blocks] == [{SKIP}] * (len(names) - 1) + [{*tables[1]}]
    assert set(world.pinned(tables[1])) == set(tables[1])
    world.half.finished(request, whole=True)
    world.report(saved={job.job: 1 for job in jobs})
    assert world.pinned([*tables[0], *tables[1]]) == []


@pytest.mark.parametrize("length", [2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 45])
def test_a_decode_leg_loads_the_state_before_the_last_token(world: World, length: int) -> None:
    request = leg("a", length, prefill=False)
    world.new(request)
    world.hub.turn()
    asked, _, _ = world.hub.lookups[0]
    assert asked == FakeRequest("b", length - 1).hashes(tail=True)
    world.hub.answer(len(asked))
    assert world.match(request) == (length - 1, True)
    assert request.num_tokens == length, "it is this engine that computes the last one"
    tables = tables_of(world, request)
    world.half.after_alloc(request, tables, length - 1)
    (job,) = world.step().loads
    assert [of_states(block) for block in job.blocks] == [{SKIP}] * (len(asked) - 1) + [
        {*tables[1]}
    ]
    assert [block.pages[0] for block in job.blocks] == tables[0][::PAGES][: len(asked)]


def test_a_state_after_the_last_token_is_not_asked_for(world: World) -> None:
    """That token is computed again, and the state would take it in twice."""
    request = FakeRequest("a", 2 * BLOCK)
    world.new(request)
    assert world.hub.lookups[0][0] == request.hashes()[:1]


def test_others_than_hand_offs_save_nothing(world: World) -> None:
    """Their state moves on with the next step, and without one their blocks are of no use."""
    request = world.new(FakeRequest("a", 3 * BLOCK), usable=0)
    tables = tables_of(world, request)
    world.half.after_alloc(request, tables, 0)
    assert not step(world, request, tables, 3 * BLOCK)
    world.hub.turn()
    assert world.hub.announced == []


def test_a_prompt_that_cannot_be_shortened_is_not_handed_off(world: World) -> None:
    request = leg("a", 1, prefill=True)
    world.new(request, usable=None)
    assert request.num_tokens == 1
    assert world.half.finished(request, whole=True) is None


def poll(world: World, request: FakeRequest, complete: int) -> tuple[int | None, bool]:
    """A tenth of a second later, so many blocks of the layers with attention are complete."""
    world.hub.turn()
    reply = world.hub.lookups[-1][2]
    if not reply.done():
        reply.set_result(Answer(0, 4, (), complete))
        world.hub.turn()
    world.now += 0.1
    return world.match(request)


def test_blocks_that_come_are_progress_though_none_is_usable_before_the_state(world: World) -> None:
    """A decode leg waits as long as the prefill comes along, and a second more."""
    request = leg("a", 3 * BLOCK + 5, prefill=False)
    world.new(request)
    for complete in range(4):
        for _ in range(8):
            matched = poll(world, request, complete)
            if world.step().fetches:
                world.report(fetched={"a": FetchProgress(ended=True, refused=True)})
            assert matched == (None, False), f"{complete} blocks"
    answers = [poll(world, request, 3) for _ in range(12)]
    assert answers[-1] == (0, False)


def test_of_states_only_the_last_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[bytes]] = []

    async def announce(hashes: list[bytes], ttl_s: float) -> None:
        told.append(hashes)

    async def namespace(spec: bytes, deadline_s: float = 5.0) -> SimpleNamespace:
        return SimpleNamespace(announce=announce)

    limits = SimpleNamespace(keys_per_call_max=10, announce_ttl_s_max=10.0)
    monkeypatch.setattr(HubLink, "_limits", limits)
    link = HubLink("hub:1", "", "test", 0.1, EventLog(""))
    monkeypatch.setattr(link, "namespace", namespace)
    names = [key(1), key(2), key(3)]
    link.loop.run_until_complete(link.announce((FULL, STATES), names, 5.0))
    link.loop.close()
    assert told == [names, names[-1:]]


# ---- what a section of states is -------------------------------------------------------------


def spec_of(page: int = STATE_BYTES) -> MambaSpec:
    return MambaSpec(
        block_size=STATE_TOKENS,
        shapes=((page // 4,),),
        dtypes=(torch.float32,),
        mamba_type=MambaAttentionBackendEnum.MAMBA2,
    )


def states_of(count: int, groups: int = 2) -> tuple[list[torch.Tensor], StatePages]:
    generator = torch.Generator().manual_seed(5)
    shape = (BLOCKS, 1, 1, STATE_BYTES)
    kv = [
        torch.randint(-128, 127, shape, dtype=torch.int8, generator=generator) for _ in range(count)
    ]
    grouped = GroupedPages(STATE_PREFIX, [(1, one) for one in kv], groups)
    return kv, StatePages(grouped, groups)


def test_states_are_a_section_of_their_own_and_the_last_one() -> None:
    assert kinds([STATE, 64, 0]) == [0, 64, STATE]
    _, pages = states_of(2)
    held = state_info(["model.layers.0.mamba", "model.layers.3.mamba"], spec_of(), pages, BLOCK)
    assert (held.layers, held.heads, held.page_tokens, held.page_bytes) == (
        (0, 3), 1, BLOCK, STATE_BYTES,
    )  # fmt: skip
    assert held.encoding == "state-mamba2-sd/1"
    assert has_tails(held.encoding)
    assert section_attribute({(0, 0): held}, 2) == {"section": "state"}
    assert by_section({(0, 0): RankHolds((held,))}) == [{(0, 0): held}]
    assert _need(STATES, SimpleNamespace(), tail=True).kind == "state"  # type: ignore[arg-type]


def test_the_precision_of_states_counts_for_the_layers_beside_them_too() -> None:
    """What a state passes on is seen by attention."""
    _, pages = states_of(1)
    held = state_info(["model.layers.0.mamba"], spec_of(), pages, BLOCK)
    full = replace(held, window=0, kv_dtype="bfloat16", page_tokens=32)
    one, other = ({(0, 0): full}, {(0, 0): held})
    assert state_dtypes([one, other]) == "float32"
    assert state_dtypes([one]) == ""
    assert section_attribute(one, 2, "float32") == {"section": "full", "state_dtypes": "float32"}
    assert section_attribute(one, 1) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mamba_cache_mode": "align"}, "mamba_cache_mode 'align'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2"),
        ({"speculative_config": object()}, "speculative"),
    ],
)
def test_engines_whose_state_runs_ahead_or_lies_in_parts_are_refused(
    changes: dict[str, Any], named: str
) -> None:
    values = {"mamba_cache_mode": "none", "tensor_parallel_size": 1, "speculative_config": None}
    parts = SimpleNamespace(**{**values, **changes})
    config = SimpleNamespace(
        cache_config=parts, parallel_config=parts, speculative_config=parts.speculative_config
    )
    with pytest.raises(UnsupportedError, match=named):
        require_states(config)


# ---- the worker half -------------------------------------------------------------------------


def test_a_state_is_pushed_and_pulled_as_one_page_and_fails_the_request() -> None:
    link = FakeLink()
    spaces = {b"full": FakeNamespace(), b"state": FakeNamespace()}

    async def namespace(spec: bytes, deadline_s: float = 5.0) -> FakeNamespace:
        return spaces[spec]

    link.namespace = namespace  # type: ignore[method-assign]
    attention = torch.rand((BLOCKS * 4, HEADS, TOKENS, 2 * DIMS))
    kv, pages = states_of(LAYERS)
    sections = [
        RankSection(0, GroupedPages(CPU_ENCODING, [(0, attention)], 2), ("a.0",), 0),
        RankSection(STATE, pages, ("m.0", "m.1"), 0),
    ]
    half = WorkerHalf(
        Settings.parse({"address": "hub:1"}),
        link,  # type: ignore[arg-type]
        EventLog(""),
        sections,
        stage=0,
        pushes=True,
        group_tokens=[ENGINE_BLOCK, STATE_TOKENS],
    )
    a = BlockPages(key(1), bytes(32), (0, 1, 2, 3, *[SKIP] * 4), "r", BLOCK)
    b = BlockPages(key(2), key(1), (4, 5, 3, 3), "r", 40)
    want = [one[3].clone() for one in kv]
    half.bind(StepMeta(sections=(FULL, STATES), saves=[SaveJob(1, (a, b))]))
    half.step_saved()
    link.turn()
    assert half.take_report() == RankReport({1: 1}, {})
    assert set(spaces[b"full"].stored) == {key(1), key(2)}
    assert set(spaces[b"state"].stored) == {key(2)}
    stored = spaces[b"state"].stored[key(2)][:, 0, 0, :STATE_BYTES]
    assert np.array_equal(stored.view(np.int8), torch.stack(want)[:, 0, 0].numpy())
    c, d = a._replace(pages=(8, 9, 10, 11, *[SKIP] * 4)), b._replace(pages=(12, 13, 7, 7))
    half.bind(StepMeta(sections=(FULL, STATES), loads=[LoadJob("r", (c, d), 5.0)]))
    half.start_loads()
    link.turn()
    assert (half.take_received(), half.take_lost(), half.take_invalid()) == ({"r"}, set(), set())
    assert [torch.equal(one[7], other) for one, other in zip(kv, want, strict=True)] == [True] * 2
    del spaces[b"state"].stored[key(2)]
    half.bind(StepMeta(sections=(FULL, STATES), loads=[LoadJob("r", (c, d), 5.0)]))
    half.start_loads()
    link.turn()
    assert (half.take_received(), half.take_lost(), half.take_invalid()) == ({"r"}, {"r"}, set())
    link.close()


# ---- pipeline stages -------------------------------------------------------------------------

NAMES = ("m.0.mamba", "m.1.mamba", "m.2.mamba", "m.3.attn")
STAGES = [[(0, 4)], [(0, 2), (2, 4)], [(0, 3), (3, 4)]]
"""Layers [first, last + 1) of each stage: one; states alone before both kinds; kinds apart."""
IDS = (0, 1, 2, 3, *[5] * PAGES)
"""Pages of the attention's group, and a block of the states' for each of them."""


def stage_of(layers: range, kv: list[torch.Tensor]) -> tuple[list[RankSection], RankHolds]:
    """One stage's part of a model whose tensors are `kv`, as the worker half has it."""
    sections, infos = [], []
    attention = [(0, kv[at]) for at in layers if at == 3]
    states = [(1, kv[at]) for at in layers if at < 3]
    if attention:
        pages = GroupedPages(CPU_ENCODING, attention, 2)
        info = RankInfo((3,), 0, HEADS, CPU_ENCODING, "float32", TOKENS, pages.format.page_bytes)
        sections.append(RankSection(0, pages, (NAMES[3],), 0))
        infos.append(info)
    if states:
        names = tuple(NAMES[at] for at in layers if at < 3)
        held = StatePages(GroupedPages(STATE_PREFIX, states, 2), 2)
        sections.append(RankSection(STATE, held, names, 0))
        infos.append(replace(state_info(names, spec_of(), held, BLOCK), groups=(1,)))
    return sections, RankHolds(tuple(infos))


def moves(
    stages: list[tuple[int, int]], kv: list[torch.Tensor]
) -> Iterator[tuple[int, RankSection, Region]]:
    """(kind, a stage's section, its place in the grid of that kind), for all stages."""
    ranks = [stage_of(range(*layers), kv) for layers in stages]
    held = by_section({(stage, 0): holds for stage, (_, holds) in enumerate(ranks)})
    told = StepMeta(sections=tuple(section_of(SimpleNamespace(canonical=b""), h) for h in held))
    for stage, (sections, _) in enumerate(ranks):
        for section in sections:
            yield section.window, section, section.region(told, stage)


def pushed_by(stages: list[tuple[int, int]], kv: list[torch.Tensor]) -> dict[int, np.ndarray]:
    """What the hub has of a block after all stages have pushed, by kind."""
    page = GroupedPages(CPU_ENCODING, [(0, kv[3])], 2).format.page_bytes
    slots = {
        0: np.zeros((1, HEADS, PAGES, page), np.uint8),
        STATE: np.zeros((3, 1, 1, STATE_BYTES), np.uint8),
    }
    for kind, section, region in moves(stages, kv):
        cells = slots[kind][region.layer_start : region.layer_stop]
        assert not cells.any(), "another stage's layers"
        section.pages.gather(0, section.pages.layers, IDS, cells)
    return slots


@pytest.mark.parametrize("reader", STAGES)
@pytest.mark.parametrize("writer", STAGES)
def test_stages_that_lack_a_kind_of_layers_share_with_others(
    writer: list[tuple[int, int]], reader: list[tuple[int, int]]
) -> None:
    """A stage without attention does not start on a CPU (vLLM's workers disagree about layouts)."""
    states, _ = states_of(3)
    generator = torch.Generator().manual_seed(6)
    kv = [*states, torch.rand((BLOCKS, HEADS, TOKENS, 2 * DIMS), generator=generator)]
    slots = pushed_by(writer, kv)
    for kind, slot in pushed_by([(0, 4)], kv).items():
        assert np.array_equal(slots[kind], slot), kind
    assert np.array_equal(
        slots[STATE][:, 0, 0].view(np.int8), torch.stack([one[5, 0, 0] for one in states]).numpy()
    )
    copies = [torch.zeros_like(one) for one in kv]
    for kind, section, region in moves(reader, copies):
        cells = slots[kind][region.layer_start : region.layer_stop]
        section.pages.scatter(0, section.pages.layers, IDS, cells)
    for at, (have, want) in enumerate(zip(copies, kv, strict=True)):
        blocks = [5] if at < 3 else [0, 1, 2, 3]
        assert torch.equal(have[blocks], want[blocks]), NAMES[at]
