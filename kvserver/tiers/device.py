"""The device tier: an arena whose memory the server reaches only by copying.

Rule 1: a copy has ended when the call returns, also one that failed; calls may come from any
        thread.
Rule 2: a device arena is volatile: it starts empty, and nothing of it is recovered.
Rule 3: host memory may be pinned for its copies: speed, and nothing else, depends on it.

`MemoryDevice` keeps the arena in process memory. It makes real copies, so the third tier runs and
is tested on machines without a GPU. The one in a GPU's memory is `kvserver.tiers.cuda`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvserver.tiers.errors import TierError

Bytes = npt.NDArray[np.uint8]


class DeviceArena(Protocol):
    """What the mover needs of a device. Offsets and lengths in bytes of its data area; host memory
    is contiguous."""

    @property
    def name(self) -> str:
        """For people: what the memory is."""

    @property
    def data_bytes(self) -> int: ...

    def upload(self, offset: int, source: Bytes) -> None:
        """Copy `source` (host memory) to `offset`. TierError when the device fails."""

    def download(self, offset: int, target: Bytes) -> None:
        """Fill `target` (host memory) from `offset`. TierError when the device fails."""

    def pin(self, host: Bytes, start: int, stop: int) -> int:
        """Pin what can be of `host[:stop]`, of which the first `start` bytes were pinned before;
        how many bytes are now. `host` is the same memory in each call, and stays mapped until
        `close`. TierError when that is refused: copies go on, slower."""

    def close(self) -> None:
        """Give the memory back, and what was pinned; no copy may run or follow."""


class MemoryDevice:
    """A device arena in process memory, for which nothing need be pinned."""

    name = "memory"

    def __init__(self, data_bytes: int) -> None:
        self.data_bytes = data_bytes
        self._memory: Bytes | None = np.empty(data_bytes, np.uint8)

    def upload(self, offset: int, source: Bytes) -> None:
        self._extent(offset, source.nbytes)[:] = source

    def download(self, offset: int, target: Bytes) -> None:
        target[:] = self._extent(offset, target.nbytes)

    def pin(self, host: Bytes, start: int, stop: int) -> int:
        return stop

    def close(self) -> None:
        self._memory = None

    def _extent(self, offset: int, length: int) -> Bytes:
        if self._memory is None:
            raise TierError("the device is closed")
        assert 0 <= offset <= self.data_bytes - length, (offset, length)
        return self._memory[offset : offset + length]
