"""A relay in front of a TCP port that holds back what the far side says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from types import TracebackType
from typing import Self

CHUNK = 64 << 10


class DelayingRelay:
    """Everything that the target sends arrives `delay_s` later; what it is sent, at once.

    `delay_s` may be changed at any time and holds at once, also for what is on its way. Order is
    kept, nothing is dropped. Threads end with the relay.
    """

    def __init__(self, target: str, delay_s: float = 0.0) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._delay_s = delay_s
        self._changed = threading.Condition()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def delay_s(self) -> float:
        return self._delay_s

    @delay_s.setter
    def delay_s(self, seconds: float) -> None:
        with self._changed:
            self._delay_s = seconds
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for one in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                if self._closed:
                    return
                near.close()  # the target is away: whoever asked is told
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            held: deque[tuple[float, bytes]] = deque()
            for work in (
                threading.Thread(target=self._pass, args=(near, far)),
                threading.Thread(target=self._hold, args=(far, held)),
                threading.Thread(target=self._give, args=(near, held)),
            ):
                self._threads.append(work)
                work.start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while raw := near.recv(CHUNK):
                far.sendall(raw)
        _end(far)

    def _hold(self, far: socket.socket, held: deque[tuple[float, bytes]]) -> None:
        """Take in what the target says; the last, empty piece says that it is over."""
        raw = b"begin"
        while raw:
            try:
                raw = far.recv(CHUNK)
            except OSError:
                raw = b""
            with self._changed:
                held.append((time.monotonic(), raw))
                self._changed.notify_all()
        far.close()

    def _give(self, near: socket.socket, held: deque[tuple[float, bytes]]) -> None:
        """Pass it on when it is due."""
        with contextlib.suppress(OSError):
            while raw := self._due(held):
                near.sendall(raw)
        _end(near)
        near.close()

    def _due(self, held: deque[tuple[float, bytes]]) -> bytes:
        with self._changed:
            while not self._closed:
                left = held[0][0] + self._delay_s - time.monotonic() if held else None
                if left is not None and left <= 0:
                    return held.popleft()[1]
                self._changed.wait(left)
        return b""


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
