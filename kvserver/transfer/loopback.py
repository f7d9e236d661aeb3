"""A transfer within one process: the arena is a NumPy buffer. Simulations and tests stand on it.

Rule 1: it copies for real; a reader and a writer of one extent see the same bytes as with `shm`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvserver.transfer.base import TransferError, check_extent


class LoopbackTransfer:
    """Reaches `buffer` (uint8, one axis, writable), known as `arena_id` (16 bytes)."""

    def __init__(self, buffer: npt.NDArray[np.uint8], *, arena_id: bytes) -> None:
        if buffer.ndim != 1 or buffer.dtype != np.uint8:
            raise TransferError(f"arena is {buffer.dtype}{buffer.shape}, must be flat uint8")
        self._buffer = buffer
        self._arena_id = arena_id

    @property
    def arena_id(self) -> bytes:
        return self._arena_id

    @property
    def data_bytes(self) -> int:
        return self._buffer.size

    def read(self, offset: int, into: memoryview) -> None:
        check_extent(offset, into.nbytes, self.data_bytes)
        target = np.frombuffer(into, dtype=np.uint8)
        np.copyto(target, self._buffer[offset : offset + target.size])

    def write(self, offset: int, data: memoryview) -> None:
        check_extent(offset, data.nbytes, self.data_bytes)
        source = np.frombuffer(data, dtype=np.uint8)
        np.copyto(self._buffer[offset : offset + source.size], source)
