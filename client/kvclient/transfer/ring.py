"""The staging ring of the `nixl` transport: memory that the hub reads and writes.

The hub initiates every transfer, so a hub that was stopped in the middle may write here long after
its call failed. Therefore nothing of the caller's is ever handed to it, only extents of this ring,
and an extent is used again when the hub has said that nothing of its move runs, and not before.

    FREE --take--> TAKEN --give_back--> FREE
                     \\--withhold(number)--> WITHHELD --settled(number)--> FREE

Rule 1: only this module changes an extent's state.
Rule 2: no deadline frees a WITHHELD extent. The ring's memory outlives every one of them: see
`Orphans`.

What is proof that a server process can write no more:

  * its own answer, to Move or to Settle, that the move is terminal;
  * a server with the same arena id and a later epoch. It holds the lock of the arena's directory,
    which the old process held from before its first transfer until its agent was destroyed, or it
    died. Another epoch of another arena id proves nothing: a stopped process keeps its lock, and a
    server with another directory may answer at its address.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvclient.errors import Unavailable
from kvclient.transfer.base import Bytes

EXTENTS = 8
STAGING_BYTES = 128 << 20
STAGING_BYTES_MIN = 1 << 20
STAGING_BYTES_MAX = 16 << 30
ORPHANED_BYTES_MAX = 512 << 20
_ALIGN = 4096


class Ring:
    """EXTENTS extents of equal size. On one event loop."""

    def __init__(self, staging_bytes: int) -> None:
        self.extent_bytes = staging_bytes // EXTENTS // _ALIGN * _ALIGN
        memory = mmap.mmap(-1, self.extent_bytes * EXTENTS)
        memory.madvise(mmap.MADV_DONTFORK)  # a child's copy would be another memory
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)  # what pins and copies goes by pages
        self.bytes: Bytes = np.frombuffer(memory, np.uint8)
        self._free = deque(range(EXTENTS))
        self._taken: set[int] = set()
        self._withheld: dict[int, int] = {}  # extent -> number of its move
        self._waiting: deque[asyncio.Future[int]] = deque()

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def prefault(self) -> None:
        """Fresh memory costs several times the copy into it."""
        self.bytes[::_ALIGN] = 0

    def view(self, extent: int) -> Bytes:
        return self.bytes[extent * self.extent_bytes : (extent + 1) * self.extent_bytes]

    def address_of(self, extent: int) -> int:
        return self.address + extent * self.extent_bytes

    @property
    def taken(self) -> int:
        return len(self._taken)

    @property
    def used_bytes(self) -> int:
        """Of extents that are taken or withheld."""
        return self.extent_bytes * (len(self._taken) + len(self._withheld))

    @property
    def own_bytes(self) -> int:
        return self.bytes.nbytes

    @property
    def busy(self) -> bool:
        return bool(self._taken or self._withheld)

    @property
    def withheld(self) -> list[int]:
        """Numbers of the moves that extents are withheld for."""
        return list(dict.fromkeys(self._withheld.values()))

    async def take(self, limit_s: float) -> int:
        """An extent, FREE until now. Unavailable when none comes free in time."""
        if self._free:
            extent = self._free.popleft()
            self._taken.add(extent)
            return extent
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            async with asyncio.timeout(limit_s):
                return await future
        except BaseException as error:
            if future.done() and not future.cancelled():
                self.give_back(future.result())
            if isinstance(error, TimeoutError):
                text = f"no staging came free in {limit_s:g} s; of {EXTENTS} extents, "
                text += f"{len(self._withheld)} are withheld until the hub settles them"
                raise Unavailable(text) from error
            raise

    def give_back(self, extent: int) -> None:
        """Nobody writes or reads it any more."""
        self._taken.remove(extent)
        self._freed(extent)

    def withhold(self, extent: int, number: int) -> None:
        """Somebody may still write or read it, for the move of this number."""
        self._taken.remove(extent)
        self._withheld[extent] = number

    def settled(self, number: int) -> None:
        """Nothing of this move runs, for certain."""
        for extent in [e for e, n in self._withheld.items() if n == number]:
            del self._withheld[extent]
            self._freed(extent)

    def proven(self) -> None:
        """The hub process is gone, and every move with it."""
        for number in self.withheld:
            self.settled(number)

    def _freed(self, extent: int) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                self._taken.add(extent)
                future.set_result(extent)
                return
        self._free.append(extent)

    def validate(self) -> None:
        """The books: each extent is in exactly one state."""
        known = [*self._free, *self._taken, *self._withheld]
        assert sorted(known) == list(range(EXTENTS)), known


class Held(Protocol):
    """Memory that a hub may still touch: a Ring, or `kvclient.transfer.direct.Holds`."""

    @property
    def own_bytes(self) -> int:
        """What this client made for it."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any move of it may still run."""
        ...

    @property
    def withheld(self) -> list[int]:
        """Moves that failed, and which the hub can be asked about."""
        ...

    def settled(self, number: int) -> None: ...

    def proven(self) -> None: ...


@dataclass(eq=False, slots=True)
class Orphan:
    """Memory whose session is over while moves of it may still run."""

    held: Held
    arena_id: bytes
    epoch: int
    client: int
    key: bytes


@dataclass(slots=True)
class Orphans:
    """Memory that may still be touched, kept alive until that is disproved. One per process."""

    kept: list[Orphan] = field(default_factory=list)

    @property
    def bytes_total(self) -> int:
        return sum(orphan.held.own_bytes for orphan in self.kept)

    def add(self, orphan: Orphan) -> None:
        self.kept.append(orphan)

    def meet(self, arena_id: bytes, epoch: int) -> list[Orphan]:
        """Free what this server proves to be over; what it can be asked about."""
        for orphan in list(self.kept):
            if orphan.arena_id == arena_id and orphan.epoch < epoch:
                orphan.held.proven()
                self.kept.remove(orphan)
        return [o for o in self.kept if (o.arena_id, o.epoch) == (arena_id, epoch)]

    def drop(self, orphan: Orphan) -> None:
        if orphan in self.kept:
            self.kept.remove(orphan)

    def check(self) -> None:
        """Unavailable when so much is withheld that another ring may not be made."""
        if self.bytes_total >= ORPHANED_BYTES_MAX:
            raise Unavailable(
                f"{self.bytes_total} bytes of staging may still be written by hubs that did not"
                f" answer, at most {ORPHANED_BYTES_MAX}: restart this process"
            )


orphans = Orphans()
