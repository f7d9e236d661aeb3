"""The server's side of `shm`: clients of this host map the arena themselves.

A Unix stream socket, one handshake a connection (`kvproto.handshake`). The answer carries the
arena's descriptor and, for a writable mapping, that client's liveness descriptor. No payload
passes here. A connection that was opened for calls goes to whoever serves those (`Calls`).

Rules:
 1. A writable arena is passed only together with the client's locked liveness file: while any
    process may still write, its lock is held (DESIGN 5).
 2. One writable mapping per client id: a second would outlive the first one's lock.
 3. Whatever arrives (nothing, garbage, too much, too many connections) is answered or closed
    within `handshake_s`, and no descriptor stays open behind it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from kvproto.handshake import (
    REQUEST_BYTES,
    Answer,
    HandshakeError,
    Mode,
    Request,
    Status,
    decode_request,
    encode_answer,
)
from kvserver.transfer.base import TransferError

CONNECTIONS_MAX = 64
HANDSHAKE_S = 5.0
SOCKET_PATH_BYTES_MAX = 107  # sun_path, without its terminating zero
_ACCEPT_PAUSE_S = 0.1

Authorise = Callable[[int, int, bytes], bool]


class SharedArena(Protocol):
    """What the handshake tells of an arena file (`kvserver.tiers.host.HostArena`)."""

    @property
    def fd(self) -> int: ...
    @property
    def arena_id(self) -> bytes: ...
    @property
    def epoch(self) -> int: ...
    @property
    def table_offset(self) -> int: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def data_bytes(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...


class LivenessFiles(Protocol):
    """Who may still write (`kvserver.tiers.liveness.Liveness`)."""

    def grant(self, client_id: int) -> int: ...

    def is_dead(self, client_id: int) -> bool: ...


class Calls(Protocol):
    """Serves calls over connections (`kvserver.service.local`)."""

    def full(self) -> bool: ...

    async def take(self, connection: socket.socket, session: int, client: int) -> None: ...


class ShmServer:
    """An Endpoint. `authorise(session, client, token)` is asked on the loop's thread.

    Defaults: at most 64 handshakes at once, each within 5 s; the socket is for this user only.
    """

    name = "shm"

    def __init__(
        self,
        path: Path,
        *,
        arena: SharedArena,
        liveness: LivenessFiles,
        authorise: Authorise,
        connections_max: int = CONNECTIONS_MAX,
        handshake_s: float = HANDSHAKE_S,
        socket_mode: int = 0o600,
        log: logging.Logger | None = None,
    ) -> None:
        self._path = path
        self._arena = arena
        self._liveness = liveness
        self._authorise = authorise
        self._connections_max = connections_max
        self._handshake_s = handshake_s
        self._socket_mode = socket_mode
        self._log = log or logging.getLogger(__name__)
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._calls: Calls | None = None
        self.refused = 0
        self.granted = 0

    @property
    def address(self) -> str:
        return str(self._path)

    @property
    def offer(self) -> tuple[str, dict[str, str]]:
        """Address and options, for HelloReply."""
        return self.address, {"calls": "1"} if self._calls is not None else {}

    def serve_calls(self, calls: Calls) -> None:
        """From now on connections for calls are taken, and go to `calls`."""
        self._calls = calls

    async def start(self) -> None:
        """Listen. The caller holds the directory's lock, so a socket found here is a dead one's."""
        if len(os.fsencode(self._path)) > SOCKET_PATH_BYTES_MAX:
            raise TransferError(
                f"socket path {self._path} is longer than {SOCKET_PATH_BYTES_MAX} bytes: "
                "choose a shorter host_dir"
            )
        with suppress(FileNotFoundError):
            self._path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(str(self._path))
            self._path.chmod(self._socket_mode)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise TransferError(f"cannot listen on {self._path}: {error}") from error
        self._listener = listener
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener))

    async def close(self) -> None:
        """Stop listening and end open handshakes. What clients have mapped stays theirs."""
        tasks = [*self._handshakes, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with suppress(FileNotFoundError):
                self._path.unlink()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, say; the backlog waits
                self._log.warning("shm accept failed: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            connection.setblocking(False)
            if len(self._handshakes) >= self._connections_max:
                text = f"more than {self._connections_max} handshakes at once"
                self._refuse(connection, Status.BUSY, text)
                connection.close()
                continue
            task = loop.create_task(self._serve(connection))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                async with asyncio.timeout(self._handshake_s):
                    raw = await _receive(connection, REQUEST_BYTES)
                request = decode_request(raw)
            except TimeoutError:
                self._refuse(connection, Status.BAD_REQUEST, "no request in time")
            except HandshakeError as error:
                self._refuse(connection, Status.BAD_REQUEST, str(error))
            except OSError as error:
                self.refused += 1
                self._log.info("shm handshake broke off: %s", error)
            else:
                if request.mode is Mode.CALLS:
                    await self._hand_over(connection, request)
                else:
                    self._grant(connection, request)

    async def _hand_over(self, connection: socket.socket, request: Request) -> None:
        if not self._authorise(request.session, request.client, request.token):
            self._refuse(connection, Status.REFUSED, "unknown session, client or token")
            return
        if self._calls is None or self._calls.full():
            self._refuse(connection, Status.BUSY, "no more connections for calls are taken")
            return
        try:
            self._send(connection, self._answer(), [])
            ours = socket.socket(fileno=connection.detach())
            await self._calls.take(ours, request.session, request.client)
        except OSError as error:
            self.refused += 1
            self._log.info("shm handshake broke off: %s", error)

    def _answer(self) -> Answer:
        return Answer(
            status=Status.OK,
            epoch=self._arena.epoch,
            file_bytes=self._arena.file_bytes,
            table_offset=self._arena.table_offset,
            data_offset=self._arena.data_offset,
            data_bytes=self._arena.data_bytes,
            arena_id=self._arena.arena_id,
        )

    def _grant(self, connection: socket.socket, request: Request) -> None:
        if not self._authorise(request.session, request.client, request.token):
            self._refuse(connection, Status.REFUSED, "unknown session, client or token")
            return
        if request.mode is Mode.WRITE and not self._liveness.is_dead(request.client):
            text = f"client {request.client} already holds a writable mapping"
            self._refuse(connection, Status.MAPPED, text)
            return
        fds: list[int] = []
        try:
            if request.mode is Mode.WRITE:
                fds.append(self._liveness.grant(request.client))
            flags = os.O_RDWR if request.mode is Mode.WRITE else os.O_RDONLY
            # A description of the client's own: nothing of the server's is shared with it.
            fds.append(os.open(f"/proc/self/fd/{self._arena.fd}", flags | os.O_CLOEXEC))
            self._send(connection, self._answer(), fds)
            self.granted += 1
        except OSError as error:
            self._refuse(connection, Status.FAILED, f"cannot pass the arena: {error}")
        finally:
            for fd in fds:
                os.close(fd)

    def _refuse(self, connection: socket.socket, status: Status, text: str) -> None:
        self.refused += 1
        self._log.info("shm handshake refused: %s", text)
        with suppress(OSError):  # the peer may be gone; it asked, nobody listens
            self._send(connection, Answer(status=status, text=text), [])

    @staticmethod
    def _send(connection: socket.socket, answer: Answer, fds: list[int]) -> None:
        """An answer is smaller than any socket buffer: it goes out in one call or not at all."""
        raw = encode_answer(answer)
        sent = socket.send_fds(connection, [raw], fds)
        if sent != len(raw):
            raise OSError(f"sent {sent} of {len(raw)} bytes")


async def _receive(connection: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes, or fewer when the peer stops sending before."""
    loop = asyncio.get_running_loop()
    raw = bytearray()
    while len(raw) < length:
        part = await loop.sock_recv(connection, length - len(raw))
        if not part:
            break
        raw += part
    return bytes(raw)
