"""A relay in front of a TCP port that holds back what the far side says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque

from tests.support.relay import CHUNK, Relay, Work, shut


class DelayingRelay(Relay):
    """Everything that the target sends arrives `delay_s` later; what it is sent, at once.

    `delay_s` may be changed at any time and holds at once, also for what is on its way. Order is
    kept, nothing is dropped.
    """

    def __init__(self, target: str, delay_s: float = 0.0) -> None:
        super().__init__(target)
        self._delay_s = delay_s

    @property
    def delay_s(self) -> float:
        return self._delay_s

    @delay_s.setter
    def delay_s(self, seconds: float) -> None:
        with self._changed:
            self._delay_s = seconds
            self._changed.notify_all()

    def admit(self, port: int) -> Work:
        return self._relay

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        held: deque[tuple[float, bytes]] = deque()
        others = [
            threading.Thread(target=self._hold, args=(far, held)),
            threading.Thread(target=self._give, args=(near, held)),
        ]
        for thread in others:
            thread.start()
        with contextlib.suppress(OSError):
            while raw := near.recv(CHUNK):
                far.sendall(raw)
        shut(far)
        for thread in others:
            thread.join()

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

    def _give(self, near: socket.socket, held: deque[tuple[float, bytes]]) -> None:
        """Pass it on when it is due."""
        with contextlib.suppress(OSError):
            while raw := self._due(held):
                near.sendall(raw)
        shut(near)

    def _due(self, held: deque[tuple[float, bytes]]) -> bytes:
        with self._changed:
            while not self._closed:
                left = held[0][0] + self._delay_s - time.monotonic() if held else None
                if left is not None and left <= 0:
                    return held.popleft()[1]
                self._changed.wait(left)
        return b""
