"""The `tcp` transport: cells travel over connections to the hub's data port (`kvproto.frames`).

A put or get is cut into frames of about FRAME_BYTES and dealt out to a few connections, one thread
each. A thread sends its frames one behind the other and takes the answers as they come; so neither
side waits for the other between frames. Every cell is hashed here, on the way out and on arrival,
and by the hub on its side.

Rules:
 1. A frame counts when its answer came. What was sent and not answered may still be written by the
    hub: the work then says that it is not drained.
 2. A cancelled put or get ends its connections and returns when its threads have let go of the
    caller's memory.
 3. A broken connection costs one repetition of what was not answered, over a new one.
 4. No thread waits longer than STALL_S for a peer that neither takes nor gives a byte, or DIAL_S
    for a connection.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from kvclient.copying import Copier, Outcome, Reading, Writing
from kvclient.errors import KVError, Unavailable
from kvclient.staging import aligned
from kvclient.timing import Deadline
from kvclient.tls import Tls
from kvclient.transfer.base import Bytes
from kvclient.transfer.wire import BROKEN, Wire, dial
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
DIAL_S = 5.0
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


class _Job:
    """The wires that work for one put or get, so that it can be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wires: set[Wire] = set()
        self.stopped = False

    @contextmanager
    def using(self, wire: Wire) -> Iterator[None]:
        with self._lock:
            if self.stopped:
                raise ConnectionAbortedError("told to stop")
            self._wires.add(wire)
        try:
            yield
        finally:
            with self._lock:
                self._wires.discard(wire)

    @property
    def busy(self) -> bool:
        """Whether a thread may still touch the caller's memory. Once stopped and not busy, it stays
        so: who dials meanwhile finds out in `using`.
        """
        with self._lock:
            return bool(self._wires)

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for wire in self._wires:
                wire.shutdown()


Share = Callable[[Wire, list[_Frame]], None]


class TcpTransfer:
    """A Transfer (`kvclient.transfer.base`). Built by `open_tcp`."""

    transport = "tcp"

    def __init__(
        self, address: str, welcome: frames.Welcome, dial: Callable[[float], Wire],
        first: Wire, connections: int,
    ) -> None:  # fmt: skip
        self.address = address
        self.arena_id = welcome.arena_id
        self.epoch = welcome.epoch
        self._dial = dial
        self._lock = threading.Lock()
        self._idle = [first]
        self._connections = connections
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="kvclient-tcp")
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
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()
        self._pool.shutdown(wait=False)

    # ---- moving --------------------------------------------------------------------------

    async def put(self, work: Writing, copier: Copier) -> None:
        cut = list(_frames(work))
        work.stale[:] = True
        work.drained = False
        await self._run(lambda wire, part: self._write(wire, work, part), cut)
        work.drained = all(frame.status is not None for frame in cut)
        work.stale[:] = False
        for frame in cut:
            if frame.status is not Status.OK:
                work.stale[frame.index] = True

    async def get(self, work: Reading, copier: Copier) -> None:
        cut = list(_frames(work))
        work.outcomes[:] = Outcome.STALE
        await self._run(lambda wire, part: self._read(wire, work, part), cut)
        work.outcomes[:] = Outcome.OK
        for frame in cut:
            if frame.status is Status.CORRUPT:
                work.outcomes[frame.index] = Outcome.CORRUPT
        for frame in cut:
            if frame.status not in (Status.OK, Status.CORRUPT):
                work.outcomes[frame.index] = Outcome.STALE

    async def _run(self, share: Share, cut: list[_Frame]) -> None:
        """Every frame in some thread; returns when none of them touches the work any more."""
        job = _Job()
        loop = asyncio.get_running_loop()
        try:
            parts = _dealt(cut, self._connections)
            futures = [loop.run_in_executor(self._pool, self._work, job, share, p) for p in parts]
        except RuntimeError as error:  # the pool is shut down
            raise Unavailable("the client is closed") from error
        waiting = asyncio.gather(*futures, return_exceptions=True)
        try:
            results = await asyncio.shield(waiting)
        except asyncio.CancelledError:
            job.stop()
            while job.busy:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(_PAUSE_S)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _work(self, job: _Job, share: Share, part: list[_Frame]) -> None:
        """One thread's share. What a broken connection left open, or the way there damaged, is
        tried once more.
        """
        for _ in range(2):
            left = [frame for frame in part if frame.status in (None, Status.CORRUPT)]
            if not left or job.stopped or self._closed:
                return
            try:
                wire = self._take()
            except KVError:
                return
            try:
                with job.using(wire):
                    share(wire, left)
            except BROKEN:
                wire.close()
            except BaseException:
                wire.close()
                raise
            else:
                self._keep(wire)

    def _take(self) -> Wire:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._dial(DIAL_S)

    def _keep(self, wire: Wire) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(wire)
                return
        wire.close()

    # ---- one thread, one connection ------------------------------------------------------

    def _write(self, wire: Wire, work: Writing, part: list[_Frame]) -> None:
        scratch: list[Bytes] = []
        taken = 0
        for tag, frame in enumerate(part):
            rows = work.source(frame.index)[frame.start : frame.stop, :, : frame.place.cell_bytes]
            sums = work.sums[frame.index, frame.start : frame.stop].reshape(-1)
            head = frames.encode_request(frame.request(Op.WRITE, tag))
            if wire.carries(frame.place.cell_bytes):
                wire.send_grid(head, rows, sums)
            else:
                _send_chunks(wire, head, rows, sums, scratch)
            if tag - taken >= ANSWERS_MAX:
                self._answer(wire, Op.WRITE, taken, part)
                taken += 1
        for tag in range(taken, len(part)):
            self._answer(wire, Op.WRITE, tag, part)

    def _answer(self, wire: Wire, op: Op, tag: int, part: list[_Frame]) -> frames.Reply:
        reply = frames.decode_reply(wire.take(frames.REPLY_BYTES))
        frame = part[tag]
        if (reply.op, reply.tag) != (op, tag):
            raise FrameError(f"an answer to {reply.op.name} {reply.tag}, not to {op.name} {tag}")
        expected = frame.request(op, tag).answer_bytes if reply.status is Status.OK else 0
        if reply.body_bytes != expected:
            raise FrameError(f"an answer of {reply.body_bytes} bytes, not {expected}")
        if op is Op.WRITE or reply.status is not Status.OK:
            frame.status = reply.status
        return reply

    def _read(self, wire: Wire, work: Reading, part: list[_Frame]) -> None:
        asked = 0
        scratch: list[Bytes] = []
        for tag, frame in enumerate(part):
            while asked < min(len(part), tag + READS_AHEAD):
                wire.send([frames.encode_request(part[asked].request(Op.READ, asked))])
                asked += 1
            if self._answer(wire, Op.READ, tag, part).status is not Status.OK:
                continue
            trailer = np.frombuffer(wire.take(frame.place.trailer_bytes), np.uint8)
            good = self._receive(wire, work, frame, trailer, scratch)
            after, status = frames.decode_after(wire.take(frames.AFTER_BYTES))
            if after != tag:
                raise FrameError(f"the end of answer {after}, not of {tag}")
            frame.status = Status.CORRUPT if status is Status.OK and not good else status

    def _receive(
        self, wire: Wire, work: Reading, frame: _Frame, trailer: Bytes, scratch: list[Bytes]
    ) -> bool:
        """The cells of one answer, into their place; whether they are what was committed."""
        rows = work.target(frame.index)[frame.start : frame.stop, :, : frame.place.cell_bytes]
        sums: Checksums = np.zeros(frame.region.cells, np.uint64)
        if wire.carries(frame.place.cell_bytes):
            wire.fill_grid(rows, sums)
        else:
            _fill_chunks(wire, rows, sums, scratch)
        return work.matches(frame.index, frame.start, frame.stop, sums, trailer)


# ---- where native code does not carry a frame whole --------------------------------------------


def _send_chunks(
    wire: Wire, head: bytes, rows: Bytes, sums: Checksums, scratch: list[Bytes]
) -> None:
    """Head, cells and checksums; each chunk is sent out of the cache that its hash left it in."""
    before: list[memoryview | bytes] = [head]
    at = 0
    for chunk in _chunks(rows):
        cells = chunk.shape[0] * chunk.shape[1]
        sums[at : at + cells] = grid_checksums(chunk)
        at += cells
        wire.send([*before, _flat(chunk, scratch)])
        before.clear()
    wire.send([sums.astype("<u8", copy=False).tobytes()])


def _fill_chunks(wire: Wire, rows: Bytes, sums: Checksums, scratch: list[Bytes]) -> None:
    """Receive cells, and what they are hashed to while the next ones arrive."""
    at = 0
    for chunk in _chunks(rows):
        whole = _whole(chunk)
        if whole is not None:
            wire.fill(whole)
        else:
            buffer = _scratch(scratch, chunk.size)
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


def _dealt(cut: list[_Frame], connections: int) -> list[list[_Frame]]:
    """Shares of about equal size, in order; little is not cut up."""
    total = sum(frame.size for frame in cut)
    shares = max(1, min(connections, total // SHARE_BYTES_MIN))
    parts: list[list[_Frame]] = [[]]
    filled = 0
    for frame in cut:
        if filled >= total * len(parts) / shares and len(parts) < shares:
            parts.append([])
        parts[-1].append(frame)
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
