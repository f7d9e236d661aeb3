"""The `nixl` transport: the hub reads and writes memory of ours, by RDMA where it can.

A put is cut into moves. Staged, each is one extent of a ring: copy and hash into it, then one Move
call, in which the hub reads it into the slots and hashes what arrived. A get is the reverse: one
Move call, in which the hub writes the extent, then copy and hash into the caller's memory. A few
moves are under way at once, so that copying and moving overlap.

Direct, for cells that lie in memory which the caller registered: hash where they lie, Move; or
Move, hash where they arrived.

Rules:
 1. Only extents of the ring and registered memory are ever reachable for the hub; the rules of
    when they may be used again stand in `kvclient.transfer.ring` and `kvclient.transfer.direct`.
 2. A Move that did not come back terminal withholds its memory. A task asks the hub to settle it
    until it has, also through a later session.
 3. Staged, what is hashed on the way in is the extent's content, which nobody changes while it is
    moved: a copy of the caller's pages. So a push commits bytes that were held throughout.
 4. Direct, a put or get waits until every move is terminal, or it fails.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np

from kvclient.copying import Copier, Outcome, Piece, Reading, Writing, copy_cells
from kvclient.errors import KVError, Unavailable, Unsupported
from kvclient.timing import Deadline
from kvclient.transfer.cutting import (
    MOVES_AHEAD,
    Part,
    direct_addresses,
    parts,
    pieces,
    region_message,
    rooms,
    staged_addresses,
    sums_of,
)
from kvclient.transfer.direct import Addresses, Block, Holds, Memories
from kvclient.transfer.progress import ClientAgent, open_agent
from kvclient.transfer.ring import Orphan, Ring, orphans
from kvclient.transfer.settling import Rpc, settle_all
from kvproto import nixlib, wires
from kvproto.checksum import grid_checksums
from kvproto.frames import PERMIT_BYTES, Op, Status
from kvproto.v1 import kvserver_pb2 as pb

BACKEND = "UCX"
DIRECT_BYTES = 64 << 20  # of one move without staging
TAKE_S = 10.0
ATTACH_S = 5.0
REPLY_S = 1.0  # what a Move's answer may take beyond the move

Message = Any


class NixlTransfer:
    """A Transfer (`kvclient.transfer.base`). Built by `open_nixl`."""

    transport = "nixl"
    mapped = False

    def __init__(
        self, hello: Message, agent: ClientAgent, ring: Ring, *, backend: str, rpc: Rpc,
        memories: Memories | None,
    ) -> None:  # fmt: skip
        """`memories`: what the caller registers; None where everything is staged."""
        self.address = backend
        self.arena_id: bytes = hello.arena_id
        self.epoch: int = hello.epoch
        self._session: int = hello.session
        self._client: int = hello.client
        self._agent: ClientAgent | None = agent
        self._ring: Ring | None = ring
        self._rpc = rpc
        self._key = b""
        self._move_s = 0.0
        self._numbers = itertools.count(1)
        self._settling: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._attached = 0
        self._attaching = asyncio.Lock()
        self._memories = memories
        self._holds = Holds(memories or Memories())
        self.follows = wires.beside()  # cores to hash one put while the hub moves another
        self.bytes_moved = [0, 0]  # staged and direct, out and in

    @property
    def direct(self) -> bool:
        return self._memories is not None

    @property
    def staging_bytes(self) -> int:
        return self._ring.used_bytes if self._ring is not None else 0

    @property
    def _closed(self) -> bool:
        return self._closing.is_set()

    def alive(self) -> bool:
        return not self._closed

    @property
    def drained(self) -> bool:
        return self._ring is None or not (self._ring.busy or self._holds.busy)

    async def attach(self, deadline: Deadline) -> None:
        """Register what is not registered yet, and tell the hub of all of it."""
        try:
            async with self._attaching:
                await self._attach(deadline)
        finally:
            self._let_go()

    async def _attach(self, deadline: Deadline) -> None:
        ring, agent = self._ring, self._agent
        if ring is None or agent is None:
            raise Unavailable("the session of this transfer has ended")
        wanted = self._memories.registered if self._memories is not None else []
        for memory in (one for one in wanted if one not in agent.known):
            try:
                await asyncio.to_thread(agent.register, memory)
            except nixlib.NixlError as error:
                raise Unsupported(str(error), field="memory") from error
        metadata = await asyncio.to_thread(agent.metadata)
        rows = [(ring.address, ring.bytes.nbytes, nixlib.Memory.DRAM.code, 0)]
        rows += [(m.address, m.nbytes, m.memory.code, m.device) for m in wanted]
        request = pb.AttachRequest(
            session=self._session, client=self._client, metadata=metadata,
            extents=np.array(rows, "<u8").tobytes(),
        )  # fmt: skip
        with agent.moving():
            reply = await self._rpc("Attach", request, deadline)
        self._attached += 1
        self._key = reply.key
        self._move_s = reply.move_ms_max / 1000
        for known in agent.known:
            if known not in wanted:
                await asyncio.to_thread(agent.deregister, known)

    async def _attach_again(self, epoch: int) -> None:
        """The hub has a new agent, which does not know us. Once for all moves that were told so."""
        async with self._attaching:
            if epoch == self._attached and not self._closed:
                with suppress(KVError):
                    await self._attach(Deadline(ATTACH_S))
        self._let_go()

    def close(self) -> None:
        if self._closed:
            return
        self._closing.set()
        if self._settling is not None:
            self._settling.cancel()
        for held in (self._ring, self._holds):
            if held is not None and held.busy:
                orphans.add(Orphan(held, self.arena_id, self.epoch, self._client, self._key))
        self._let_go()

    def _let_go(self) -> None:
        """After `close`, when no call of ours runs: the agent goes; withheld memory stays."""
        ring = self._ring
        if not self._closed or ring is None or ring.taken or self._holds.running:
            return
        if self._attaching.locked():  # which does it when it is over
            return
        self._ring = None
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()

    # ---- moving --------------------------------------------------------------------------

    async def put(self, work: Writing, copier: Copier) -> None:
        work.stale[:] = False
        work.drained = False
        assert work.sources is not None
        cut = self._cut(work, work.sources)
        work.drained = await self._run(cut, lambda part: self._put(work, copier, part))

    async def get(self, work: Reading, copier: Copier) -> None:
        work.outcomes[:] = Outcome.OK
        assert work.targets is not None
        cut = self._cut(work, work.targets)
        await self._run(cut, lambda part: self._get(work, copier, part))

    def _cut(self, work: Writing | Reading, blocks: Sequence[Block]) -> Iterator[Part]:
        ring, memories = self._the_ring(), self._memories
        found = {} if memories is None else {
            index: place
            for index, block in enumerate(blocks)
            if (place := memories.scattered(block)) is not None
        }  # fmt: skip
        staged = [index for index in range(len(blocks)) if index not in found]
        return chain(
            parts(work, list(found), DIRECT_BYTES, found), parts(work, staged, ring.extent_bytes)
        )

    async def _run(self, cut: Iterator[Part], one: Callable[[Part], Awaitable[bool]]) -> bool:
        """Every part, a few at a time; whether all were terminal. When it is cancelled or fails,
        it returns after the last copy from or to the caller's memory.
        """
        terminal = True

        async def worker() -> None:
            nonlocal terminal
            for part in cut:
                terminal &= await one(part)

        tasks = [asyncio.create_task(worker()) for _ in range(MOVES_AHEAD)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            while not all(task.done() for task in tasks):
                with suppress(asyncio.CancelledError):
                    await asyncio.wait(tasks)
        return terminal

    async def _put(self, work: Writing, copier: Copier, part: Part) -> bool:
        if part.places is not None:
            return await self._put_direct(work, copier, part)
        ring = self._the_ring()
        extent = await ring.take(TAKE_S)
        number = 0
        try:
            into = rooms(part, ring.view(extent))

            def copy(piece: Piece) -> None:
                target = into[piece.index][piece.start : piece.stop]
                layers = slice(part.start + piece.start, part.start + piece.stop)
                source = work.source(piece.index)[layers, :, : part.cell_bytes]
                copy_cells(target, source, work.sums[piece.index, layers].reshape(-1), _always)

            await copier.run(copy, pieces(part, copier))
            number = next(self._numbers)
            addresses = staged_addresses(part, ring.address_of(extent))
            request = self._request(Op.WRITE, work, part, number, addresses)
            request.checksums = sums_of(work, part)
            reply = await self._move(request)
        except KVError as error:
            self._end(ring, extent, number)
            if number == 0 or isinstance(error, Unsupported):
                raise
            work.stale[part.indices] = True
            return False
        except BaseException:
            self._end(ring, extent, number)
            raise
        self._end(ring, extent, 0 if reply.terminal else number)
        self._note_put(work, part, reply)
        return bool(reply.terminal)

    async def _put_direct(self, work: Writing, copier: Copier, part: Part) -> bool:
        places = part.places
        assert places is not None

        def hash_cells(piece: Piece) -> None:
            start, stop = part.start + piece.start, part.start + piece.stop
            cells = places[piece.index].read(start, stop)[:, :, : part.cell_bytes]
            work.sums[piece.index, start:stop] = grid_checksums(cells).reshape(cells.shape[:2])

        await copier.run(hash_cells, pieces(part, copier))
        addresses, extents = direct_addresses(part)
        request = self._request(Op.WRITE, work, part, next(self._numbers), addresses)
        request.checksums = sums_of(work, part)
        reply = await self._move_direct(request, extents)
        if reply is None:
            work.stale[part.indices] = True
        else:
            self._note_put(work, part, reply)
        return True

    def _note_put(self, work: Writing, part: Part, reply: Message) -> None:
        good = np.frombuffer(reply.statuses, np.uint8) == Status.OK
        work.stale[np.asarray(part.indices)[~good]] = True
        self._count(part, int(good.sum()))

    async def _get(self, work: Reading, copier: Copier, part: Part) -> bool:
        if part.places is not None:
            return await self._get_direct(work, copier, part)
        ring = self._the_ring()
        extent = await ring.take(TAKE_S)
        number = next(self._numbers)
        terminal = False
        try:
            addresses = staged_addresses(part, ring.address_of(extent))
            reply = await self._move(self._request(Op.READ, work, part, number, addresses))
            terminal = reply.terminal
            if not terminal:
                work.outcomes[part.indices] = Outcome.STALE
                return False
            good, trailer_of = self._arrived(work, part, reply)
            source_of = rooms(part, ring.view(extent))

            def copy(piece: Piece) -> None:
                source = source_of[piece.index][piece.start : piece.stop]
                start, stop = part.start + piece.start, part.start + piece.stop
                target = work.target(piece.index)[start:stop, :, : part.cell_bytes]
                sums = np.zeros(target.shape[0] * target.shape[1], np.uint64)
                copy_cells(target, source, sums, _always)
                if not work.matches(piece.index, start, stop, sums, trailer_of[piece.index]):
                    work.outcomes[piece.index] = Outcome.CORRUPT

            await copier.run(copy, pieces(part, copier, good))
        except Unsupported:
            raise
        except KVError:
            work.outcomes[part.indices] = Outcome.STALE
            return False
        finally:
            self._end(ring, extent, 0 if terminal else number)
        return True

    async def _get_direct(self, work: Reading, copier: Copier, part: Part) -> bool:
        places = part.places
        assert places is not None
        addresses, extents = direct_addresses(part)
        request = self._request(Op.READ, work, part, next(self._numbers), addresses)
        reply = await self._move_direct(request, extents)
        if reply is None:
            work.outcomes[part.indices] = Outcome.STALE
            return True
        good, trailer_of = self._arrived(work, part, reply)

        def check(piece: Piece) -> None:
            start, stop = part.start + piece.start, part.start + piece.stop
            cells = places[piece.index].read(start, stop)[:, :, : part.cell_bytes]
            sums = grid_checksums(cells)
            if not work.matches(piece.index, start, stop, sums, trailer_of[piece.index]):
                work.outcomes[piece.index] = Outcome.CORRUPT

        await copier.run(check, pieces(part, copier, good))
        return True

    def _arrived(
        self, work: Reading, part: Part, reply: Message
    ) -> tuple[list[int], dict[int, Any]]:
        """Blocks of a get that came, and each block's trailer; marks the others."""
        statuses = np.frombuffer(reply.statuses, np.uint8)
        trailers = np.frombuffer(reply.trailers, np.uint8).reshape(len(part.indices), -1)
        work.outcomes[np.asarray(part.indices)[statuses != Status.OK]] = Outcome.STALE
        good = [i for i, s in zip(part.indices, statuses, strict=True) if s == Status.OK]
        self._count(part, len(good))
        return good, dict(zip(part.indices, trailers, strict=True))

    def _count(self, part: Part, blocks: int) -> None:
        self.bytes_moved[part.places is not None] += part.block_bytes * blocks

    def _the_ring(self) -> Ring:
        if self._ring is None or self._closed:
            raise Unavailable("the session of this transfer has ended")
        return self._ring

    async def _move_direct(self, request: Message, extents: Addresses) -> Message | None:
        """A move of registered memory: its terminal answer; None when it failed and is over.

        When it cannot be known to be over, because the session ended or the caller's deadline came,
        this raises, and the memory stays pinned.
        """
        self._the_ring()
        number, holds = request.move, self._holds
        holds.begin(number, extents)
        try:
            reply = None
            try:
                reply = await self._move(request)
            except Unsupported:
                raise
            except KVError:
                if self._closed:
                    raise
            if reply is not None and reply.terminal:
                holds.end(number)
                return reply
            over: asyncio.Future[Any] = holds.withhold(number)
            self._settle_soon()
            closing: asyncio.Future[Any] = asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait({over, closing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                closing.cancel()
            if not over.done():
                raise Unavailable("the session ended while the hub moved registered memory")
            return None
        except BaseException:
            holds.withhold(number)
            self._settle_soon()
            raise
        finally:
            self._let_go()

    async def _move(self, request: Message) -> Message:
        epoch, agent = self._attached, self._agent
        if agent is None:
            raise Unavailable("the session of this transfer has ended")
        try:
            with agent.moving():
                reply = await self._rpc("Move", request, Deadline(self._move_s + REPLY_S))
        except Unavailable as error:
            if error.field == "attach":
                await self._attach_again(epoch)
            raise
        if len(reply.statuses) * 8 != len(request.holds):
            raise KVError(f"the hub answered {len(reply.statuses)} of a move's slots")
        return reply

    def _request(
        self, op: Op, work: Writing | Reading, part: Part, number: int, addresses: Addresses
    ) -> Message:
        grid, slots = work.grid, [work.slots[i] for i in part.indices]
        permits = b"".join(slot.permit for slot in slots)
        if len(permits) != PERMIT_BYTES * len(slots):
            raise Unsupported("the hub gave no permits for these slots")
        return pb.MoveRequest(
            session=self._session,
            client=self._client,
            move=number,
            op=op,
            layers=grid.layers,
            heads=grid.heads,
            granted=region_message(work.granted),
            region=region_message(part.region),
            holds=np.full(len(slots), work.hold, "<u8").tobytes(),
            offsets=np.array([slot.offset for slot in slots], "<u8").tobytes(),
            generations=np.array([slot.generation for slot in slots], "<u8").tobytes(),
            cell_bytes=np.full(len(slots), part.cell_bytes, "<u8").tobytes(),
            permits=permits,
            addresses=addresses.astype("<u8", copy=False).tobytes(),
            deadline_ms=round(self._move_s * 1000),
        )

    # ---- what may still be touched ---------------------------------------------------------

    def _end(self, ring: Ring, extent: int, number: int) -> None:
        """We are done with an extent; with a `number`, its move may still run."""
        if number:
            ring.withhold(extent, number)
            self._settle_soon()
        else:
            ring.give_back(extent)
        self._let_go()

    def _settle_soon(self) -> None:
        if not self._closed and (self._settling is None or self._settling.done()):
            self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        agent, held = self._agent, [one for one in (self._ring, self._holds) if one]
        if agent is not None:
            with agent.moving():
                await settle_all(self._rpc, self._session, self._client, self._key, held)


async def open_nixl(
    hello: Message, *, backend: str, params: Mapping[str, str], staging_bytes: int, rpc: Rpc,
    memories: Memories | None, deadline: Deadline,
) -> NixlTransfer:  # fmt: skip
    """Make an agent and a ring, and attach. Unsupported where NIXL cannot be used here."""
    orphans.check()

    # The hub takes an agent of this name only; the rest keeps others from taking it.
    name = f"kvclient-{hello.session:x}-{hello.client}-{secrets.token_hex(8)}"
    ring, direct = Ring(staging_bytes), memories is not None
    agent = await open_agent(
        name, ring, backend=backend, params=params, direct=direct, deadline=deadline
    )
    transfer = NixlTransfer(hello, agent, ring, backend=backend, rpc=rpc, memories=memories)
    try:
        await transfer.attach(deadline)
    except BaseException:
        transfer.close()
        raise
    return transfer


def _always() -> bool:
    return True
