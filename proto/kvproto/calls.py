"""Calls over the `shm` socket, byte for byte: what a client of the same host says without gRPC.

A connection begins with the handshake (`kvproto.handshake`, mode CALLS); frames follow, both ways:

    request = u32 body_bytes | u8 method | u8 0 | u16 0 | u64 call | u32 deadline_ms | u32 0
              | body                                                            (24 + n bytes)
    reply   = u32 body_bytes | u8 status | u8 last | u16 0 | u64 call | body    (16 + n bytes)

All integers are little-endian. The bodies are the messages of kvserver.v1, and a call means what it
means over gRPC. `call` is a number that the client chose and has no other call under; replies come
in any order. A unary call has one reply, with `last` 1; a stream has any number before it. `status`
is the number of a gRPC status. Unless it is 0, the reply is the last, and its body is a refusal:

    refusal = u16 kind_bytes | u16 field_bytes | u16 limit_bytes | kind | field | limit | message

Method 0, CANCEL, has no body: the call is ended and has no further reply, as at its deadline
(`deadline_ms` 0: it has none). For a call that has ended it is ignored.

Rule 1: pure; sockets belong to the two sides.
Rule 2: what no encoder here writes is a FrameError. Nothing on the connection can be trusted from
there on: the side that sees it closes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from kvproto.v1 import kvserver_pb2 as pb

REQUEST_BODY_BYTES_MAX = 8 << 20  # what is larger goes by gRPC
REPLY_BODY_BYTES_MAX = 16 << 20
CALLS_MAX = 256  # running at once on a connection
OK = 0
_REQUEST = struct.Struct("<IBBHQII")
_REPLY = struct.Struct("<IBBHQ")
_LENGTHS = struct.Struct("<HHH")
REQUEST_HEAD_BYTES = _REQUEST.size
REPLY_HEAD_BYTES = _REPLY.size
_TEXT_BYTES_MAX = 1024
_DEADLINE_MS_MAX = (1 << 32) - 1
_STATUS_MAX = 16  # the last status that gRPC has


class FrameError(ValueError):
    """The other side sent something that is no frame of this version."""


class Method(IntEnum):
    """What is called. The numbers are those on the wire, the names those of the Cache service."""

    CANCEL = 0
    LOOKUP = 1
    ANNOUNCE = 2
    RESERVE = 3
    COMMIT = 4
    ABORT = 5
    FENCE = 6
    ACQUIRE = 7
    RELEASE = 8

    @property
    def rpc(self) -> str:
        return self.name.capitalize()


MESSAGES: dict[Method, tuple[Any, Any]] = {
    method: (getattr(pb, f"{method.rpc}Request"), getattr(pb, f"{method.rpc}Reply"))
    for method in Method
    if method is not Method.CANCEL
}
BY_RPC = {method.rpc: method for method in MESSAGES}
STREAMING = frozenset({Method.ACQUIRE})


class Request(NamedTuple):
    method: Method
    call: int
    deadline_ms: int
    body: bytes


class Reply(NamedTuple):
    status: int
    last: bool
    call: int
    body: bytes


class Refusal(NamedTuple):
    """`kind`, `field`, `limit` are those of the gRPC trailers kv-kind, kv-field, kv-limit."""

    message: str
    kind: str = ""
    field: str = ""
    limit: str = ""


def encode_request(method: Method, call: int, deadline_ms: int, body: bytes) -> bytes:
    if len(body) > REQUEST_BODY_BYTES_MAX:
        raise FrameError(f"a request of {len(body)} bytes, at most {REQUEST_BODY_BYTES_MAX}")
    deadline_ms = min(deadline_ms, _DEADLINE_MS_MAX)
    return _REQUEST.pack(len(body), method, 0, 0, call, deadline_ms, 0) + body


def encode_cancel(call: int) -> bytes:
    return _REQUEST.pack(0, Method.CANCEL, 0, 0, call, 0, 0)


def encode_reply(call: int, body: bytes, *, last: bool) -> bytes:
    if len(body) > REPLY_BODY_BYTES_MAX:
        raise FrameError(f"a reply of {len(body)} bytes, at most {REPLY_BODY_BYTES_MAX}")
    return _REPLY.pack(len(body), OK, last, 0, call) + body


def encode_refusal(call: int, status: int, refusal: Refusal) -> bytes:
    message, *rest = (_cut(text) for text in refusal)
    body = _LENGTHS.pack(*map(len, rest)) + b"".join(rest) + message
    return _REPLY.pack(len(body), status, 1, 0, call) + body


def _cut(text: str) -> bytes:
    raw = text.encode()[:_TEXT_BYTES_MAX]
    return raw.decode(errors="ignore").encode()  # a cut must not split a character


def decode_refusal(body: bytes) -> Refusal:
    if len(body) < _LENGTHS.size:
        raise FrameError(f"a refusal of {len(body)} bytes")
    at, texts = _LENGTHS.size, []
    for length in _LENGTHS.unpack_from(body):
        texts.append(body[at : at + length])
        at += length
    if at > len(body):
        raise FrameError("a refusal whose texts are cut")
    try:
        return Refusal(body[at:].decode(), *(text.decode() for text in texts))
    except UnicodeDecodeError as error:
        raise FrameError("a refusal that is not UTF-8") from error


class _Splitter:
    """Bytes as they arrive, as frames. Holds at most one frame that is not whole yet."""

    def __init__(self, head: struct.Struct, body_bytes_max: int) -> None:
        self._head = head
        self._body_bytes_max = body_bytes_max
        self._held = bytearray()
        self._wanted = head.size  # bytes of `held` without which nothing more can be told

    def _split(self, data: bytes) -> Iterator[tuple[tuple[int, ...], bytes]]:
        """Each whole frame's fields behind its length, and its body."""
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return
            data = bytes(self._held)
            self._held.clear()
        at, size = 0, self._head.size
        while len(data) - at >= size:
            length, *fields = self._head.unpack_from(data, at)
            if length > self._body_bytes_max:
                raise FrameError(f"a frame of {length} bytes, at most {self._body_bytes_max}")
            end = at + size + length
            if end > len(data):
                self._wanted = end - at
                break
            yield tuple(fields), data[at + size : end]
            at = end
        else:
            self._wanted = size
        self._held += data[at:]


class RequestSplitter(_Splitter):
    """Requests out of what a client sends."""

    def __init__(self) -> None:
        super().__init__(_REQUEST, REQUEST_BODY_BYTES_MAX)

    def feed(self, data: bytes) -> Iterator[Request]:
        for (number, zero, zeros, call, deadline_ms, more_zeros), body in self._split(data):
            if number not in _METHODS or zero or zeros or more_zeros:
                raise FrameError(f"method {number} is unknown or reserved bytes are set")
            method = _METHODS[number]
            if method is Method.CANCEL and (body or deadline_ms):
                raise FrameError("a CANCEL with a body or a deadline")
            yield Request(method, call, deadline_ms, body)


class ReplySplitter(_Splitter):
    """Replies out of what a hub sends."""

    def __init__(self) -> None:
        super().__init__(_REPLY, REPLY_BODY_BYTES_MAX)

    def feed(self, data: bytes) -> Iterator[Reply]:
        for (status, last, zeros, call), body in self._split(data):
            if status > _STATUS_MAX or last > 1 or zeros or (status != OK and not last):
                raise FrameError(f"status {status}, last {last}, or reserved bytes are set")
            yield Reply(status, bool(last), call, body)


_METHODS = {int(method): method for method in Method}
