"""The memory of one client that the agent may be sent to: what it attached, by address.

Rule 1: pure. What a Move names is looked up here before anything is posted.
Rule 2: extents do not overlap, so that an address says of which kind of memory it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError
from kvproto.nixlib import Memory

EXTENTS_MAX = 1024
DEVICES_MAX = 1 << 16
COLUMNS = 4  # address, bytes, kind, device

Numbers = npt.NDArray[np.uint64]


class Extents:
    """Of rows [n, COLUMNS]. FieldError names what cannot be right."""

    def __init__(self, rows: Numbers) -> None:
        if not 0 < len(rows) <= EXTENTS_MAX:
            raise FieldError("extents", len(rows), f"1 to {EXTENTS_MAX} extents")
        if (rows[:, 2] >= len(Memory)).any() or (rows[:, 3] >= DEVICES_MAX).any():
            limit = f"memory of kind 0 to {len(Memory) - 1}, on a device below {DEVICES_MAX}"
            raise FieldError("extents", rows[:, 2:].max(axis=0).tolist(), limit)
        rows = rows[np.argsort(rows[:, 0])]
        self._starts, self._stops = rows[:, 0], rows[:, 0] + rows[:, 1]
        if (self._stops <= self._starts).any():
            raise FieldError("extents", "an extent", "one byte or more, below 2^64")
        if (self._stops[:-1] > self._starts[1:]).any():
            raise FieldError("extents", "two of them", "no overlap")
        self._kinds, self._devices = rows[:, 2], rows[:, 3]

    def kind_of(self, addresses: Numbers, sizes: Numbers) -> tuple[Memory, int]:
        """The memory and device of pieces of `sizes` bytes at `addresses`. FieldError unless each
        lies within one extent, and all in the same kind of memory.
        """
        at = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        stops = addresses + sizes
        if (at < 0).any() or (stops > self._stops[at]).any() or (stops < addresses).any():
            raise FieldError("addresses", "a piece", "within what the client attached")
        kinds, devices = self._kinds[at], self._devices[at]
        if (kinds != kinds.flat[0]).any() or (devices != devices.flat[0]).any():
            raise FieldError("addresses", "pieces", "in memory of one kind and device")
        return Memory.of(int(kinds.flat[0])), int(devices.flat[0])
