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
from kvserver.core.events import Event, Tier, TierGrew
from kvserver.tiers.host import HostArena

FIRST_STEP_BYTES = 16 << 20
STEP_BYTES = 128 << 20


class Prefault(threading.Thread):
    """Posts TierGrew for each step; `stop` ends it at the next one."""

    def __init__(
        self, host: HostArena, *, post: Callable[[Event], None], log: logging.Logger
    ) -> None:
        super().__init__(name="prefault")
        self._host = host
        self._post = post
        self._log = log
        self._stopping = threading.Event()

    def run(self) -> None:
        started, ready, total = time.monotonic(), 0, self._host.data_bytes
        step = FIRST_STEP_BYTES
        while ready < total and not self._stopping.is_set():
            target = min(total, ready + step)
            try:
                self._host.prefault(ready, target)
            except (FieldError, OSError) as error:
                self._log.error(
                    "host_tier_smaller",
                    extra={"fields": {"ready": ready, "total": total, "reason": str(error)}},
                )
                return
            ready, step = target, STEP_BYTES
            self._post(TierGrew(Tier.HOST, ready))
        seconds = round(time.monotonic() - started, 3)
        self._log.info("host_tier_ready", extra={"fields": {"bytes": ready, "seconds": seconds}})

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._stopping.set()
        if self.is_alive():
            self.join()
