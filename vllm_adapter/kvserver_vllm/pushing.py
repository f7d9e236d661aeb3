"""Pushes: pages of the engine copied to the hub, layer by layer, on the link's thread.

Rules:
  1. A push reads pages that the scheduler half pinned, as the forward pass completes their layers.
  2. What a tail's last page holds behind its tokens is zeroed in the copy, before the checksum.
  3. It lets go of them `pin_ms` after the step at the latest, whatever the hub does; once it has,
     no copy is left. With `direct` it ends by then, and lets go when the hub is known to read no
     more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvclient import CommitVerdict, KVError, Reservation, ReserveVerdict
from kvproto.grid import Region
from kvserver_vllm.direct import Direct
from kvserver_vllm.layout import Pages
from kvserver_vllm.messages import BlockPages, SaveJob, StepMeta
from kvserver_vllm.rank import Rank

logger = logging.getLogger("vllm.kvserver")


class Track:
    """Progress of one forward pass in the layers of one section."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._seen: set[int] = set()
        self._ready = 0
        self._progress = asyncio.Event()

    @property
    def ready(self) -> int:
        """Layers 0 ... ready - 1 are in the engine's pages."""
        return self._ready

    def layer_done(self, layer: int) -> None:
        self._seen.add(layer)
        while self._ready in self._seen:
            self._ready += 1
        self._progress.set()

    def finish(self) -> None:
        self._ready = self._layers
        self._progress.set()

    async def beyond(self, layer: int) -> int:
        """Wait until more than `layer` layers are ready, and return how many."""
        while self._ready <= layer:
            self._progress.clear()
            await self._progress.wait()
        return self._ready


class Step:
    """Progress of one forward pass. Lives on the link's thread."""

    def __init__(self, layers: Sequence[int]) -> None:
        """`layers` of each section."""
        self.tracks = [Track(count) for count in layers]
        self.finished = asyncio.Event()
        self.deadline = float("inf")

    def layer_done(self, section: int, layer: int) -> None:
        self.tracks[section].layer_done(layer)

    def finish(self, deadline: float) -> None:
        """The pass is over; pages stay pinned until `deadline`."""
        self.deadline = deadline
        for track in self.tracks:
            track.finish()
        self.finished.set()


class Hold:
    """The engine's pages of one job, until this rank needs them no more. On the link's thread."""

    def __init__(self, let_go: Callable[[], None]) -> None:
        self._let_go = let_go
        self.over = False
        self.late = False
        """They are wanted back and were not all copied."""

    def end(self) -> None:
        if not self.over:
            self.over = True
            self._let_go()


@dataclass(frozen=True)
class Part:
    """What one section of this rank pushes of a job."""

    job: SaveJob
    direct: Direct
    step: Step
    hold: Hold
    track: Track
    blocks: list[BlockPages]
    reservation: Reservation
    region: Region
    straight: list[int]
    """Positions in `blocks` of what goes straight from its pages; what is staged goes by copies."""
    staged: list[int]

    @property
    def pages(self) -> Pages:
        return self.direct.section.pages


class Pushes:
    """Saves of this rank under way."""

    def __init__(self, rank: Rank, *, on: bool) -> None:
        """`on` is False on replicas: another rank pushes the same heads."""
        self._rank = rank
        self._direct = [Direct(rank, section) for section in rank.sections]
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

    def _lose(
        self, counter: str, job: SaveJob, reason: str, blocks: Sequence[BlockPages] | None = None
    ) -> None:
        """Give up a job, or some of its blocks. The scheduler half, whose session announced them,
        is told."""
        lost = job.blocks if blocks is None else blocks
        self._rank.count(counter)
        self._rank.log.write("save_lost", job=job.job, blocks=len(lost), reason=reason)
        with self._rank.outbox.lock:
            self._rank.outbox.given_up += (block.hash for block in lost)

    def _let_go(self, job: SaveJob) -> None:
        """This rank will not touch the job's pages again."""
        with self._rank.outbox.lock:
            self._rank.outbox.saved[job.job] = 1

    async def push(self, meta: StepMeta, job: SaveJob, step: Step) -> None:
        """Copy and commit one admitted job, in each section that has its pages."""
        hold = Hold(lambda: self._let_go(job))
        started = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        guard = self._rank.link.spawn(self._expire(job, step, hold, task))
        copying = set(range(len(self._direct)))

        def copied(section: int) -> None:
            copying.discard(section)
            if not copying:
                hold.end()

        try:
            async with asyncio.TaskGroup() as group:
                for at in sorted(copying):
                    group.create_task(self._push_section(meta, job, step, hold, at, copied))
            self._rank.figures.took("push_seconds", time.monotonic() - started)
        except asyncio.CancelledError:
            pass  # late, or the link is closing
        finally:
            guard.cancel()
            self._rank.queued -= 1
            if not hold.over:
                for at in sorted(copying):
                    await self._direct[at].quiet(job.blocks)
                hold.end()

    async def _push_section(
        self, meta: StepMeta, job: SaveJob, step: Step, hold: Hold, at: int,
        copied: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Push section number `at`; calls `copied` once it needs the engine's pages no more."""
        link, direct = self._rank.link, self._direct[at]
        section = direct.section
        blocks = [block for block in job.blocks if section.whole(block.pages)]
        try:
            if blocks:
                region = section.region(meta, self._rank.stage)
                namespace = await link.namespace(section.order(meta).spec)
                reservation = await namespace.reserve(
                    [block.hash for block in blocks],
                    [block.parent for block in blocks],
                    tokens=[block.tokens for block in blocks],
                    region=region,
                )
                async with reservation:
                    self._lose_refused(job, blocks, reservation)
                    straight = self._straight(direct, blocks, reservation)
                    staged = [index for index in reservation.writable if index not in straight]
                    part = Part(
                        job, direct, step, hold, step.tracks[at], blocks, reservation, region,
                        straight, staged,
                    )  # fmt: skip
                    last = await self._push_layers(part)
                    if not self._rank.log.on:  # otherwise the pages are hashed first
                        copied(at)
                    if last is not None:
                        await self._commit(part, *last)
                        self._log_pushed(part)
        except (KVError, TimeoutError) as error:
            self._lose("saves_dropped.hub", job, str(error))
            link.doubt(error)
            await direct.quiet(blocks)
        except Exception as error:  # of the device that the pages are on, say
            logger.exception("kvserver: a push failed; the hub does not get its blocks")
            self._lose("saves_dropped.copy", job, str(error))
            await direct.quiet(blocks)
        copied(at)

    def _lose_refused(
        self, job: SaveJob, blocks: list[BlockPages], reservation: Reservation
    ) -> None:
        refused = np.flatnonzero(reservation.verdicts == ReserveVerdict.NO_SPACE)
        if len(refused):
            lost = [blocks[index] for index in refused]
            self._lose("saves_dropped.hub", job, "the hub has no room", lost)

    async def _expire(self, job: SaveJob, step: Step, hold: Hold, push: asyncio.Task[None]) -> None:
        """End a push that still needs the engine's pages `pin_ms` after the step. Copies are made
        on this thread and ask `hold` before they begin, so that none is left: the pages are let go
        of at once, while the push tells the hub of its end, however long that takes."""
        await step.finished.wait()
        await asyncio.sleep(max(0.0, step.deadline - time.monotonic()))
        if not hold.over:
            self._late(job, hold)
            push.cancel()

    def _late(self, job: SaveJob, hold: Hold) -> None:
        """The engine wants the pages back before they were all copied."""
        if not hold.late:
            hold.late = True
            self._lose("saves_dropped.late", job, "its pages were needed")
            if not self._rank.settings.direct:
                hold.end()

    def _log_pushed(self, part: Part) -> None:
        written = sorted([*part.staged, *part.straight])
        log, section = self._rank.log, part.direct.section
        for index in written if log.on and not part.hold.over else ():
            self._rank.log_cells("pushed", section, part.region, part.blocks[index])
        log.write("push_done", job=part.job.job, blocks=len(written), window=section.window)

    async def _push_layers(self, part: Part) -> tuple[Region, float] | None:
        """Copy layers as they become ready and commit them, but for the last stretch of what is
        staged, which is returned, with when its copy began: its commit needs no pages. None when
        there is nothing to write, or no time."""
        pages, region = part.pages, part.region
        done, first = 0, region.layer_start
        while part.staged or part.straight:
            ready = await part.track.beyond(done)
            began = time.monotonic()
            for index in part.staged:
                if time.monotonic() > part.step.deadline:
                    self._late(part.job, part.hold)
                if part.hold.late:
                    return None
                cells = part.reservation.cells(index)[done:ready]
                pages.gather(done, ready, part.blocks[index].pages, cells)
                pages.format.zero_behind(cells, part.blocks[index].tokens)
            stretch = Region(first + done, first + ready, region.head_start, region.head_stop)
            await self._push_straight(part, (done, ready), stretch)
            done = ready
            if done == pages.layers:
                break
            await self._commit(part, stretch, began)
        return (stretch, began) if part.staged or part.straight else None

    def _straight(
        self, direct: Direct, blocks: list[BlockPages], reservation: Reservation
    ) -> list[int]:
        """Which of the writable blocks go straight from their pages."""
        if not direct.on:
            return []
        layers, place = direct.section.pages.layers, direct.place
        return [i for i in reservation.writable if place(blocks[i], 0, layers) is not None]

    async def _push_straight(self, part: Part, layers: tuple[int, int], region: Region) -> None:
        """Move and commit these layers of blocks that are not staged."""
        places = [part.direct.place(part.blocks[index], *layers) for index in part.straight]
        began = time.monotonic()
        sources = [place for place in places if place is not None]
        if sources:
            verdicts = await part.reservation.fill(part.straight, sources, region=region)
            self._committed(part, part.straight, verdicts, region, began)

    async def _commit(self, part: Part, region: Region, began: float) -> None:
        if part.staged:
            verdicts = await part.reservation.commit(part.staged, region=region)
            self._committed(part, part.staged, verdicts, region, began)

    def _committed(
        self, part: Part, indices: list[int], verdicts: npt.NDArray[np.uint8], region: Region,
        began: float,
    ) -> None:  # fmt: skip
        whole = [indices[at] for at in np.flatnonzero(verdicts == CommitVerdict.OK)]
        lost = len(indices) - len(whole)
        pages = sum(part.pages.count(part.blocks[index].pages) for index in whole)
        self._rank.count("pushed_bytes", pages * part.pages.format.page_bytes * region.cells)
        if lost:
            self._rank.count("blocks_not_committed")
        self._rank.log.write(
            "commit",
            job=part.job.job,
            window=part.direct.section.window,
            layers=[region.layer_start, region.layer_stop],
            heads=[region.head_start, region.head_stop],
            blocks=len(verdicts) - lost,
            lost=lost,
            ms=round(1e3 * (time.monotonic() - began), 3),
        )
