"""What a nixl worker has to move, and whose turn it is: shared by its agents.

A Job is one client's batch, cut into Posts (`posts`).

    submitted -> taken, a post at a time -> each `put_back` when it is terminal -> `ended`, once
                                            \\--an item of which every byte came: `whole`

Rules:
 1. From any thread. The lock covers the books alone: `current` and `ended` of a job are called
    without it, by the thread whose call made them due.
 2. No deadline is a fence: a Job ends when every post of it that was taken has been put back,
    whenever that is. Callers may `stop` it, which gives out no more of it, and wait or not; what it
    may touch stays theirs to guard until `ended`.
 3. Clients take turns, a post at a time.
 4. An agent takes posts of clients that it has joined. Agent 0 has joined whoever is admitted, the
    others join who was reached already, and only while JOIN_POSTS of a client wait: connections
    cost both sides (ADR 0016), and most clients never need another one.
 5. After the last post each item's slot is looked at once more (`current`): what is not what was
    granted any more is STALE, whatever was moved.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvproto.nixlib import Memory, NixlError
from kvserver.transfer.nixl.messages import Attach, Ended
from kvserver.transfer.nixl.posts import Post

JOBS_PER_CLIENT_MAX = 64
JOIN_POSTS = 4

Bytes = npt.NDArray[np.uint8]


def _none(items: list[int]) -> list[int]:
    return []


@dataclass(eq=False, slots=True)
class Job:
    """`ended(job)` is called when nothing of it is taken any more. `wrong` says which of some whole
    items are not what they should be."""

    client: int
    read: bool  # from the client into slots
    memory: Memory  # the client's
    posts: Sequence[Post]
    outcomes: Bytes  # [items] Ended
    current: Callable[[int], bool]  # item -> its slot is what was granted
    ended: Callable[[Job], None]
    wrong: Callable[[list[int]], list[int]] = _none
    stopped: bool = False
    _next: int = 0
    _taken: int = 0
    _over: bool = False
    _left: list[int] = field(init=False)  # posts of an item that are not DONE

    def __post_init__(self) -> None:
        whose = [item for post in self.posts for item in post.items]
        self._left = np.bincount(np.array(whose, np.intp), minlength=len(self.outcomes)).tolist()

    @property
    def left(self) -> int:
        """Posts that were not taken yet."""
        return len(self.posts) - self._next

    def lost(self, post: Post) -> dict[int, Ended]:
        """What becomes of a post's items because a slot of one is gone: a post is cut once, so what
        shares it with a lost slot is lost as well. Empty when it may be posted."""
        gone = [item for item in post.items if not self.current(item)]
        if not gone:
            return {}
        return {item: Ended.STALE if item in gone else Ended.FAILED for item in post.items}


@dataclass(eq=False, slots=True)
class _Client:
    told: Attach
    queue: deque[Job] = field(default_factory=deque)  # what has posts left
    taken: int = 0  # posts
    agents: set[int] = field(default_factory=lambda: {0})  # that have joined it
    left: set[int] = field(default_factory=set)  # agents that could not
    reached: bool = False  # a post of it was DONE

    def wants(self, agent: int) -> bool:
        """Rule 4: whether it should join."""
        if not self.reached or agent in self.agents or agent in self.left:
            return False
        return sum(job.left for job in self.queue) >= JOIN_POSTS


class Jobs:
    """See the module's rules."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._clients: dict[int, _Client] = {}
        self._turn: deque[int] = deque()  # clients, the next first
        self.changes = 0
        self.closed = False

    # ---- clients -------------------------------------------------------------------------------

    def admit(self, told: Attach) -> set[int]:
        """Agent 0 has attached to a client, perhaps again: agents that have joined it, and have to
        attach again as well."""
        with self._changed:
            if (known := self._clients.get(told.client)) is not None:
                known.told = told
                return known.agents - {0}
            self._clients[told.client] = _Client(told)
            self._turn.append(told.client)
        return set()

    def to_join(self, agent: int) -> Attach | None:
        """What an agent should attach to next. It has joined then, unless it has to `leave`."""
        with self._changed:
            for known in self._clients.values():
                if known.wants(agent):
                    known.agents.add(agent)
                    return known.told
        return None

    def leave(self, agent: int, client: int) -> None:
        """It cannot reach the client: it takes no more of it, and is not asked again."""
        with self._changed:
            if (known := self._clients.get(client)) is not None:
                known.agents.discard(agent)
                known.left.add(agent)

    def forget(self, client: int) -> None:
        """Nothing of it is moved any more, and what waits ends as FAILED. NixlError while a post of
        it is taken; then it may go on when that is put back."""
        with self._changed:
            known = self._clients.get(client)
            if known is None:
                return
            over = self._stop_all(known)
            runs = known.taken
            if not runs:
                del self._clients[client]
                self._turn.remove(client)
        self._end(over)
        if runs:
            raise NixlError("a transfer of it still runs")

    # ---- jobs ----------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """`job.ended` follows, perhaps from here."""
        with self._changed:
            known = self._clients.get(job.client)
            if known is None or self.closed or len(known.queue) >= JOBS_PER_CLIENT_MAX:
                job.stopped = True
            elif job.posts:
                known.queue.append(job)
                self._change()
                return
            job._over = True
        self._end([job])

    def stop(self, job: Job) -> None:
        with self._changed:
            over = self._stop(job)
        self._end(over)

    def close(self) -> None:
        """Give out no more."""
        with self._changed:
            self.closed = True
            over = [job for known in self._clients.values() for job in self._stop_all(known)]
            self._change()
        self._end(over)

    # ---- posts ---------------------------------------------------------------------------------

    def take(self, agent: int = 0, busy: Collection[int] = ()) -> tuple[Job, Post] | None:
        """For one of the agents, by number: the next post of the next client that is not busy. It
        has to be `put_back`."""
        with self._changed:
            for _ in range(len(self._turn)):
                client = self._turn[0]
                self._turn.rotate(-1)
                known = self._clients[client]
                if known.queue and client not in busy and agent in known.agents:
                    job = known.queue[0]
                    post = job.posts[job._next]
                    job._next += 1
                    job._taken += 1
                    known.taken += 1
                    if not job.left:
                        known.queue.popleft()
                    return job, post
        return None

    def whole(self, job: Job, post: Post) -> list[int]:
        """Of a post that is DONE: the items of which every byte has come with it. Once a post."""
        with self._changed:
            known = self._clients[job.client]
            if not known.reached:
                known.reached = True
                self._change()
            for item in post.items:
                job._left[item] -= 1
            return [item for item in post.items if not job._left[item]]

    def put_back(self, job: Job, outcomes: Mapping[int, Ended]) -> None:
        """A taken post is terminal, and nobody touches its memory any more. The first outcome of an
        item that is not OK stays."""
        over = []
        with self._changed:
            for item, outcome in outcomes.items():
                job.outcomes[item] = job.outcomes[item] or outcome
            job._taken -= 1
            self._clients[job.client].taken -= 1
            if self._done(job):
                over = [job]
        self._end(over)

    # ---- waiting -------------------------------------------------------------------------------

    def wait(self, changes: int, limit_s: float | None) -> None:
        """Until there were more than these `changes`, for as long as `limit_s`."""
        with self._changed:
            if self.changes == changes:
                self._changed.wait(limit_s)

    def wake(self) -> None:
        with self._changed:
            self._change()

    def _change(self) -> None:
        self.changes += 1
        self._changed.notify_all()

    # ---- ends ----------------------------------------------------------------------------------

    def _stop_all(self, known: _Client) -> list[Job]:
        return [over for job in list(known.queue) for over in self._stop(job)]

    def _stop(self, job: Job) -> list[Job]:
        """Give out no more of it; itself, if that ends it."""
        job.stopped = True
        known = self._clients.get(job.client)
        if known is not None and job in known.queue:
            known.queue.remove(job)
        return [job] if self._done(job) else []

    def _done(self, job: Job) -> bool:
        """True once: when nothing of it is taken and nothing will be."""
        if job._over or job._taken or (job.left and not job.stopped):
            return False
        job._over = True
        return True

    def _end(self, over: Sequence[Job]) -> None:
        """Nothing of these is taken any more: what was never taken has failed."""
        for job in over:
            for post in job.posts[job._next :]:
                for item in post.items:
                    job.outcomes[item] = job.outcomes[item] or Ended.FAILED
            for item in np.flatnonzero(job.outcomes == Ended.OK).tolist():
                if not job.current(item):
                    job.outcomes[item] = Ended.STALE
            job.ended(job)
