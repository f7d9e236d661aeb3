"""Staging: cells that a rank holds before its request has blocks of the engine.

Over shared memory the cells stay where they are, leased, and are copied once; over other transports
they were moved into this process's memory. Either way they count against `staging_bytes`.

Theory of operation. The rank's layers are cut into a few groups, and each group is a read stream of
its own over all blocks of the fetch: a block's first layers arrive while its last are computed.

Rules:
  1. What is held is bounded by `staging_bytes`, counted when a fetch begins and given back when it
     is closed; one that does not fit is refused.
  2. Every granted part is released once: by who takes it, or by `close`.
  3. The streams run until everything has come, is missing, or the fetch is closed: when its load
     has taken what it wants, or when it is dropped.
  4. The scheduler half ends the wait for a writer. The streams outlast that, for what is complete
     by then is still to come; and a short wait is not held against the hub.
  5. Engines with windowed layers (sections.py) stage nothing, since they do not load all blocks: a
     fetch is refused, and the request is loaded when its blocks are complete.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

from kvclient import Granted, KVError
from kvproto.grid import Region
from kvserver_vllm.link import CALL_S
from kvserver_vllm.messages import STALL_S, FetchJob, FetchProgress, LoadJob, StepMeta
from kvserver_vllm.rank import Rank

GROUPS_MAX = 4
"""Streams of one fetch."""
NEAR_S, NEAR_SHARE = 0.05, 0.25
"""A fetch is near when at most this share is left, and is estimated to take no longer: what was
there from the start came fast and says little about what is still computed."""


class Staging:
    """One fetch of one rank. Lives on the link's thread."""

    def __init__(self, rank: Rank, job: FetchJob, size: int, told: Callable[[], None]) -> None:
        """`size` is what it counts for; `told` is called when `progress` has changed."""
        self._rank = rank
        self._job = job
        self._told = told
        self.size = size
        self._position = {key: index for index, key in enumerate(job.hashes)}
        self._section = rank.sections[0]
        layers = self._section.pages.layers
        count = min(GROUPS_MAX, layers)
        bounds = [layers * group // count for group in range(count + 1)]
        self._groups = list(pairwise(bounds))
        self._parts: list[list[Granted | None]] = [[None] * count for _ in job.hashes]
        self._arrived = 0
        self._taken = 0
        self._began = time.monotonic()
        self._news = asyncio.Event()
        self._streams: list[asyncio.Task[None]] = []
        self._ended = False

    @property
    def progress(self) -> FetchProgress:
        whole = 0
        for parts in self._parts:
            if None in parts:
                break
            whole += 1
        total = len(self._parts) * len(self._groups)
        left = total - self._arrived
        spent = time.monotonic() - self._began
        late = left <= NEAR_SHARE * total
        near = not left or (late and left * spent / self._arrived <= NEAR_S)
        return FetchProgress(whole, self._arrived, near and not (left and self._ended), self._ended)

    async def run(self, meta: StepMeta) -> None:
        """Lease everything, as it is committed. Returns when nothing more will come."""
        link = self._rank.link
        try:
            namespace = await link.namespace(self._section.order(meta).spec)
            region = self._section.region(meta, self._rank.stage)
            self._streams = [
                link.spawn(self._stream(namespace, region, group))
                for group in range(len(self._groups))
            ]
            await asyncio.gather(*self._streams)
        except (KVError, TimeoutError) as error:
            link.doubt(error)
        finally:
            self._ended = True
            self._changed()

    async def _stream(self, namespace: Any, whole: Region, group: int) -> None:
        start, stop = self._groups[group]
        region = Region(
            whole.layer_start + start, whole.layer_start + stop, whole.head_start, whole.head_stop
        )
        limits = self._rank.link
        step = limits.keys_max
        for first in range(0, len(self._job.hashes), step):
            stream = namespace.acquire(
                list(self._job.hashes[first : first + step]),
                region=region,
                wait_s=min(self._job.wait_s + STALL_S, limits.wait_s_max),
                deadline_s=CALL_S,
            )
            async with stream:
                async for granted in stream:
                    self._parts[first + granted.index][group] = granted
                    self._arrived += 1
                    self._rank.log.write(
                        "fetched",
                        request=self._job.request,
                        index=first + granted.index,
                        layers=[region.layer_start, region.layer_stop],
                        tokens=granted.tokens,
                    )
                    self._changed()
            if stream.missing:
                return

    def _changed(self) -> None:
        self._news.set()
        self._told()

    async def take(self, key: bytes) -> list[tuple[int, int, Granted]] | None:
        """The parts of a block, (first layer, last layer + 1, cells), once all are there; None when
        they will not come. The caller releases them."""
        index = self._position.get(key)
        if index is None:
            return None
        parts = self._parts[index]
        while None in parts:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        found = [
            (start, stop, part)
            for (start, stop), part in zip(self._groups, parts, strict=True)
            if part is not None
        ]
        self._parts[index] = []
        return found

    async def close(self) -> None:
        """End the streams and give back what nobody took."""
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)
        self._ended = True
        left = [part for parts in self._parts for part in parts if part is not None]
        self._parts = [[] for _ in self._parts]
        for part in left:
            await part.release()


class Stagings:
    """The fetches of one rank. Called on the link's thread."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._active: dict[str, tuple[Staging, asyncio.Task[None]]] = {}

    def fetch(self, meta: StepMeta, job: FetchJob) -> None:
        """Begin to get hold of a request's blocks, if there is room for them."""
        rank, pages = self._rank, self._rank.sections[0].pages
        page = pages.format.page_tokens
        count = sum(-(-tokens // page) for tokens in job.tokens)
        size = count * pages.layers * pages.heads * pages.format.page_bytes
        windows = rank.link.window_bytes_max * min(GROUPS_MAX, pages.layers)
        crowded = rank.fetched_bytes + size > rank.settings.staging_bytes or size > windows
        if crowded or any(section.window for section in meta.sections):
            rank.count("fetches_refused")
            self._tell(job.request, FetchProgress(ended=True, refused=True))
            return
        rank.fetched_bytes += size
        staging = Staging(rank, job, size, lambda: self._tell(job.request, staging.progress))
        self._active[job.request] = (staging, rank.link.spawn(staging.run(meta)))

    def _tell(self, request: str, progress: FetchProgress) -> None:
        with self._rank.outbox.lock:
            self._rank.outbox.fetched[request] = progress

    def drop(self, request: str) -> None:
        """Nobody will load what is left of it."""
        active = self._active.pop(request, None)
        if active is not None:
            self._rank.link.spawn(self._close(*active))

    async def _close(self, staging: Staging, task: asyncio.Task[None]) -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await staging.close()
        self._rank.fetched_bytes -= staging.size

    async def land(
        self, meta: StepMeta, job: LoadJob, missing: set[int], arrived: Callable[[], None]
    ) -> None:
        """Copy a fetch's blocks into the engine's pages as they come, and take what arrived out of
        `missing`; the first that does not come ends it. `arrived` is called with each."""
        active, section = self._active.get(job.request), self._rank.sections[0]
        for index, block in enumerate(job.blocks):
            parts = await active[0].take(block.hash) if active is not None else None
            if parts is None:
                return
            arrived()
            good, moved, tier = True, 0, 0
            try:
                for start, stop, granted in parts:
                    cells = granted.cells
                    section.pages.scatter(start, stop, block.pages, cells)
                    moved, tier = moved + int(cells.nbytes), int(granted.tier)
                    del cells
                    good = await self._rank.link.verified(granted) and good
            finally:
                for _, _, granted in parts:
                    await granted.release()
            if good:
                missing.discard(index)
                self._rank.count("pulled_bytes", moved)
                if self._rank.log.on:
                    region = section.region(meta, self._rank.stage)
                    self._rank.log_cells("pulled", section, region, block, moved, tier)
