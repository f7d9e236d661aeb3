"""The agent of `nixl`, and whose turn it is: moves bytes between slots and memory of clients.

The hub initiates: a push is a READ of client memory into slots, a pull a WRITE from slots into
client memory. A Job is one client's batch, cut into Posts of at most POST_BYTES.

    queued -> posted -> terminal (DONE, ERR) -> `ended` is called, once, with what became of it
                            \\--each item of which every byte came: `arrived`, while the rest moves

Rules:
 1. One thread at a time calls any of this, over and over `step`. Over CMA a post copies before it
    returns, so posts are small and clients take turns.
 2. No deadline is a fence: a Job ends when each of its posts is terminal, whenever that is. Callers
    may `stop` a Job, which posts no more of it, and wait or not; what it may touch stays theirs to
    guard until `ended`.
 3. Before each post and after the last one an item's slot is looked at (`current`): what was lost
    is not written, what changed was not read.
 4. The first transfer with a peer makes the connection, and both sides have to take part in that.
    Until it is DONE, `wiring` tells how soon somebody with a core should `wire`: UCX's thread in a
    client spins until its side has been answered, and so takes the core that the answer needs.
 5. A post that has not become terminal in `stuck_s` is `Stuck`: no call of the library is known to
    end it for certain, the end of the process is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvproto.nixlib import Descriptors, Memory, NixlError, State
from kvserver.transfer.nixl.messages import Ended, Totals
from kvserver.transfer.nixl.posts import Post

POSTS_PER_CLIENT = 2  # in flight at once: a stopped client holds up nobody else
JOBS_PER_CLIENT_MAX = 64
_POLL_S = 50e-6
_POLL_SLOW_S = 5e-3  # of posts that have run for longer than _SLOW_AFTER_S
_SLOW_AFTER_S = 0.5
_WIRE_S = 1e-3  # and _POLL_SLOW_S after _SLOW_AFTER_S

Bytes = npt.NDArray[np.uint8]


class Stuck(Exception):
    """A transfer does not end."""


class Mover(Protocol):
    """What this module needs of `kvproto.nixlib.Agent`; tests have another."""

    name: str

    def register(self, address: int, length: int, memory: Memory, device: int = 0) -> None: ...
    def metadata(self) -> bytes: ...
    def add_peer(self, metadata: bytes) -> str: ...
    def drop_peer(self, name: str) -> None: ...
    def progress(self) -> None: ...
    def post(
        self, *, read: bool, peer: str, local: Descriptors, remote: Descriptors, memory: Memory
    ) -> tuple[int, State]: ...
    def state(self, handle: int) -> State: ...
    def release(self, handle: int) -> None: ...
    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Job:
    """`ended(job)` is called when nothing of the job runs any more, and before it, once an item at
    most, `arrived(items)` of those whose posts are all DONE.
    """

    client: int
    read: bool  # from the client into slots
    memory: Memory
    posts: Sequence[Post]
    outcomes: Bytes  # [items] Ended
    current: Callable[[int], bool]  # item -> its slot is what was granted
    ended: Callable[[Job], None]
    arrived: Callable[[list[int]], None] = lambda items: None
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
    wired: bool = False  # a transfer was DONE
    jobs: deque[Job] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)


class NixlAgent:
    """See the module's rules."""

    def __init__(
        self,
        mover: Mover,
        area: Bytes,
        *,
        stuck_s: float,
        note: Callable[[str, str], object],
        before_post: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`area` is the memory that slots lie in; `note(event, reason)` is told of what failed;
        `before_post` is a place for tests to wait at. NixlError when `area` cannot be registered.
        """
        mover.register(int(area.ctypes.data), area.nbytes, Memory.DRAM)
        self.base = int(area.ctypes.data)
        self._mover = mover
        self._stuck_s = stuck_s
        self._note = note
        self._before_post = before_post
        self._clock = clock
        self._peers: dict[int, _Peer] = {}
        self._turn: deque[int] = deque()  # clients, the next first
        self._closing = False
        self.bytes_read = 0
        self.bytes_written = 0
        self.posts = 0
        self.posts_failed = 0

    @property
    def totals(self) -> Totals:
        return Totals(self.bytes_read, self.bytes_written, self.posts, self.posts_failed)

    @property
    def in_flight(self) -> int:
        """Posts that are not terminal."""
        return sum(len(peer.running) for peer in self._peers.values())

    # ---- orders ----------------------------------------------------------------------------

    def attach(self, client: int, metadata: bytes, prefix: str) -> str:
        """Let the agent reach a client: the name of its agent, which must begin with `prefix`.
        NixlError when it cannot."""
        name = self._mover.add_peer(metadata)
        if not name.startswith(prefix):
            self._mover.drop_peer(name)
            raise NixlError(f"the agent is called {name!r}, its name must begin with {prefix!r}")
        peer = self._peers.get(client)
        if peer is None:
            self._peers[client] = _Peer(name)
            self._turn.append(client)
        elif peer.name != name:
            raise NixlError(f"client {client} has attached as {peer.name!r}")
        return name

    def detach(self, client: int) -> None:
        """Forget a client of which nothing runs (NixlError); its queued jobs end as FAILED."""
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
        try:
            self._mover.drop_peer(peer.name)
        except NixlError as error:
            self._note("nixl_drop_peer", str(error))

    def submit(self, job: Job) -> None:
        """`job.ended` follows, from here or from a later `step`."""
        peer = self._peers.get(job.client)
        if peer is None or self._closing or len(peer.jobs) >= JOBS_PER_CLIENT_MAX:
            job.stop()
            self._end(job)
        elif not job.posts:
            self._end(job)
        else:
            peer.jobs.append(job)

    def close(self) -> None:
        """Post no more; `step` on until nothing is `in_flight`, as long as there is time."""
        self._closing = True
        for peer in self._peers.values():
            for job in peer.jobs:
                job.stop()
            self._drop_stopped(peer)

    # ---- moving ----------------------------------------------------------------------------

    def step(self) -> bool:
        """Look at what runs, post once; whether anything moved. Stuck by rule 5."""
        moved = self._poll()
        if not self._closing:
            moved |= self._post_next()
        oldest = min((r.since for p in self._peers.values() for r in p.running), default=None)
        if oldest is not None and self._clock() - oldest > self._stuck_s:
            raise Stuck(f"a transfer was not terminal after {self._stuck_s} s")
        return moved

    @property
    def wiring(self) -> float | None:
        """Rule 4: in how many seconds to `wire`; None: no connection is being made."""
        since = [r.since for p in self._peers.values() for r in p.running if not p.wired]
        if not since:
            return None
        return _WIRE_S if self._clock() - max(since) < _SLOW_AFTER_S else _POLL_SLOW_S

    def wire(self) -> None:
        self._mover.progress()

    @property
    def pause_s(self) -> float | None:
        """How long to wait for orders after a `step` that moved nothing; None: for as long as none
        come."""
        since = [r.since for peer in self._peers.values() for r in peer.running]
        if not since:
            return None
        return _POLL_S if self._clock() - max(since) < _SLOW_AFTER_S else _POLL_SLOW_S

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
        self._before_post()
        self.posts += 1
        try:
            handle, state = self._mover.post(
                read=job.read, peer=peer.name, local=post.local, remote=post.remote,
                memory=job.memory,
            )  # fmt: skip
        except NixlError as error:
            self._note("nixl_post", str(error))
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
                state = self._mover.state(running.handle)
                if state is not State.RUNNING:
                    peer.running.remove(running)
                    self._terminal(running, state)
                    moved = True
        return moved

    def _terminal(self, running: _Running, state: State) -> None:
        self._mover.release(running.handle)
        if state is State.DONE:
            self._peers[running.job.client].wired = True
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
