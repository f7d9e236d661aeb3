"""The worker half: moves this rank's heads and layers between the engine's pages and the hub.

Rules:
  1. The engine's thread only enqueues: no call below waits for the hub or copies a page.
  2. All copies run on the link's thread, so that once a job was reported none of them is left.
  3. A push reads pages that the scheduler half pinned, layer by layer as the forward pass
     completes them, and lets go of them `pin_ms` after the step at the latest.
  4. Every load is reported once, by its deadline, with the blocks that did not arrive.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvclient import CommitVerdict, Granted, KVError, Reservation
from kvproto.checksum import checksum
from kvproto.grid import Region
from kvserver_vllm.config import Settings
from kvserver_vllm.events import EventLog
from kvserver_vllm.layout import SKIP, Pages
from kvserver_vllm.link import HubLink
from kvserver_vllm.messages import LoadJob, RankReport, SaveJob, StepMeta

logger = logging.getLogger("vllm.kvserver")


class Step:
    """Progress of one forward pass, in layers. Lives on the link's thread."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._seen: set[int] = set()
        self._ready = 0
        self._progress = asyncio.Event()
        self.finished = asyncio.Event()
        self.deadline = float("inf")

    @property
    def ready(self) -> int:
        """Layers 0 ... ready - 1 are in the engine's pages."""
        return self._ready

    def layer_done(self, layer: int) -> None:
        self._seen.add(layer)
        while self._ready in self._seen:
            self._ready += 1
        self._progress.set()

    def finish(self, deadline: float) -> None:
        """The pass is over; pages stay pinned until `deadline`."""
        self.deadline = deadline
        self._ready = self._layers
        self.finished.set()
        self._progress.set()

    async def beyond(self, layer: int) -> int:
        """Wait until more than `layer` layers are ready, and return how many."""
        while self._ready <= layer:
            self._progress.clear()
            await self._progress.wait()
        return self._ready


@dataclass
class Outbox:
    """What the link's thread has finished and the engine's thread will report."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    saved: dict[int, int] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    failed: dict[str, int] = field(default_factory=dict)
    invalid: set[int] = field(default_factory=set)


class WorkerHalf:
    """One per rank. Public methods are called on the engine's thread."""

    def __init__(
        self,
        settings: Settings,
        link: HubLink,
        log: EventLog,
        pages: Pages,
        layers: Sequence[str],
        *,
        stage: int,
        head_start: int,
        pushes: bool,
    ) -> None:
        """`layers` are this rank's layer names in order; `pushes` is False on replicas."""
        self._settings = settings
        self._link = link
        self._log = log
        self._pages = pages
        self._layer = {name: index for index, name in enumerate(layers)}
        self._stage = stage
        self._head_start = head_start
        self._pushes = pushes
        self._meta = StepMeta()
        self._greeted = b""
        self._step: Step | None = None
        self._queued = 0
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._outbox = Outbox()
        self._report_failed: dict[str, int] = {}
        self._invalid: set[int] = set()
        self.counters: dict[str, int] = {}

    # ---- the engine's thread -----------------------------------------------------------------

    def bind(self, meta: StepMeta) -> None:
        """A step begins: its pushes may reserve while the forward pass runs."""
        self._meta = meta
        self._step = None
        if meta.spec and meta.spec != self._greeted:
            self._greeted = meta.spec
            self._link.submit(self._link.greet(meta.spec))
        if not meta.saves:
            return
        step = self._step = Step(self._pages.layers)
        for job in meta.saves:
            if not self._pushes or self._queued >= self._settings.jobs_max:
                if self._pushes:
                    self._lose_save("saves_dropped", job, "jobs_max pushes are queued")
                self._let_go(job)
                continue
            self._queued += 1
            self._link.submit(self._push(meta, job, step))

    def layer_saved(self, name: str) -> None:
        """vLLM's save_kv_layer: this layer of the step is in the engine's pages."""
        step = self._step
        if step is None:
            return
        layer = self._layer.get(name)
        if layer is not None:
            self._call_soon(step.layer_done, layer)
            if self._log.on:
                self._log.write("save_layer", layer=layer, jobs=[j.job for j in self._meta.saves])

    def step_saved(self) -> None:
        """vLLM's wait_for_save: whatever no layer hook took is ready now."""
        if self._step is not None:
            deadline = time.monotonic() + self._settings.pin_ms / 1e3
            self._call_soon(self._step.finish, deadline)
            self._step = None

    def start_loads(self) -> None:
        """vLLM's start_load_kv."""
        for job in self._meta.loads:
            self._link.submit(self._load(self._meta, job))
        for request in self._meta.aborts:
            self._call_soon(self._abort, request)

    def take_received(self) -> set[str]:
        """Requests whose load ended since the last call; fixes what the next two calls answer."""
        box = self._outbox
        with box.lock:
            received, box.received = box.received, set()
            self._invalid, box.invalid = box.invalid, set()
            self._report_failed, box.failed = box.failed, {}
        return received

    def take_invalid(self) -> set[int]:
        """Engine blocks of those loads that did not arrive."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> RankReport | None:
        with self._outbox.lock:
            saved, self._outbox.saved = self._outbox.saved, {}
        failed, self._report_failed = self._report_failed, {}
        return RankReport(saved, failed) if saved or failed else None

    def _call_soon(self, function: Any, *args: Any) -> None:
        try:
            self._link.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("kvserver: the link is closed")

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    def _lose_save(self, counter: str, job: SaveJob, reason: str) -> None:
        self._count(counter)
        self._log.write("save_lost", job=job.job, blocks=len(job.blocks), reason=reason)

    # ---- pushes, on the link's thread --------------------------------------------------------

    def _let_go(self, job: SaveJob) -> None:
        """This rank will not touch the job's pages again."""
        with self._outbox.lock:
            self._outbox.saved[job.job] = 1

    def _region(self, meta: StepMeta) -> Region:
        start = meta.layer_start[self._stage]
        heads = (self._head_start, self._head_start + self._pages.heads)
        return Region(start, start + self._pages.layers, *heads)

    async def _push(self, meta: StepMeta, job: SaveJob, step: Step) -> None:
        let_go = asyncio.Event()
        task = asyncio.current_task()
        assert task is not None
        guard = self._link.spawn(self._expire(step, let_go, task))
        try:
            region = self._region(meta)
            namespace = await self._link.namespace(meta.spec)
            reservation = await namespace.reserve(
                [block.hash for block in job.blocks],
                [block.parent for block in job.blocks],
                region=region,
            )
            async with reservation:
                blocks = list(reservation.writable)
                last = await self._push_layers(job, step, reservation, blocks, region)
                let_go.set()
                self._let_go(job)
                if last is not None:
                    await self._commit(job, reservation, blocks, last)
                    self._log.write("push_done", job=job.job, blocks=len(blocks))
        except (KVError, TimeoutError) as error:
            self._lose_save("saves_failed", job, str(error))
            self._link.doubt(error)
        except asyncio.CancelledError:
            self._lose_save("saves_dropped", job, "its pages were needed")
        finally:
            guard.cancel()
            if not let_go.is_set():
                self._let_go(job)
            self._queued -= 1

    async def _expire(self, step: Step, let_go: asyncio.Event, push: asyncio.Task[None]) -> None:
        """End a push that still needs the engine's pages `pin_ms` after the step."""
        await step.finished.wait()
        await asyncio.sleep(max(0.0, step.deadline - time.monotonic()))
        if not let_go.is_set():
            push.cancel()

    async def _push_layers(
        self,
        job: SaveJob,
        step: Step,
        reservation: Reservation,
        blocks: list[int],
        region: Region,
    ) -> Region | None:
        """Copy layers as they become ready and commit them, but for the last stretch, which is
        returned: its commit needs no pages. None when there is nothing to write, or no time."""
        done, first = 0, region.layer_start
        while blocks:
            ready = await step.beyond(done)
            for index in blocks:
                if time.monotonic() > step.deadline:
                    self._lose_save("saves_dropped", job, "its pages were needed")
                    return None
                pages = job.blocks[index].pages
                self._pages.gather(done, ready, pages, reservation.cells(index)[done:ready])
            stretch = Region(first + done, first + ready, region.head_start, region.head_stop)
            done = ready
            if done == self._pages.layers:
                break
            await self._commit(job, reservation, blocks, stretch)
        if self._log.on:
            for index in blocks:
                self._log_cells("pushed", job.blocks[index].pages, region, job, index)
        return stretch if blocks else None

    async def _commit(
        self, job: SaveJob, reservation: Reservation, blocks: list[int], region: Region
    ) -> None:
        verdicts = await reservation.commit(blocks, region=region)
        lost = int(np.count_nonzero(verdicts != CommitVerdict.OK))
        if lost:
            self._count("blocks_not_committed")
        self._log.write(
            "commit",
            job=job.job,
            layers=[region.layer_start, region.layer_stop],
            heads=[region.head_start, region.head_stop],
            blocks=len(blocks) - lost,
            lost=lost,
        )

    # ---- loads, on the link's thread ---------------------------------------------------------

    def _abort(self, request: str) -> None:
        task = self._loads.get(request)
        if task is not None:
            task.cancel()

    async def _load(self, meta: StepMeta, job: LoadJob) -> None:
        """Pull one request's blocks; whatever happens, report it once."""
        task = asyncio.current_task()
        assert task is not None
        self._loads[job.request] = task
        missing = set(range(len(job.blocks)))
        aborted = False
        try:
            async with asyncio.timeout(job.deadline_s):
                await self._pull(meta, job, missing)
        except (KVError, TimeoutError) as error:
            self._link.doubt(error)
        except asyncio.CancelledError:
            aborted = True
        except Exception:
            logger.exception("kvserver: a load failed; its blocks are recomputed")
        finally:
            self._loads.pop(job.request, None)
            self._report_load(job, missing, aborted)

    async def _pull(self, meta: StepMeta, job: LoadJob, missing: set[int]) -> None:
        deadline_s = max(job.deadline_s, 0.001)
        namespace = await self._link.namespace(meta.spec, deadline_s)
        step = self._link.keys_max
        for start in range(0, len(job.blocks), step):
            part = job.blocks[start : start + step]
            stream = namespace.acquire(
                [block.hash for block in part],
                region=self._region(meta),
                window_bytes=min(self._settings.window_bytes, self._link.window_bytes_max),
                deadline_s=deadline_s,
            )
            async with stream:
                async for granted in stream:
                    index = start + granted.index
                    if self._take(job, index, stream.region, granted):
                        missing.discard(index)
                    await granted.release()

    def _take(self, job: LoadJob, index: int, region: Region, granted: Granted) -> bool:
        """Copy one granted block into the engine's pages; whether its bytes are the right ones."""
        pages, cells = job.blocks[index].pages, granted.cells
        self._pages.scatter(0, self._pages.layers, pages, cells)
        moved, tier = int(cells.nbytes), int(granted.tier)
        del cells
        if not granted.verify():
            return False
        if self._log.on:
            self._log_cells("pulled", pages, region, job, index, moved, tier)
        return True

    def _report_load(self, job: LoadJob, missing: set[int], aborted: bool) -> None:
        per_block = self._pages.format.pages_per_block
        if missing and not aborted:
            self._count("loads_failed")
            for index in sorted(missing):
                self._log.write("failed_block", request=job.request, index=index)
        with self._outbox.lock:
            self._outbox.received.add(job.request)
            if missing and not aborted:
                self._outbox.failed[job.request] = min(missing)
                for index in missing:
                    pages = job.blocks[index].pages
                    self._outbox.invalid.update(p // per_block for p in pages if p != SKIP)

    def _log_cells(
        self,
        event: str,
        pages: Sequence[int],
        region: Region,
        job: SaveJob | LoadJob,
        index: int,
        moved: int = 0,
        tier: int = 0,
    ) -> None:
        """Log a hash of what stands in the engine's pages, by head over all layers of the rank."""
        present = [page for page in pages if page != SKIP]
        shape = (self._pages.layers, self._pages.heads, len(present), self._pages.format.page_bytes)
        cells = np.empty(shape, dtype=np.uint8)
        self._pages.gather(0, self._pages.layers, present, cells)
        hashes = [
            f"{checksum(np.ascontiguousarray(cells[:, head])):016x}"
            for head in range(self._pages.heads)
        ]
        block = job.blocks[index]
        self._log.write(
            event,
            request=block.request,
            hash=block.hash.hex(),
            layers=[region.layer_start, region.layer_stop],
            heads=[region.head_start, region.head_stop],
            pages=len(present),
            cells=hashes,
            bytes=moved or int(cells.nbytes),
            tier=tier,
        )
