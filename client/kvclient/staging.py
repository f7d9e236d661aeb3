"""Memory of this process that blocks pass through when the hub's memory is not mapped here.

Fresh memory costs several times the copy into it (DESIGN 5), so buffers are kept and used again.

Buffers begin at multiples of ALIGN_BYTES. To addresses that are not multiples of 32, as those of
NumPy's large arrays, which begin 16 bytes behind a page, the string copies of x86 kernels and C
libraries can be two to three times as slow: 0.71 to 0.81 core-ms per MiB received from a socket,
for 0.26 to 0.31 (AMD EPYC).

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
ALIGN_BYTES = 64


def aligned(size: int) -> Bytes:
    """uint8 [size] at a multiple of ALIGN_BYTES, with whatever stood there."""
    room = np.empty(size + ALIGN_BYTES - 1, np.uint8)
    start = -int(room.ctypes.data) % ALIGN_BYTES
    return room[start : start + size]


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
        return aligned(size)

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
