"""Relays before a TCP port that cut connections: after a number of bytes, or of one process."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Self

CHUNK = 64 << 10


class CuttingRelay:
    """Relays `cuts[0]` bytes (both directions together) of the first connection and cuts it there,
    then the second after `cuts[1]`, and so on; later ones are whole. Threads end with it.
    """

    def __init__(self, target: str, cuts: list[int]) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            limit = self._cuts.pop(0) if self._cuts else None
            thread = threading.Thread(target=self._relay, args=(near, limit))
            self._threads.append(thread)
            thread.start()

    def _relay(self, near: socket.socket, limit: int | None) -> None:
        with (
            near,
            socket.create_connection(self._target) as far,
            selectors.DefaultSelector() as wait,
        ):
            other = {near: far, far: near}
            self._sockets |= {near, far}
            for one in other:
                wait.register(one, selectors.EVENT_READ)
            left = limit
            with contextlib.suppress(OSError):
                while left is None or left > 0:
                    for key, _ in wait.select():
                        one = key.fileobj
                        raw = one.recv(CHUNK if left is None else min(CHUNK, left))
                        if not raw:
                            return
                        other[one].sendall(raw)
                        if left is not None:
                            left -= len(raw)
                            if left <= 0:
                                self.cut += 1
                                return
            self._sockets -= {near, far}


class SeveringRelay:
    """A relay that cuts off single processes: `sever(pid)` ends that process's connections and
    refuses its new ones, until `mend()`. Threads end with it.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: dict[int, tuple[socket.socket, socket.socket]] = {}  # by the client's port
        self._severed: set[int] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.refused = 0

    def sever(self, pid: int) -> int:
        """How many connections the process had."""
        with self._lock:
            self._severed.add(pid)
            mine = [self._pairs[port] for port in _ports(pid) if port in self._pairs]
        for pair in mine:
            _shut(pair)
        return len(mine)

    def mend(self) -> None:
        with self._lock:
            self._severed.clear()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            pairs = list(self._pairs.values())
        for pair in pairs:
            _shut(pair)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, (_, port) = self._listener.accept()
            except OSError:
                return
            with self._lock:
                refused = any(port in _ports(pid) for pid in self._severed)
                self.refused += refused
                if refused:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._pairs[port] = (near, far)
            thread = threading.Thread(target=self._relay, args=(port, near, far))
            self._threads.append(thread)
            thread.start()

    def _relay(self, port: int, near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as wait, contextlib.suppress(OSError):
            other = {near: far, far: near}
            for one in other:
                wait.register(one, selectors.EVENT_READ)
            raw = b"-"
            while raw:
                for key, _ in wait.select():
                    raw = key.fileobj.recv(CHUNK)
                    if not raw:
                        break
                    other[key.fileobj].sendall(raw)
        with self._lock:
            del self._pairs[port]


def _shut(pair: tuple[socket.socket, ...]) -> None:
    for one in pair:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _ports(pid: int) -> set[int]:
    """Local ports of a process's TCP connections."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return {one.laddr.port for one in psutil.Process(pid).net_connections("tcp")}
    return set()
