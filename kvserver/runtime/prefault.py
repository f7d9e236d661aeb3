"""Makes the host arena's memory resident in the background, a slab after the other.

First touch of memory costs seconds per GiB, so a server does not wait for it: the host tier grows
as pages become ready, and the server answers meanwhile.

Rule: memory that the system refuses ends the growth, not the server: the tier stays as large as it
got, and the log says why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvproto.errors import FieldError
from kvserver.core.events import (
    Event,
    Tier,
    TierGrew,
)
from kvserver.tiers.host import HostArena

FIRST_STEP_BYTES = 64 << 20
STEP_BYTES = 128 << 20


class Prefault(threading.Thread):
    """Posts TierGrew for each step; `stop` ends it at the next one. `grew` is told of each before,
    in bytes that are resident now."""

    def __init__(
        self,
        host: HostArena,
        *,
        post: Callable[[Event], None],
        grew: Callable[[int], None] | None = None,
        log: logging.Logger,
    ) -> None:
        super().__init__(name="prefault")
        self._host = host
        self._post = post
        self._grew = grew
        self._log = log
        self._stopping = threading.Event()
        self._ready = 0

    def first(self) -> None:
        """The first step, so that a server has room when it says that it is ready."""
        self._step(FIRST_STEP_BYTES)

    def run(self) -> None:
        started = time.monotonic()
        while self._ready < self._host.data_bytes and not self._stopping.is_set():
            if not self._step(STEP_BYTES):
                return
        seconds = round(time.monotonic() - started, 3)
        fields = {"bytes": self._ready, "seconds": seconds}
        self._log.info("host_tier_ready", extra={"fields": fields})

    def _step(self, length: int) -> bool:
        target = min(self._host.data_bytes, self._ready + length)
        try:
            self._host.prefault(self._ready, target)
        except (FieldError, OSError) as error:
            fields = {"ready": self._ready, "total": self._host.data_bytes, "reason": str(error)}
            self._log.error("host_tier_smaller", extra={"fields": fields})
            return False
        self._ready = target
        if self._grew is not None:
            self._grew(target)
        self._post(TierGrew(Tier.HOST, target))
        return True

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._stopping.set()
        if self.is_alive():
            self.join()
