"""The worker half against a hub in this process that holds, delays or fails as the test says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from kvclient import Unavailable
from kvproto.grid import Region
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import CPU_ENCODING, SKIP, HostPages
from kvserver_vllm.messages import BlockPages, LoadJob, RankReport, SaveJob, StepMeta
from kvserver_vllm.worker import WorkerHalf

LAYERS, BLOCKS, HEADS, TOKENS, DIMS = 4, 16, 2, 32, 4
PAGES = 4
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
REGION = Region(0, LAYERS, 0, HEADS)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def block(number: int, first_page: int) -> BlockPages:
    pages = tuple(range(first_page, first_page + PAGES))
    return BlockPages(hash=key(number), parent=bytes(32), pages=pages, request="a")


class FakeNamespace:
    """Blocks in a dictionary; `gate` holds every call, `error` fails it."""

    def __init__(self) -> None:
        self.stored: dict[bytes, np.ndarray] = {}
        self.commits: list[tuple[list[int], Region]] = []
        self.aborted = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.refused: set[bytes] = set()
        self.corrupt: set[bytes] = set()
        self.regions: list[Region] = []

    async def enter(self) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def reserve(
        self, hashes: Sequence[bytes], parents: Sequence[bytes], *, region: Region
    ) -> FakeReservation:
        await self.enter()
        self.regions.append(region)
        return FakeReservation(self, list(hashes), region)

    def acquire(self, hashes: Sequence[bytes], *, region: Region, **_: Any) -> FakeStream:
        self.regions.append(region)
        return FakeStream(self, list(hashes), region)


class FakeReservation:
    def __init__(self, namespace: FakeNamespace, hashes: list[bytes], region: Region) -> None:
        self._namespace, self._hashes, self._region = namespace, hashes, region
        self.writable = [i for i, h in enumerate(hashes) if h not in namespace.refused]
        shape = (region.layers, region.heads, PAGES, TOKENS * 2 * DIMS * 4)
        self._cells = {i: np.zeros(shape, np.uint8) for i in self.writable}

    async def __aenter__(self) -> FakeReservation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._namespace.aborted += 1

    def cells(self, index: int) -> np.ndarray:
        return self._cells[index]

    async def commit(self, indices: Sequence[int], *, region: Region) -> np.ndarray:
        await self._namespace.enter()
        self._namespace.commits.append((list(indices), region))
        if region.layer_stop == self._region.layer_stop:
            for index in indices:
                self._namespace.stored[self._hashes[index]] = self._cells[index].copy()
        return np.zeros(len(indices), np.uint8)


class FakeStream:
    def __init__(self, namespace: FakeNamespace, hashes: list[bytes], region: Region) -> None:
        self.region = region
        self._namespace = namespace
        self._left = [i for i, h in enumerate(hashes) if h in namespace.stored]
        self._hashes = hashes

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> FakeGranted:
        await self._namespace.enter()
        if not self._left:
            raise StopAsyncIteration
        index = self._left.pop(0)
        name = self._hashes[index]
        return FakeGranted(index, self._namespace.stored[name], name not in self._namespace.corrupt)


class FakeGranted:
    tier = 2

    def __init__(self, index: int, cells: np.ndarray, good: bool) -> None:
        self.index, self.cells, self._good = index, cells, good

    def verify(self) -> bool:
        return self._good

    async def release(self) -> None:
        return None


class FakeLink:
    keys_max = 3
    window_bytes_max = 1 << 30

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.opened = FakeNamespace()
        self.doubts: list[BaseException] = []
        self.greeted: list[bytes] = []

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.call_soon_threadsafe(self.spawn, work)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.loop.create_task(work)

    async def greet(self, spec: bytes) -> None:
        self.greeted.append(spec)

    async def namespace(self, spec: bytes, deadline_s: float = 5.0) -> FakeNamespace:
        assert spec == b"spec"
        return self.opened

    def doubt(self, error: BaseException) -> None:
        self.doubts.append(error)

    def turn(self, seconds: float = 0.0) -> None:
        """Let the link's thread do all it can, and at least `seconds` pass."""

        async def settle() -> None:
            for _ in range(30):
                await asyncio.sleep(0)
            await asyncio.sleep(seconds)

        self.loop.run_until_complete(settle())

    def close(self) -> None:
        self.turn()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.loop.close()


class Rank:
    """A rank with random KV."""

    def __init__(self, link: FakeLink, log: Path | None = None, **settings: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (BLOCKS, HEADS, TOKENS, 2 * DIMS)
        self.kv = [torch.rand(shape, generator=generator) for _ in range(LAYERS)]
        self.pages = HostPages(CPU_ENCODING, self.kv)
        self.log_path = log
        self.half = WorkerHalf(
            Settings.parse({"address": "hub:1", **settings}),
            link,  # type: ignore[arg-type]
            EventLog(str(log) if log else "", rank=0),
            self.pages,
            NAMES,
            stage=0,
            head_start=0,
            pushes=True,
        )

    def cells(self, pages: Sequence[int]) -> np.ndarray:
        out = np.zeros((LAYERS, HEADS, len(pages), self.pages.format.page_bytes), np.uint8)
        self.pages.gather(0, LAYERS, pages, out)
        return out

    def bind(self, **meta: Any) -> None:
        self.half.bind(StepMeta(spec=b"spec", layer_start={0: 0}, **meta))

    def events(self, name: str) -> list[dict[str, Any]]:
        assert self.log_path is not None
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]


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
    began = time.monotonic()
    for step in range(50):
        rank.bind(saves=[SaveJob(step, (block(step, 4),))])
        for name in NAMES:
            rank.half.layer_saved(name)
        rank.half.step_saved()
    assert time.monotonic() - began < 0.5


def test_pages_are_let_go_pin_ms_after_the_step_whatever_the_hub_does(link: FakeLink) -> None:
    rank = Rank(link, pin_ms=50)
    link.opened.gate.clear()
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    link.turn(0.1)
    assert rank.half.take_report() is None, "the step still runs"
    rank.half.step_saved()
    link.turn()
    assert rank.half.take_report() is None
    link.turn(0.08)
    assert rank.half.take_report() == RankReport({1: 1})
    assert rank.half.counters["saves_dropped"] == 1
    link.opened.gate.set()
    link.turn()
    assert link.opened.stored == {}


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
    assert rank.half.take_report() == RankReport({1: 1})
    assert link.doubts == [link.opened.error]


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


def test_a_full_queue_drops_the_save_and_counts_it(link: FakeLink) -> None:
    rank = Rank(link, jobs_max=2)
    link.opened.gate.clear()
    for job in range(4):
        rank.bind(saves=[SaveJob(job, (block(job, 4),))])
    assert rank.half.counters["saves_dropped"] == 2
    assert rank.half.take_report() == RankReport({2: 1, 3: 1})


def test_a_replica_pushes_nothing_and_reports_all_the_same(link: FakeLink, rank: Rank) -> None:
    rank.half._pushes.on = False
    rank.bind(saves=[SaveJob(1, (block(1, 4),))])
    rank.half.step_saved()
    link.turn()
    assert link.opened.commits == []
    assert rank.half.take_report() == RankReport({1: 1})


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
    part = BlockPages(hash=key(0), parent=bytes(32), pages=(SKIP, SKIP, 6, 7), request="a")
    gone = BlockPages(hash=key(9), parent=bytes(32), pages=(SKIP, 9, 10, 11), request="a")
    rank.bind(loads=[LoadJob("a", (part, gone), 5.0)])
    rank.half.start_loads()
    link.turn()
    rank.half.take_received()
    assert rank.half.take_invalid() == {9, 10, 11}
    assert np.array_equal(rank.cells([4, 5]), before)


def test_a_load_ends_at_its_deadline_with_what_did_not_arrive(link: FakeLink, rank: Rank) -> None:
    store(link, rank, 4)
    link.opened.gate.clear()
    rank.bind(loads=[load(rank, 2, deadline_s=0.05)])
    rank.half.start_loads()
    link.turn(0.02)
    assert rank.half.take_received() == set()
    link.turn(0.06)
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set(range(8))
    before = rank.cells(range(8))
    link.opened.gate.set()
    link.turn()
    assert np.array_equal(rank.cells(range(8)), before), "nothing is written after the report"


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


def test_an_aborted_load_is_reported_without_failed_blocks(link: FakeLink, rank: Rank) -> None:
    store(link, rank, 1)
    link.opened.gate.clear()
    rank.bind(loads=[load(rank, 1)])
    rank.half.start_loads()
    link.turn()
    rank.bind(aborts=["a"])
    rank.half.start_loads()
    link.turn()
    assert rank.half.take_received() == {"a"}
    assert rank.half.take_invalid() == set()
    assert rank.half.take_report() is None


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
    assert len(set(pushed["cells"])) == HEADS
    assert pulled["bytes"] == LAYERS * HEADS * PAGES * target.pages.format.page_bytes
    assert [e["layer"] for e in source.events("save_layer")] == [0]
    assert [e["layers"] for e in source.events("commit")][-1][1] == LAYERS


def test_reports_of_ranks_add_up() -> None:
    one = RankReport({1: 1, 2: 1}, {"a": 5})
    other = RankReport({2: 1}, {"a": 3, "b": 0})
    assert one.aggregate(other) == RankReport({1: 1, 2: 2}, {"a": 3, "b": 0})
