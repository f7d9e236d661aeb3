"""Pushes: pages of the engine copied to the hub, layer by layer, on the link's thread.

Rules:
  1. A push reads pages that the scheduler half pinned, as the forward pass completes their layers.
  2. What a tail's last page holds behind its tokens is zeroed in the copy, before the checksum.
  3. It lets go of them `pin_ms` after the step at the latest; once it has, no copy is left. With
     `direct` it ends by then, and lets go when the hub is known to read no more.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import numpy.typing as npt

from kvclient import CommitVerdict, KVError, Reservation
from kvproto.grid import Region
from kvserver_vllm.direct import Direct
from kvserver_vllm.messages import SaveJob, StepMeta
from kvserver_vllm.rank import Rank


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


class Pushes:
    """Saves of this rank under way."""

    def __init__(self, rank: Rank, *, on: bool) -> None:
        """`on` is False on replicas: another rank pushes the same heads."""
        self._rank = rank
        self._direct = Direct(rank)
        self.on = on

    def admit(self, job: SaveJob) -> bool:
        """Engine's thread: whether `push` is to follow. Otherwise the job has been let go of."""
        if self.on and self._rank.queued < self._rank.settings.jobs_max:
            self._rank.queued += 1
            self._rank.count("saves")
            return True
        if self.on:
            self._lose("saves_dropped.queue", job, "jobs_max pushes are queued")
        self._let_go(job)
        return False

    def _lose(self, counter: str, job: SaveJob, reason: str) -> None:
        self._rank.count(counter)
        self._rank.log.write("save_lost", job=job.job, blocks=len(job.blocks), reason=reason)

    def _let_go(self, job: SaveJob) -> None:
        """This rank will not touch the job's pages again."""
        with self._rank.outbox.lock:
            self._rank.outbox.saved[job.job] = 1

    async def push(self, meta: StepMeta, job: SaveJob, step: Step) -> None:
        """Copy and commit one admitted job."""
        link = self._rank.link
        let_go = asyncio.Event()
        started = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        guard = link.spawn(self._expire(step, let_go, task))
        try:
            region = self._rank.region(meta)
            namespace = await link.namespace(meta.spec)
            reservation = await namespace.reserve(
                [block.hash for block in job.blocks],
                [block.parent for block in job.blocks],
                tokens=[block.tokens for block in job.blocks],
                region=region,
            )
            async with reservation:
                blocks = list(reservation.writable)
                straight = self._straight(job, blocks)
                staged = [index for index in blocks if index not in straight]
                last = await self._push_layers(job, step, reservation, staged, straight, region)
                log = self._rank.log
                if not log.on:  # otherwise the pages are hashed first
                    let_go.set()
                    self._let_go(job)
                if last is not None:
                    await self._commit(job, reservation, staged, *last)
                    self._rank.figures.took("push_seconds", time.monotonic() - started)
                    for index in blocks if log.on else ():
                        self._rank.log_cells("pushed", job.blocks[index].pages, region, job, index)
                    log.write("push_done", job=job.job, blocks=len(blocks))
                if not let_go.is_set():
                    let_go.set()
                    self._let_go(job)
        except (KVError, TimeoutError) as error:
            self._lose("saves_dropped.hub", job, str(error))
            link.doubt(error)
        except asyncio.CancelledError:
            self._lose("saves_dropped.late", job, "its pages were needed")
        finally:
            guard.cancel()
            self._rank.queued -= 1
            if not let_go.is_set():
                await self._direct.quiet(job.blocks)
                self._let_go(job)

    async def _expire(self, step: Step, let_go: asyncio.Event, push: asyncio.Task[None]) -> None:
        """End a push that still needs the engine's pages `pin_ms` after the step."""
        await step.finished.wait()
        await asyncio.sleep(max(0.0, step.deadline - time.monotonic()))
        if not let_go.is_set():
            push.cancel()

    async def _push_layers(
        self, job: SaveJob, step: Step, reservation: Reservation, staged: list[int],
        straight: list[int], region: Region,
    ) -> tuple[Region, float] | None:  # fmt: skip
        """Copy layers as they become ready and commit them, but for the last stretch of what is
        staged, which is returned, with when its copy began: its commit needs no pages. None when
        there is nothing to write, or no time."""
        pages = self._rank.pages
        done, first = 0, region.layer_start
        while staged or straight:
            ready = await step.beyond(done)
            began = time.monotonic()
            for index in staged:
                if time.monotonic() > step.deadline:
                    self._lose("saves_dropped.late", job, "its pages were needed")
                    return None
                cells = reservation.cells(index)[done:ready]
                pages.gather(done, ready, job.blocks[index].pages, cells)
                pages.format.zero_behind(cells, job.blocks[index].tokens)
            stretch = Region(first + done, first + ready, region.head_start, region.head_stop)
            await self._push_straight(job, reservation, straight, (done, ready), stretch)
            done = ready
            if done == pages.layers:
                break
            await self._commit(job, reservation, staged, stretch, began)
        return (stretch, began) if staged or straight else None

    def _straight(self, job: SaveJob, blocks: list[int]) -> list[int]:
        """Which of them go straight from their pages."""
        if not self._direct.on:
            return []
        layers, place = self._rank.pages.layers, self._direct.place
        return [index for index in blocks if place(job.blocks[index], 0, layers) is not None]

    async def _push_straight(
        self, job: SaveJob, reservation: Reservation, blocks: list[int], layers: tuple[int, int],
        region: Region,
    ) -> None:  # fmt: skip
        """Move and commit these layers of blocks that are not staged."""
        places = [self._direct.place(job.blocks[index], *layers) for index in blocks]
        began = time.monotonic()
        sources = [place for place in places if place is not None]
        if sources:
            verdicts = await reservation.fill(blocks, sources, region=region)
            self._committed(job, blocks, verdicts, region, began)

    async def _commit(
        self, job: SaveJob, reservation: Reservation, blocks: list[int], region: Region,
        began: float,
    ) -> None:  # fmt: skip
        if blocks:
            verdicts = await reservation.commit(blocks, region=region)
            self._committed(job, blocks, verdicts, region, began)

    def _committed(
        self, job: SaveJob, blocks: list[int], verdicts: npt.NDArray[np.uint8], region: Region,
        began: float,
    ) -> None:  # fmt: skip
        whole = [blocks[at] for at in np.flatnonzero(verdicts == CommitVerdict.OK)]
        lost = len(blocks) - len(whole)
        pages = sum(len(job.blocks[index].pages) for index in whole)
        self._rank.count("pushed_bytes", pages * self._rank.pages.format.page_bytes * region.cells)
        if lost:
            self._rank.count("blocks_not_committed")
        self._rank.log.write(
            "commit",
            job=job.job,
            layers=[region.layer_start, region.layer_stop],
            heads=[region.head_start, region.head_stop],
            blocks=len(verdicts) - lost,
            lost=lost,
            ms=round(1e3 * (time.monotonic() - began), 3),
        )
