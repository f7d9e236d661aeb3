"""The seam between the client and the ways bytes move: an arena that can be read and written.

An Arena belongs to one session with one server process (one epoch). Offsets and lengths are bytes
of the arena's data area, as the server's grants name them.

Rules:
 1. A view holds the mapping it comes from: it stays valid memory for as long as it lives, also
    after `close`.
 2. `close` gives no new views from then on. `drained` is true once no writable view is left:
    from then on nothing in this process can write the arena.
 3. `current` is asked before and after a copy; what is not current both times was not read, or
    must not be written.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.uint64]


class Arena(Protocol):
    """A mapped arena. `transport` and `address` say how it is reached."""

    transport: str
    address: str
    arena_id: bytes
    epoch: int
    data_bytes: int

    def alive(self) -> bool:
        """Whether the server process that this arena was opened with still owns it."""
        ...

    def current(self, offset: int, generation: int) -> bool:
        """Whether the slot at `offset` still is what was granted as `generation`."""
        ...

    def reading(self, offset: int, length: int) -> Bytes:
        """A read-only view. Gone after `close`; Unavailable outside the arena."""
        ...

    def writing(self, offset: int, length: int) -> Bytes:
        """A writable view. Unsupported when the arena was opened for reading only."""
        ...

    def close(self) -> None: ...

    @property
    def drained(self) -> bool: ...
