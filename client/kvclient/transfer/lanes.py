"""Connections to the hub's data port, each with a thread of its own: lanes.

A put or get is dealt out to lanes as shares; a share is a few frames. A lane serves its shares in
the order in which they came, and sends what comes next before what was sent is answered, so that
its wire carries bytes all the time:

    queued --frames sent--> owed --answers taken--> over        (a connection breaks: queued again)

Rules:
 1. Answers are taken in the order in which frames were sent: those of a share that was sent whole
    as they come, once TAKE_FROM are owed, and then one behind the other, for each costs a cold
    turn between two frames. No more are owed than the share of the next frame allows, and no cells
    are sent while cells are owed: both sides would wait for the other to take.
 2. Memory of a share that was stopped is not touched again: at once if it waits, else from when its
    connection has been shut down, which costs the other shares on it a repetition.
 3. What a broken connection left open, or the way there damaged, is tried once more over a new one.
    A connection that was shut down for somebody else does not count.
 4. Only a lane's thread uses its wire, but for `shutdown`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from kvclient.errors import KVError, Unavailable
from kvclient.transfer.wire import BROKEN, Wire
from kvproto.frames import Op, Status

DIAL_S = 5.0
TAKE_FROM = 64
Dial = Callable[[float], Wire]


class Frame(Protocol):
    """One request. `status` is None until it was answered."""

    status: Status | None

    @property
    def size(self) -> int:
        """Bytes of its cells."""


class Courier(Protocol):
    """How the frames of one put or get travel; called on the lanes' threads."""

    op: Op
    owed_max: int
    """Frames sent and not answered, at most."""

    def send(self, wire: Wire, frame: int, tag: int) -> None: ...

    def take(self, wire: Wire, frame: int, tag: int) -> None:
        """The answer: sets the frame's status."""


class Share:
    """What one lane has of a put or get. `over` is done when no thread touches its memory any more,
    and none will; whether its frames were answered, they say themselves.
    """

    def __init__(self, courier: Courier, frames: Sequence[Frame], indices: Sequence[int]) -> None:
        """`indices` into the `frames` of the whole."""
        self.courier = courier
        self.over: Future[None] = Future()
        self.over.set_running_or_notify_cancel()
        self.size = sum(frames[index].size for index in indices)
        self.touching = False
        self.stopped = False
        self.tries = 0
        self.owed = 0
        self.left: deque[int] = deque()
        self._frames = frames
        self._indices = indices

    def begin(self) -> bool:
        """Queue what is open, once more if it was; whether there is any."""
        open_ = (None, Status.CORRUPT)
        self.left = deque(i for i in self._indices if self._frames[i].status in open_)
        return bool(self.left)


class Lane:
    """One connection and its thread, which begins with the first share."""

    def __init__(self, dial: Dial, first: Wire | None = None) -> None:
        self._dial = dial
        self._wire = first
        self._lock = threading.Condition()
        self._queue: deque[Share] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._shut = False  # the wire, for a share that was stopped
        self._taking = False
        self._tag = 0
        self._current: Share | None = None
        self._owed: deque[tuple[Share, int, int]] = deque()  # share, frame, tag
        self.backlog = 0
        """Bytes of shares that are not over."""

    # ---- from any thread -------------------------------------------------------------------

    def add(self, share: Share) -> None:
        """Unavailable once closed, and where no thread can be had."""
        with self._lock:
            if self._closed:
                raise Unavailable("the client is closed")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="kvclient-tcp", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise Unavailable(f"no thread for a connection: {error}") from error
                self._thread = thread
            self._queue.append(share)
            self.backlog += share.size
            self._lock.notify()

    def stop(self, share: Share) -> None:
        """Rule 2. `share.over` may come later; nothing is touched once `share.touching` is not."""
        with self._lock:
            share.stopped = True
            if share.touching and self._wire is not None:
                self._shut = True
                self._wire.shutdown()

    def close(self) -> None:
        """What runs ends as it would; what waits does not begin."""
        with self._lock:
            self._closed = True
            if self._thread is None and self._wire is not None:
                self._wire.close()
                self._wire = None
            self._lock.notify()

    # ---- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if self._current is None:
                self._current = self._next()
                if self._current is None and not self._owed:
                    break
            share = self._current
            try:
                if share is not None and self._may_send(share):
                    self._send(share)
                else:
                    share = self._owed[0][0]
                    self._take()
            except BROKEN:
                self._broken()
            except Exception as error:  # of a share's own making
                assert share is not None
                self._end(share, error)
                self._broken()
        self._hang_up()

    def _next(self) -> Share | None:
        """Waits for one if nothing is owed; None: there is none, and if nothing is owed, closed."""
        with self._lock:
            while not self._queue and not self._owed and not self._closed:
                self._lock.wait()
            return self._queue.popleft() if self._queue else None

    def _may_send(self, share: Share) -> bool:
        """Rule 1."""
        if not self._owed:
            self._taking = False
            return True
        if len(self._owed) >= share.courier.owed_max:
            return False
        if self._owed[-1][0].courier.op is Op.READ and share.courier.op is Op.WRITE:
            return False
        oldest = self._owed[0][0]
        if oldest is share or oldest.courier.op is Op.READ:
            self._taking = False
        elif self._taking or len(self._owed) >= TAKE_FROM:
            assert self._wire is not None
            self._taking = self._wire.readable
        return not self._taking

    def _send(self, share: Share) -> None:
        if not share.touching and not self._begin(share):
            self._current = None
            self._end(share)
            return
        assert self._wire is not None
        frame, self._tag = share.left.popleft(), (self._tag + 1) % (1 << 32)
        if not share.left:
            self._current = None
        share.owed += 1
        self._owed.append((share, frame, self._tag))
        share.courier.send(self._wire, frame, self._tag)

    def _begin(self, share: Share) -> bool:
        """Whether something of it is to be sent, and can be."""
        wire = self._wire
        if wire is None and not share.stopped and not self._closed:
            try:
                wire = self._dial(DIAL_S)
            except KVError:
                return False
        with self._lock:
            self._wire = wire
            if share.stopped or self._closed or not share.begin():
                return False
            share.tries += 1
            share.touching = True
            return True

    def _take(self) -> None:
        share, frame, tag = self._owed[0]
        assert self._wire is not None
        share.courier.take(self._wire, frame, tag)
        self._owed.popleft()
        share.owed -= 1
        if not share.left and not share.owed:
            self._again_or_end(share)

    def _broken(self) -> None:
        """The connection is of no use any more; what it left open goes to the head of the queue."""
        told = self._hang_up()
        shares = list(dict.fromkeys(share for share, _, _ in self._owed))
        if self._current is not None and self._current not in shares:
            shares.append(self._current)
        self._owed.clear()
        self._current = None
        told = told or any(share.stopped for share in shares)
        for share in reversed(shares):
            share.owed = 0
            share.tries -= told and not share.stopped
            self._again_or_end(share)

    def _again_or_end(self, share: Share) -> None:
        """It is over, unless something is left to be tried once more."""
        with self._lock:
            share.touching = False
            if share.tries < 2 and not share.stopped and not self._closed and share.begin():
                self._queue.appendleft(share)
                return
        self._end(share)

    def _end(self, share: Share, error: Exception | None = None) -> None:
        with self._lock:
            share.touching = False
            if share.over.done():
                return
            self.backlog -= share.size
        if error is None:
            share.over.set_result(None)
        else:
            share.stopped = True
            share.over.set_exception(error)

    def _hang_up(self) -> bool:
        """Whether the wire had been shut down for a share that was stopped."""
        with self._lock:
            wire, self._wire = self._wire, None
            told, self._shut = self._shut, False
        if wire is not None:
            wire.close()
        return told
