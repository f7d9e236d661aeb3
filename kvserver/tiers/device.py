"""The device tier: an arena whose memory the server reaches only by copying.

Rule 1: a copy has ended when the call returns; calls may come from any thread.
Rule 2: a device arena is volatile: it starts empty, and nothing of it is recovered.

`FakeDevice` keeps the arena in process memory. It makes real copies, so the third tier runs and
is tested on machines without a GPU.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvserver.tiers.errors import TierError

Bytes = npt.NDArray[np.uint8]


class DeviceArena(Protocol):
    """What the mover needs of a device. Offsets and lengths in bytes of its data area."""

    @property
    def name(self) -> str: ...

    @property
    def data_bytes(self) -> int: ...

    def upload(self, offset: int, source: Bytes) -> None:
        """Copy `source` (host memory) to `offset`. TierError when the device fails."""

    def download(self, offset: int, target: Bytes) -> None:
        """Fill `target` (host memory) from `offset`. TierError when the device fails."""

    def close(self) -> None:
        """Give the memory back; no copy may run or follow."""


class FakeDevice:
    """A device arena in process memory."""

    name = "memory"

    def __init__(self, data_bytes: int) -> None:
        self.data_bytes = data_bytes
        self._memory: Bytes | None = np.empty(data_bytes, np.uint8)

    def upload(self, offset: int, source: Bytes) -> None:
        self._extent(offset, source.nbytes)[:] = source

    def download(self, offset: int, target: Bytes) -> None:
        target[:] = self._extent(offset, target.nbytes)

    def close(self) -> None:
        self._memory = None

    def _extent(self, offset: int, length: int) -> Bytes:
        if self._memory is None:
            raise TierError("the device is closed")
        assert 0 <= offset <= self.data_bytes - length, (offset, length)
        return self._memory[offset : offset + length]
