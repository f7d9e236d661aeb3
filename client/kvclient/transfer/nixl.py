"""The `nixl` transport: the hub reads and writes a staging ring of ours, by RDMA where it can.

A put is cut into moves of one extent each: copy and hash into the extent, then one Move call, in
which the hub reads it into the slots and hashes what arrived. A get is the reverse: one Move call,
in which the hub writes the extent, then copy and hash into the caller's memory. A few moves are
under way at once, so that copying and moving overlap.

Rules:
 1. Only extents of the ring are ever reachable for the hub; the rules of when one may be used
    again stand in `kvclient.transfer.ring`.
 2. A Move that did not come back terminal withholds its extent. A task asks the hub to settle it
    until it has, also through a later session.
 3. What is hashed on the way in is the extent's content, which nobody changes while it is moved:
    a copy of the caller's pages. So a push commits bytes that were held throughout.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvclient.copying import Copier, Outcome, Piece, Reading, Writing, copy_cells
from kvclient.errors import DeadlineExceeded, KVError, Unavailable, Unsupported
from kvclient.timing import Deadline
from kvclient.transfer.base import Bytes
from kvclient.transfer.ring import Orphan, Ring, orphans
from kvproto import nixlib
from kvproto.frames import PERMIT_BYTES, Op, Status
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb

BACKEND = "UCX"
MOVES_AHEAD = 3
TAKE_S = 10.0
ATTACH_S = 5.0
SETTLE_S = 0.2
SETTLE_LIMIT_S = 2.0
REPLY_S = 1.0  # what a Move's answer may take beyond the move

Message = Any
Rpc = Callable[[str, Message, Deadline], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers [start, stop) of the region of these blocks: what one Move carries."""

    indices: list[int]
    start: int
    stop: int
    region: Region


class NixlTransfer:
    """A Transfer (`kvclient.transfer.base`). Built by `open_nixl`."""

    transport = "nixl"

    def __init__(
        self, hello: Message, agent: nixlib.Agent, ring: Ring, *, backend: str, rpc: Rpc
    ) -> None:
        self.address = backend
        self.arena_id: bytes = hello.arena_id
        self.epoch: int = hello.epoch
        self._session: int = hello.session
        self._client: int = hello.client
        self._agent: nixlib.Agent | None = agent
        self._ring: Ring | None = ring
        self._rpc = rpc
        self._key = b""
        self._move_s = 0.0
        self._numbers = itertools.count(1)
        self._settling: asyncio.Task[None] | None = None
        self._closed = False
        self._attached = 0
        self._attaching = asyncio.Lock()
        self.bytes_out = 0
        self.bytes_in = 0

    @property
    def mapped(self) -> bool:
        return False

    def alive(self) -> bool:
        return not self._closed

    @property
    def drained(self) -> bool:
        return self._ring is None or not (self._ring.taken or self._ring.withheld)

    async def attach(self, deadline: Deadline) -> None:
        """Tell the hub of the ring."""
        ring, agent = self._ring, self._agent
        assert ring is not None
        assert agent is not None
        extents = np.array([ring.address, ring.bytes.nbytes], "<u8")
        reply = await self._rpc(
            "Attach",
            pb.AttachRequest(
                session=self._session,
                client=self._client,
                metadata=agent.metadata(),
                extents=extents.tobytes(),
                memory=nixlib.Memory.DRAM.value,
            ),
            deadline,
        )
        self._attached += 1
        self._key = reply.key
        self._move_s = reply.move_ms_max / 1000

    async def _attach_again(self, epoch: int) -> None:
        """The hub has a new agent, which does not know us. Once for all moves that were told so."""
        async with self._attaching:
            if epoch == self._attached and not self._closed:
                with suppress(KVError):
                    await self.attach(Deadline(ATTACH_S))

    def close(self) -> None:
        self._closed = True
        if self._settling is not None:
            self._settling.cancel()
        self._let_go()

    def _let_go(self) -> None:
        """After `close`, when no move of ours runs: the agent goes; withheld memory stays."""
        ring = self._ring
        if not self._closed or ring is None or ring.taken:
            return
        self._ring = None
        if ring.withheld:
            orphans.add(Orphan(ring, self.arena_id, self.epoch, self._client, self._key))
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()

    # ---- moving --------------------------------------------------------------------------

    async def put(self, work: Writing, copier: Copier) -> None:
        work.stale[:] = False
        work.drained = False
        terminal = await self._run(work, lambda part: self._put(work, copier, part))
        work.drained = terminal

    async def get(self, work: Reading, copier: Copier) -> None:
        work.outcomes[:] = Outcome.OK
        await self._run(work, lambda part: self._get(work, copier, part))

    async def _run(self, work: Writing | Reading, one: Callable[[_Part], Awaitable[bool]]) -> bool:
        """Every part, a few at a time; whether all were terminal. When it is cancelled or fails,
        it returns after the last copy from or to the caller's memory.
        """
        if self._closed or self._ring is None:
            raise Unavailable("the session of this transfer has ended")
        parts = _parts(work, self._ring.extent_bytes)
        terminal = True

        async def worker() -> None:
            nonlocal terminal
            for part in parts:
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

    async def _put(self, work: Writing, copier: Copier, part: _Part) -> bool:
        ring = self._the_ring()
        extent = await ring.take(TAKE_S)
        number = 0
        try:
            rooms = _rooms(work, part, ring.view(extent))

            def copy(piece: Piece) -> None:
                assert work.sources is not None
                target = rooms[piece.index][piece.start : piece.stop]
                layers = slice(part.start + piece.start, part.start + piece.stop)
                source = work.sources[piece.index][layers, :, : target.shape[2]]
                copy_cells(target, source, work.sums[piece.index, layers].reshape(-1), _always)

            await copier.run(copy, _pieces(work, part, copier))
            sums = work.sums[part.indices, part.start : part.stop].astype("<u8", copy=False)
            number = next(self._numbers)
            request = self._request(Op.WRITE, work, part, number, ring.address_of(extent))
            request.checksums = sums.tobytes()
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
        good = np.frombuffer(reply.statuses, np.uint8) == Status.OK
        work.stale[np.asarray(part.indices)[~good]] = True
        self.bytes_out += sum(rooms[i].nbytes for i in np.asarray(part.indices)[good].tolist())
        return bool(reply.terminal)

    async def _get(self, work: Reading, copier: Copier, part: _Part) -> bool:
        ring = self._the_ring()
        extent = await ring.take(TAKE_S)
        number = next(self._numbers)
        terminal = False
        try:
            request = self._request(Op.READ, work, part, number, ring.address_of(extent))
            reply = await self._move(request)
            terminal = reply.terminal
            if not terminal:
                work.outcomes[part.indices] = Outcome.STALE
                return False
            statuses = np.frombuffer(reply.statuses, np.uint8)
            trailers = np.frombuffer(reply.trailers, np.uint8).reshape(len(part.indices), -1)
            rooms = _rooms(work, part, ring.view(extent))
            good = [i for i, s in zip(part.indices, statuses, strict=True) if s == Status.OK]
            work.outcomes[np.asarray(part.indices)[statuses != Status.OK]] = Outcome.STALE
            trailer_of = dict(zip(part.indices, trailers, strict=True))

            def copy(piece: Piece) -> None:
                assert work.targets is not None
                source = rooms[piece.index][piece.start : piece.stop]
                start, stop = part.start + piece.start, part.start + piece.stop
                target = work.targets[piece.index][start:stop, :, : source.shape[2]]
                sums = np.zeros(target.shape[0] * target.shape[1], np.uint64)
                copy_cells(target, source, sums, _always)
                if not work.matches(piece.index, start, stop, sums, trailer_of[piece.index]):
                    work.outcomes[piece.index] = Outcome.CORRUPT

            await copier.run(copy, _pieces(work, part, copier, good))
            self.bytes_in += sum(rooms[i].nbytes for i in good)
        except Unsupported:
            raise
        except KVError:
            work.outcomes[part.indices] = Outcome.STALE
            return False
        finally:
            self._end(ring, extent, 0 if terminal else number)
        return True

    def _the_ring(self) -> Ring:
        if self._ring is None or self._closed:
            raise Unavailable("the session of this transfer has ended")
        return self._ring

    async def _move(self, request: Message) -> Message:
        epoch = self._attached
        try:
            reply = await self._rpc("Move", request, Deadline(self._move_s + REPLY_S))
        except Unavailable as error:
            if error.field == "attach":
                await self._attach_again(epoch)
            raise
        if len(reply.statuses) * 8 != len(request.holds):
            raise KVError(f"the hub answered {len(reply.statuses)} of a move's slots")
        return reply

    def _request(
        self, op: Op, work: Writing | Reading, part: _Part, number: int, address: int
    ) -> Message:
        grid, slots = work.grid, [work.slots[i] for i in part.indices]
        cell_bytes = np.array([grid.cell_bytes(slot.tokens) for slot in slots], "<u8")
        sizes = cell_bytes * np.uint64(part.region.cells)
        addresses = np.uint64(address) + np.cumsum(sizes, dtype=np.uint64) - sizes
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
            granted=_message(work.granted),
            region=_message(part.region),
            holds=np.full(len(slots), work.hold, "<u8").tobytes(),
            offsets=np.array([slot.offset for slot in slots], "<u8").tobytes(),
            generations=np.array([slot.generation for slot in slots], "<u8").tobytes(),
            cell_bytes=cell_bytes.tobytes(),
            permits=permits,
            addresses=addresses.astype("<u8").tobytes(),
            deadline_ms=round(self._move_s * 1000),
        )

    # ---- extents -------------------------------------------------------------------------

    def _end(self, ring: Ring, extent: int, number: int) -> None:
        """We are done with an extent; with a `number`, its move may still run."""
        if number:
            ring.withhold(extent, number)
            if not self._closed and (self._settling is None or self._settling.done()):
                self._settling = asyncio.create_task(self._settle(ring))
        else:
            ring.give_back(extent)
        self._let_go()

    async def _settle(self, ring: Ring) -> None:
        """Ask until nothing is withheld."""
        while ring.withheld and not self._closed:
            with suppress(KVError):
                await settle(self._rpc, self._session, self._client, self._key, ring)
            if ring.withheld:
                await asyncio.sleep(SETTLE_S)


async def settle(rpc: Rpc, session: int, client: int, key: bytes, ring: Ring) -> None:
    """Ask the hub which of the ring's withheld moves still run; free the extents of the others."""
    numbers = ring.withheld
    request = pb.SettleRequest(
        session=session, client=client, key=key, moves=np.array(numbers, "<u8").tobytes()
    )
    reply = await rpc("Settle", request, Deadline(SETTLE_LIMIT_S))
    if len(reply.running) != len(numbers):
        raise KVError(f"the hub settled {len(reply.running)} of {len(numbers)} moves")
    for number, running in zip(numbers, reply.running, strict=True):
        if not running:
            ring.settled(number)


async def open_nixl(
    hello: Message, *, backend: str, params: Mapping[str, str], staging_bytes: int, rpc: Rpc,
    deadline: Deadline,
) -> NixlTransfer:  # fmt: skip
    """Make an agent and a ring, and attach. Unsupported where NIXL cannot be used here."""
    for orphan in orphans.meet(hello.arena_id, hello.epoch):
        with suppress(KVError):
            await settle(rpc, hello.session, orphan.client, orphan.key, orphan.ring)
        if not orphan.ring.withheld:
            orphans.drop(orphan)
    orphans.check()

    def make() -> tuple[nixlib.Agent, Ring]:
        # The hub takes an agent of this name only; the rest keeps others from taking it.
        name = f"kvclient-{hello.session:x}-{hello.client}-{secrets.token_hex(8)}"
        agent = nixlib.Agent(name, backend=backend, params=params, progress=True)
        ring = Ring(staging_bytes)
        ring.prefault()
        agent.register(ring.address, ring.bytes.nbytes, nixlib.Memory.DRAM)
        return agent, ring

    try:
        async with asyncio.timeout(max(deadline.left(), 1e-3)):
            agent, ring = await asyncio.to_thread(make)
    except TimeoutError as error:
        raise DeadlineExceeded("no NIXL agent in time", field="deadline_s") from error
    except nixlib.NixlError as error:
        raise Unsupported(str(error)) from error
    transfer = NixlTransfer(hello, agent, ring, backend=backend, rpc=rpc)
    try:
        await transfer.attach(deadline)
    except BaseException:
        transfer.close()
        raise
    return transfer


# ---- cutting -----------------------------------------------------------------------------------


def _parts(work: Writing | Reading, extent_bytes: int) -> Iterator[_Part]:
    """Whole regions of as many blocks as an extent holds, or layers of one block."""
    grid, region = work.grid, work.region
    layer_bytes = region.heads * max((grid.cell_bytes(s.tokens) for s in work.slots), default=1)
    if layer_bytes > extent_bytes:
        raise Unsupported(
            f"one layer of the region has {layer_bytes} bytes, a staging extent {extent_bytes}:"
            " raise staging_bytes",
            field="staging_bytes",
        )
    many = extent_bytes // (layer_bytes * region.layers)
    count = len(work.slots)
    if many:
        many = max(1, min(many, -(-count // MOVES_AHEAD)))
        cuts = [(list(range(at, min(at + many, count))), 0, region.layers)
                for at in range(0, count, many)]  # fmt: skip
    else:
        step = extent_bytes // layer_bytes
        cuts = [([at], start, min(start + step, region.layers))
                for at in range(count) for start in range(0, region.layers, step)]  # fmt: skip
    for indices, start, stop in cuts:
        first = region.layer_start
        part = Region(first + start, first + stop, region.head_start, region.head_stop)
        yield _Part(indices, start, stop, part)


def _rooms(work: Writing | Reading, part: _Part, extent: Bytes) -> dict[int, Bytes]:
    """Where each block's cells lie in the extent: [layers, heads, cell bytes], without gaps."""
    rooms, at = {}, 0
    for index in part.indices:
        shape = (*_shape(part.region), work.grid.cell_bytes(work.slots[index].tokens))
        size = shape[0] * shape[1] * shape[2]
        rooms[index] = extent[at : at + size].reshape(shape)
        at += size
    return rooms


def _shape(region: Region) -> tuple[int, int]:
    return region.layers, region.heads


def _pieces(
    work: Writing | Reading, part: _Part, copier: Copier, indices: Sequence[int] | None = None
) -> list[list[Piece]]:
    chosen = part.indices if indices is None else indices
    tokens = max((work.slots[i].tokens for i in chosen), default=work.grid.block_tokens)
    layer_bytes = part.region.heads * work.grid.cell_bytes(tokens)
    return copier.split(part.region.layers, layer_bytes, chosen)


def _always() -> bool:
    return True


def _message(region: Region) -> Message:
    return pb.Region(
        layer_start=region.layer_start,
        layer_stop=region.layer_stop,
        head_start=region.head_start,
        head_stop=region.head_stop,
    )
