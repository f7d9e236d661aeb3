"""The adapter's worker half with `direct`: an engine's pages, and a hub that stops and goes on.

A load, or a push's hold on its pages, is reported when the hub is known to move no more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch

from kvclient import Client
from kvclient.transfer.ring import orphans
from kvproto import nixlib
from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import CPU_ENCODING, SKIP, HostPages
from kvserver_vllm.link import HubLink
from kvserver_vllm.messages import BlockPages, LoadJob, SaveJob, Section, StepMeta
from kvserver_vllm.rank import RankSection
from kvserver_vllm.worker import WorkerHalf
from tests.contract.conftest import eventually
from tests.fault.test_nixl_peers import running, small
from tests.support.server import ServerProcess

pytestmark = pytest.mark.skipif(
    not nixlib.available(), reason="NIXL is not installed (pip install --no-deps nixl-cu12)"
)
Serve = Callable[..., ServerProcess]
LAYERS, HEADS, TOKENS, DIMS, PAGES = 4, 2, 32, 64, 4
LONG = {"session_ttl_ms": 60_000, "reservation_ms_max": 20_000}
SPEC = NamespaceSpec(
    model="pages", weights=bytes(32), kv_dtype="float32", encoding=CPU_ENCODING, layers=LAYERS,
    kv_heads=HEADS, page_bytes=TOKENS * 2 * DIMS * 4, block_tokens=TOKENS * PAGES,
    page_tokens=TOKENS,
)  # fmt: skip


class Engine:
    """A rank with random KV and a link of its own."""

    def __init__(self, server: ServerProcess, log: Path, blocks: int = 32) -> None:
        shape = (LAYERS, blocks, HEADS, TOKENS, 2 * DIMS)
        self.kv = torch.rand(shape, generator=torch.Generator().manual_seed(blocks))
        self.pages = HostPages(CPU_ENCODING, list(self.kv))
        settings = Settings.parse({"address": server.address, "transport": "nixl", "direct": True})
        self.log = EventLog(str(log), rank=0)
        self.link = HubLink.shared(
            server.address, tenant="", name="rank", lookup_s=1, log=self.log,
            reach=settings.reach(),
        )  # fmt: skip
        self.link.register(self.pages.memory)
        self.half = WorkerHalf(
            settings, self.link, self.log,
            [RankSection(0, self.pages, tuple(str(i) for i in range(LAYERS)), 0)],
            stage=0, pushes=True, group_tokens=[TOKENS],
        )  # fmt: skip
        eventually(lambda: self.link.direct, "connected, and the pages are registered")

    def bind(self, **meta: Any) -> None:
        self.half.bind(StepMeta(sections=(Section(SPEC.canonical, {0: 0}),), **meta))

    def push(self, blocks: list[BlockPages], job: int = 1) -> None:
        self.bind(saves=[SaveJob(job, tuple(blocks))])
        self.half.step_saved()

    def load(self, blocks: list[BlockPages], deadline_s: float = 10.0) -> None:
        self.bind(loads=[LoadJob("a", tuple(blocks), deadline_s)])
        self.half.start_loads()

    def saved(self) -> dict[int, int]:
        report = self.half.take_report()
        return report.saved if report is not None else {}

    def cells(self, block: BlockPages) -> np.ndarray:
        out = np.zeros((LAYERS, HEADS, len(block.pages), SPEC.page_bytes), np.uint8)
        self.pages.gather(0, LAYERS, block.pages, out)
        return out

    def moved(self) -> list[int]:
        client = self.link._client
        assert client is not None
        return list(client.session.link.transfer.bytes_moved)  # type: ignore[attr-defined]


def block(number: int, *pages: int, tokens: int = TOKENS * PAGES) -> BlockPages:
    return BlockPages(bytes([number + 1]) * 32, ROOT, pages, "a", tokens)


@pytest.fixture
def engine_of(tmp_path: Path) -> Iterator[Callable[[ServerProcess], Engine]]:
    made: list[Engine] = []

    def make(server: ServerProcess) -> Engine:
        made.append(Engine(server, tmp_path / "events"))
        return made[-1]

    orphans.kept.clear()
    yield make
    for engine in made:
        engine.link.close()
    orphans.kept.clear()


def test_pages_go_straight_in_and_out(
    serve: Serve, engine_of: Callable[[ServerProcess], Engine]
) -> None:
    """But for a tail whose last page must be zeroed, and pages that are to be left alone."""
    server = small(serve, **LONG)
    engine = engine_of(server)
    saved = [block(1, 5, 2, 9, 7), block(2, 0, 1, 3, 4), block(3, 11, 12, tokens=40)]
    engine.push(saved)
    eventually(lambda: engine.saved() == {1: 1}, "pushed")
    size = SPEC.grid.payload_bytes()
    eventually(lambda: engine.moved() == [size // 2, 2 * size], "two of three go straight")
    loads = [block(1, 20, 31, 22, 21), block(2, SKIP, 25, 26, 27), block(3, 28, 29, tokens=40)]
    before = [engine.cells(one) for one in saved]
    engine.load(loads)
    eventually(lambda: engine.half.take_received() == {"a"}, "loaded")
    assert engine.half.take_invalid() == set()
    assert np.array_equal(engine.cells(loads[0]), before[0])
    assert np.array_equal(engine.cells(block(2, 25, 26, 27)), before[1][:, :, 1:])
    assert engine.moved() == [size // 2 + size + size // 2, 3 * size]
    assert server.stats().counters["nixl_items_corrupt"] == 0


def test_a_load_is_reported_when_the_hub_writes_no_more(
    serve: Serve, engine_of: Callable[[ServerProcess], Engine]
) -> None:
    server = small(serve, failpoints="nixl.post=sleep:1.5@1", **LONG)
    keys = [block(n, 4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3) for n in range(6)]
    with Client.connect(server.address, transport="shm") as client:
        namespace = client.open_namespace(SPEC)
        arrays = np.random.default_rng(1).integers(
            0, 256, (6, LAYERS, HEADS, SPEC.grid.cell_bytes()), np.uint8
        )
        parents = [ROOT] * 6
        assert namespace.push([b.hash for b in keys], arrays, parents=parents).written == 6
    engine = engine_of(server)
    engine.load(keys, deadline_s=1.2)
    eventually(lambda: running(server) > 0, "the hub is about to write")
    server.stop_signal()
    try:
        time.sleep(1.8)
        assert engine.half.take_received() == set(), "the deadline is over, the blocks are not"
        free = block(9, 24, 25, 26, 27)
        before = engine.cells(free)
    finally:
        server.cont()
    eventually(lambda: engine.half.take_received() == {"a"}, "the hub has gone on")
    invalid = engine.half.take_invalid()
    assert invalid == set(range(24)), "all of it is computed"
    engine.kv[:] = 0.5
    wanted = engine.cells(free)
    time.sleep(0.5)
    assert all(np.array_equal(engine.cells(one), wanted) for one in keys), "nothing comes late"
    assert not np.array_equal(before, wanted)


def test_a_push_lets_go_when_the_hub_reads_no_more(
    serve: Serve, engine_of: Callable[[ServerProcess], Engine]
) -> None:
    """A hub that is killed in the middle: its successor in the same directory is the proof."""
    server = small(serve, failpoints="nixl.post=sleep:5@1", **LONG)
    engine = engine_of(server)
    engine.push([block(n, 4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3) for n in range(6)])
    eventually(lambda: running(server) > 0, "the hub is about to read")
    os.kill(server.pid, signal.SIGKILL)
    time.sleep(1)  # pin_ms is over
    assert engine.saved() == {}
    server.kill()
    server.restart()
    eventually(lambda: engine.saved() == {1: 1}, "a successor answers", 15)
    with Client.connect(server.address, transport="shm") as client:
        assert client.open_namespace(SPEC).lookup([block(0).hash]).usable_blocks == 0
