"""The seam between the server and the ways bytes move: two small protocols.

`Transfer` moves bytes between an arena and memory of its caller. It knows arena, offset and
length, nothing else: no blocks, leases or namespaces. So a data worker can be a thread of the
server, a process that maps the arena, or the far end of a socket.

`Endpoint` is what clients find: it is offered in HelloReply and lives as long as the server.

Rules:
 1. A transfer that returns has moved every byte; one that raises may have moved any part.
 2. Bounds are checked here, on every call; a caller's arithmetic is never trusted.
 3. A TransferError says nothing about when the bytes stop moving unless `terminal` is true: what
    a non-terminal error touched stays quarantined (DESIGN 5).
"""

from __future__ import annotations

from typing import Protocol


class TransferError(Exception):
    """A transfer failed. `terminal`: nothing will touch the bytes any more."""

    def __init__(self, message: str, *, terminal: bool = True) -> None:
        self.terminal = terminal
        super().__init__(message)


class Transfer(Protocol):
    """Moves bytes of one arena. Offsets and lengths in bytes of the arena's data area."""

    @property
    def arena_id(self) -> bytes:
        """16 bytes: which arena this reaches."""
        ...

    @property
    def data_bytes(self) -> int:
        """Size of the arena's data area."""
        ...

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` (writable, contiguous bytes) from the arena at `offset`."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Copy `data` (contiguous bytes) to the arena at `offset`."""
        ...


class Endpoint(Protocol):
    """A transport on offer: `name` and `address` are what HelloReply tells the client."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...


def check_extent(offset: int, length: int, data_bytes: int) -> None:
    """TransferError unless [offset, offset + length) lies in an arena of `data_bytes`."""
    if offset < 0 or length < 0 or offset + length > data_bytes:
        raise TransferError(f"extent {offset}+{length} outside the arena's {data_bytes} bytes")
