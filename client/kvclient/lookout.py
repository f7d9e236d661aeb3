"""Waiting awake, for a moment, for what is about to arrive.

A thread that sleeps for an answer gives its processor up. Where answers take half a millisecond
that costs more than it saves: another processor has to wake this one, which in a virtual machine
takes its time, and both find cold caches.

Rules:
 1. Nobody looks for longer than AWAKE_S; who waits longer sleeps.
 2. Each look offers the core to others. When the clock shows that one took it, cores are not free,
    and looking costs a turn: then nobody looks for a pause, which doubles with each turn lost, up
    to PAUSE_LAST_S, and is short again after CALM looks that lost none.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable

AWAKE_S = 5e-4
TAKEN_S = 1e-4  # a look takes a few microseconds
PAUSE_FIRST_S = 0.01
PAUSE_LAST_S = 2.0
CALM = 64


class Lookout:
    """Looks at one socket, for one thread."""

    def __init__(
        self,
        watched: socket.socket,
        *,
        clock: Callable[[], float] = time.monotonic,
        give_way: Callable[[], None] = os.sched_yield,
    ) -> None:
        self._poll = select.poll()
        self._poll.register(watched, select.POLLIN)
        self._clock = clock
        self._give_way = give_way
        self._pause_s = PAUSE_FIRST_S
        self._calm = 0
        self._again_at = 0.0

    def look(self) -> bool:
        """Whether there is something to read, or to be told; False sends the caller to sleep."""
        now = self._clock()
        end = now + AWAKE_S
        if now < self._again_at:
            return False
        while now < end:
            if self._poll.poll(0):
                self._found()
                return True
            self._give_way()
            before, now = now, self._clock()
            if now - before > TAKEN_S:
                self._lost(now)
                break
        return False

    def _found(self) -> None:
        self._calm += 1
        if self._calm == CALM:
            self._pause_s = PAUSE_FIRST_S

    def _lost(self, now: float) -> None:
        self._calm = 0
        self._again_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, PAUSE_LAST_S)
