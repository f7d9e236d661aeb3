"""A client of the data port that is nothing but a socket: tests say each byte themselves."""

from __future__ import annotations

import socket
import ssl
from types import TracebackType
from typing import Self

import numpy as np

from kvproto import frames
from kvproto.checksum import checksum
from kvproto.frames import Hello, Op, Place, Reply, Request, Status, Welcome
from kvproto.grid import Region

DEADLINE_S = 10.0


def sums_of(payload: bytes, cell_bytes: int) -> bytes:
    """The packed checksums of cells that follow each other."""
    starts = range(0, len(payload), cell_bytes)
    return np.array([checksum(payload[i : i + cell_bytes]) for i in starts], "<u8").tobytes()


class RawTcp:
    """One connection. Every wait ends after DEADLINE_S."""

    def __init__(self, address: str, *, tls: ssl.SSLContext | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._owed = b""
        self.sock = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
        if tls is not None:
            plain = self.sock
            try:
                self.sock = tls.wrap_socket(plain, server_hostname=host)
            except BaseException:
                plain.close()
                raise

    def hello(self, hello: Hello) -> Welcome:
        self.sock.sendall(frames.encode_hello(hello))
        return self.welcome()

    def welcome(self) -> Welcome:
        head = self.receive(frames.WELCOME_HEAD_BYTES)
        return frames.decode_welcome(head + self.receive(frames.welcome_text_bytes(head)))

    def begin_write(self, place: Place, region: Region, sums: bytes, *, tag: int = 0) -> None:
        """All that comes before the cells; `reply` sends the checksums, which come after them."""
        self.sock.sendall(frames.encode_request(Request(Op.WRITE, tag, place, region)))
        self._owed += sums

    def write(self, place: Place, region: Region, payload: bytes, *, tag: int = 0) -> Reply:
        self.begin_write(place, region, sums_of(payload, place.cell_bytes), tag=tag)
        self.sock.sendall(payload)
        return self.reply()

    def reply(self) -> Reply:
        owed, self._owed = self._owed, b""
        self.sock.sendall(owed)
        return frames.decode_reply(self.receive(frames.REPLY_BYTES))

    def begin_read(self, place: Place, region: Region, *, tag: int = 0) -> Reply:
        self.sock.sendall(frames.encode_request(Request(Op.READ, tag, place, region)))
        return self.reply()

    def read(self, place: Place, region: Region, *, tag: int = 0) -> tuple[Status, bytes, bytes]:
        """The status in the end, the trailer and the cells."""
        reply = self.begin_read(place, region, tag=tag)
        assert reply.tag == tag
        if reply.status is not Status.OK:
            assert reply.body_bytes == 0
            return reply.status, b"", b""
        trailer = self.receive(place.trailer_bytes)
        payload = self.receive(reply.body_bytes - len(trailer))
        after, status = frames.decode_after(self.receive(frames.AFTER_BYTES))
        assert after == tag
        return status, trailer, payload

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes; AssertionError when the server closes before."""
        raw = bytearray()
        while len(raw) < count:
            part = self.sock.recv(count - len(raw))
            assert part, f"closed after {len(raw)} of {count} bytes"
            raw += part
        return bytes(raw)

    def ended(self) -> bool:
        """Wait until the server closes; False when it sends something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
