"""Memory that is registered once, out of which the arrays of a test come.

Clients of the way `nixl-direct` register `HEAP.memory`; from then on `Blocks` makes its arrays of
it, so that the same tests move them without staging. An extent is free again when nothing refers to
the array, or a view of it, any more.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import numpy as np
import numpy.typing as npt

from kvclient.staging import ALIGN_BYTES, aligned

Bytes = npt.NDArray[np.uint8]
HEAP_BYTES = 512 << 20  # touched only where it is used


class Heap:
    def __init__(self) -> None:
        self._memory: Bytes | None = None
        self._free: list[tuple[int, int]] = []  # start, stop; in order

    @property
    def memory(self) -> Bytes:
        if self._memory is None:
            self._memory = np.frombuffer(mmap.mmap(-1, HEAP_BYTES), np.uint8)
            self._free = [(0, HEAP_BYTES)]
        return self._memory

    def array(self, shape: tuple[int, ...]) -> Bytes:
        """uint8, with whatever stood there; of ordinary memory while nobody has registered this."""
        size = int(np.prod(shape))
        room = -(-size // ALIGN_BYTES) * ALIGN_BYTES
        for at, (start, stop) in enumerate(self._free):
            if stop - start >= room > 0:
                self._free[at] = (start + room, stop)
                holder = (ctypes.c_uint8 * size).from_address(self.memory.ctypes.data + start)
                weakref.finalize(holder, self._give_back, start, start + room)
                return np.frombuffer(holder, np.uint8).reshape(shape)
        return aligned(size).reshape(shape)

    def _give_back(self, start: int, stop: int) -> None:
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self._free, (start, stop)]):
            if low == high:
                continue
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged


HEAP = Heap()
