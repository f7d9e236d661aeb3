"""Memory of this process that blocks pass through when the hub's memory is not mapped here.

Fresh memory costs several times the copy into it (DESIGN 5), so buffers are kept and used again.

Invariants:
  * a buffer is either free here or with exactly one taker.
  * at most `bytes_max` are kept free; what exceeds them goes back to the system. How much is with
    takers is bounded by what they were granted: reservations and windows.
"""

from __future__ import annotations

import threading

import numpy as np

from kvclient.transfer.base import Bytes

KEPT_BYTES_MAX = 256 << 20


class Buffers:
    """Free buffers by size. Any thread."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._free: dict[int, list[Bytes]] = {}
        self.kept_bytes = 0

    def take(self, size: int) -> Bytes:
        """uint8 [size], with whatever stood in it."""
        with self._lock:
            free = self._free.get(size)
            if free:
                self.kept_bytes -= size
                return free.pop()
        return np.empty(size, np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """The taker has no view of it any more."""
        with self._lock:
            if self.kept_bytes + buffer.size <= self._bytes_max:
                self._free.setdefault(buffer.size, []).append(buffer)
                self.kept_bytes += buffer.size

    def clear(self) -> None:
        with self._lock:
            self._free.clear()
            self.kept_bytes = 0
