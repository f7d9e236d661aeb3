"""A connection to the hub's data port: dialled, greeted, and then bytes (`kvproto.frames`).

Rule 1: no call waits longer than its limit for a peer that neither takes nor gives a byte.
Rule 2: `Wire.shutdown` ends whoever is in a call of it, from any thread.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Sequence
from contextlib import suppress

from kvclient.errors import DeadlineExceeded, Unavailable, Unsupported
from kvclient.tls import Tls
from kvproto import frames, wires
from kvproto.cells import Bytes, Checksums
from kvproto.frames import FrameError

RECEIVING_BYTES = 4 << 20
# What waits for longer is cold when its receiver copies it: docs/adr/0013.
SENDING_BYTES = 2 << 20
STALL_S = 10.0
BROKEN = (OSError, FrameError)  # what a connection that cannot be used any more raises
_BUFFERS_MAX = 512  # of one sendmsg
_TIMEVAL = struct.Struct("@ll")


class Wire:
    """One connection after its hello. Used by one thread at a time; `shutdown` by any."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._arrivals = select.poll()
        self._arrivals.register(connection, select.POLLIN)
        self.scratch: list[Bytes] = []
        """Memory for cells with gaps between them, its user's own."""

    def send(self, buffers: Sequence[memoryview | bytes]) -> None:
        if self._tls:
            for buffer in buffers:
                self._socket.sendall(buffer)
            return
        left = [memoryview(buffer).cast("B") for buffer in buffers]
        while left:
            sent = self._socket.sendmsg(left[:_BUFFERS_MAX])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def fill(self, view: memoryview) -> None:
        """Receive exactly what fits into `view`."""
        flags = 0 if self._tls else socket.MSG_WAITALL
        while view:
            count = self._socket.recv_into(view, 0, flags)
            if not count:
                raise ConnectionResetError("the hub hung up")
            view = view[count:]

    def carries(self, cell_bytes: int) -> bool:
        """Whether whole grids of such cells go through native code: `send_grid`, `fill_grid`."""
        return not self._tls and wires.usable(cell_bytes)

    def send_grid(self, head: bytes, grid: Bytes, sums: Checksums) -> None:
        """The head, the cells, and their checksums, which are left in `sums` too."""
        wires.send(self._socket.fileno(), head, grid, sums)

    def fill_grid(self, grid: Bytes, sums: Checksums) -> None:
        """Receive all of `grid`; its cells' checksums come into `sums`."""
        wires.receive(self._socket.fileno(), grid, sums)

    @property
    def readable(self) -> bool:
        """Whether something can be taken now."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        return bool(self._arrivals.poll(0))

    def take(self, length: int) -> bytes:
        raw = bytearray(length)
        self.fill(memoryview(raw))
        return bytes(raw)

    def shutdown(self) -> None:
        """Whoever sends or receives gets an error, at once."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.close()


def dial(
    address: str, hello: frames.Hello, tls: Tls | None, limit_s: float
) -> tuple[Wire, frames.Welcome]:
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s)
    except TimeoutError as error:
        raise DeadlineExceeded(f"no connection to {address} in time", field="deadline_s") from error
    except (OSError, ValueError) as error:
        raise Unavailable(f"cannot connect to {address}: {error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDING_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVING_BYTES)
        if tls is not None:
            name = tls.name or host.strip("[]")
            connection = tls.context().wrap_socket(connection, server_hostname=name)
        # MSG_WAITALL fills a large buffer only on a socket without a Python timeout.
        connection.settimeout(None)
        _limit(connection, limit_s)
        wire = Wire(connection)
        wire.send([frames.encode_hello(hello)])
        head = wire.take(frames.WELCOME_HEAD_BYTES)
        welcome = frames.decode_welcome(head + wire.take(frames.welcome_text_bytes(head)))
        _limit(connection, STALL_S)
    except ssl.SSLError as error:
        connection.close()
        raise Unsupported(f"no TLS with {address}: {error}") from error
    except BlockingIOError as error:
        connection.close()
        raise DeadlineExceeded(f"no welcome from {address} in time", field="deadline_s") from error
    except BROKEN as error:
        connection.close()
        raise Unavailable(f"the data port {address} broke off: {error}") from error
    if welcome.status is not frames.HelloStatus.OK:
        connection.close()
        raise Unavailable(f"the data port {address} refuses: {welcome.text}")
    return wire, welcome


def _limit(connection: socket.socket, seconds: float) -> None:
    whole = int(seconds)
    packed = _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)
