"""The hub's hold on its nixl worker: starts it, tells it what to move, starts another one.

    starting -> standing -> gone: ended and reaped -> every Work of it ends, `lost` -> starting

Rules:
 1. On the loop's thread; nothing here waits for the worker but what is awaited.
 2. A Work ends when the worker says so, or when its process has been reaped: only then can nothing
    of it touch the arena or a client any more. No deadline is such a sign.
 3. A worker that answers no PING in `stuck_s` while something is asked of it is killed. Counted are
    pings that went unanswered, as this process may have stood still itself.
 4. After the loss of a worker every client has to attach again; `lost` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvproto.nixlib import NixlError
from kvserver.transfer.base import TransferError
from kvserver.transfer.nixl.messages import (
    Attach,
    Attached,
    End,
    Ended,
    Frames,
    Kind,
    Totals,
    frame,
    number_of,
    of_number,
)
from kvserver.transfer.nixl.work import Work
from kvserver.transfer.nixl.worker import CLOSE_S, Setup
from kvserver.transfer.shm import SharedArena

PING_S = 1.0
END_S = 2.0  # beyond what the worker may take to close
BACKLOG_BYTES_MAX = 64 << 20  # of orders that the worker has not taken
BACKOFF_S, BACKOFF_S_MAX = 0.2, 5.0

Bytes = npt.NDArray[np.uint8]
OnEnd = Callable[[Bytes], None]  # [items] Ended


class _Link(asyncio.Protocol):
    """One worker, from its start until it is reaped."""

    def __init__(self, owner: AgentProcess, process: subprocess.Popen[bytes]) -> None:
        self._owner = owner
        self._frames = Frames()
        self.process = process
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.jobs: dict[int, tuple[int, OnEnd]] = {}  # number -> items
        self.asks: dict[int, asyncio.Future[None]] = {}
        self.totals = Totals()
        self.pings = 0
        self.pongs = 0
        self.reason = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for kind, payload in self._frames.feed(data):
            self._owner._heard(self, kind, payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner._gone(self)

    @property
    def backlog_bytes(self) -> int:
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(frame(kind, payload))


class AgentProcess:
    """See the module's rules."""

    def __init__(
        self,
        arena: SharedArena,
        lock_fd: int,
        *,
        command: Sequence[str],
        backend: str,
        params: Mapping[str, str],
        agents: int,
        stuck_s: float,
        nice: int,
        report: Callable[[str, BaseException], object],
        log: logging.Logger,
    ) -> None:
        """`command` with a descriptor's number behind it starts a worker; `lock_fd` holds the lock
        of the arena's directory."""
        self._arena = arena
        self._lock_fd = lock_fd
        self._command = command
        self._backend = backend
        self._params = dict(params)
        self._agents = agents
        self._stuck_s = stuck_s
        self._nice = nice
        self._lost: Callable[[], object] = lambda: None
        self._report = report
        self._log = log
        self._first: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._link: _Link | None = None
        self._standing = asyncio.Event()
        self._asks = itertools.count(1)
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._before = Totals()  # of workers that have gone
        self.rebuilds = 0

    @property
    def totals(self) -> Totals:
        """Of all workers so far."""
        now = self._link.totals if self._link is not None else Totals()
        return Totals(*(a + b for a, b in zip(self._before, now, strict=True)))

    @property
    def pid(self) -> int | None:
        """Of the worker; None while there is none."""
        return None if self._link is None else self._link.process.pid

    # ---- life ----------------------------------------------------------------------------------

    def spawn(self) -> None:
        """Start the first worker without waiting for it: it takes a second or so where cores are
        short. TransferError when there can be no process."""
        self._first = self._run()

    async def start(self, lost: Callable[[], object]) -> None:
        """Returns when the agent stands; TransferError when it cannot be made. `lost` is told that
        everybody has to attach again."""
        self._lost = lost
        await self._start()
        self._task(self._watch())

    async def close(self) -> None:
        """Post no more, wait for what runs, then end the worker: nothing of it runs any more."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._first is not None:
            (process, ours), self._first = self._first, None
            ours.close()
            await asyncio.to_thread(_reap, process, END_S)
        link = self._link
        if link is not None:
            link.send(Kind.CLOSE)
            await asyncio.to_thread(_reap, link.process, CLOSE_S + END_S)
            self._ended(link)

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self) -> None:
        (process, ours), self._first = self._first or self._run(), None
        link = self._link = _Link(self, process)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: link, sock=ours)
        await link.ready
        self._standing.set()

    def _run(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        setup = Setup(
            hub=os.getpid(),
            name=f"kvserver-{secrets.token_hex(8)}",
            arena_id=self._arena.arena_id.hex(),
            epoch=self._arena.epoch,
            file_bytes=self._arena.file_bytes,
            backend=self._backend,
            params=self._params,
            agents=self._agents,
            stuck_s=self._stuck_s,
            nice=self._nice,
        )
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    [*self._command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        except OSError as error:
            ours.close()
            raise TransferError(f"nixl: {error}") from error
        with contextlib.suppress(OSError):  # it has ended already, which will be noticed
            socket.send_fds(ours, [setup.encode()], [self._arena.fd, self._lock_fd])
        return process, ours

    def _gone(self, link: _Link) -> None:
        if not self._closing:
            self._task(self._replace(link))

    async def _replace(self, link: _Link) -> None:
        """A worker's socket has ended: the worker, too, then another one."""
        stood = self._standing.is_set()
        self._standing.clear()
        link.process.kill()
        await asyncio.to_thread(link.process.wait)
        self._ended(link)
        status = link.process.returncode
        reason = link.reason or f"the worker ended with status {status}"
        if not stood:
            if not link.ready.done():
                link.ready.set_exception(TransferError(f"nixl: {reason}"))
            return
        self.rebuilds += 1
        self._log.error("nixl_rebuild", extra={"fields": {"reason": reason, "status": status}})
        pause = BACKOFF_S
        while True:
            try:
                await self._start()
                return
            except TransferError as error:  # without an agent nothing attaches; the hub serves on
                self._report("nixl", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF_S_MAX)

    def _ended(self, link: _Link) -> None:
        """The process has been reaped."""
        if link.transport is not None:
            link.transport.abort()
        self._before = self.totals
        self._link = None
        self._lost()
        for ask in link.asks.values():
            if not ask.done():
                ask.set_exception(NixlError("the hub had to rebuild its agent"))
        jobs, link.jobs = link.jobs, {}
        for items, ended in jobs.values():
            ended(_all_failed(items))

    async def _watch(self) -> None:
        """Rule 3."""
        while True:
            await asyncio.sleep(PING_S)
            link = self._link
            if link is None or not link.ready.done() or not (link.jobs or link.asks):
                continue
            if (link.pings - link.pongs) * PING_S > self._stuck_s:
                link.reason = f"the worker did not answer for {self._stuck_s} s"
                link.process.kill()
                continue
            link.pings += 1
            link.send(Kind.PING, of_number(link.pings))

    # ---- orders ----------------------------------------------------------------------------

    async def attach(self, client: int, metadata: bytes, prefix: str) -> None:
        """Let the agent reach a client, whose agent's name must begin with `prefix`. NixlError when
        it cannot. Waits for a worker; the caller has a deadline."""
        await self._standing.wait()
        link = self._link
        assert link is not None
        ask = next(self._asks)
        answer = link.asks[ask] = asyncio.get_running_loop().create_future()
        try:
            link.send(Kind.ATTACH, Attach(ask, client, prefix, metadata).encode())
            await answer
        finally:
            link.asks.pop(ask, None)

    def detach(self, client: int) -> None:
        """Forget a client of which nothing runs."""
        if self._link is not None:
            self._link.send(Kind.DETACH, of_number(client))

    def submit(self, work: Work, ended: OnEnd) -> None:
        """`ended` follows, whatever happens, perhaps at once."""
        link = self._link
        if (
            link is None
            or not self._standing.is_set()
            or self._closing
            or link.backlog_bytes > BACKLOG_BYTES_MAX
        ):
            ended(_all_failed(work.slots))
            return
        link.jobs[work.number] = work.slots, ended
        link.send(Kind.MOVE, work.encode())

    def stop(self, number: int) -> None:
        """Post no more of this Work. `ended` still follows."""
        if self._link is not None and number in self._link.jobs:
            self._link.send(Kind.STOP, of_number(number))

    # ---- the worker's words ----------------------------------------------------------------

    def _heard(self, link: _Link, kind: Kind, payload: bytes) -> None:
        match kind:
            case Kind.ENDED:
                end = End.decode(payload)
                link.totals = end.totals
                _, ended = link.jobs.pop(end.number)
                ended(end.outcomes)
            case Kind.ATTACHED:
                told = Attached.decode(payload)
                answer = link.asks.get(told.ask)
                if answer is None or answer.done():
                    return  # its caller's deadline has come
                if told.reason:
                    answer.set_exception(NixlError(told.reason))
                else:
                    answer.set_result(None)
            case Kind.PONG:
                link.pongs = number_of(payload)
            case Kind.READY:
                if not link.ready.done():
                    link.ready.set_result(None)
            case Kind.REFUSED:
                link.reason = payload.decode()
            case Kind.NOTE:
                event, reason = json.loads(payload)
                self._log.warning(event, extra={"fields": {"reason": reason}})
                if event == "nixl_worker":  # its last word
                    link.reason = reason
                    self._report("nixl", TransferError(reason))
                elif event == "nixl_stuck":
                    link.reason = reason
            case _:
                raise AssertionError(kind)


def _all_failed(items: int) -> Bytes:
    return np.full(items, Ended.FAILED, np.uint8)


def _reap(process: subprocess.Popen[bytes], limit_s: float) -> None:
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
