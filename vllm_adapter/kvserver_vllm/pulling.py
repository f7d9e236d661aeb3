"""Pulls: hub blocks copied into pages of the engine, on the link's thread.

Rule: every load is reported once, with the blocks that did not arrive, and once it was reported no
copy of it is left. That is by its deadline; with `direct` it is when the hub is known to write no
more (`kvserver_vllm.direct`).
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np

from kvclient import AsyncNamespace, Granted, KVError
from kvproto.grid import Region
from kvserver_vllm.direct import Direct
from kvserver_vllm.layout import SKIP
from kvserver_vllm.messages import LoadJob, StepMeta
from kvserver_vllm.rank import Rank
from kvserver_vllm.staging import Stagings

logger = logging.getLogger("vllm.kvserver")

DIRECT_BYTES = 256 << 20
"""Pulled by one call that is not staged: what one failure costs."""


class Pulls:
    """Loads of this rank under way."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._direct = Direct(rank)
        self._loads: dict[str, asyncio.Task[None]] = {}
        self.stagings = Stagings(rank)
        self._open: dict[str, LoadJob] = {}
        self._void: set[str] = set()

    def expect(self, job: LoadJob) -> None:
        """`load` will be called for it. On the engine's thread, so that a void finds it."""
        self._open[job.request] = job

    def void(self, request: str) -> None:
        """Report all blocks of this load as failed, those that have arrived too."""
        if request in self._open:
            self._void.add(request)
            self.abort(request)

    def abort(self, request: str) -> None:
        task = self._loads.get(request)
        if task is not None:
            task.cancel()

    async def load(self, meta: StepMeta, job: LoadJob) -> None:
        """Pull one request's blocks; whatever happens, report it once."""
        task = asyncio.current_task()
        assert task is not None
        self._loads[job.request] = task
        missing = set(range(len(job.blocks)))
        aborted = False
        started = time.monotonic()
        try:
            async with asyncio.timeout(job.deadline_s):
                bring = self.stagings.land if job.fetched else self._pull
                await bring(meta, job, missing)
        except (KVError, TimeoutError) as error:
            self._rank.link.doubt(error)
        except asyncio.CancelledError:
            aborted = True
        except Exception:
            logger.exception("kvserver: a load failed; its blocks are recomputed")
        finally:
            self._loads.pop(job.request, None)
            self.stagings.drop(job.request)
        if missing:
            await self._direct.quiet(job.blocks)
        if not aborted:
            self._rank.figures.took("pull_seconds", time.monotonic() - started)
        self._report(job, missing, aborted)

    async def _pull(self, meta: StepMeta, job: LoadJob, missing: set[int]) -> None:
        link = self._rank.link
        deadline_s = max(job.deadline_s, 0.001)
        namespace = await link.namespace(meta.spec, deadline_s)
        staged = await self._pull_direct(namespace, meta, job, missing)
        step = link.keys_max
        for start in range(0, len(staged), step):
            part = staged[start : start + step]
            stream = namespace.acquire(
                [job.blocks[index].hash for index in part],
                region=self._rank.region(meta),
                window_bytes=min(self._rank.settings.window_bytes, link.window_bytes_max),
                deadline_s=deadline_s,
            )
            async with stream:
                async for granted in stream:
                    index = part[granted.index]
                    if self._take(job, index, stream.region, granted):
                        missing.discard(index)
                    await granted.release()

    async def _pull_direct(
        self, namespace: AsyncNamespace, meta: StepMeta, job: LoadJob, missing: set[int]
    ) -> list[int]:
        """Pull what goes straight into its pages; the positions of the others."""
        indices = list(range(len(job.blocks)))
        if not self._direct.on:
            return indices
        rank, region = self._rank, self._rank.region(meta)
        places = {
            index: place
            for index, block in enumerate(job.blocks)
            if (place := self._direct.place(block, 0, rank.pages.layers)) is not None
        }
        step = max(1, DIRECT_BYTES // namespace.grid.region_bytes(region))
        chosen = list(places)
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            result = await namespace.pull(
                [job.blocks[index].hash for index in part],
                [places[index] for index in part],
                region=region,
                window_bytes=min(rank.settings.window_bytes, rank.link.window_bytes_max),
                deadline_s=max(job.deadline_s, 0.001),
            )
            for at in np.flatnonzero(result.found).tolist():
                index, pages = part[at], job.blocks[part[at]].pages
                missing.discard(index)
                moved = namespace.grid.region_bytes(region, int(result.tokens[at]))
                rank.count("pulled_bytes", moved)
                if rank.log.on:
                    tier = int(result.tiers[at])
                    rank.log_cells("pulled", pages, region, job, index, moved, tier)
        return [index for index in indices if index not in places]

    def _take(self, job: LoadJob, index: int, region: Region, granted: Granted) -> bool:
        """Copy one granted block into the engine's pages; whether its bytes are the right ones."""
        pages, cells = job.blocks[index].pages, granted.cells
        self._rank.pages.scatter(0, self._rank.pages.layers, pages, cells)
        moved, tier = int(cells.nbytes), int(granted.tier)
        del cells
        if not granted.verify():
            return False
        self._rank.count("pulled_bytes", moved)
        if self._rank.log.on:
            self._rank.log_cells("pulled", pages, region, job, index, moved, tier)
        return True

    def _report(self, job: LoadJob, missing: set[int], aborted: bool) -> None:
        per_block = self._rank.pages.format.pages_per_block
        self._open.pop(job.request, None)
        if job.request in self._void:
            self._void.discard(job.request)
            missing, aborted = set(range(len(job.blocks))), False
        if missing and not aborted:
            self._rank.count("loads_short")
            for index in sorted(missing):
                self._rank.log.write("failed_block", request=job.request, index=index)
        outbox = self._rank.outbox
        with outbox.lock:
            outbox.received.add(job.request)
            if missing and not aborted:
                outbox.failed[job.request] = min(missing)
                for index in missing:
                    pages = job.blocks[index].pages
                    outbox.invalid.update(p // per_block for p in pages if p != SKIP)
