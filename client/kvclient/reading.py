"""Reading: streams of grants, and the pull that is built on them.

Rules:
 1. A grant is a lease over some slots. It goes back when every block of it was released; releases
    are gathered, one call for all that came while the last one ran.
 2. What was copied counts only after `verify` (or `copy_to`, or `pull`) said so: checksums of
    every cell, and the slot's generation and the arena's epoch before and after.
 3. A block that fails is a miss. Wrong bytes in a slot that is still current are reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from kvclient.checks import Arrays, targets_of
from kvclient.copying import (
    Outcome,
    Piece,
    Reading,
    Slot,
    as_arena,
    as_array,
    cells_of,
    check_blocks,
    read_piece,
)
from kvclient.errors import Gone, InvalidArgument, KVError
from kvclient.leases import Leases
from kvclient.results import Bytes, PullResult, Tier
from kvclient.session import Link
from kvclient.streams import Stream
from kvclient.timing import Deadline
from kvclient.transfer.cutting import region_message
from kvclient.transfer.direct import Block
from kvclient.writing import permits_of
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.namespace import AsyncNamespace


GROUP_BYTES = 8 << 20  # moved at once by a stream of a hub that is not mapped


class Batch:
    """One Grant: slots under one lease. Goes back when each block was released; at leisure when
    it is the stream's `last`.
    """

    def __init__(self, grant: pb.Grant, link: Link, leases: Leases, *, last: bool) -> None:
        self.indices: list[int] = np.frombuffer(grant.indices, "<u4").tolist()
        offsets = np.frombuffer(grant.offsets, "<u8").tolist()
        generations = np.frombuffer(grant.generations, "<u8").tolist()
        tokens = np.frombuffer(grant.tokens, "<u4").tolist()
        roots = np.frombuffer(grant.roots, "<u8").tolist()
        self.tiers = np.frombuffer(grant.tiers, np.uint8)
        permits = permits_of(grant.permits, len(offsets))
        columns = zip(offsets, generations, tokens, roots, permits, strict=True)
        self.slots = [Slot(*column) for column in columns]
        if not len(self.slots) == len(self.indices) == len(self.tiers):
            raise KVError("the hub sent a ragged grant")
        self.link = link
        self.lease: int = grant.lease
        self._leases = leases
        self._held = len(self.slots)
        self.last = last

    def release(self, count: int = 1) -> None:
        self._held -= count
        if self._held == 0:
            self._leases.give_back(self.link, self.lease, soon=not self.last)


class Granted:
    """One leased block of a read stream.

    index      position in the acquire call
    tokens     tokens that it holds; a tail has fewer pages
    tier       where it was when it was asked for
    complete   False: still filling; the region asked for is there all the same
    corrupt    set by `verify`/`copy_to`: the slot is current and its bytes are wrong
    """

    def __init__(self, stream: ReadStream, batch: Batch, position: int) -> None:
        self._stream = stream
        self.batch = batch
        self.slot = batch.slots[position]
        self._released = False
        self.index = batch.indices[position]
        self.tokens = self.slot.tokens
        self.tier = Tier(int(batch.tiers[position]))
        self.complete = self.slot.root != 0
        self.corrupt = False
        self._local: Bytes | None = None  # the region's cells, when the hub's are not mapped here
        self._outcome = Outcome.STALE  # of what was moved there

    def __repr__(self) -> str:
        return f"Granted(index={self.index}, tokens={self.tokens}, tier={self.tier.name})"

    @property
    def cells(self) -> Bytes:
        """The region's cells, read-only:
        uint8 [layers of the region, heads of the region, pages, page bytes].

        Over shm they stand in the hub's arena, over other transports where they were moved to.
        Copy, then `verify`, then `release`; after that the view is worth nothing. Gone when the
        session ended.
        """
        grid, region, link = self._stream.namespace.grid, self._stream.region, self.batch.link
        if link.lost is not None:
            raise link.gone()
        shape = (region.layers, region.heads, grid.pages_for(self.tokens), grid.page_bytes)
        arena = as_arena(link.transfer)
        if arena is None:
            if self._local is None:
                raise Gone("this block was released")
            moved = self._local.reshape(shape)
            moved.flags.writeable = False
            return moved
        whole = arena.reading(self.slot.offset, grid.payload_bytes(self.slot.tokens))
        cells = cells_of(whole, grid, self.slot.tokens, region)
        strides = (*cells.strides[:2], grid.page_bytes, 1)
        return np.lib.stride_tricks.as_strided(cells, shape, strides, writeable=False)

    def verify(self) -> bool:
        """Whether what stands in `cells` is what was committed, and stood there all the time since
        the grant. Call it after copying; hashes the region, so call it in a worker thread.
        False is a miss: forget what was copied.
        """
        arena = as_arena(self.batch.link.transfer)
        if arena is None:
            return self._judge(self._outcome)
        work = self._work(None)
        read_piece(arena, work, Piece(0, 0, self._stream.region.layers))
        return self._judge(Outcome(int(work.outcomes[0])))

    async def verified(self) -> bool:
        """`verify`, shared out over the copy threads: sooner for a large block where there are
        cores for them, later for a small one."""
        transfer = self.batch.link.transfer
        if not transfer.mapped:
            return self._judge(self._outcome)
        work = self._work(None)
        await transfer.get(work, self._stream.namespace.copier)
        return self._judge(Outcome(int(work.outcomes[0])))

    async def copy_to(self, out: Bytes) -> bool:
        """Copy the region into `out` ([layers, heads, cell bytes or more], cells contiguous) in
        the copy threads and check the bytes that arrived. False is a miss.
        """
        namespace = self._stream.namespace
        targets = targets_of("out", [out], [self.tokens], namespace.grid, self._stream.region)
        transfer = self.batch.link.transfer
        if not transfer.mapped:
            cells, target = self.cells, as_array(targets[0])
            target[:, :, : cells[0, 0].size] = cells.reshape(*cells.shape[:2], -1)
            return self._judge(self._outcome)
        work = self._work(targets)
        await transfer.get(work, namespace.copier)
        return self._judge(Outcome(int(work.outcomes[0])))

    def local(self) -> Bytes:
        """Memory for the region of this block; `moved` says what became of it."""
        size = self._stream.namespace.grid.region_bytes(self._stream.region, self.tokens)
        self._local = self._stream.namespace.buffers.take(size)
        return self._local.reshape(self._stream.region.layers, self._stream.region.heads, -1)

    def moved(self, outcome: Outcome) -> None:
        self._outcome = outcome

    async def release(self) -> None:
        """Give the lease back; sent with others, soon. A second call does nothing."""
        if self._released:
            return
        self._released = True
        self.batch.release()
        if self._local is not None:
            self._stream.namespace.buffers.give_back(self._local)
            self._local = None
        if self.corrupt:
            self._stream.namespace.report_soon([self._stream.hashes[self.index]], self.batch.link)

    def _work(self, targets: list[Block] | None) -> Reading:
        grid, region = self._stream.namespace.grid, self._stream.region
        return Reading(grid, region, [self.slot], targets, hold=self.batch.lease)

    def _judge(self, outcome: Outcome) -> bool:
        self.corrupt = self.corrupt or outcome is Outcome.CORRUPT
        return outcome is Outcome.OK


class ReadStream:
    """Blocks as they become readable, in order of the keys: an async iterator of Granted.

    Use it as `async with`, so that leaving early ends the call at the hub, and with it the leases
    of what was granted; after the iteration has ended they stay until released. `missing` lists
    positions that will not come; it is complete once the iteration has ended. The hub grants no
    more than a window of bytes at once: release what was copied, or the stream stands still (and
    raises DeadlineExceeded in the end).
    """

    def __init__(
        self, namespace: AsyncNamespace, hashes: list[bytes], *, region: Region, wait_ms: int,
        window_bytes: int, lease_ms: int, inherit_lease: int, step_s: float,
    ) -> None:  # fmt: skip
        self.namespace = namespace
        self.hashes = hashes
        self.region = region
        self.missing: list[int] = []
        self._wait_ms = wait_ms
        self._window_bytes = window_bytes
        self._lease_ms = lease_ms
        self._inherit_lease = inherit_lease
        self._step_s = step_s
        self._call: Stream | None = None
        self._link: Link | None = None
        self._ready: list[Granted] = []
        self._done = False
        self._coming: list[list[Granted]] = []  # granted, not moved here yet; the next one last
        self._moving: asyncio.Task[list[Granted]] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the call at the hub. Blocks already granted but not handed out go back."""
        self._done = True
        left = [*self._ready, *(granted for group in self._coming for granted in group)]
        if self._moving is not None:
            self._moving.cancel()
            with suppress(KVError, asyncio.CancelledError):
                left += await self._moving
            self._moving = None
        self._ready, self._coming = [], []
        for granted in left:
            await granted.release()
        if self._call is not None and not self._call.done():
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Granted]:
        return self

    async def __anext__(self) -> Granted:
        while not self._ready:
            deadline = Deadline(self._step_s)
            if self._moving is not None or self._coming:
                self._ready = await self._moved(deadline)
                continue
            batch = await self.next_batch(deadline)
            if batch is None:
                raise StopAsyncIteration
            granted = [Granted(self, batch, i) for i in range(len(batch.slots))]
            granted.reverse()
            if batch.link.transfer.mapped:
                self._ready = granted
            else:
                self._coming = self._groups(granted)
        return self._ready.pop()

    def _groups(self, granted: list[Granted]) -> list[list[Granted]]:
        """What is moved together: some MiB, so that the first is here soon."""
        size = self.namespace.grid.region_bytes(self.region)
        step = max(1, GROUP_BYTES // size)
        ends = range(len(granted), 0, -step)
        return [granted[max(0, end - step) : end] for end in reversed(ends)]

    async def _moved(self, deadline: Deadline) -> list[Granted]:
        """The next group, moved here; the one behind it is begun."""
        if self._moving is None:
            self._moving = asyncio.create_task(self._move(self._coming.pop()))
        async with self.namespace.within(deadline, "read"):
            ready = await asyncio.shield(self._moving)
        self._moving = None
        if self._coming:
            self._moving = asyncio.create_task(self._move(self._coming.pop()))
        return ready

    async def _move(self, group: list[Granted]) -> list[Granted]:
        """Blocks that did not arrive are handed out too: `verify` says so."""
        batch = group[0].batch
        slots = [granted.slot for granted in group]
        work = Reading(self.namespace.grid, self.region, slots, None, hold=batch.lease)
        work.targets = [granted.local() for granted in group]
        try:
            await batch.link.transfer.get(work, self.namespace.copier)
        except KVError:
            return group
        except BaseException:
            for granted in group:
                await granted.release()
            raise
        for granted, outcome in zip(group, work.outcomes.tolist(), strict=True):
            granted.moved(Outcome(outcome))
        return group

    async def next_batch(self, deadline: Deadline) -> Batch | None:
        """The next Grant as a whole; None at the end."""
        while not self._done:
            reply = await self._read(deadline)
            self.missing.extend(np.frombuffer(reply.missing, "<u4").tolist())
            self._done = self._done or reply.done
            if reply.HasField("grant"):
                assert self._link is not None
                return Batch(reply.grant, self._link, self.namespace.leases, last=reply.done)
        return None

    async def _read(self, deadline: Deadline) -> pb.AcquireReply:
        """The next message; begins the call, and once more if its session had just ended."""
        for attempt in (0, 1):
            fresh = self._call is None
            if fresh:
                await self._begin(deadline)
            try:
                return await self._message(deadline)
            except Gone:
                if attempt or not fresh or self._inherit_lease:
                    raise
                self._call = None
        raise AssertionError("unreachable")

    async def _begin(self, deadline: Deadline) -> None:
        session = self.namespace.session
        link = await session.ready(deadline)
        handle = await self.namespace.handle(link, deadline)
        self._link = link
        self._call = session.stream(
            link,
            "Acquire",
            pb.AcquireRequest(
                session=link.session,
                client=link.client,
                namespace=handle,
                hashes=b"".join(self.hashes),
                region=region_message(self.region),
                wait_ms=self._wait_ms,
                window_bytes=self._window_bytes,
                lease_ms=self._lease_ms,
                inherit_lease=self._inherit_lease,
                release=self.namespace.leases.take(link),
            ),
        )

    async def _message(self, deadline: Deadline) -> pb.AcquireReply:
        assert self._link is not None
        assert self._call is not None
        session = self.namespace.session
        try:
            reply = await self._call.read(deadline)
        except KVError as error:
            failed = session.stream_failed(self._link, error)
            self._done = not isinstance(failed, Gone)
            self.namespace.stale_handle(self._link, failed)
            raise failed from None
        if reply is None:
            self._done = True
            return pb.AcquireReply(done=True)
        message: pb.AcquireReply = reply
        return message


class Pull:
    """One pull: grants are copied and checked while the next ones arrive."""

    def __init__(
        self, namespace: AsyncNamespace, hashes: list[bytes], out: Arrays, *, region: Region,
        deadline: Deadline,
    ) -> None:  # fmt: skip
        grid = namespace.grid
        # How many tokens a block holds, only its grant says: widths are checked again then.
        self._targets = targets_of("out", out, [1] * len(hashes), grid, region)
        self._namespace = namespace
        self._hashes = hashes
        self._region = region
        self._deadline = deadline
        self._corrupt: list[int] = []
        self._found = np.zeros(len(hashes), np.bool_)
        self._tokens = np.zeros(len(hashes), np.uint32)
        self._tiers = np.zeros(len(hashes), np.uint8)
        self._bytes = 0

    async def run(self, *, wait_s: float, window_bytes: int, inherit_lease: int) -> PullResult:
        step = self._namespace.session.link.limits.keys_per_call_max
        for start in range(0, len(self._hashes), step):
            stream = self._namespace.acquire(
                self._hashes[start : start + step],
                region=self._region,
                wait_s=wait_s,
                window_bytes=window_bytes,
                inherit_lease=inherit_lease,
            )
            await self._take_all(stream, start)
        if self._corrupt:
            with suppress(KVError):
                await self._namespace.report_corrupt([self._hashes[i] for i in self._corrupt])
        return PullResult(self._found, self._tokens, self._tiers, self._bytes, len(self._corrupt))

    async def _take_all(self, stream: ReadStream, first: int) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            async with stream:
                while (batch := await stream.next_batch(self._deadline)) is not None:
                    if batch.last or not self._namespace.overlaps:
                        await self._take(batch, first)
                    else:
                        tasks.append(asyncio.create_task(self._take(batch, first)))
                for task in tasks:
                    await task
        except BaseException:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _take(self, batch: Batch, first: int) -> None:
        """Copy and check one Grant, in threads; then give its lease back."""
        grid, region = self._namespace.grid, self._region
        try:
            targets = [self._targets[first + i] for i in batch.indices]
            for index, slot, target in zip(batch.indices, batch.slots, targets, strict=True):
                cell_bytes = grid.cell_bytes(slot.tokens)
                if target.shape[2] < cell_bytes:
                    limit = f"cells of {cell_bytes} bytes ({slot.tokens} tokens) or more"
                    raise InvalidArgument.of(f"out[{first + index}]", target.shape, limit)
            check_blocks(batch.link.transfer, targets)
            work = Reading(grid, region, batch.slots, targets, hold=batch.lease)
            await batch.link.transfer.get(work, self._namespace.copier)
        finally:
            batch.release(len(batch.slots))
        for i in range(len(batch.slots)):
            index = first + batch.indices[i]
            if work.outcomes[i] == Outcome.OK:
                self._found[index] = True
                self._tokens[index] = batch.slots[i].tokens
                self._tiers[index] = batch.tiers[i]
                self._bytes += grid.region_bytes(region, batch.slots[i].tokens)
            elif work.outcomes[i] == Outcome.CORRUPT:
                self._corrupt.append(index)
