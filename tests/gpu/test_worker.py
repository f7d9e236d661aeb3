"""The adapter's worker half with KV on a card, against a real hub: an engine that runs ahead.

The engine here enqueues a layer's computation, and calls the hook, long before the card gets to it;
so what is pushed without waiting for the card is wrong, and the controls show that it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("torch")

import torch

from kvproto.namespace import NamespaceSpec
from kvproto.prefix import ROOT
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.grouped import GroupedPages
from kvserver_vllm.layout import TOKEN_ENCODING
from kvserver_vllm.link import HubLink
from kvserver_vllm.marks import AtOnce, Marks
from kvserver_vllm.messages import BlockPages, LoadJob, SaveJob, Section, StepMeta
from kvserver_vllm.rank import RankSection
from kvserver_vllm.worker import WorkerHalf
from tests.contract.conftest import chosen, eventually
from tests.support.kv_tensors import LAYERS, kv_tensors
from tests.support.server import ServerProcess
from tests.support.ways import Way

pytestmark = pytest.mark.gpu
HEADS, TOKENS, CONTENT, PAGES, COUNT = 2, 32, 256, 8, 24
CYCLES = 60_000_000  # some 35 ms of a card
ITEM = {torch.bfloat16: 2, torch.float8_e4m3fn: 1}


@pytest.fixture(scope="module", params=["shm", "tcp", "nixl", "nixl-direct"])
def way(request: pytest.FixtureRequest) -> Way:
    return chosen(request)


@pytest.fixture(scope="module")
def hub(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = way.serve(tmp_path_factory.mktemp("hub"), host_bytes="96MiB")
    yield server
    server.close()


class Engine:
    """A rank whose KV is on the card, [layer][block, head, token, content]."""

    def __init__(
        self, hub: ServerProcess, way: Way, log: Path, *, order: str, dtype: torch.dtype,
        blind: bool = False, name: str = "rank",
    ) -> None:  # fmt: skip
        self.kv = kv_tensors(
            order, TOKENS, dtype=dtype, blocks=COUNT, content=CONTENT, device="cuda"
        )
        self.spec = NamespaceSpec(
            model=f"card {order} {dtype} {blind}", weights=bytes(32),
            kv_dtype=str(dtype).removeprefix("torch."), encoding=TOKEN_ENCODING, layers=LAYERS,
            kv_heads=HEADS, page_bytes=16 * CONTENT * ITEM[dtype], block_tokens=16 * PAGES,
            page_tokens=16,
        )  # fmt: skip
        settings = Settings.parse({"address": hub.address, **way.settings(hub)})
        self.link = HubLink.shared(
            hub.address, tenant="", name=name, lookup_s=1, log=EventLog("", rank=0),
            reach=settings.reach(),
        )  # fmt: skip
        pages = GroupedPages(TOKEN_ENCODING, [(0, one) for one in self.kv], 1)
        if settings.direct:
            self.link.register(pages.memory)
        marks = AtOnce(self.link.post) if blind else Marks(self.kv[0].device, self.link.post)
        self.half = WorkerHalf(
            settings, self.link, EventLog(str(log), rank=0),
            [RankSection(0, pages, tuple(map(str, range(LAYERS))), 0)],
            stage=0, pushes=True, group_tokens=[TOKENS], marks=marks,
        )  # fmt: skip
        eventually(lambda: self.link.responsive, "connected", 30)
        if settings.direct:
            eventually(lambda: self.link.direct, "registered", 30)

    def bind(self, **meta: Any) -> None:
        self.half.bind(StepMeta(sections=(Section(self.spec.canonical, {0: 0}),), **meta))

    def forward(self, first: int, values: torch.Tensor) -> float:
        """Enqueue a step that computes `values` [layers, blocks, ...] into the engine blocks from
        `first` on, with the hooks; the seconds it took to enqueue."""
        began = time.monotonic()
        for layer in range(LAYERS):
            torch.cuda._sleep(CYCLES)
            self.kv[layer][first : first + len(values[layer])].copy_(values[layer])
            self.half.layer_saved(str(layer))
        self.half.step_saved()
        return time.monotonic() - began

    def saved(self) -> dict[int, int]:
        report = self.half.take_report()
        return report.saved if report is not None else {}

    def load(self, block: BlockPages) -> None:
        self.bind(loads=[LoadJob("a", (block,), 10.0)])
        self.half.start_loads()

    def loaded(self) -> set[int]:
        eventually(lambda: self.half.take_received() == {"a"}, "loaded", 20)
        return self.half.take_invalid()

    def close(self) -> None:
        self.half.close()
        self.link.close()


def block(number: int, first: int) -> BlockPages:
    pages = tuple(range(2 * first, 2 * first + PAGES))
    return BlockPages(bytes([number + 1]) * 32, ROOT, pages, "a", 16 * PAGES)


def values_of(engine: Engine, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, PAGES // 2, *engine.kv[0].shape[1:])
    made = torch.rand(shape, generator=generator).to(engine.kv[0].dtype).cuda()
    torch.cuda.synchronize()
    return made


@pytest.fixture
def engine_of(hub: ServerProcess, way: Way, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(hub, way, tmp_path / "events", **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def bytes_of(layers: Sequence[torch.Tensor]) -> np.ndarray:
    return np.stack([one.contiguous().view(torch.uint8).cpu().numpy() for one in layers])


def pushed_and_loaded(engine: Engine, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """What was computed, and what came back into other blocks of the engine."""
    values = values_of(engine, seed)
    engine.bind(saves=[SaveJob(1, (block(seed, 4),))])
    eventually(lambda: bool(engine.link._namespaces), "greeted", 20)
    assert engine.forward(4, values) < 0.06, "the hooks only enqueue"
    eventually(lambda: engine.saved() == {1: 1}, "pushed", 20)
    torch.cuda.synchronize()
    time.sleep(0.3)  # the last commit needs no pages
    engine.load(block(seed, 12))
    assert engine.loaded() == set()
    return bytes_of(list(values)), bytes_of([kv[12:16] for kv in engine.kv])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_what_the_card_computed_is_what_comes_back(
    engine_of: Callable[..., Engine], order: str, dtype: torch.dtype
) -> None:
    want, have = pushed_and_loaded(engine_of(order=order, dtype=dtype))
    assert np.array_equal(want, have)


def test_without_marks_layers_are_pushed_before_they_are_computed(
    engine_of: Callable[..., Engine],
) -> None:
    """The control."""
    engine = engine_of(order="LBHNC", dtype=torch.bfloat16, blind=True)
    want, have = pushed_and_loaded(engine)
    assert not np.array_equal(want, have)


@pytest.mark.parametrize("blind", [False, True])
def test_a_load_waits_for_what_still_writes_its_pages(
    engine_of: Callable[..., Engine], blind: bool
) -> None:
    """A step that was enqueued before may write into blocks that were given back meanwhile."""
    engine = engine_of(order="LBHNC", dtype=torch.bfloat16, blind=False)
    want, have = pushed_and_loaded(engine, seed=5)
    assert np.array_equal(want, have)
    if blind:
        engine.half._marks = AtOnce(engine.link.post)
    torch.cuda._sleep(20 * CYCLES)
    for kv in engine.kv:
        kv[16:20] = -1.0
    engine.load(block(5, 16))
    assert engine.loaded() == set()
    torch.cuda.synchronize()
    got = bytes_of([kv[16:20] for kv in engine.kv])
    assert np.array_equal(got, want) is not blind
