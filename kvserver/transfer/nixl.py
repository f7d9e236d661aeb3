"""The server's side of `nixl`: one thread owns the agent and moves bytes for remote clients.

The server initiates: a push is a READ of client memory into slots, a pull a WRITE from slots into
client memory. A Job is one client's batch, cut into Posts of at most POST_BYTES.

    queued -> posted -> terminal (DONE, ERR) -> `ended` is called, once, with what became of it
                            \\--each item of which every byte came: `arrived`, while the rest moves

Rules:
 1. Only the agent's thread calls NIXL. Over CMA a post copies before it returns, so posts are
    small and clients take turns, and the thread steps back behind the loop's (`nice`).
 2. No deadline is a fence: a Job ends when each of its posts is terminal, whenever that is. Callers
    may `stop` a Job, which posts no more of it, and wait or not; what it may touch stays theirs to
    guard until `ended`.
 3. Before each post and after the last one an item's slot is looked at (`current`): what was lost
    is not written, what changed was not read.
 4. A post that has not become terminal in `rebuild_s` costs everybody the agent: it is destroyed,
    which ends every transfer, and made anew. Jobs that were posted or queued end as FAILED, and
    clients must attach again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvproto.nixlib import Agent, Descriptors, Memory, NixlError, State
from kvserver.transfer.base import TransferError
from kvserver.transfer.posts import Post
from kvserver.transfer.priority import step_back

POSTS_PER_CLIENT = 2  # in flight at once: a stopped client holds up nobody else
JOBS_PER_CLIENT_MAX = 64
_POLL_S = 50e-6
_POLL_SLOW_S = 5e-3  # of posts that have run for longer than _SLOW_AFTER_S
_SLOW_AFTER_S = 0.5
CLOSE_S = 5.0

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


class Ended(IntEnum):
    """What became of an item of a Job."""

    OK = 0
    STALE = 1  # its slot is no longer what was granted
    FAILED = 2  # the transfer failed, was stopped, or the agent was rebuilt


class Mover(Protocol):
    """What this module needs of `kvproto.nixlib.Agent`; tests have another."""

    name: str

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None: ...
    def metadata(self) -> bytes: ...
    def add_peer(self, metadata: bytes) -> str: ...
    def drop_peer(self, name: str) -> None: ...
    def post(
        self, *, read: bool, peer: str, local: Descriptors, remote: Descriptors, memory: Memory
    ) -> tuple[int, State]: ...
    def state(self, handle: int) -> State: ...
    def release(self, handle: int) -> None: ...
    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Job:
    """`ended(job)` is called on the agent's thread when nothing of the job runs any more, and
    before it, once an item at most, `arrived(items)` of those whose posts are all DONE.
    """

    client: int
    read: bool  # from the client into slots
    memory: Memory
    posts: Sequence[Post]
    outcomes: Bytes  # [items] Ended
    current: Callable[[int], bool]  # item -> its slot is what was granted
    ended: Callable[[Job], None]
    arrived: Callable[[list[int]], None] = lambda items: None
    before_post: Callable[[], None] = lambda: None  # a place for tests to wait at
    stopped: bool = False  # post no more of it
    _next: int = 0
    _running: int = 0
    _over: bool = False
    _left: list[int] = field(init=False)  # posts of an item that are not DONE

    def __post_init__(self) -> None:
        whose = [item for post in self.posts for item in post.items]
        self._left = np.bincount(np.array(whose, np.intp), minlength=len(self.outcomes)).tolist()

    def stop(self) -> None:
        self.stopped = True


@dataclass(eq=False, slots=True)
class _Running:
    job: Job
    post: Post
    handle: int
    since: float


@dataclass(eq=False, slots=True)
class _Peer:
    name: str
    jobs: deque[Job] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)


class NixlAgent:
    """See the module's rules. `start` before use; every other method from any thread."""

    def __init__(
        self,
        area: Bytes,
        *,
        backend: str,
        params: Mapping[str, str],
        rebuild_s: float,
        rebuilt: Callable[[], None],
        report: Callable[[str, BaseException], object],
        log: logging.Logger,
        nice: int = 0,
        make: Callable[[str], Mover] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`area` is the memory that slots lie in; `rebuilt` is told on the agent's thread."""
        self._area = area
        self._backend = backend
        self._make = make or (
            lambda name: Agent(name, backend=backend, params=params, progress=False)
        )
        self._nice = nice
        self._rebuild_s = rebuild_s
        self._rebuilt = rebuilt
        self._report = report
        self._log = log
        self._clock = clock
        self._agent: Mover | None = None
        self._peers: dict[int, _Peer] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._over = False  # the thread has ended
        self._turn: deque[int] = deque()  # clients, the next first
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        self._ready: Future[None] = Future()
        self.bytes_read = 0
        self.bytes_written = 0
        self.posts = 0
        self.posts_failed = 0
        self.rebuilds = 0

    @property
    def base(self) -> int:
        """The address of the area."""
        return int(self._area.ctypes.data)

    # ---- from any thread -------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Done when the agent stands; TransferError in it when it cannot be made."""
        self._thread.start()
        return self._ready

    def close(self) -> None:
        """Stop posting, wait CLOSE_S for what runs, destroy the agent. Blocks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def attach(self, client: int, metadata: bytes, prefix: str) -> Future[str]:
        """Let the agent reach a client: the name of its agent, which must begin with `prefix`."""
        return self._ask(lambda: self._attach(client, metadata, prefix))

    def detach(self, client: int) -> Future[None]:
        """Forget a client; its queued jobs end as FAILED, what runs is left to become terminal."""
        return self._ask(lambda: self._detach(client))

    def submit(self, job: Job) -> None:
        """`job.ended` follows, whatever happens."""
        self._order(lambda: self._queue(job))

    def _ask(self, what: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(what())
            except Exception as error:
                future.set_exception(error)

        self._order(answer)
        return future

    def _order(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._over:
                self._commands.append(command)
                self._wake.notify()
                return
        command()  # nobody else would: it finds no agent and no peer

    # ---- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        step_back(self._nice)
        try:
            self._build()
        except Exception as error:
            with self._wake:
                self._over = True
            self._ready.set_exception(TransferError(f"nixl: {error}"))
            return
        self._ready.set_result(None)
        close_at = 0.0
        while True:
            try:
                moved = self._step()
            except Exception as error:  # a bug of ours; the agent's state is unknown
                self._report("nixl", error)
                self._rebuild(f"internal error: {error!r}")
                moved = False
            with self._wake:
                if self._closing:
                    close_at = close_at or self._clock() + CLOSE_S
                    if not self._in_flight() or self._clock() > close_at:
                        break
                if not moved and not self._commands:
                    self._wake.wait(self._pause())
        self._end_all()
        with self._wake:
            self._over = True
            commands = list(self._commands)
        for command in commands:
            command()

    def _build(self) -> None:
        agent = self._make(f"kvserver-{secrets.token_hex(8)}")
        agent.register(self.base, self._area.nbytes, Memory.DRAM)
        self._agent = agent

    def _step(self) -> bool:
        """One round; whether anything moved."""
        with self._wake:
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        moved = bool(commands) | self._poll()
        if not self._closing:
            moved |= self._post_next()
        oldest = min((r.since for p in self._peers.values() for r in p.running), default=None)
        if oldest is not None and self._clock() - oldest > self._rebuild_s:
            self._rebuild(f"a transfer was not terminal after {self._rebuild_s} s")
        return moved

    def _in_flight(self) -> int:
        return sum(len(peer.running) for peer in self._peers.values())

    def _pause(self) -> float | None:
        since = [r.since for peer in self._peers.values() for r in peer.running]
        if not since:
            return None
        return _POLL_S if self._clock() - max(since) < _SLOW_AFTER_S else _POLL_SLOW_S

    def _attach(self, client: int, metadata: bytes, prefix: str) -> str:
        if self._agent is None:
            raise NixlError("the server is stopping")
        name = self._agent.add_peer(metadata)
        if not name.startswith(prefix):
            self._agent.drop_peer(name)
            raise NixlError(f"the agent is called {name!r}, its name must begin with {prefix!r}")
        peer = self._peers.get(client)
        if peer is None:
            self._peers[client] = _Peer(name)
            self._turn.append(client)
        elif peer.name != name:
            raise NixlError(f"client {client} has attached as {peer.name!r}")
        return name

    def _detach(self, client: int) -> None:
        peer = self._peers.get(client)
        if peer is None:
            return
        for job in list(peer.jobs):
            job.stop()
        self._drop_stopped(peer)
        if peer.running:
            raise NixlError("a transfer of it still runs")
        del self._peers[client]
        self._turn.remove(client)
        if self._agent is not None:
            try:
                self._agent.drop_peer(peer.name)
            except NixlError as error:
                self._log.info("nixl_drop_peer", extra={"fields": {"reason": str(error)}})

    def _queue(self, job: Job) -> None:
        peer = self._peers.get(job.client)
        if peer is None or self._closing or len(peer.jobs) >= JOBS_PER_CLIENT_MAX:
            job.stop()
            self._end(job)
            return
        peer.jobs.append(job)

    def _post_next(self) -> bool:
        """Give the next client that has something to post its turn."""
        for _ in range(len(self._turn)):
            client = self._turn[0]
            self._turn.rotate(-1)
            peer = self._peers[client]
            self._drop_stopped(peer)
            if peer.jobs and len(peer.running) < POSTS_PER_CLIENT:
                self._post_one(peer)
                return True
        return False

    def _drop_stopped(self, peer: _Peer) -> None:
        for job in [job for job in peer.jobs if job.stopped]:
            peer.jobs.remove(job)
            if not job._running:
                self._end(job)

    def _post_one(self, peer: _Peer) -> None:
        job = peer.jobs[0]
        post = job.posts[job._next]
        job._next += 1
        if job._next == len(job.posts):
            peer.jobs.popleft()
        lost = [item for item in post.items if not job.current(item)]
        for item in lost:
            job.outcomes[item] = Ended.STALE
        if lost:  # a post is cut once: what shares it with a lost slot is lost as well
            for item in post.items:
                job.outcomes[item] = job.outcomes[item] or Ended.FAILED
            self._end_if_over(job)
            return
        job.before_post()
        assert self._agent is not None
        self.posts += 1
        try:
            handle, state = self._agent.post(
                read=job.read, peer=peer.name, local=post.local, remote=post.remote,
                memory=job.memory,
            )  # fmt: skip
        except NixlError as error:
            self._log.warning("nixl_post", extra={"fields": {"reason": str(error)}})
            self._count(job, post, State.FAILED)
            self._end_if_over(job)
            return
        job._running += 1
        running = _Running(job, post, handle, self._clock())
        if state is State.RUNNING:
            peer.running.append(running)
        else:
            self._terminal(running, state)

    def _poll(self) -> bool:
        moved = False
        for peer in self._peers.values():
            for running in list(peer.running):
                assert self._agent is not None
                state = self._agent.state(running.handle)
                if state is not State.RUNNING:
                    peer.running.remove(running)
                    self._terminal(running, state)
                    moved = True
        return moved

    def _terminal(self, running: _Running, state: State) -> None:
        assert self._agent is not None
        self._agent.release(running.handle)
        running.job._running -= 1
        self._count(running.job, running.post, state)
        self._end_if_over(running.job)

    def _count(self, job: Job, post: Post, state: State) -> None:
        if state is State.DONE:
            self.bytes_read += post.nbytes if job.read else 0
            self.bytes_written += 0 if job.read else post.nbytes
            for item in post.items:
                job._left[item] -= 1
            if whole := [item for item in post.items if not job._left[item]]:
                job.arrived(whole)
            return
        self.posts_failed += 1
        for item in post.items:
            job.outcomes[item] = job.outcomes[item] or Ended.FAILED

    def _end_if_over(self, job: Job) -> None:
        if not job._running and (job.stopped or job._next == len(job.posts)):
            peer = self._peers.get(job.client)
            if peer is not None and job in peer.jobs:
                peer.jobs.remove(job)
            self._end(job)

    def _end(self, job: Job) -> None:
        """Nothing of the job runs any more: what was never posted has failed."""
        if job._over:
            return
        job._over = True
        for post in job.posts[job._next :]:
            for item in post.items:
                job.outcomes[item] = job.outcomes[item] or Ended.FAILED
        for item in np.flatnonzero(job.outcomes == Ended.OK).tolist():
            if not job.current(item):
                job.outcomes[item] = Ended.STALE
        job.ended(job)

    # ---- the end of an agent -----------------------------------------------------------------

    def _rebuild(self, reason: str) -> None:
        self.rebuilds += 1
        self._log.error("nixl_rebuild", extra={"fields": {"reason": reason}})
        self._end_all()
        self._rebuilt()
        try:
            self._build()
        except NixlError as error:  # without an agent nothing attaches; the server serves on
            self._report("nixl", error)

    def _end_all(self) -> None:
        """Destroy the agent, then end every job: from here on nothing of them can run."""
        peers, self._peers = self._peers, {}
        self._turn.clear()
        agent, self._agent = self._agent, None
        if agent is not None:
            for peer in peers.values():
                for running in peer.running:
                    try:
                        agent.release(running.handle)
                    except NixlError as error:
                        self._log.info("nixl_release", extra={"fields": {"reason": str(error)}})
            agent.close()
        for peer in peers.values():
            for running in peer.running:
                running.job._running -= 1
                running.job.stop()
                self._count(running.job, running.post, State.FAILED)
                if not running.job._running:
                    self._end(running.job)
            for job in peer.jobs:
                job.stop()
                self._end(job)
