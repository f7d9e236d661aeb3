"""One connection of a data worker: hello, then requests one after the other.

Rules:
 1. A slot is written only while the directory says that this client may: the permit proves what
    was granted, the entry that it still holds. The generation is looked at again after every wait
    for the peer, right before bytes are copied. What comes for a slot that is no longer that is
    taken off the wire into a scratch buffer, and answered STALE.
 2. A slot is read only while its generation is that of the lease, looked at in the same places. If
    it changes in the middle, zeros fill the rest of the frame and its end says STALE: the peer
    never sees a byte of whoever has the slot next.
 3. What a connection may take is bounded: one head, one frame's checksums, one scratch buffer.
 4. A head that cannot be right or a permit that is not ours ends the connection, after an answer
    that says so. So does a peer that makes no progress within `stall_s` of a started frame.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from kvproto.frames import (
    HELLO_BYTES,
    REQUEST_BYTES,
    FrameError,
    Hello,
    HelloStatus,
    Op,
    Reply,
    Request,
    Status,
    Welcome,
    decode_hello,
    decode_request,
    encode_after,
    encode_reply,
    encode_welcome,
)
from kvproto.grid import CHECKSUM_BYTES
from kvserver.transfer.permits import Permits
from kvserver.transfer.slots import Rows, Slots
from kvserver.transfer.tcp.stream import Ended, Stalled, Stream

CHUNK_BYTES = 1 << 20  # at most so much between two looks at a generation
MORE_BYTES = 1 << 20  # of a frame that is coming, worth a wake-up
SCRATCH_BYTES = 256 << 10
LINGER_BYTES = 4 << 20  # of a refused peer's frame, thrown away so that it can read the answer
LINGER_S = 1.0
_ZEROS = memoryview(bytes(64 << 10))

Authorise = Callable[[Hello], Welcome]


class Counters:
    """What the connections of one worker count. From any thread."""

    NAMES = (
        "bytes_in", "bytes_out", "frames_written", "frames_read", "frames_stale",
        "frames_corrupt", "refused", "broken", "stalled",
    )  # fmt: skip

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(self.NAMES, 0)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def take(self) -> dict[str, int]:
        """What was counted since the last time; nothing that is 0."""
        with self._lock:
            counts, self._counts = self._counts, dict.fromkeys(self.NAMES, 0)
        return {name: count for name, count in counts.items() if count}


class Refused(Exception):
    """The peer asked for something that it may not; the connection ends after the answer."""


class Connection:
    """`authorise` asks the server about a hello; it waits for the answer, with a deadline."""

    def __init__(
        self,
        stream: Stream,
        *,
        slots: Slots,
        permits: Permits,
        authorise: Authorise,
        counters: Counters,
    ) -> None:
        self._stream = stream
        self._slots = slots
        self._permits = permits
        self._authorise = authorise
        self._counters = counters
        self._head = bytearray(REQUEST_BYTES)
        self._scratch = memoryview(b"")
        self.client = 0

    def serve(self, *, hello_s: float) -> None:
        """Until the connection ends, for whatever reason; never raises for one of the peer's."""
        try:
            if self._greet(hello_s):
                while True:
                    self._stream.wait_idle()
                    self._serve_request()
        except (Ended, OSError):
            pass
        except Stalled:
            self._counters.add(stalled=1)
        except FrameError:
            self._counters.add(broken=1)
            self._linger()
        except Refused:
            self._counters.add(refused=1)
            self._linger()

    # ---- greeting ------------------------------------------------------------------------------

    def _greet(self, hello_s: float) -> bool:
        raw = bytearray(HELLO_BYTES)
        stall_s, self._stream.stall_s = self._stream.stall_s, hello_s
        try:
            self._stream.receive(memoryview(raw))
            hello = decode_hello(bytes(raw))
        except FrameError as error:
            self._counters.add(broken=1)
            self._stream.send(encode_welcome(Welcome(HelloStatus.BAD_REQUEST, str(error))))
            self._linger()
            return False
        finally:
            self._stream.stall_s = stall_s
        welcome = self._authorise(hello)
        self._stream.send(encode_welcome(welcome))
        if welcome.status is not HelloStatus.OK:
            self._counters.add(refused=1)
            self._linger()
            return False
        self.client = hello.client
        return True

    # ---- requests ------------------------------------------------------------------------------

    def _serve_request(self) -> None:
        head = memoryview(self._head)
        self._stream.receive(head)
        try:
            request = decode_request(bytes(head))
        except FrameError:
            op, tag = (int.from_bytes(self._head[i : i + 4], "little") for i in (0, 4))
            if op in (Op.WRITE, Op.READ):  # else there is no answer that the peer could decode
                self._stream.send(encode_reply(Reply(Op(op), tag, Status.BAD)))
            raise
        if not self._permits.check(request.op, self.client, request.place):
            self._refuse(request.op, request.tag, Status.DENIED)
        if not self._slots.within(request.place):
            self._refuse(request.op, request.tag, Status.BAD)
        self._slots.map_in(request.place)
        if request.op is Op.WRITE:
            self._write(request)
        else:
            self._read(request)

    def _refuse(self, op: Op, tag: int, status: Status) -> NoReturn:
        self._stream.send(encode_reply(Reply(op, tag, status)))
        raise Refused(status.name)

    # ---- WRITE ---------------------------------------------------------------------------------

    def _write(self, request: Request) -> None:
        place = request.place
        rows = self._slots.rows(place, request.region)
        sums: list[int] = []
        taken = 0
        if self._slots.may_write(place, self.client):
            if self._stream.carries(place.cell_bytes):
                arrival = self._slots.arrival(place, request.region)
                self._stream.receive_guarded(arrival, MORE_BYTES)
                taken, sums = arrival.done, arrival.sums.tolist()
            else:
                taken = self._fill(request, rows, sums)
        self._drain(rows.nbytes - taken)
        told = bytearray(request.region.cells * CHECKSUM_BYTES)
        self._stream.receive(memoryview(told))
        status = Status.STALE
        if taken == rows.nbytes and self._slots.may_write(place, self.client):
            good = sums == np.frombuffer(told, "<u8").tolist()
            status = Status.OK if good else Status.CORRUPT
        if status is Status.OK:
            self._counters.add(frames_written=1, bytes_in=rows.nbytes)
        elif status is Status.STALE:
            self._counters.add(frames_stale=1)
        else:
            self._counters.add(frames_corrupt=1)
        self._stream.send(encode_reply(Reply(request.op, request.tag, status)))

    def _fill(self, request: Request, rows: Rows, sums: list[int]) -> int:
        """Receive into the slot while it is ours: how many bytes. `sums` gets what their cells are
        hashed to.

        The kernel receives what comes next while the cells that are here are hashed, out of the
        cache that their copy left them in.
        """
        stream, current, place = self._stream, self._slots.current, request.place
        done = 0
        while done < rows.nbytes:
            views = rows.views(done, CHUNK_BYTES)
            if not current(place):
                break
            count = stream.receive_some(views)
            if count == 0:
                stream.wait_more(min(MORE_BYTES, rows.nbytes - done))
                continue
            done += count
            sums += rows.checksums(len(sums), done // place.cell_bytes)
        return done

    def _drain(self, count: int) -> None:
        """Take `count` bytes off the wire and forget them."""
        if count and not self._scratch:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        while count:
            taken = self._stream.receive_some([self._scratch[:count]])
            if taken == 0:
                self._stream.wait_read()
            count -= taken

    # ---- READ ----------------------------------------------------------------------------------

    def _read(self, request: Request) -> None:
        place, stream, current = request.place, self._stream, self._slots.current
        trailer = bytes(self._slots.trailer(place))
        if not current(place):  # after the copy: the trailer that goes out is the lease's
            self._counters.add(frames_stale=1)
            stream.send(encode_reply(Reply(request.op, request.tag, Status.STALE)))
            return
        rows = self._slots.rows(place, request.region)
        head = encode_reply(Reply(request.op, request.tag, Status.OK, request.answer_bytes))
        front = memoryview(head + trailer)
        total = len(front) + rows.nbytes
        sent = 0
        stale = False
        while sent < total:
            payload = max(0, sent - len(front))
            stale = stale or not current(place)
            views = [front[sent:]] if sent < len(front) else []
            views += (
                [_ZEROS[: rows.nbytes - payload]] if stale else rows.views(payload, CHUNK_BYTES)
            )
            count = stream.send_some(views)
            if count == 0:
                stream.wait_write()
            sent += count
        status = Status.OK if not stale and current(place) else Status.STALE
        if status is Status.OK:
            self._counters.add(frames_read=1, bytes_out=rows.nbytes)
        else:
            self._counters.add(frames_stale=1)
        stream.send(encode_after(request.tag, status))

    # ---- end -----------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Let a refused peer read why: closing on unread bytes would reset the connection."""
        end = time.monotonic() + LINGER_S
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        taken = 0
        with contextlib.suppress(Ended, Stalled, OSError):
            self._stream.end_sending()
            while taken < LINGER_BYTES and (left := end - time.monotonic()) > 0:
                count = self._stream.receive_some([scratch])
                if count == 0:
                    self._stream.wait_read(left)
                taken += count
