"""The handshake of the `shm` transport, byte for byte.

One request a connection of a Unix stream socket, then one answer. Then the server closes, unless
the connection is for calls (mode CALLS), whose frames follow (`kvproto.calls`):

    request  = 'kvsh' | u16 version | u8 mode | u8 zero | u64 session | u32 client | u32 zero
               | token[16]                                                      (40 bytes)
    answer   = 'kvsr' | u16 version | u16 status | u64 epoch | u64 file_bytes | u64 table_offset
               | u64 data_offset | u64 data_bytes | arena_id[16] | u16 text_bytes | 6 zero bytes
               | text                                                           (72 + n bytes)

All integers are little-endian. With status OK the answer carries file descriptors (SCM_RIGHTS):
mode WRITE gets [liveness file, arena opened O_RDWR], mode READ gets [arena opened O_RDONLY], mode
CALLS none.
`text` says in words why a request was refused; it is empty with OK.

Rule 1: pure; sockets and descriptors belong to the two sides.
Rule 2: a decoder accepts exactly what its encoder writes, and raises HandshakeError otherwise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

VERSION = 1
TOKEN_BYTES = 16
ARENA_ID_BYTES = 16
TEXT_BYTES_MAX = 512
_REQUEST = struct.Struct("<4sHBBQII16s")
_ANSWER = struct.Struct("<4sHHQQQQQ16sH6x")
REQUEST_BYTES = _REQUEST.size
ANSWER_HEAD_BYTES = _ANSWER.size
ANSWER_BYTES_MAX = ANSWER_HEAD_BYTES + TEXT_BYTES_MAX
_REQUEST_MAGIC = b"kvsh"
_ANSWER_MAGIC = b"kvsr"


class HandshakeError(ValueError):
    """The other side sent something that is no handshake of this version."""


class Mode(IntEnum):
    """What the connection is for. The numbers are those on the wire."""

    READ = 0
    WRITE = 1
    CALLS = 2


class Status(IntEnum):
    OK = 0
    BAD_REQUEST = 1  # not this protocol, or not this version of it
    REFUSED = 2  # unknown session, client or token
    BUSY = 3  # too many connections at once; try again
    MAPPED = 4  # this client already holds a writable mapping
    FAILED = 5  # the server could not open what it should pass


@dataclass(frozen=True, slots=True)
class Request:
    mode: Mode
    session: int
    client: int
    token: bytes  # 16 bytes, from HelloReply


@dataclass(frozen=True, slots=True)
class Answer:
    """Offsets and sizes are bytes in the arena file; zero unless `status` is OK."""

    status: Status
    text: str = ""
    epoch: int = 0
    file_bytes: int = 0
    table_offset: int = 0
    data_offset: int = 0
    data_bytes: int = 0
    arena_id: bytes = bytes(ARENA_ID_BYTES)


def encode_request(request: Request) -> bytes:
    if len(request.token) != TOKEN_BYTES:
        raise HandshakeError(f"token has {len(request.token)} bytes, must have {TOKEN_BYTES}")
    return _REQUEST.pack(
        _REQUEST_MAGIC, VERSION, request.mode, 0, request.session, request.client, 0, request.token
    )


def decode_request(raw: bytes) -> Request:
    if len(raw) != REQUEST_BYTES:
        raise HandshakeError(f"request has {len(raw)} bytes, must have {REQUEST_BYTES}")
    magic, version, mode, zero, session, client, zeros, token = _REQUEST.unpack(raw)
    if magic != _REQUEST_MAGIC:
        raise HandshakeError("not a kvserver shm handshake")
    if version != VERSION:
        raise HandshakeError(f"handshake version {version}, this side speaks {VERSION}")
    if mode not in {int(known) for known in Mode} or zero or zeros:
        raise HandshakeError(f"mode {mode} is unknown or reserved bytes are set")
    return Request(Mode(mode), session, client, token)


def encode_answer(answer: Answer) -> bytes:
    text = answer.text.encode()[:TEXT_BYTES_MAX]
    text = text.decode(errors="ignore").encode()  # a cut must not split a character
    head = _ANSWER.pack(
        _ANSWER_MAGIC,
        VERSION,
        answer.status,
        answer.epoch,
        answer.file_bytes,
        answer.table_offset,
        answer.data_offset,
        answer.data_bytes,
        answer.arena_id,
        len(text),
    )
    return head + text


def answer_bytes(head: bytes) -> int:
    """Length of the whole answer that begins with `head` (ANSWER_HEAD_BYTES long)."""
    magic, version, *_rest, text_bytes = _ANSWER.unpack(head)
    if magic != _ANSWER_MAGIC:
        raise HandshakeError("not an answer of a kvserver")
    if version != VERSION:
        raise HandshakeError(f"handshake version {version}, this side speaks {VERSION}")
    if text_bytes > TEXT_BYTES_MAX:
        raise HandshakeError(f"text of {text_bytes} bytes, at most {TEXT_BYTES_MAX}")
    return ANSWER_HEAD_BYTES + int(text_bytes)


def decode_answer(raw: bytes) -> Answer:
    if len(raw) < ANSWER_HEAD_BYTES or len(raw) != answer_bytes(raw[:ANSWER_HEAD_BYTES]):
        raise HandshakeError(f"answer of {len(raw)} bytes is cut or too long")
    (_, _, status, epoch, file_bytes, table_offset, data_offset, data_bytes, arena_id, _) = (
        _ANSWER.unpack(raw[:ANSWER_HEAD_BYTES])
    )
    if status not in {int(known) for known in Status}:
        raise HandshakeError(f"unknown status {status}")
    if raw[ANSWER_HEAD_BYTES - 6 : ANSWER_HEAD_BYTES] != bytes(6):
        raise HandshakeError("reserved bytes are set")
    try:
        text = raw[ANSWER_HEAD_BYTES:].decode()
    except UnicodeDecodeError as error:
        raise HandshakeError("text is not UTF-8") from error
    return Answer(
        status=Status(status),
        text=text,
        epoch=epoch,
        file_bytes=file_bytes,
        table_offset=table_offset,
        data_offset=data_offset,
        data_bytes=data_bytes,
        arena_id=arena_id,
    )
