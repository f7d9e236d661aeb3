"""The server's side of `tcp`: the port, the workers behind it, and who may use it.

The endpoint binds the port and decides hellos on the loop's thread; workers accept, and move the
bytes (`worker`). With `workers` 0 there is one worker, and its threads are the server's.

Rules:
 1. A client's liveness lock is granted with its first connection; the endpoint holds a copy of the
    descriptor as long as it counts a connection of that client in any worker, so the connections
    of one client share a lock. With the last one the lock goes and its file is forgotten: the
    client may come back and is granted a new one.
 2. A client that `alive` does not know any more is dropped within WATCH_S; `drop` does it at once.
    Dropped means told to hang up: the count falls when the worker has let go.
 3. A worker that dies is replaced, after a pause that grows to BACKOFF_S_MAX; its connections have
    ended with it. Consent is bounded: `connections_max` over all, CLIENT_CONNECTIONS_MAX a client.
 4. A worker that does not read its channel is ended rather than waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvproto.frames import HelloStatus
from kvserver.transfer.base import TransferError
from kvserver.transfer.shm import LivenessFiles, SharedArena
from kvserver.transfer.tcp import channel
from kvserver.transfer.tcp.channel import Channel, ChannelClosed
from kvserver.transfer.tcp.connection import Counters
from kvserver.transfer.tcp.worker import Setup, Worker, tls_context

CONNECTIONS_MAX = 256
CLIENT_CONNECTIONS_MAX = 16
HELLO_S = 5.0
STALL_S = 30.0
WATCH_S = 0.5
BACKOFF_S = 0.1
BACKOFF_S_MAX = 5.0
STEADY_S = 10.0  # a worker that lived so long is started anew at once
END_S = 5.0
_BACKLOG = 256

Authorise = Callable[[int, int, bytes], bool]
Alive = Callable[[int, int], bool]


class ForgettableLiveness(LivenessFiles, Protocol):
    """Liveness files whose client may come back (`kvserver.tiers.liveness.Liveness`)."""

    def forget(self, client: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Paths of PEM files; with `client_ca`, clients must show a certificate of it."""

    cert: str
    key: str
    client_ca: str = ""


@dataclass(eq=False, slots=True)
class _Running:
    """A worker, and the connections that were allowed to it: number -> (session, client)."""

    channel: Channel
    process: subprocess.Popen[bytes] | None
    thread: threading.Thread | None
    started: float
    connections: dict[int, tuple[int, int]] = field(default_factory=dict)


class TcpEndpoint:
    """An Endpoint. `authorise` and `alive` are asked on the loop's thread.

    `alive(session, client)`: whether that client is still one of the session's.
    """

    name = "tcp"

    def __init__(
        self,
        listen: str,
        *,
        arena: SharedArena,
        liveness: ForgettableLiveness,
        authorise: Authorise,
        alive: Alive,
        secret: bytes,
        workers: int = 1,
        nice: int = 0,
        connections_max: int = CONNECTIONS_MAX,
        stall_s: float = STALL_S,
        hello_s: float = HELLO_S,
        tls: Tls | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self._listen = listen
        self._arena = arena
        self._liveness = liveness
        self._authorise = authorise
        self._alive = alive
        self._workers = max(1, workers)
        self._threads = workers == 0
        self._connections_max = connections_max
        self._tls = tls
        self._log = log or logging.getLogger(__name__)
        self._setup = Setup(
            secret=secret.hex(),
            arena_id=arena.arena_id.hex(),
            epoch=arena.epoch,
            file_bytes=arena.file_bytes,
            connections_max=connections_max,
            stall_s=stall_s,
            hello_s=hello_s,
            nice=nice,
            tls_cert=tls.cert if tls else "",
            tls_key=tls.key if tls else "",
            tls_client_ca=tls.client_ca if tls else "",
        )
        if tls is not None and self._threads:
            raise TransferError("tcp_workers 0 cannot serve TLS: its workers are processes")
        self._listener: socket.socket | None = None
        self._running: set[_Running] = set()
        self._clients: Counter[int] = Counter()  # client -> connections
        self._locks: dict[int, int] = {}  # client -> descriptor
        self._failures = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._counts = dict.fromkeys(Counters.NAMES, 0)
        self.granted = 0
        self.refused = 0
        self.restarts = 0

    # ---- what others see -----------------------------------------------------------------------

    @property
    def address(self) -> str:
        """host:port as bound."""
        assert self._listener is not None, "start() comes first"
        host, _, _ = self._listen.rpartition(":")
        return f"{host}:{self._listener.getsockname()[1]}"

    @property
    def offer(self) -> tuple[str, dict[str, str]]:
        """What HelloReply tells: the address (":port" where the host is any), and the options."""
        assert self._listener is not None, "start() comes first"
        host, port = self._listener.getsockname()[:2]
        address = f":{port}" if host in ("0.0.0.0", "::") else self.address
        return address, {"tls": "1"} if self._tls else {}

    @property
    def connections(self) -> int:
        return self._clients.total()

    @property
    def pids(self) -> list[int]:
        """Of the workers that are processes."""
        return [w.process.pid for w in self._running if w.process is not None]

    def counters(self) -> dict[str, int]:
        counts = {f"tcp_{name}": count for name, count in self._counts.items()}
        counts["tcp_refused"] += self.refused
        return counts | {
            "tcp_granted": self.granted,
            "tcp_connections": self.connections,
            "tcp_worker_restarts": self.restarts,
        }

    def attached(self, client: int) -> bool:
        """Whether the client has a connection, or had one that a worker has not let go of."""
        return client in self._locks

    def drop(self, client: int) -> None:
        """End the client's connections. `attached` is false when they have ended."""
        for worker in list(self._running):
            if any(c == client for _, c in worker.connections.values()):
                self._send(worker, {"drop": client})

    # ---- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind, and start the workers; what connects before they are ready waits in the backlog."""
        host, _, port = self._listen.rpartition(":")
        if self._tls is not None:
            try:
                tls_context(self._tls.cert, self._tls.key, self._tls.client_ca)
            except OSError as error:
                raise TransferError(f"tls_cert, tls_key, tls_client_ca: {error}") from error
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server(
                (host.strip("[]"), int(port)), family=family, backlog=_BACKLOG
            )
        except OSError as error:
            raise TransferError(f"tcp_listen: {self._listen}: {error}") from error
        for _ in range(self._workers):
            self._start_worker()
        self._spawn(self._watch())

    async def close(self) -> None:
        """Stop listening and end every connection; returns when nothing of it touches the arena."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        for worker in self._running:
            loop.remove_reader(worker.channel.fileno())
            with contextlib.suppress(OSError):
                worker.channel.end.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(*(asyncio.to_thread(_end, worker) for worker in self._running))
        for worker in list(self._running):
            self._lost_connections(worker)
            worker.channel.close()
        self._running.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- workers -------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        ours, theirs = channel.pair()
        process = thread = None
        if self._threads:
            thread = threading.Thread(target=_run_thread, args=(theirs,), name="tcp-worker")
            thread.start()
        else:
            command = [sys.executable, "-m", "kvserver.transfer.tcp.worker", str(theirs.fileno())]
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            finally:
                theirs.close()
        ours.end.setblocking(False)
        worker = _Running(ours, process, thread, loop.time())
        self._running.add(worker)
        loop.add_reader(ours.fileno(), self._read, worker)
        self._send(worker, self._setup.message(), (self._arena.fd, self._listener.fileno()))

    def _send(self, worker: _Running, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        try:
            worker.channel.send(message, fds)
        except BlockingIOError:
            self._log.error("tcp_worker_hangs")
            if worker.process is not None:
                worker.process.kill()
        except ChannelClosed:
            return  # `_read` finds the same, and deals with it

    def _read(self, worker: _Running) -> None:
        try:
            message, fds = worker.channel.receive()
        except BlockingIOError:
            return
        except ChannelClosed:
            asyncio.get_running_loop().remove_reader(worker.channel.fileno())
            self._spawn(self._replace(worker))
            return
        assert not fds, "a worker passes none"
        if "hello" in message:
            self._decide(worker, message)
        elif "closed" in message:
            session_client = worker.connections.pop(message["closed"], None)
            if session_client is not None:
                self._left(session_client[1])
        elif "counted" in message:
            for name, count in message["counted"].items():
                self._counts[name] += count

    async def _replace(self, worker: _Running) -> None:
        """A worker is gone: its locks are, too. Start another one, not too often."""
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(_end, worker)
        worker.channel.close()
        self._running.discard(worker)
        self._lost_connections(worker)
        lived = loop.time() - worker.started
        self._failures = 0 if lived > STEADY_S else self._failures + 1
        pause = min(BACKOFF_S * 2**self._failures, BACKOFF_S_MAX) if self._failures else 0.0
        status = worker.process.returncode if worker.process is not None else 0
        fields = {"status": status, "lived_s": round(lived, 3), "pause_s": pause}
        self._log.error("tcp_worker_lost", extra={"fields": fields})
        await asyncio.sleep(pause)
        while not self._closing:
            try:
                self._start_worker()
            except OSError as error:  # out of processes or descriptors
                fields = {"reason": str(error)}
                self._log.error("tcp_worker_not_started", extra={"fields": fields})
                await asyncio.sleep(BACKOFF_S_MAX)
            else:
                self.restarts += 1
                return

    def _lost_connections(self, worker: _Running) -> None:
        for _, client in worker.connections.values():
            self._left(client)
        worker.connections.clear()

    async def _watch(self) -> None:
        """Drop whom the server does not know any more."""
        while True:
            await asyncio.sleep(WATCH_S)
            everybody = {sc for worker in self._running for sc in worker.connections.values()}
            for session, client in everybody:
                if not self._alive(session, client):
                    self.drop(client)

    # ---- hellos --------------------------------------------------------------------------------

    def _decide(self, worker: _Running, message: dict[str, Any]) -> None:
        session, client = message["session"], message["client"]
        status, text = self._verdict(session, client, bytes.fromhex(message["token"]))
        fds: tuple[int, ...] = ()
        if status is HelloStatus.OK:
            worker.connections[message["hello"]] = (session, client)
            self._clients[client] += 1
            self.granted += 1
            fds = (self._locks[client],)
        else:
            self._log.info("tcp_refused", extra={"fields": {"reason": text}})
        self._send(worker, {"connection": message["hello"], "status": status, "text": text}, fds)

    def _verdict(self, session: int, client: int, token: bytes) -> tuple[HelloStatus, str]:
        if self.connections >= self._connections_max:
            return HelloStatus.BUSY, f"tcp_connections_max is {self._connections_max}"
        if self._clients[client] >= CLIENT_CONNECTIONS_MAX:
            return HelloStatus.BUSY, f"at most {CLIENT_CONNECTIONS_MAX} connections a client"
        if not self._authorise(session, client, token):
            return HelloStatus.REFUSED, "unknown session, client or token"
        if client not in self._locks:
            try:
                self._locks[client] = self._liveness.grant(client)
            except FileExistsError:
                return HelloStatus.REFUSED, f"client {client} writes by another transport"
            except OSError as error:
                return HelloStatus.FAILED, f"no liveness lock: {error}"
        return HelloStatus.OK, ""

    def _left(self, client: int) -> None:
        """One connection has ended, and the worker holds nothing for it any more."""
        self._clients[client] -= 1
        if self._clients[client]:
            return
        del self._clients[client]
        os.close(self._locks.pop(client))
        if self._liveness.is_dead(client):
            self._liveness.forget(client)


def _run_thread(end: Channel) -> None:
    try:
        Worker(end).run()
    finally:
        end.close()


def _end(worker: _Running) -> None:
    """Wait for a worker whose channel is closed; a process that does not end is killed."""
    if worker.thread is not None:
        worker.thread.join(END_S)
    if worker.process is not None:
        try:
            worker.process.wait(END_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait(END_S)
