"""Time as the client uses it: deadlines of calls, and pauses between attempts to reconnect."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

BACKOFF_FIRST_S = 0.05
BACKOFF_LAST_S = 1.0


class Deadline:
    """The instant by which a call has ended, on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._end - time.monotonic())


class Backoff:
    """Pauses that double from 50 ms to 1 s; each is drawn from the upper half of its step."""

    def __init__(
        self,
        *,
        first_s: float = BACKOFF_FIRST_S,
        last_s: float = BACKOFF_LAST_S,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._draw = draw
        self._step_s = first_s

    def next(self) -> float:
        step, self._step_s = self._step_s, min(2 * self._step_s, self._last_s)
        return step * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        self._step_s = self._first_s
