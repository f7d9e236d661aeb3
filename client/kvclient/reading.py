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
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio
import numpy as np

from kvclient.checks import Arrays, targets_of
from kvclient.copying import Outcome, Piece, Reading, Slot, cells_of
from kvclient.errors import Gone, InvalidArgument, KVError, late
from kvclient.results import Bytes, PullResult, Tier
from kvclient.session import Link, Session
from kvclient.timing import Deadline
from kvclient.writing import region_message
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.namespace import AsyncNamespace


class Leases:
    """Gives leases back, many in one call."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending: dict[Link, list[int]] = {}
        self._flusher: asyncio.Task[None] | None = None

    def give_back(self, link: Link, lease: int) -> None:
        if link.lost is not None:
            return
        self._pending.setdefault(link, []).append(lease)
        if self._flusher is None or self._flusher.done():
            self._flusher = self._session.background(self._flush())

    async def _flush(self) -> None:
        while self._pending:
            link, leases = self._pending.popitem()
            packed = np.array(leases, "<u8").tobytes()

            async def make(at: Link, packed: bytes = packed) -> pb.ReleaseRequest:
                return pb.ReleaseRequest(session=at.session, leases=packed)

            with suppress(KVError):  # unheard, they expire
                deadline = Deadline(self._session.options.deadline_s)
                await self._session.call("Release", make, deadline, link=link)


class Batch:
    """One Grant: slots under one lease. Goes back when each block was released."""

    def __init__(self, grant: pb.Grant, link: Link, leases: Leases) -> None:
        self.indices: list[int] = np.frombuffer(grant.indices, "<u4").tolist()
        offsets = np.frombuffer(grant.offsets, "<u8").tolist()
        generations = np.frombuffer(grant.generations, "<u8").tolist()
        tokens = np.frombuffer(grant.tokens, "<u4").tolist()
        roots = np.frombuffer(grant.roots, "<u8").tolist()
        self.tiers = np.frombuffer(grant.tiers, np.uint8)
        columns = zip(offsets, generations, tokens, roots, strict=True)
        self.slots = [Slot(*column) for column in columns]
        if not len(self.slots) == len(self.indices) == len(self.tiers):
            raise KVError("the hub sent a ragged grant")
        self.link = link
        self._lease: int = grant.lease
        self._leases = leases
        self._held = len(self.slots)

    def release(self, count: int = 1) -> None:
        self._held -= count
        if self._held == 0:
            self._leases.give_back(self.link, self._lease)


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
        self._batch = batch
        self._slot = batch.slots[position]
        self._released = False
        self.index = batch.indices[position]
        self.tokens = self._slot.tokens
        self.tier = Tier(int(batch.tiers[position]))
        self.complete = self._slot.root != 0
        self.corrupt = False

    def __repr__(self) -> str:
        return f"Granted(index={self.index}, tokens={self.tokens}, tier={self.tier.name})"

    @property
    def cells(self) -> Bytes:
        """The region's cells, read-only, in the arena:
        uint8 [layers of the region, heads of the region, pages, page bytes].
        Copy, then `verify`, then `release`. Gone when the session ended.
        """
        grid, region, link = self._stream.namespace.grid, self._stream.region, self._batch.link
        if link.lost is not None:
            raise link.gone()
        whole = link.arena.reading(self._slot.offset, grid.payload_bytes(self._slot.tokens))
        cells = cells_of(whole, grid, self._slot.tokens, region)
        shape = (*cells.shape[:2], grid.pages_for(self._slot.tokens), grid.page_bytes)
        strides = (*cells.strides[:2], grid.page_bytes, 1)
        return np.lib.stride_tricks.as_strided(cells, shape, strides, writeable=False)

    def verify(self) -> bool:
        """Whether what stands in `cells` is what was committed, and stood there all the time since
        the grant. Call it after copying; hashes the region, so call it in a worker thread.
        False is a miss: forget what was copied.
        """
        return self._judge(self._reading(None))

    async def copy_to(self, out: Bytes) -> bool:
        """Copy the region into `out` ([layers, heads, cell bytes or more], cells contiguous) in
        the copy threads and check the bytes that arrived. False is a miss.
        """
        namespace = self._stream.namespace
        targets = targets_of("out", [out], [self.tokens], namespace.grid, self._stream.region)
        work = self._work(targets)
        pieces = namespace.copier.split(self._stream.region.layers, self._layer_bytes(), [0])
        await namespace.copier.run(work, pieces)
        return self._judge(Outcome(int(work.outcomes[0])))

    async def release(self) -> None:
        """Give the lease back; sent with others, soon. A second call does nothing."""
        if self._released:
            return
        self._released = True
        self._batch.release()
        if self.corrupt:
            self._stream.namespace.report_soon([self._stream.hashes[self.index]], self._batch.link)

    def _layer_bytes(self) -> int:
        return self._stream.region.heads * self._stream.namespace.grid.cell_bytes(self.tokens)

    def _work(self, targets: list[Bytes] | None) -> Reading:
        grid = self._stream.namespace.grid
        return Reading(self._batch.link.arena, grid, self._stream.region, [self._slot], targets)

    def _reading(self, targets: list[Bytes] | None) -> Outcome:
        work = self._work(targets)
        work(Piece(0, 0, self._stream.region.layers))
        return Outcome(int(work.outcomes[0]))

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
        self._call: Any = None
        self._link: Link | None = None
        self._ready: list[Granted] = []
        self._done = False

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
        while self._ready:
            await self._ready.pop().release()
        if self._call is not None and not self._call.done():
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Granted]:
        return self

    async def __anext__(self) -> Granted:
        while not self._ready:
            batch = await self.next_batch(Deadline(self._step_s))
            if batch is None:
                raise StopAsyncIteration
            self._ready = [Granted(self, batch, i) for i in range(len(batch.slots))]
            self._ready.reverse()
        return self._ready.pop()

    async def next_batch(self, deadline: Deadline) -> Batch | None:
        """The next Grant as a whole; None at the end."""
        while not self._done:
            reply = await self._read(deadline)
            self.missing.extend(np.frombuffer(reply.missing, "<u4").tolist())
            self._done = self._done or reply.done
            if reply.HasField("grant"):
                assert self._link is not None
                return Batch(reply.grant, self._link, self.namespace.leases)
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
            ),
        )

    async def _message(self, deadline: Deadline) -> pb.AcquireReply:
        assert self._link is not None
        session = self.namespace.session
        try:
            async with asyncio.timeout(deadline.left()):
                reply = await self._call.read()
        except TimeoutError:
            self._call.cancel()
            raise late("Acquire", session.address, deadline.seconds) from None
        except grpc.RpcError as error:
            self._done = True
            failed = session.stream_failed(self._link, "Acquire", error)
            self._done = not isinstance(failed, Gone)
            self.namespace.stale_handle(self._link, failed)
            raise failed from None
        except asyncio.CancelledError:
            session.cancelled("Acquire")
            raise
        if reply is grpc.aio.EOF:
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
                    tasks.append(asyncio.create_task(self._take(batch, first)))
                for task in tasks:
                    await task
        except BaseException:
            for task in tasks:
                task.cancel()
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
            work = Reading(batch.link.arena, grid, region, batch.slots, targets)
            layer_bytes = region.heads * grid.cell_bytes()
            blocks = range(len(batch.slots))
            pieces = self._namespace.copier.split(region.layers, layer_bytes, blocks)
            await self._namespace.copier.run(work, pieces)
        finally:
            batch.release(len(batch.slots))
        for i in blocks:
            index = first + batch.indices[i]
            if work.outcomes[i] == Outcome.OK:
                self._found[index] = True
                self._tokens[index] = batch.slots[i].tokens
                self._tiers[index] = batch.tiers[i]
                self._bytes += grid.region_bytes(region, batch.slots[i].tokens)
            elif work.outcomes[i] == Outcome.CORRUPT:
                self._corrupt.append(index)
