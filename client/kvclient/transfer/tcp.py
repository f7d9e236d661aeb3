"""The `tcp` transport: cells travel over connections to the hub's data port (`kvproto.frames`).

A put or get is cut into frames of about FRAME_BYTES and dealt out to a few connections, one thread
each (`kvclient.transfer.lanes`). Frames are sent one behind the other, those of the next put too,
and answers are taken as they come; so neither side waits for the other between frames. Every cell
is hashed here, on the way out and on arrival, and by the hub on its side.

Rules:
 1. A frame counts when its answer came. What was sent and not answered may still be written by the
    hub: the work then says that it is not drained.
 2. A cancelled put or get ends its connections and returns when their threads have let go of the
    caller's memory.
 3. A broken connection costs one repetition of what was not answered, over a new one.
 4. No thread waits longer than STALL_S for a peer that neither takes nor gives a byte, or DIAL_S
    for a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from kvclient.copying import Copier, Outcome, Reading, Writing
from kvclient.errors import Unavailable
from kvclient.staging import aligned
from kvclient.timing import Deadline
from kvclient.tls import Tls
from kvclient.transfer.base import Bytes
from kvclient.transfer.lanes import Courier, Dial, Lane, Share
from kvclient.transfer.wire import Wire, dial
from kvproto import frames
from kvproto.cells import Checksums
from kvproto.checksum import grid_checksums
from kvproto.frames import FrameError, Op, Place, Request, Status
from kvproto.grid import Region

FRAME_BYTES = 4 << 20
CHUNK_BYTES = 512 << 10  # hashed while the next one arrives
SHARE_BYTES_MIN = 4 << 20  # less is not worth a second connection
ANSWERS_MAX = 256  # asked for and not taken yet: their heads fit into any socket buffer
READS_AHEAD = 16
_PAUSE_S = 0.001


@dataclass(slots=True)
class _Frame:
    """Layers [start, stop) of the region of block `index`, as one request."""

    index: int
    start: int
    stop: int
    place: Place
    region: Region
    status: Status | None = None  # None until it was answered

    def request(self, op: Op, tag: int) -> Request:
        return Request(op, tag, self.place, self.region)

    @property
    def size(self) -> int:
        return self.region.cells * self.place.cell_bytes


class TcpTransfer:
    """A Transfer (`kvclient.transfer.base`). Built by `open_tcp`."""

    transport = "tcp"
    follows = True

    def __init__(
        self, address: str, welcome: frames.Welcome, dial: Dial, first: Wire, connections: int
    ) -> None:
        self.address = address
        self.arena_id = welcome.arena_id
        self.epoch = welcome.epoch
        self._lanes = [Lane(dial, first), *(Lane(dial) for _ in range(connections - 1))]
        self._closed = False

    @property
    def mapped(self) -> bool:
        return False

    @property
    def direct(self) -> bool:
        return False

    @property
    def staging_bytes(self) -> int:
        return 0

    async def attach(self, deadline: Deadline) -> None:
        """Nothing is registered here."""

    def alive(self) -> bool:
        return not self._closed

    @property
    def drained(self) -> bool:
        """The hub's data worker writes for us; only the end of its connection says that it does
        not, and the hub sees that by itself.
        """
        return False

    def close(self) -> None:
        self._closed = True
        for lane in self._lanes:
            lane.close()

    # ---- moving --------------------------------------------------------------------------

    async def put(self, work: Writing, copier: Copier) -> None:
        cut = list(_frames(work))
        work.stale[:] = True
        work.drained = False
        await self._run(_Puts(work, cut), cut)
        work.drained = all(frame.status is not None for frame in cut)
        work.stale[:] = False
        for frame in cut:
            if frame.status is not Status.OK:
                work.stale[frame.index] = True

    async def get(self, work: Reading, copier: Copier) -> None:
        cut = list(_frames(work))
        work.outcomes[:] = Outcome.STALE
        await self._run(_Gets(work, cut), cut)
        work.outcomes[:] = Outcome.OK
        for frame in cut:
            if frame.status is Status.CORRUPT:
                work.outcomes[frame.index] = Outcome.CORRUPT
        for frame in cut:
            if frame.status not in (Status.OK, Status.CORRUPT):
                work.outcomes[frame.index] = Outcome.STALE

    async def _run(self, courier: Courier, cut: list[_Frame]) -> None:
        """Every frame over some lane; returns when none of them touches the work any more."""
        dealt: list[tuple[Lane, Share]] = []
        for part in _dealt(cut, len(self._lanes)):
            lane = min(self._lanes, key=lambda lane: lane.backlog)
            share = Share(courier, cut, part)
            try:
                lane.add(share)
            except BaseException:
                await self._stop(dealt)
                raise
            dealt.append((lane, share))
        waiting = asyncio.gather(
            *(asyncio.wrap_future(share.over) for _, share in dealt), return_exceptions=True
        )
        try:
            results = await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await self._stop(dealt)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _stop(self, dealt: Sequence[tuple[Lane, Share]]) -> None:
        for lane, share in dealt:
            lane.stop(share)
        while any(share.touching for _, share in dealt):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(_PAUSE_S)


# ---- on a lane's thread ------------------------------------------------------------------------


class _Puts:
    """Cells out, their checksums behind them, and a word on each frame back."""

    op = Op.WRITE
    owed_max = ANSWERS_MAX

    def __init__(self, work: Writing, cut: Sequence[_Frame]) -> None:
        self._work = work
        self._cut = cut

    def send(self, wire: Wire, frame: int, tag: int) -> None:
        one, work = self._cut[frame], self._work
        rows = work.source(one.index)[one.start : one.stop, :, : one.place.cell_bytes]
        sums = work.sums[one.index, one.start : one.stop].reshape(-1)
        head = frames.encode_request(one.request(Op.WRITE, tag))
        if wire.carries(one.place.cell_bytes):
            wire.send_grid(head, rows, sums)
        else:
            _send_chunks(wire, head, rows, sums)

    def take(self, wire: Wire, frame: int, tag: int) -> None:
        one = self._cut[frame]
        one.status = _answer(wire, one, Op.WRITE, tag)


class _Gets:
    """Requests out, cells back."""

    op = Op.READ
    owed_max = READS_AHEAD

    def __init__(self, work: Reading, cut: Sequence[_Frame]) -> None:
        self._work = work
        self._cut = cut

    def send(self, wire: Wire, frame: int, tag: int) -> None:
        wire.send([frames.encode_request(self._cut[frame].request(Op.READ, tag))])

    def take(self, wire: Wire, frame: int, tag: int) -> None:
        one = self._cut[frame]
        status = _answer(wire, one, Op.READ, tag)
        if status is not Status.OK:
            one.status = status
            return
        trailer = np.frombuffer(wire.take(one.place.trailer_bytes), np.uint8)
        good = self._receive(wire, one, trailer)
        after, status = frames.decode_after(wire.take(frames.AFTER_BYTES))
        if after != tag:
            raise FrameError(f"the end of answer {after}, not of {tag}")
        one.status = Status.CORRUPT if status is Status.OK and not good else status

    def _receive(self, wire: Wire, frame: _Frame, trailer: Bytes) -> bool:
        """The cells of one answer, into their place; whether they are what was committed."""
        work = self._work
        rows = work.target(frame.index)[frame.start : frame.stop, :, : frame.place.cell_bytes]
        sums: Checksums = np.zeros(frame.region.cells, np.uint64)
        if wire.carries(frame.place.cell_bytes):
            wire.fill_grid(rows, sums)
        else:
            _fill_chunks(wire, rows, sums)
        return work.matches(frame.index, frame.start, frame.stop, sums, trailer)


def _answer(wire: Wire, frame: _Frame, op: Op, tag: int) -> Status:
    reply = frames.decode_reply(wire.take(frames.REPLY_BYTES))
    if (reply.op, reply.tag) != (op, tag):
        raise FrameError(f"an answer to {reply.op.name} {reply.tag}, not to {op.name} {tag}")
    expected = frame.request(op, tag).answer_bytes if reply.status is Status.OK else 0
    if reply.body_bytes != expected:
        raise FrameError(f"an answer of {reply.body_bytes} bytes, not {expected}")
    return reply.status


# ---- where native code does not carry a frame whole --------------------------------------------


def _send_chunks(wire: Wire, head: bytes, rows: Bytes, sums: Checksums) -> None:
    """Head, cells and checksums; each chunk is sent out of the cache that its hash left it in."""
    before: list[memoryview | bytes] = [head]
    at = 0
    for chunk in _chunks(rows):
        cells = chunk.shape[0] * chunk.shape[1]
        sums[at : at + cells] = grid_checksums(chunk)
        at += cells
        wire.send([*before, _flat(chunk, wire.scratch)])
        before.clear()
    wire.send([sums.astype("<u8", copy=False).tobytes()])


def _fill_chunks(wire: Wire, rows: Bytes, sums: Checksums) -> None:
    """Receive cells, and what they are hashed to while the next ones arrive."""
    at = 0
    for chunk in _chunks(rows):
        whole = _whole(chunk)
        if whole is not None:
            wire.fill(whole)
        else:
            buffer = _scratch(wire.scratch, chunk.size)
            wire.fill(buffer.data)
            chunk[...] = buffer.reshape(chunk.shape)
        cells = chunk.shape[0] * chunk.shape[1]
        sums[at : at + cells] = grid_checksums(chunk)
        at += cells


# ---- cutting -----------------------------------------------------------------------------------


def _frames(work: Writing | Reading) -> Iterator[_Frame]:
    """Each block's region in runs of layers of about FRAME_BYTES."""
    grid, region = work.grid, work.region
    for index, slot in enumerate(work.slots):
        cell_bytes = grid.cell_bytes(slot.tokens)
        place = Place(
            work.hold, slot.offset, slot.generation, cell_bytes, grid.layers, grid.heads,
            work.granted, slot.permit,
        )  # fmt: skip
        step = max(1, FRAME_BYTES // (region.heads * cell_bytes))
        for start in range(0, region.layers, step):
            stop = min(start + step, region.layers)
            layers = (region.layer_start + start, region.layer_start + stop)
            part = Region(*layers, region.head_start, region.head_stop)
            yield _Frame(index, start, stop, place, part)


def _dealt(cut: list[_Frame], connections: int) -> list[list[int]]:
    """Shares of about equal size, in order, as indices; little is not cut up."""
    total = sum(frame.size for frame in cut)
    shares = max(1, min(connections, total // SHARE_BYTES_MIN))
    parts: list[list[int]] = [[]]
    filled = 0
    for index, frame in enumerate(cut):
        if filled >= total * len(parts) / shares and len(parts) < shares:
            parts.append([])
        parts[-1].append(index)
        filled += frame.size
    return parts if cut else []


def _chunks(rows: Bytes) -> Iterator[Bytes]:
    """[layers, heads, cell bytes] in parts of about CHUNK_BYTES: whole layers, or heads of one."""
    layers, heads, cell_bytes = rows.shape
    if heads * cell_bytes <= CHUNK_BYTES:
        step = CHUNK_BYTES // (heads * cell_bytes)
        for start in range(0, layers, step):
            yield rows[start : start + step]
        return
    step = max(1, CHUNK_BYTES // cell_bytes)
    for layer in range(layers):
        for start in range(0, heads, step):
            yield rows[layer : layer + 1, start : start + step]


def _whole(chunk: Bytes) -> memoryview | None:
    """Its memory, if there are no gaps in it."""
    return chunk.reshape(-1).data if chunk.flags.c_contiguous else None


def _flat(chunk: Bytes, scratch: list[Bytes]) -> memoryview:
    """Its bytes without gaps: itself, or a copy in the scratch memory."""
    whole = _whole(chunk)
    if whole is not None:
        return whole
    buffer = _scratch(scratch, chunk.size)
    buffer.reshape(chunk.shape)[...] = chunk
    return buffer.data


def _scratch(kept: list[Bytes], size: int) -> Bytes:
    if not kept or kept[0].size < size:
        kept[:] = [aligned(size)]
    return kept[0][:size]


# ---- connecting --------------------------------------------------------------------------------


def address_of(offer: str, dialled: str) -> str:
    """Where to dial: an offer without a host means the one that the hub was reached at."""
    if not offer.startswith(":"):
        return offer
    host = dialled.rpartition("/")[2].rpartition(":")[0] or "127.0.0.1"
    return host + offer


async def open_tcp(
    address: str, *, session: int, client: int, token: bytes, connections: int, tls: Tls | None,
    deadline_s: float,
) -> TcpTransfer:  # fmt: skip
    """Dial the hub's data port and say hello. Unavailable when it cannot be reached or refuses."""
    hello = frames.Hello(session, client, token)
    welcomes: list[frames.Welcome] = []

    def another(limit_s: float) -> Wire:
        wire, welcome = dial(address, hello, tls, limit_s)
        if welcomes and welcome.epoch != welcomes[0].epoch:
            wire.close()
            raise Unavailable(f"another hub answers at {address}")
        welcomes.append(welcome)
        del welcomes[1:]
        return wire

    first = await asyncio.to_thread(another, deadline_s)
    return TcpTransfer(address, welcomes[0], another, first, connections)
