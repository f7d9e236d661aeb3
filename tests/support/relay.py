"""Relays in front of a TCP port: what all kinds have in common.

    class Counting(Relay):
        def admit(self, port): ...

    with Counting("127.0.0.1:7000") as relay:
        connect(relay.address)

Rules:
  1. Each connection is served by a thread of its own, and both its sockets are closed when that
     thread is done with them. The kind of relay says how it is served, or that it is refused.
  2. Whoever comes while the target is away is told: his connection is closed.
  3. Leaving the relay ends every connection and waits for every thread.
  4. `_changed` guards what threads share. It is notified when the relay ends, so that no thread of
     a kind sleeps on it longer.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

CHUNK = 64 << 10
END_S = 10.0

Work = Callable[[socket.socket, socket.socket], object]
"""Serves one connection: the client's socket, the target's. An OSError ends it quietly."""


class Relay(ABC):
    """Relays connections from `address` to `target`, both host:port."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._changed = threading.Condition()
        self._closed = False
        self._pairs: dict[int, tuple[socket.socket, socket.socket]] = {}  # by the client's port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    @abstractmethod
    def admit(self, port: int) -> Work | None:
        """How the connection from that local port is served; None refuses it. Called in the order
        in which connections come, with `_changed` held."""

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
            pairs = list(self._pairs.values())
        shut(self._listener, *(one for pair in pairs for one in pair))
        for thread in self._threads:  # the first one adds no more once it has ended
            thread.join(END_S)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, (_, port) = self._listener.accept()
            except OSError:
                return
            with self._changed:
                work = None if self._closed else self.admit(port)
                far = self._reach() if work is not None else None
                if work is None or far is None:
                    near.close()
                    continue
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pairs[port] = (near, far)
            thread = threading.Thread(target=self._serve, args=(port, near, far, work))
            self._threads.append(thread)
            thread.start()

    def _reach(self) -> socket.socket | None:
        """A connection to the target, None when it is away."""
        with contextlib.suppress(OSError):
            return socket.create_connection(self._target)
        return None

    def _serve(self, port: int, near: socket.socket, far: socket.socket, work: Work) -> None:
        with near, far, contextlib.suppress(OSError):
            work(near, far)
        with self._changed:
            del self._pairs[port]


def pump(near: socket.socket, far: socket.socket, limit: int | None = None) -> bool:
    """Pass on what either side says until one ends, or until `limit` bytes of both together have
    passed: whether they have."""
    other = {near: far, far: near}
    left = limit
    with selectors.DefaultSelector() as wait:
        for one in other:
            wait.register(one, selectors.EVENT_READ)
        while left is None or left > 0:
            for key, _ in wait.select():
                one = key.fileobj
                raw = one.recv(CHUNK if left is None else min(CHUNK, left))
                if not raw:
                    return False
                other[one].sendall(raw)
                if left is not None:
                    left -= len(raw)
                    if left <= 0:
                        break
    return True


def shut(*sockets: socket.socket) -> None:
    """End their connections both ways; those that have ended already stay as they are."""
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
