"""A connection's bytes: never blocks inside a copy, and waits with a deadline.

Rule 1: the socket is non-blocking. `receive_some` and `send_some` move what can be moved at once
and return 0 when that is nothing; waiting is a call of its own. So a caller can look at a slot's
generation after every wait: a peer cannot choose the moment at which its bytes land in the arena,
or the arena's bytes leave.
Rule 2: `wait_*` raise Stalled when the peer makes no progress within `stall_s`.
Rule 3: `hang_up` may be called from any thread; it ends every wait.
"""

from __future__ import annotations

import ctypes
import select
import socket
import ssl
from collections.abc import Sequence

from kvproto import wires
from kvproto.wires import Arrival, Came

# How long many bytes are waited for: 1 MiB takes this long at 0.4 Gbit/s. A slower peer's bytes are
# taken as they come.
MORE_S = 0.02
_GONE = select.POLLERR | select.POLLNVAL


class Ended(Exception):
    """The peer closed or broke the connection."""


class Stalled(Exception):
    """No progress in time."""


class Stream:
    """Over a plain socket. Takes the socket; `close` closes it."""

    def __init__(self, sock: socket.socket, *, stall_s: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.stall_s = stall_s
        self._low = ctypes.c_int(1)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    # ---- waiting -------------------------------------------------------------------------------

    def wait_read(self, timeout_s: float | None = None) -> None:
        """Until something can be received. Stalled after `timeout_s` (None: `stall_s`)."""
        self._low_water(1)
        self._wait(self._readable, timeout_s)

    def wait_more(self, count: int) -> None:
        """Until `count` bytes can be received together; where that takes longer than MORE_S, until
        any can. A peer that sends as fast as we receive would wake us up for every segment.
        """
        self._low_water(count)
        if not self._readable.poll(MORE_S * 1000):
            self.wait_read()

    def _low_water(self, count: int) -> None:
        """What `_readable` waits for."""
        if count != self._low.value:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._low.value = count

    def wait_write(self, timeout_s: float | None = None) -> None:
        self._wait(self._writable, timeout_s)

    def wait_idle(self) -> None:
        """Until a request begins; an idle connection may wait for ever."""
        self._low_water(1)
        self._readable.poll()

    def _wait(self, events: select.poll, timeout_s: float | None) -> None:
        seconds = self.stall_s if timeout_s is None else timeout_s
        ready = events.poll(max(0, seconds) * 1000)
        if not ready:
            raise Stalled(f"no progress within {seconds} s")
        if ready[0][1] & _GONE:
            raise Ended("the connection broke")

    # ---- moving --------------------------------------------------------------------------------

    def receive_some(self, views: Sequence[memoryview]) -> int:
        """Fill `views` with what has arrived; how many bytes that is. Ended at the end."""
        try:
            if len(views) == 1:
                count = self.sock.recv_into(views[0])
            else:
                count = self.sock.recvmsg_into(views)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Ended(str(error)) from error
        if count == 0:
            raise Ended("the peer closed")
        return count

    def carries(self, cell_bytes: int) -> bool:
        """Whether `receive_guarded` takes grids of such cells."""
        return wires.usable(cell_bytes)

    def receive_guarded(self, arrival: Arrival, more_bytes: int) -> Came:
        """What comes, by native code, which looks at the guard where rule 1 wants it; `more_bytes`
        are waited for together, as in `wait_more`. WHOLE or LOST.
        """
        while True:
            try:
                came = wires.receive_guarded(
                    self.sock.fileno(), arrival, more_bytes=more_bytes, wait_s=MORE_S, low=self._low
                )
            except OSError as error:
                raise Ended(str(error)) from error
            if came is not Came.WAITED:
                return came
            self.wait_read()

    def send_some(self, views: Sequence[memoryview]) -> int:
        """Send what the socket takes of `views`; how many bytes that is."""
        try:
            return self.sock.sendmsg(views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Ended(str(error)) from error

    def receive(self, view: memoryview) -> None:
        """Fill `view`."""
        done = 0
        while done < len(view):
            count = self.receive_some([view[done:]])
            if count == 0:
                self.wait_read()
            done += count

    def send(self, raw: bytes) -> None:
        view = memoryview(raw)
        while view:
            count = self.send_some([view])
            if count == 0:
                self.wait_write()
            view = view[count:]

    # ---- end -----------------------------------------------------------------------------------

    def end_sending(self) -> None:
        """Tell the peer that nothing follows; what it sends can still be received."""
        self.sock.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed or broken already: nobody waits on it

    def close(self) -> None:
        self.sock.close()


class TlsStream(Stream):
    """Over TLS: OpenSSL takes one extent a call, 16 KiB of it at most.

    Bytes that OpenSSL has decrypted and not yet handed out are seen by no poll: every wait comes
    after an attempt that said that it needs more.
    """

    def __init__(self, sock: ssl.SSLSocket, *, stall_s: float) -> None:
        super().__init__(sock, stall_s=stall_s)
        self._ssl = sock

    def carries(self, cell_bytes: int) -> bool:
        """Never: OpenSSL has the bytes."""
        return False

    def wait_idle(self) -> None:
        if not self._ssl.pending():
            super().wait_idle()

    def wait_more(self, count: int) -> None:
        """The same as `wait_read`: OpenSSL takes a record at a time."""
        self.wait_read()

    def receive_some(self, views: Sequence[memoryview]) -> int:
        try:
            count = self._ssl.recv_into(views[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:  # also ssl.SSLError
            raise Ended(str(error)) from error
        if count == 0:
            raise Ended("the peer closed")
        return count

    def send_some(self, views: Sequence[memoryview]) -> int:
        try:
            return self._ssl.send(views[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise Ended(str(error)) from error

    def end_sending(self) -> None:
        # SSLSocket.shutdown forgets its TLS state: what comes could not be received any more.
        socket.socket.shutdown(self._ssl, socket.SHUT_WR)

    def hang_up(self) -> None:
        # As above, and another thread is using that state.
        try:
            socket.socket.shutdown(self._ssl, socket.SHUT_RDWR)
        except OSError:
            return
