"""What the hub and its nixl worker say to each other, over a Unix stream socket.

    frame = u32 payload bytes | u8 kind | payload

    hub -> worker   setup (JSON, with the descriptors of the arena and of its directory's lock),
                    then ATTACH, DETACH, MOVE, STOP, PING, CLOSE
    worker -> hub   READY or REFUSED, then ATTACHED, ENDED, PONG, NOTE

A MOVE is answered by one ENDED, an ATTACH by one ATTACHED, a PING by one PONG, in any order.

Rule 1: what is malformed is a bug of ours, as both ends are one program: it is asserted.
Rule 2: an ENDED follows the last access to the slots and to the client's memory.
"""

from __future__ import annotations

import struct
from enum import IntEnum, auto
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

FRAME_BYTES_MAX = 256 << 20
SETUP_BYTES = 4096  # JSON, padded
_FRAME = struct.Struct("<IB")

Bytes = npt.NDArray[np.uint8]


class Kind(IntEnum):
    ATTACH = auto()
    DETACH = auto()
    MOVE = auto()
    STOP = auto()
    PING = auto()
    CLOSE = auto()
    READY = auto()
    REFUSED = auto()
    ATTACHED = auto()
    ENDED = auto()
    PONG = auto()
    NOTE = auto()


class Ended(IntEnum):
    """What became of an item."""

    OK = 0
    STALE = 1  # its slot is no longer what was granted
    FAILED = 2  # the transfer failed, was stopped, or the worker ended
    CORRUPT = 3  # what arrived is not what its checksums say


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    assert len(payload) <= FRAME_BYTES_MAX, len(payload)
    return _FRAME.pack(len(payload), kind) + payload


class Frames:
    """Cuts what a stream brings into frames."""

    def __init__(self) -> None:
        self._raw = bytearray()

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """Those that are whole now."""
        self._raw += data
        found, at = list[tuple[Kind, bytes]](), 0
        while len(self._raw) - at >= _FRAME.size:
            size, kind = _FRAME.unpack_from(self._raw, at)
            assert size <= FRAME_BYTES_MAX, size
            stop = at + _FRAME.size + size
            if len(self._raw) < stop:
                break
            found.append((Kind(kind), bytes(self._raw[at + _FRAME.size : stop])))
            at = stop
        del self._raw[:at]
        return found


class Attach(NamedTuple):
    ask: int
    client: int
    prefix: str  # what the name of the client's agent has to begin with
    metadata: bytes

    def encode(self) -> bytes:
        prefix = self.prefix.encode()
        return struct.pack("<QIH", self.ask, self.client, len(prefix)) + prefix + self.metadata

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        ask, client, length = struct.unpack_from("<QIH", raw)
        return cls(ask, client, raw[14 : 14 + length].decode(), raw[14 + length :])


class Attached(NamedTuple):
    ask: int
    reason: str  # empty: it is

    def encode(self) -> bytes:
        return struct.pack("<Q", self.ask) + self.reason.encode()

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        return cls(int.from_bytes(raw[:8], "little"), raw[8:].decode())


class Totals(NamedTuple):
    """Of a worker since its start."""

    bytes_read: int = 0
    bytes_written: int = 0
    posts: int = 0
    posts_failed: int = 0


class End(NamedTuple):
    """Of a Work: an Ended for each item."""

    number: int
    totals: Totals
    outcomes: Bytes

    def encode(self) -> bytes:
        return struct.pack("<5Q", self.number, *self.totals) + self.outcomes.tobytes()

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        number, *totals = struct.unpack_from("<5Q", raw)
        return cls(number, Totals(*totals), np.frombuffer(raw, np.uint8, offset=40))


def of_number(number: int) -> bytes:
    """The payload of DETACH (a client), STOP (a Work's number), PING and PONG."""
    return struct.pack("<Q", number)


def number_of(raw: bytes) -> int:
    return int.from_bytes(raw, "little")
