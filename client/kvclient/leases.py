"""Leases on their way back: many in one call; those that nobody waits for go with the next Acquire.

Rule: what was given back under a Link that is lost is forgotten; what the hub does not hear of,
expires.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from kvclient.errors import TIMEOUTS, KVError
from kvclient.session import Link, Session
from kvclient.timing import Deadline
from kvproto.v1 import kvserver_pb2 as pb

RELEASE_PAUSE_S = 0.02  # leases that nobody waits for go back after this, or with an Acquire


class Leases:
    """Gives leases back, many in one call: those that came while the last call ran, and those of
    streams that have ended, for which the hub can wait a moment, with the next Acquire.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._pending: dict[Link, list[int]] = {}
        self._flushes = False  # a flush runs, or is about to: it sees what is pending by then
        self._flusher: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def give_back(self, link: Link, lease: int, *, soon: bool = True) -> None:
        """`soon`: a stream waits for room in its window."""
        if soon:
            self._hurry.set()
        if self._add(link, lease):
            self._begin()

    def leave(self, link: Link, lease: int, post: Callable[[Callable[[], None]], None]) -> None:
        """The same at leisure, on any thread; `post` has the loop call something."""
        if self._add(link, lease):
            post(self._begin)

    def take(self, link: Link) -> bytes:
        """What waits to be given back under `link`, packed, for the caller to send. On any
        thread."""
        with self._lock:
            leases = self._pending.pop(link, None)
        return np.array(leases, "<u8").tobytes() if leases else b""

    async def settle(self, deadline: Deadline) -> None:
        """Return when the hub has heard of everything given back until now, or at the deadline."""
        self._hurry.set()
        if self._flusher is not None:
            await asyncio.wait([self._flusher], timeout=deadline.left())

    def _add(self, link: Link, lease: int) -> bool:
        """Whether a flush must be begun."""
        if link.lost is not None:
            return False
        with self._lock:
            self._pending.setdefault(link, []).append(lease)
            flushes, self._flushes = self._flushes, True
        return not flushes

    def _begin(self) -> None:
        self._flusher = self._session.background(self._flush())

    def _more(self) -> bool:
        with self._lock:
            self._flushes = bool(self._pending)
            return self._flushes

    async def _flush(self) -> None:
        # Waits before it looks: the next Acquire has mostly taken by then what was to be flushed,
        # and were this to end for that, each lease would wake the loop anew.
        more = True
        while more:
            if not self._hurry.is_set():
                with suppress(*TIMEOUTS):
                    await asyncio.wait_for(self._hurry.wait(), RELEASE_PAUSE_S)
            self._hurry.clear()
            for link in list(self._pending):
                if packed := self.take(link):
                    await self._send(link, packed)
            more = self._more()

    async def _send(self, link: Link, packed: bytes) -> None:
        async def make(at: Link) -> pb.ReleaseRequest:
            return pb.ReleaseRequest(session=at.session, leases=packed)

        with suppress(KVError):  # unheard, they expire
            deadline = Deadline(self._session.options.deadline_s)
            await self._session.call("Release", make, deadline, link=link)
