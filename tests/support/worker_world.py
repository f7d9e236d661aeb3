"""The adapter's worker half with a hub in this process that holds, delays or fails as a test says.

`Rank` has random KV; needs vLLM and torch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvclient import KVError, ReserveVerdict
from kvproto.grid import Region
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import CPU_ENCODING, HostPages
from kvserver_vllm.messages import BlockPages, Section, StepMeta
from kvserver_vllm.rank import RankSection
from kvserver_vllm.worker import WorkerHalf

LAYERS, BLOCKS, HEADS, TOKENS, DIMS = 4, 16, 2, 32, 4
PAGES = 4
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
REGION = Region(0, LAYERS, 0, HEADS)
SECTION = Section(b"spec", {0: 0})


def key(number: int) -> bytes:
    return bytes([number]) * 32


def block(number: int, first_page: int) -> BlockPages:
    pages = tuple(range(first_page, first_page + PAGES))
    return BlockPages(
        hash=key(number), parent=bytes(32), pages=pages, request="a", tokens=PAGES * TOKENS
    )


def tail(number: int, first_page: int, tokens: int) -> BlockPages:
    pages = tuple(range(first_page, first_page - (-tokens // TOKENS)))
    return BlockPages(hash=key(number), parent=bytes(32), pages=pages, request="a", tokens=tokens)


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
        self.no_space: set[bytes] = set()
        self.corrupt: set[bytes] = set()
        self.regions: list[Region] = []
        self.filling: dict[bytes, int] = {}  # stored blocks of which only so many layers are there
        self.moved = asyncio.Event()
        self.held = 0  # parts granted and not released
        self.waits: list[tuple[float, float]] = []  # of reads: for writers, and for answers on top

    def wrote(self, name: bytes, layers: int) -> None:
        """A writer has come so far with a block; negative: it is gone."""
        self.filling[name] = layers
        if layers < 0:
            del self.stored[name]
        elif layers == LAYERS:
            del self.filling[name]
        self.moved.set()
        self.moved = asyncio.Event()

    def verdict(self, name: bytes) -> ReserveVerdict:
        if name in self.no_space:
            return ReserveVerdict.NO_SPACE
        return ReserveVerdict.PRESENT if name in self.refused else ReserveVerdict.WRITE

    async def enter(self) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def reserve(
        self,
        hashes: Sequence[bytes],
        parents: Sequence[bytes],
        *,
        tokens: Sequence[int],
        region: Region,
    ) -> FakeReservation:
        await self.enter()
        self.regions.append(region)
        return FakeReservation(self, list(hashes), list(tokens), region)

    def acquire(
        self,
        hashes: Sequence[bytes],
        *,
        region: Region,
        wait_s: float = 0.0,
        deadline_s: float,
        **_: Any,
    ) -> FakeStream:
        self.regions.append(region)
        self.waits.append((wait_s, deadline_s))
        return FakeStream(self, list(hashes), region)


class FakeReservation:
    def __init__(
        self, namespace: FakeNamespace, hashes: list[bytes], tokens: list[int], region: Region
    ) -> None:
        self._namespace, self._hashes, self._region = namespace, hashes, region
        self.verdicts = np.array([namespace.verdict(h) for h in hashes], np.uint8)
        self.writable = np.flatnonzero(self.verdicts == ReserveVerdict.WRITE).tolist()
        self._open = set(self.writable)
        self._cells = {
            i: np.zeros(
                (region.layers, region.heads, -(-tokens[i] // TOKENS), TOKENS * 2 * DIMS * 4),
                np.uint8,
            )
            for i in self.writable
        }

    async def __aenter__(self) -> FakeReservation:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Tells the hub of what was not committed, and waits for its answer, as the real one."""
        if self._open:
            with suppress(KVError):
                await self._namespace.enter()
        self._namespace.aborted += 1

    def cells(self, index: int) -> np.ndarray:
        return self._cells[index]

    async def commit(self, indices: Sequence[int], *, region: Region) -> np.ndarray:
        await self._namespace.enter()
        self._namespace.commits.append((list(indices), region))
        if region.layer_stop == self._region.layer_stop:
            self._open -= set(indices)
            for index in indices:
                self._namespace.stored[self._hashes[index]] = self._cells[index].copy()
        return np.zeros(len(indices), np.uint8)


class FakeStream:
    def __init__(self, namespace: FakeNamespace, hashes: list[bytes], region: Region) -> None:
        self.region = region
        self.missing: list[int] = []
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
        namespace, region = self._namespace, self.region
        await namespace.enter()
        while self._left:
            index = self._left.pop(0)
            name = self._hashes[index]
            while 0 <= namespace.filling.get(name, LAYERS) < region.layer_stop:
                await namespace.moved.wait()
            if name not in namespace.stored:
                self.missing.append(index)
                continue
            cells = namespace.stored[name][region.layer_start : region.layer_stop]
            return FakeGranted(namespace, index, cells, name not in namespace.corrupt)
        raise StopAsyncIteration


class FakeGranted:
    tier = 2

    def __init__(self, namespace: FakeNamespace, index: int, cells: np.ndarray, good: bool) -> None:
        self.index, self.cells, self._good = index, cells, good
        self.tokens = cells.shape[2] * TOKENS
        self._namespace = namespace
        namespace.held += 1

    def verify(self) -> bool:
        return self._good

    async def release(self) -> None:
        self._namespace.held -= 1


class FakeLink:
    keys_max = 3
    window_bytes_max = 1 << 30
    wait_s_max = 60.0
    staging_bytes = 0

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.skipped_s = 0.0
        real = self.loop.time
        self.loop.time = lambda: real() + self.skipped_s  # type: ignore[method-assign]
        self.opened = FakeNamespace()
        self.doubts: list[BaseException] = []
        self.greeted: list[bytes] = []
        self.judging = asyncio.Event()  # cleared: what is verified waits for the copy threads
        self.judging.set()

    def submit(self, work: Coroutine[Any, Any, None]) -> None:
        self.post(self.spawn, work)

    def post(self, function: Callable[..., object], *args: Any) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.loop.create_task(work)

    async def greet(self, specs: Sequence[bytes]) -> None:
        self.greeted += specs

    async def verified(self, granted: FakeGranted) -> bool:
        await self.judging.wait()
        return granted.verify()

    async def namespace(self, spec: bytes, deadline_s: float = 5.0) -> FakeNamespace:
        assert spec == b"spec"
        return self.opened

    def doubt(self, error: BaseException) -> None:
        self.doubts.append(error)

    def turn(self, seconds: float = 0.0) -> None:
        """Let the link's thread do all it can; then `seconds` are over, and again. They are
        skipped, not waited for: beside deadlines of tens of them, no pause of the machine counts.
        """

        async def settle() -> None:
            for _ in range(30):
                await asyncio.sleep(0)

        self.loop.run_until_complete(settle())
        if seconds:
            self.skipped_s += seconds
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
            [RankSection(0, self.pages, tuple(NAMES), 0)],
            stage=0,
            pushes=True,
            group_tokens=[TOKENS],
        )

    def cells(self, pages: Sequence[int]) -> np.ndarray:
        out = np.zeros((LAYERS, HEADS, len(pages), self.pages.format.page_bytes), np.uint8)
        self.pages.gather(0, LAYERS, pages, out)
        return out

    def bind(self, **meta: Any) -> None:
        self.half.bind(StepMeta(sections=(SECTION,), **meta))

    def events(self, name: str) -> list[dict[str, Any]]:
        assert self.log_path is not None
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]
