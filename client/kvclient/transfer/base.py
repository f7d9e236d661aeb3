"""The seam between the client and the ways bytes move.

A Transfer belongs to one session with one server process (one epoch). It moves cells between the
caller's memory and granted slots: `put` for a reservation's, `get` for a lease's. An Arena is a
Transfer whose slots this process can see: it maps the memory they stand in.

Offsets and lengths are bytes of the arena's data area, as the server's grants name them.

Rules:
 1. `put` and `get` return when nothing of ours moves those bytes any more, also when they were
    cancelled. The exception is registered memory: when they are cancelled or raise, a hub may still
    move that; it is pinned until the hub is known to be done (`kvclient.transfer.direct`). What did
    not arrive is marked in the work, not raised; Unavailable and Unsupported are raised only for a
    transfer that cannot move anything.
 2. `drained` is true when nothing that this process began can still write the arena. Where
    somebody else writes it for us (a remote hub), only an answer of theirs says so.
 3. A view of an Arena holds the mapping it comes from: it stays valid memory for as long as it
    lives, also after `close`. `close` gives no new views from then on.
 4. `current` of an Arena is asked before and after a copy; what is not current both times was not
    read, or must not be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvclient.copying import Copier, Reading, Writing
    from kvclient.timing import Deadline

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.uint64]


class Transfer(Protocol):
    """`transport` and `address` say how the hub's memory is reached."""

    transport: str
    address: str
    arena_id: bytes
    epoch: int

    @property
    def mapped(self) -> bool:
        """Whether this is an Arena."""
        ...

    @property
    def direct(self) -> bool:
        """Whether registered memory is moved without staging."""
        ...

    @property
    def follows(self) -> bool:
        """Whether a push may begin a window's put while the one before runs, and gains by it."""
        ...

    @property
    def staging_bytes(self) -> int:
        """Of memory of its own, between the caller's and the arena, what is in use now."""
        ...

    def alive(self) -> bool:
        """False once the server process that this was opened with is known to be gone."""
        ...

    async def put(self, work: Writing, copier: Copier) -> None:
        """Move `work.sources` into its slots: fills `sums`, marks `stale`."""
        ...

    async def get(self, work: Reading, copier: Copier) -> None:
        """Move slots into `work.targets`, checked: fills `outcomes`."""
        ...

    async def attach(self, deadline: Deadline) -> None:
        """Register anew what the caller has registered, if this is `direct`."""
        ...

    def close(self) -> None: ...

    @property
    def drained(self) -> bool: ...


class Arena(Transfer, Protocol):
    """A mapped arena."""

    data_bytes: int

    @property
    def mapped(self) -> Literal[True]: ...

    def current(self, offset: int, generation: int) -> bool:
        """Whether the slot at `offset` still is what was granted as `generation`."""
        ...

    def reading(self, offset: int, length: int) -> Bytes:
        """A read-only view. Gone after `close`; Unavailable outside the arena."""
        ...

    def writing(self, offset: int, length: int) -> Bytes:
        """A writable view. Unsupported when the arena was opened for reading only."""
        ...
