"""Writing: reservations. A push (`kvclient.pushing`) is built on them.

Rules:
 1. Only cells of a granted reservation are written, only under the Link it was granted under.
 2. A block is committed with the checksums of what stands in the arena after the copy.
 3. A reservation ends exactly once. What was granted and not committed is aborted, and the hub is
    told that our copies have drained only when they have.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from kvclient.checks import Arrays, blocks_of, region_in
from kvclient.copying import Slot, Writing, as_arena, cells_of, check_blocks
from kvclient.errors import Gone, InvalidArgument, KVError, NotFound
from kvclient.results import Bytes, CommitVerdict, ReserveVerdict
from kvclient.session import Link
from kvclient.timing import Deadline
from kvclient.transfer.cutting import region_message
from kvclient.transfer.direct import Block
from kvproto.cells import Checksums
from kvproto.frames import PERMIT_BYTES
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb

if TYPE_CHECKING:
    from kvclient.namespace import AsyncNamespace

# An enum's member is looked up by Python code, each time.
_GONE, _TAKEN = int(CommitVerdict.GONE), int(CommitVerdict.TAKEN)
COMMIT_BYTES_MAX = 4 << 20  # packed checksums in one Commit


class Reservation:
    """An exclusive, expiring right to fill cells. Comes from `AsyncNamespace.reserve`.

    Use it as `async with`: leaving it aborts what was not committed and says that the copies into
    it have drained, so end your own copies (also those on a GPU stream) before you leave.

    verdicts   ReserveVerdict of each key, uint8 [N]
    writable   positions granted to this writer
    region     the cells granted
    ttl_s      seconds it lives; commit before
    """

    def __init__(
        self, namespace: AsyncNamespace, link: Link, reply: pb.ReserveReply, *, count: int,
        tokens: Sequence[int], region: Region, asked_at: float,
    ) -> None:  # fmt: skip
        self.region = region
        self.ttl_s: float = reply.ttl_ms / 1000
        self.verdicts: Bytes = np.frombuffer(reply.verdicts, np.uint8)
        if len(self.verdicts) != count:
            raise KVError(f"the hub answered {len(self.verdicts)} of {count} keys")
        self.writable: list[int] = np.flatnonzero(self.verdicts == ReserveVerdict.WRITE).tolist()
        offsets = np.frombuffer(reply.offsets, "<u8")
        generations = np.frombuffer(reply.generations, "<u8")
        permits = permits_of(reply.permits, count)
        self._slots = {
            i: Slot(int(offsets[i]), int(generations[i]), tokens[i], permit=permits[i])
            for i in self.writable
        }
        self._local: dict[int, Bytes] = {}  # blocks that are filled here and then moved
        self._drained = True
        self._id: int = reply.reservation
        self._namespace = namespace
        self._link = link
        self._expires = asked_at + self.ttl_s  # on the monotonic clock; at the hub no earlier
        mask = namespace.grid.mask(region)
        self._pending = dict.fromkeys(self.writable, mask)
        self._lost: set[int] = set()
        self._ended = not self.writable

    def __repr__(self) -> str:
        return f"Reservation({len(self.writable)} of {len(self.verdicts)} writable)"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.abort()

    # ---- filling -------------------------------------------------------------------------

    def cells(self, index: int) -> Bytes:
        """The cells of block `index`, writable:
        uint8 [layers of the region, heads of the region, pages, page bytes].

        Over shm they stand in the hub's arena, over other transports in memory of this process,
        from where `commit` moves them. The view stays valid memory for as long as it lives, but
        drop it once it is filled: while a writable view of the arena exists after the session
        ended, the hub keeps its slots in quarantine, and other memory is used again.
        Gone when the session ended; InvalidArgument when `index` was not granted.
        """
        slot = self._slot(index)
        self._alive()
        grid = self._namespace.grid
        pages = grid.pages_for(slot.tokens)
        shape = (self.region.layers, self.region.heads, pages, grid.page_bytes)
        arena = as_arena(self._link.transfer)
        if arena is None:
            return self._buffer(index, slot).reshape(shape)
        whole = arena.writing(slot.offset, grid.payload_bytes(slot.tokens))
        cells = cells_of(whole, grid, slot.tokens, self.region)
        strides = (*cells.strides[:2], grid.page_bytes, 1)
        return np.lib.stride_tricks.as_strided(cells, shape, strides)

    def _alive(self) -> None:
        if self._link.lost is not None or not self._link.transfer.alive():
            raise self._link.gone()

    def _buffer(self, index: int, slot: Slot) -> Bytes:
        """This process's memory for the region of block `index`."""
        buffer = self._local.get(index)
        if buffer is None:
            size = self._namespace.grid.region_bytes(self.region, slot.tokens)
            buffer = self._local[index] = self._namespace.buffers.take(size)
        return buffer

    async def fill(
        self,
        indices: Sequence[int],
        arrays: Arrays,
        *,
        region: Region | None = None,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Copy `arrays` (one [layers, heads, cell bytes] of `region` per index) into the arena,
        hash them while hot, and commit. `region` defaults to the reservation's; pass layer
        ranges to push layer by layer. Returns CommitVerdict per index. InvalidArgument for cells
        that this reservation has committed.
        """
        deadline = self._namespace.deadline(deadline_s)
        part = region_in(region, self._namespace.grid, self.region)
        tokens = [self._slot(i).tokens for i in indices]
        mask = self._namespace.grid.mask(part)
        for index in indices:
            if index not in self._lost and mask & ~self._pending[index]:
                limit = "cells that were not committed yet: those are immutable"
                raise InvalidArgument.of("region", part, limit)
        sources = blocks_of("arrays", arrays, tokens, self._namespace.grid, part)
        with self._namespace.pinning(sources):
            work = await self.move(indices, sources, part, deadline)
            return await self.settle(indices, part, work, deadline)

    async def commit(
        self,
        indices: Sequence[int] | None = None,
        *,
        region: Region | None = None,
        checksums: Checksums | None = None,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Commit cells that were filled through `cells`: all of `indices` (default: everything
        writable), or a part of the region. Returns CommitVerdict per index: OK, GONE (expired, or
        another writer of the block was lost; write nothing more), MISMATCH (others committed
        these cells with other bytes; theirs stay).

        `checksums` (uint64 [indices, cells of region], xxh3-64, layer-major) spares hashing what
        stands in an arena; what is moved is hashed anyway. Raises Gone when the session ended.
        """
        deadline = self._namespace.deadline(deadline_s)
        part = region_in(region, self._namespace.grid, self.region)
        chosen = self.writable if indices is None else list(indices)
        for index in chosen:
            self._slot(index)
        if checksums is None or not self._link.transfer.mapped:
            work = await self.move(chosen, None, part, deadline)
        else:
            work = self._writing(chosen, None, part)
        if checksums is not None:
            given = np.asarray(checksums, np.uint64)
            if given.size != work.sums.size or len(given) != len(chosen):
                shape = (len(chosen), part.cells)
                raise InvalidArgument.of("checksums", given.shape, f"shape {shape}")
            work.sums[:] = given.reshape(work.sums.shape)
        return await self.settle(chosen, part, work, deadline)

    async def abort(self) -> None:
        """Give back what was not committed; our copies into it have drained. Never raises for a
        hub that is away: what it does not hear, it finds out from the liveness lock or the expiry.
        """
        self._give_back()
        if self._ended:
            return
        self._ended = True
        if self._link.lost is not None:
            return
        link = self._link
        with suppress(KVError):
            if any(self._pending.values()):
                await self._tell(
                    "Abort",
                    pb.AbortRequest(
                        session=link.session,
                        client=link.client,
                        reservation=self._id,
                        drained=self._drained,
                    ),
                )
            # What expired on the way is not aborted but quarantined, until it is fenced.
            if self._lost or time.monotonic() >= self._expires:
                await self._fence()

    async def fence(self) -> int:
        """Tell the hub that every copy into this reservation has drained, also when it expired:
        its slots may be used again. The number of slots that this freed. Ends the reservation.
        """
        self._give_back()
        self._ended = True
        return await self._fence()

    # ---- inside --------------------------------------------------------------------------

    def _give_back(self) -> None:
        while self._local:
            self._namespace.buffers.give_back(self._local.popitem()[1])

    async def _fence(self) -> int:
        link = self._link
        if not self._drained:  # somebody writes on our behalf; the hub finds out by itself
            return 0
        reply = await self._tell(
            "Fence",
            pb.FenceRequest(session=link.session, client=link.client, reservation=self._id),
        )
        return int(reply.slots_freed) if reply is not None else 0

    async def _tell(self, name: str, message: object) -> pb.FenceReply | None:
        async def make(_: Link) -> object:
            return message

        try:
            deadline = self._namespace.deadline(None)
            _, reply = await self._namespace.session.call(name, make, deadline, link=self._link)
        except NotFound:  # expired and fenced, or its session ended: nothing is left to tell
            return None
        return reply  # type: ignore[no-any-return]

    def _slot(self, index: int) -> Slot:
        slot = self._slots.get(index)
        if slot is None:
            raise InvalidArgument.of("index", index, "one of Reservation.writable")
        if self._ended:
            raise Gone("this reservation has ended")
        return slot

    def _writing(
        self, indices: Sequence[int], sources: Sequence[Block] | None, region: Region
    ) -> Writing:
        return Writing(
            self._namespace.grid,
            region,
            [self._slots[i] for i in indices],
            sources,
            hold=self._id,
            granted=self.region,
        )

    @property
    def number(self) -> int:
        """By which the hub knows it."""
        return self._id

    def slot(self, index: int) -> Slot:
        """What was granted for the key at this position."""
        return self._slot(index)

    def committed(self, index: int) -> None:
        """The caller has committed this block, whole, by itself (`kvclient.spares`)."""
        self._pending[index] = 0
        self._ended = not any(self._pending.values())

    def left_s(self) -> float:
        """Seconds until it expires; 0 when it has ended or its session was lost."""
        if self._ended or self._lost or self._link.lost is not None:
            return 0.0
        return max(0.0, self._expires - time.monotonic())

    async def move(
        self,
        indices: Sequence[int],
        sources: Sequence[Block] | None,
        region: Region,
        deadline: Deadline | None,
    ) -> Writing:
        """Move `sources`; without any, what was filled through `cells`. Without a deadline, the
        caller keeps its own.
        """
        self._alive()
        transfer = self._link.transfer
        if sources is None and not transfer.mapped:
            sources = [self._filled(index, region) for index in indices]
        check_blocks(transfer, sources or ())
        work = self._writing(indices, sources, region)
        try:
            if deadline is None:
                await transfer.put(work, self._namespace.copier)
            else:
                async with self._namespace.within(deadline, "copy"):
                    await transfer.put(work, self._namespace.copier)
        finally:
            self._drained = self._drained and work.drained
        return work

    def _filled(self, index: int, region: Region) -> Bytes:
        """The cells of `region` in the memory that `cells` gave out."""
        own = self.region
        buffer = self._local.get(index)
        if buffer is None:
            raise InvalidArgument.of("index", index, "a block that was filled through cells()")
        block = buffer.reshape(own.layers, own.heads, -1)
        return block[
            region.layer_start - own.layer_start : region.layer_stop - own.layer_start,
            region.head_start - own.head_start : region.head_stop - own.head_start,
        ]

    async def settle(
        self, indices: Sequence[int], region: Region, work: Writing, deadline: Deadline
    ) -> npt.NDArray[np.uint8]:
        if self._link.lost is not None:
            raise self._link.gone()
        limit = max(1, COMMIT_BYTES_MAX // (8 * region.cells))
        limit = min(limit, self._link.limits.keys_per_call_max)
        if len(indices) <= limit and not work.stale.any():
            chosen = np.array(indices, "<u4")
            sums = work.sums.astype("<u8", copy=False)
            verdicts = await self._send(chosen, sums, region, deadline)
        else:
            verdicts = await self._send_parts(indices, region, work, limit, deadline)
        mask = self._namespace.grid.mask(region)
        for index, verdict in zip(indices, verdicts.tolist(), strict=True):
            if verdict == _GONE:
                self._lost.add(index)
                self._pending[index] = 0
            elif verdict != _TAKEN:
                self._pending[index] &= ~mask
        if not any(self._pending.values()) and not self._lost:
            self._ended = True
            self._give_back()
        return verdicts

    async def _send_parts(
        self,
        indices: Sequence[int],
        region: Region,
        work: Writing,
        limit: int,
        deadline: Deadline,
    ) -> npt.NDArray[np.uint8]:
        """What is not stale, at most `limit` blocks a call."""
        verdicts = np.full(len(indices), CommitVerdict.GONE, np.uint8)
        fresh = np.flatnonzero(~work.stale)
        for start in range(0, len(fresh), limit):
            part = fresh[start : start + limit]
            chosen = np.fromiter((indices[i] for i in part), "<u4", len(part))
            sums = work.sums[part].astype("<u8", copy=False)
            verdicts[part] = await self._send(chosen, sums, region, deadline)
        return verdicts

    async def _send(
        self, indices: npt.NDArray[np.uint32], sums: Checksums, region: Region, deadline: Deadline
    ) -> npt.NDArray[np.uint8]:
        async def make(link: Link) -> pb.CommitRequest:
            return pb.CommitRequest(
                session=link.session,
                client=link.client,
                reservation=self._id,
                indices=indices.tobytes(),
                region=region_message(region),
                checksums=sums.tobytes(),
            )

        try:
            _, reply = await self._namespace.session.call("Commit", make, deadline, link=self._link)
        except Gone:
            raise
        except NotFound:  # the reservation expired: all of it
            return np.full(len(indices), CommitVerdict.GONE, np.uint8)
        verdicts: Bytes = np.frombuffer(reply.verdicts, np.uint8)
        if len(verdicts) != len(indices):
            raise KVError(f"the hub answered {len(verdicts)} of {len(indices)} blocks")
        return verdicts


def permits_of(packed: bytes, count: int) -> list[bytes]:
    """One permit a block; empty ones where the hub gave none."""
    if not packed:
        return [b""] * count
    if len(packed) != count * PERMIT_BYTES:
        raise KVError(f"the hub sent {len(packed)} bytes of permits for {count} blocks")
    return [packed[i : i + PERMIT_BYTES] for i in range(0, len(packed), PERMIT_BYTES)]
