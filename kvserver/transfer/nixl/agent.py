"""One agent of `nixl`: moves posts between slots and memory of clients.

The hub initiates: a push is a READ of client memory into slots, a pull a WRITE from slots into
client memory. What there is to post, `jobs` says; a worker has several agents, each with a thread
of its own, that take posts of the same jobs.

    taken -> posted -> terminal (DONE, FAILED) -> what is whole is checked -> put back

Rules:
 1. One thread at a time calls any of this, over and over `step`. Over CMA a post copies before it
    returns, so posts are small.
 2. Before each post its items' slots are looked at (`Job.lost`): what was lost is not written. What
    was pushed is checked here, by the thread that copied its last bytes, while others copy on.
 3. A client has at most POSTS_PER_CLIENT in flight here: one that is stopped holds up nobody else.
 4. Who attaches begins a connection, in which both sides have to take part by turns: UCX's thread
    in a client spins from our first answer until the next one, and takes the core that this needs.
    Any step may give the first. So until a transfer with a peer is DONE, which is all that tells
    that it is connected, `wiring` says how soon somebody with a core should `wire`.
 5. A post that has not become terminal in `stuck_s` is `Stuck`: no call of the library is known to
    end it for certain, the end of the process is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvproto.nixlib import Descriptors, Memory, NixlError, State
from kvserver.transfer.nixl.jobs import Job, Jobs
from kvserver.transfer.nixl.messages import Attach, Ended, Totals
from kvserver.transfer.nixl.posts import Post

POSTS_PER_CLIENT = 2
_POLL_S = 50e-6
_POLL_SLOW_S = 5e-3  # of posts that have run for longer than _SLOW_AFTER_S
_SLOW_AFTER_S = 0.5
WIRE_S = 1e-3  # and _POLL_SLOW_S after _SLOW_AFTER_S,
_WIRE_IDLE_S = 0.1  # and this after _IDLE_AFTER_S, for peers that were stopped and went on
_IDLE_AFTER_S = 5.0

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
class _Running:
    job: Job
    post: Post
    handle: int
    since: float


@dataclass(eq=False, slots=True)
class _Peer:
    name: str
    since: float
    wired: bool = False  # a transfer was DONE


class NixlAgent:
    """See the module's rules."""

    def __init__(
        self,
        mover: Mover,
        area: Bytes,
        jobs: Jobs,
        *,
        number: int = 0,
        stuck_s: float,
        note: Callable[[str, str], object],
        before_post: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`area` is the memory that slots lie in; `number` is another one for each agent of the
        jobs; `note(event, reason)` is told of what failed; `before_post` is a place for tests to
        wait at. NixlError when `area` cannot be registered.
        """
        mover.register(int(area.ctypes.data), area.nbytes, Memory.DRAM)
        self._mover = mover
        self._jobs = jobs
        self._number = number
        self._stuck_s = stuck_s
        self._note = note
        self._before_post = before_post
        self._clock = clock
        self._peers: dict[int, _Peer] = {}  # by client
        self._running: list[_Running] = []
        self._wire_failed = False  # which is said once
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
        return len(self._running)

    # ---- peers ---------------------------------------------------------------------------------

    def attach(self, told: Attach) -> None:
        """Reach a client from now on, or what it has registered since it attached. NixlError when
        that cannot be; what was reached before still is."""
        name = self._mover.add_peer(told.metadata)
        known = self._peers.get(told.client)
        reason = ""
        if not name.startswith(told.prefix):
            reason = f"the agent is called {name!r}, its name must begin with {told.prefix!r}"
        elif known is not None and known.name != name:
            reason = f"client {told.client} has attached as {known.name!r}"
        if reason:
            self._mover.drop_peer(name)
            raise NixlError(reason)
        if known is None:
            self._peers[told.client] = _Peer(name, self._clock())

    def join(self, told: Attach) -> None:
        """Attach, or leave the client to other agents."""
        try:
            self.attach(told)
        except NixlError as error:
            self._jobs.leave(self._number, told.client)
            self._note("nixl_join", str(error))

    def detach(self, client: int) -> None:
        """Forget a client of which nothing runs."""
        assert not any(running.job.client == client for running in self._running)
        if (peer := self._peers.pop(client, None)) is None:
            return
        try:
            self._mover.drop_peer(peer.name)
        except NixlError as error:
            self._note("nixl_drop_peer", str(error))

    # ---- moving --------------------------------------------------------------------------------

    def step(self) -> bool:
        """Look at what runs, join a client, post once; whether anything moved. Stuck by rule 5."""
        moved = self._poll() | self._join_next() | self._post_next()
        oldest = min((running.since for running in self._running), default=None)
        if oldest is not None and self._clock() - oldest > self._stuck_s:
            raise Stuck(f"a transfer was not terminal after {self._stuck_s} s")
        return moved

    @property
    def wiring(self) -> float | None:
        """Rule 4: in how many seconds to `wire`; None: no connection is being made."""
        since = [peer.since for peer in self._peers.values() if not peer.wired]
        if not since:
            return None
        first = [r.since for r in self._running if not self._peers[r.job.client].wired]
        age_s = self._clock() - max(since + first)
        if age_s < _SLOW_AFTER_S:
            return WIRE_S
        return _POLL_SLOW_S if first or age_s < _IDLE_AFTER_S else _WIRE_IDLE_S

    def wire(self) -> None:
        try:
            self._mover.progress()
        except NixlError as error:  # what does not go on is Stuck some time
            if not self._wire_failed:
                self._note("nixl_wire", str(error))
            self._wire_failed = True

    @property
    def pause_s(self) -> float | None:
        """How long to wait for jobs after a `step` that moved nothing; None: for as long as none
        come."""
        if not self._running:
            return None
        newest = max(running.since for running in self._running)
        if self._clock() - newest > _SLOW_AFTER_S:
            return _POLL_SLOW_S
        # Somebody else lets a connection go on: looking for it is work that keeps the interpreter.
        wired = any(self._peers[running.job.client].wired for running in self._running)
        return _POLL_S if wired else WIRE_S

    def _join_next(self) -> bool:
        if (told := self._jobs.to_join(self._number)) is None:
            return False
        self.join(told)
        return True

    def _post_next(self) -> bool:
        here = Counter(running.job.client for running in self._running)
        busy = [client for client, count in here.items() if count >= POSTS_PER_CLIENT]
        taken = self._jobs.take(self._number, busy)
        if taken is None:
            return False
        job, post = taken
        if lost := job.lost(post):
            self._jobs.put_back(job, lost)
            return True
        self._before_post()
        self.posts += 1
        try:
            handle, state = self._mover.post(
                read=job.read, peer=self._peers[job.client].name, local=post.local,
                remote=post.remote, memory=job.memory,
            )  # fmt: skip
        except NixlError as error:
            self._note("nixl_post", str(error))
            self._failed(job, post)
            return True
        running = _Running(job, post, handle, self._clock())
        if state is State.RUNNING:
            self._running.append(running)
        else:
            self._terminal(running, state)
        return True

    def _poll(self) -> bool:
        moved = False
        for running in list(self._running):
            state = self._mover.state(running.handle)
            if state is not State.RUNNING:
                self._running.remove(running)
                self._terminal(running, state)
                moved = True
        return moved

    def _terminal(self, running: _Running, state: State) -> None:
        job, post = running.job, running.post
        self._mover.release(running.handle)
        if state is not State.DONE:
            self._failed(job, post)
            return
        self._peers[job.client].wired = True
        self.bytes_read += post.nbytes if job.read else 0
        self.bytes_written += 0 if job.read else post.nbytes
        whole = self._jobs.whole(job, post)
        wrong = job.wrong(whole) if whole else []
        held = {item: Ended.CORRUPT if job.current(item) else Ended.STALE for item in wrong}
        self._jobs.put_back(job, held)

    def _failed(self, job: Job, post: Post) -> None:
        self.posts_failed += 1
        self._jobs.put_back(job, dict.fromkeys(post.items, Ended.FAILED))
