"""A data worker: accepts connections and moves their bytes, one thread each.

It is a writer of the arena on behalf of remote clients, as an engine of this host is one for
itself, and stands under the same fence: while a connection of a client is open, the worker holds a
copy of that client's liveness descriptor.

As a process (`python -m kvserver.transfer.tcp.worker FD`) it gets everything over the channel that
it inherits as FD; as a thread of the server, over the same kind of channel.

Rules:
 1. It knows no session: hellos are decided by the server, requests by their permits.
 2. A connection closes its liveness descriptor after its last access to the arena, and tells the
    server after that.
 3. A process that loses its channel ends at once: nobody could tell it to let go. Until it has
    ended, its descriptors keep the slots of its clients in quarantine, also for the next server.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import ssl
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

from kvproto.frames import Hello, HelloStatus, Welcome, encode_welcome
from kvserver.transfer.permits import Permits
from kvserver.transfer.priority import step_back
from kvserver.transfer.slots import Slots
from kvserver.transfer.tcp.channel import Channel, ChannelClosed
from kvserver.transfer.tcp.connection import Connection, Counters
from kvserver.transfer.tcp.stream import Stream, TlsStream

COUNT_S = 0.5  # how often counters go to the server
VERDICT_S = 5.0  # the server's answer to a hello; its loop may stand still for a moment
GREETING_MAX = 64  # connections that have said nothing yet, beside those that have
STACK_BYTES = 512 << 10
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told once. Durations in seconds, paths of PEM files."""

    secret: str  # hexadecimal, as is arena_id
    arena_id: str
    epoch: int
    file_bytes: int
    connections_max: int
    stall_s: float
    hello_s: float
    nice: int = 0  # of a process of its own
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""

    def message(self) -> dict[str, Any]:
        return asdict(self)


def tls_context(cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    """The server's side of TLS 1.2 or newer; with `client_ca`, clients must show a certificate.

    OSError (ssl.SSLError is one) when a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    if client_ca:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class _Open:
    """One accepted connection, and what it holds."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self.stream: Stream | None = None
        self.client = 0
        self.told = False  # the server counts it
        self.liveness = -1
        self.verdict: queue.SimpleQueue[tuple[Welcome, int]] = queue.SimpleQueue()


class Worker:
    """`run` returns when the channel ends. From then on nothing of it touches the arena.

    `own_process`: end the process instead (rule 3).
    """

    def __init__(self, channel: Channel, *, own_process: bool = False) -> None:
        self._channel = channel
        self._exit = own_process
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._threads: set[threading.Thread] = set()
        self._counters = Counters()
        self._stopping = threading.Event()
        self._sending = threading.Lock()
        self._numbers = 0

    def run(self) -> None:
        """Serve until the server closes the channel; then drop every connection and return."""
        try:
            message, fds = self._channel.receive()
        except ChannelClosed:
            return
        setup = Setup(**message)
        arena_fd, listener_fd = fds
        listener = socket.socket(fileno=listener_fd)
        try:
            self._slots = Slots(
                arena_fd,
                setup.file_bytes,
                arena_id=bytes.fromhex(setup.arena_id),
                epoch=setup.epoch,
            )
        finally:
            os.close(arena_fd)
        self._setup = setup
        if self._exit:
            step_back(setup.nice)
        self._permits = Permits(bytes.fromhex(setup.secret))
        self._tls: ssl.SSLContext | None = None
        if setup.tls_cert:
            self._tls = tls_context(setup.tls_cert, setup.tls_key, setup.tls_client_ca)
        threads = [
            threading.Thread(target=self._accept, args=(listener,), name="tcp-accept", daemon=True),
            threading.Thread(target=self._count, name="tcp-count", daemon=True),
        ]
        for thread in threads:
            thread.start()
        self._obey()
        if self._exit:
            os._exit(0)
        self._stopping.set()
        self._drop(None)
        for thread in (*threads, *list(self._threads)):
            thread.join()
        listener.close()

    # ---- the server ----------------------------------------------------------------------------

    def _obey(self) -> None:
        """Do what the server says until it is gone."""
        while True:
            try:
                message, fds = self._channel.receive()
            except ChannelClosed:
                return
            if "drop" in message:
                self._drop(message["drop"])
                continue
            status = HelloStatus(message["status"])
            welcome = Welcome(
                status, message["text"], self._setup.epoch, bytes.fromhex(self._setup.arena_id)
            )
            with self._lock:
                one = self._open.get(message["connection"])
                if one is not None:
                    one.verdict.put((welcome, fds.pop() if fds else -1))
            for fd in fds:
                os.close(fd)

    def _tell(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(ChannelClosed):
            self._channel.send(message)  # when the server is gone, `_obey` notices

    def _drop(self, client: int | None) -> None:
        """Hang up on a client, or on everybody; their threads end, and let go."""
        with self._lock:
            for one in self._open.values():
                if client is None or one.client == client:
                    if one.stream is not None:
                        one.stream.hang_up()
                    else:
                        with contextlib.suppress(OSError):
                            socket.socket.shutdown(one.sock, socket.SHUT_RDWR)

    def _count(self) -> None:
        while not self._stopping.wait(COUNT_S):
            self._tell_counts()

    def _tell_counts(self) -> None:
        counts = self._counters.take()
        if counts:
            self._tell({"counted": counts})

    # ---- connections ---------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(COUNT_S)  # to look at `_stopping`; other workers share the socket
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except (TimeoutError, BlockingIOError):
                continue
            except OSError:  # out of descriptors, say; the backlog waits
                self._stopping.wait(COUNT_S)
                continue
            if len(self._open) >= self._setup.connections_max + GREETING_MAX:
                self._counters.add(refused=1)
                _refuse(sock)
                continue
            with self._lock:
                self._numbers += 1
                one = _Open(self._numbers, sock)
                self._open[one.number] = one
            thread = threading.Thread(target=self._serve, args=(one,), daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self, one: _Open) -> None:
        try:
            one.stream = self._stream(one.sock)
            if self._stopping.is_set():
                return
            connection = Connection(
                one.stream,
                slots=self._slots,
                permits=self._permits,
                authorise=lambda hello: self._authorise(one, hello),
                counters=self._counters,
            )
            connection.serve(hello_s=self._setup.hello_s)
        except OSError:
            self._counters.add(broken=1)
        finally:
            self._forget(one)

    def _stream(self, sock: socket.socket) -> Stream:
        """OSError when the peer does not get through its TLS handshake."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if self._tls is None:
            return Stream(sock, stall_s=self._setup.stall_s)
        sock.settimeout(self._setup.hello_s)
        return TlsStream(self._tls.wrap_socket(sock, server_side=True), stall_s=self._setup.stall_s)

    def _authorise(self, one: _Open, hello: Hello) -> Welcome:
        """Ask the server; keep the liveness descriptor that comes with its consent."""
        one.client = hello.client  # before the consent: a drop that follows it must find us
        self._tell(
            {
                "hello": one.number,
                "session": hello.session,
                "client": hello.client,
                "token": hello.token.hex(),
            }
        )
        try:
            welcome, fd = one.verdict.get(timeout=VERDICT_S)
        except queue.Empty:
            one.told = True  # the server may consent yet
            return Welcome(HelloStatus.FAILED, "the server does not answer")
        if welcome.status is HelloStatus.OK:
            one.told = True
            one.liveness = fd
        return welcome

    def _forget(self, one: _Open) -> None:
        """Rule 2. The stream is closed before, so that no thread is in a copy."""
        with self._lock:
            del self._open[one.number]
            late = [] if one.verdict.empty() else [one.verdict.get()[1]]
        if one.stream is not None:
            one.stream.close()
        else:
            one.sock.close()
        for fd in (one.liveness, *late):
            if fd >= 0:
                os.close(fd)
        self._tell_counts()
        if one.told:
            self._tell({"closed": one.number})
        self._threads.discard(threading.current_thread())


def _refuse(sock: socket.socket) -> None:
    """One word to a peer for whom there is no thread; it goes into the socket's buffer."""
    with sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(encode_welcome(Welcome(HelloStatus.BUSY, "too many connections; try again")))


def main() -> None:
    """The process: see rule 3."""
    # A signal to the whole group is for the server, which drains first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.stack_size(STACK_BYTES)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    Worker(Channel(end), own_process=True).run()


if __name__ == "__main__":
    main()
