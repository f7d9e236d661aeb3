"""Pulls: hub blocks copied into pages of the engine, on the link's thread.

Rules:
  1. Every load is reported once, with the blocks that did not arrive, and once it was reported no
     copy of it is left. That is by its deadline; with `direct` it is when the hub is known to write
     no more (`kvserver_vllm.direct`).
  2. It ends before its deadline when nothing has arrived for `stall_s`. What goes straight is moved
     by calls that are long and tell nothing meanwhile: such a call may take the whole time.
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
from kvserver_vllm.messages import STATE, BlockPages, LoadJob, StepMeta
from kvserver_vllm.rank import Rank
from kvserver_vllm.staging import Stagings

logger = logging.getLogger("vllm.kvserver")

DIRECT_BYTES = 256 << 20
"""Pulled by one call that is not staged: what one failure costs."""


class Watch:
    """When a load is over (rule 2). Made, and told, within its task."""

    def __init__(self, job: LoadJob) -> None:
        self._clock = asyncio.get_running_loop().time
        self._end = self._clock() + job.deadline_s
        self._stall_s = job.stall_s
        self.timeout = asyncio.timeout_at(self._next())

    def _next(self) -> float:
        return min(self._end, self._clock() + self._stall_s)

    def arrived(self) -> None:
        """Something has."""
        if not self.timeout.expired():
            self.timeout.reschedule(self._next())

    def long_call(self) -> None:
        """Nothing will be heard until it is over."""
        self.timeout.reschedule(self._end)


class Part:
    """What one section of this rank pulls of a load: blocks of which its layers have pages."""

    def __init__(self, meta: StepMeta, job: LoadJob, direct: Direct, watch: Watch) -> None:
        self.meta = meta
        self.job = job
        self.watch = watch
        self.direct = direct
        self.section = direct.section
        present = self.section.pages.present
        self.wanted = [at for at, block in enumerate(job.blocks) if present(block.pages)]
        self.missing = set(self.wanted)


class Pulls:
    """Loads of this rank under way."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._direct = [Direct(rank, section) for section in rank.sections]
        self._loads: dict[str, asyncio.Task[None]] = {}
        self.stagings = Stagings(rank)
        self._open: dict[str, LoadJob] = {}
        self._void: set[str] = set()
        self._unwanted: set[str] = set()  # aborted before they began

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
        elif request in self._open:
            self._unwanted.add(request)

    async def load(self, meta: StepMeta, job: LoadJob) -> None:
        """Pull one request's blocks; whatever happens, report it once."""
        task = asyncio.current_task()
        assert task is not None
        self._loads[job.request] = task
        watch = Watch(job)
        parts = [Part(meta, job, direct, watch) for direct in self._direct]
        aborted = False
        started = time.monotonic()
        try:
            if job.request in self._unwanted:
                raise asyncio.CancelledError
            async with watch.timeout:
                if job.fetched:
                    await self.stagings.land(meta, job, parts[0].missing, watch.arrived)
                else:
                    for part in parts:
                        await self._pull(part)
        except (KVError, TimeoutError) as error:
            self._rank.link.doubt(error)
        except asyncio.CancelledError:
            aborted = True
        except Exception:
            logger.exception("kvserver: a load failed; its blocks are recomputed")
        finally:
            self._loads.pop(job.request, None)
            self.stagings.drop(job.request)
        for part in parts:
            if part.missing:
                await part.direct.quiet(job.blocks)
        if not aborted:
            self._rank.figures.took("pull_seconds", time.monotonic() - started)
        self._report(job, set().union(*(part.missing for part in parts)), aborted)

    async def _pull(self, part: Part) -> None:
        link, job = self._rank.link, part.job
        deadline_s = max(job.deadline_s, 0.001)
        namespace = await link.namespace(part.section.order(part.meta).spec, deadline_s)
        staged = await self._pull_direct(namespace, part)
        step = link.keys_max
        for start in range(0, len(staged), step):
            chosen = staged[start : start + step]
            stream = namespace.acquire(
                [job.blocks[index].hash for index in chosen],
                region=part.section.region(part.meta, self._rank.stage),
                window_bytes=min(self._rank.settings.window_bytes, link.window_bytes_max),
                deadline_s=deadline_s,
            )
            async with stream:
                async for granted in stream:
                    part.watch.arrived()
                    index = chosen[granted.index]
                    try:
                        if await self._take(part, index, stream.region, granted):
                            part.missing.discard(index)
                    finally:
                        await granted.release()

    async def _pull_direct(self, namespace: AsyncNamespace, part: Part) -> list[int]:
        """Pull what goes straight into its pages; the positions of the others."""
        rank, section, blocks = self._rank, part.section, part.job.blocks
        if not part.direct.on:
            return part.wanted
        region = section.region(part.meta, rank.stage)
        places = {
            index: place
            for index in part.wanted
            if (place := part.direct.place(blocks[index], 0, section.pages.layers)) is not None
        }
        step = max(1, DIRECT_BYTES // namespace.grid.region_bytes(region))
        straight = list(places)
        for start in range(0, len(straight), step):
            chosen = straight[start : start + step]
            part.watch.long_call()
            result = await namespace.pull(
                [blocks[index].hash for index in chosen],
                [places[index] for index in chosen],
                region=region,
                window_bytes=min(rank.settings.window_bytes, rank.link.window_bytes_max),
                deadline_s=max(part.job.deadline_s, 0.001),
            )
            part.watch.arrived()
            for at in np.flatnonzero(result.found).tolist():
                index = chosen[at]
                part.missing.discard(index)
                moved = namespace.grid.region_bytes(region, int(result.tokens[at]))
                rank.count("pulled_bytes", moved)
                if rank.log.on:
                    tier = int(result.tiers[at])
                    rank.log_cells("pulled", section, region, blocks[index], moved, tier)
        return [index for index in part.wanted if index not in places]

    async def _take(self, part: Part, index: int, region: Region, granted: Granted) -> bool:
        """Copy one granted block into the engine's pages; whether its bytes are the right ones."""
        pages, block, cells = part.section.pages, part.job.blocks[index], granted.cells
        pages.scatter(0, pages.layers, block.pages, cells)
        moved, tier = int(cells.nbytes), int(granted.tier)
        del cells
        if not await self._rank.link.verified(granted):
            return False
        self._rank.count("pulled_bytes", moved)
        if self._rank.log.on:
            self._rank.log_cells("pulled", part.section, region, block, moved, tier)
        return True

    def _report(self, job: LoadJob, missing: set[int], aborted: bool) -> None:
        self._open.pop(job.request, None)
        self._unwanted.discard(job.request)
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
                if not self._by_block:
                    outbox.lost.add(job.request)
                for index in missing:
                    outbox.invalid.update(self._engine_blocks(job.blocks[index]))

    @property
    def _by_block(self) -> bool:
        """vLLM takes failed blocks by their id where there is one KV cache group; with several it
        takes failed requests only. Without its state nothing of a prefix is of use."""
        states = any(section.window == STATE for section in self._rank.sections)
        return len(self._rank.group_tokens) == 1 and not states

    def _engine_blocks(self, block: BlockPages) -> set[int]:
        if not self._by_block:
            return set()
        per_block = self._rank.group_tokens[0] // self._rank.page_tokens
        return {page // per_block for page in block.pages if page != SKIP}
