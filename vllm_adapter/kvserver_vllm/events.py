"""The event log: one JSON line per lookup, save, commit, fetched part and pull.

Off unless `event_log` is set. Times are CLOCK_MONOTONIC seconds, which all processes of a machine
share. A line is one append, so that the halves of several engines may write one file.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress


class EventLog:
    """Appends events to a file; without a path it drops them."""

    def __init__(self, path: str, **common: object) -> None:
        self._common = {"pid": os.getpid(), **common}
        self._fd, self.on = -1, bool(path)
        if path:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, event: str, **fields: object) -> None:
        if self._fd < 0:
            return
        line = json.dumps({"event": event, "t": time.monotonic(), **self._common, **fields})
        with suppress(OSError):
            os.write(self._fd, line.encode() + b"\n")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self.on = -1, False
