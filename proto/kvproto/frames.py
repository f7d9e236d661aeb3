"""The framing of the `tcp` transport, byte for byte.

A client opens connections to the data port, says hello once on each, and then sends requests; the
server answers them in order. Requests may be pipelined. All integers are little-endian.

    hello   = 'kvtc' | u16 version | u16 zero | u64 session | u32 client | u32 zero | token[16]
    welcome = 'kvtw' | u16 version | u16 status | u64 epoch | arena_id[16] | u16 text_bytes
              | 6 zero bytes | text                                               (40 + n bytes)

    request = u32 op | u32 tag | u64 hold | u64 offset | u64 generation | u64 cell_bytes
              | u32 layers | u32 heads | granted 4 x u32 | region 4 x u32 | permit[16]  (96 bytes)
              WRITE is followed by the cells, then by cells(region) x u64 checksums
    reply   = u32 op | u32 tag | u32 status | u32 zero | u64 body_bytes                 (24 bytes)
              then body; a READ that is OK carries the slot's whole trailer (layers * heads x u64),
              then the cells, and behind them
    after   = u32 tag | u32 status                                                       (8 bytes)

A region is layer_start, layer_stop, head_start, head_stop; its cells follow each other in
layer-major order, `cell_bytes` each, without gaps. `tag` is the client's and comes back unchanged.
`hold` is the reservation (WRITE) or the lease (READ) that `permit` was given for, `granted` its
region; `layers` and `heads` are the whole grid's, `cell_bytes` is that of the block's tokens. With
them the server finds every byte without knowing a namespace.

Rule 1: pure; sockets belong to the two sides.
Rule 2: a decoder accepts exactly what its encoder writes, and raises FrameError otherwise. What
follows a broken frame cannot be understood: the connection ends.
Rule 3: every length follows from the head: a receiver knows what comes before it takes any of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from kvproto.grid import CELLS_MAX, CHECKSUM_BYTES, HEADS_MAX, LAYERS_MAX, Region

VERSION = 1
TOKEN_BYTES = 16
PERMIT_BYTES = 16
ARENA_ID_BYTES = 16
TEXT_BYTES_MAX = 512
_HELLO = struct.Struct("<4sHHQII16s")
_WELCOME = struct.Struct("<4sHHQ16sH6x")
_REQUEST = struct.Struct("<IIQQQQII4I4I16s")
_REPLY = struct.Struct("<IIIIQ")
_AFTER = struct.Struct("<II")
HELLO_BYTES = _HELLO.size
WELCOME_HEAD_BYTES = _WELCOME.size
REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size
AFTER_BYTES = _AFTER.size
_HELLO_MAGIC = b"kvtc"
_WELCOME_MAGIC = b"kvtw"


class FrameError(ValueError):
    """The other side sent something that is no frame of this version."""


class Op(IntEnum):
    WRITE = 1
    READ = 2


class HelloStatus(IntEnum):
    OK = 0
    BAD_REQUEST = 1  # not this protocol, or not this version of it
    REFUSED = 2  # unknown session, client or token
    BUSY = 3  # too many connections; try again
    FAILED = 4  # the server could not do its part


class Status(IntEnum):
    """What became of a request. DENIED and BAD end the connection."""

    OK = 0
    STALE = 1  # the slot is no longer what was granted: nothing was written, nothing read counts
    CORRUPT = 2  # what arrived does not match its checksums; write it again
    DENIED = 3  # the permit is not ours
    BAD = 4  # the head cannot be right


@dataclass(frozen=True, slots=True)
class Hello:
    session: int
    client: int
    token: bytes  # 16 bytes, from HelloReply


@dataclass(frozen=True, slots=True)
class Welcome:
    status: HelloStatus
    text: str = ""
    epoch: int = 0
    arena_id: bytes = bytes(ARENA_ID_BYTES)


@dataclass(frozen=True, slots=True)
class Place:
    """A granted slot, as Reserve or Acquire told it, and the permit that came with it.

    `offset` counts bytes from the start of the arena's data.
    """

    hold: int
    offset: int
    generation: int
    cell_bytes: int
    layers: int
    heads: int
    granted: Region
    permit: bytes = bytes(PERMIT_BYTES)

    @property
    def trailer_bytes(self) -> int:
        return self.layers * self.heads * CHECKSUM_BYTES

    @property
    def payload_bytes(self) -> int:
        return self.layers * self.heads * self.cell_bytes

    def sealed(self, op: Op, client: int) -> bytes:
        """The bytes that a permit vouches for: everything but the region of one request."""
        return _REQUEST.pack(
            op, client, self.hold, self.offset, self.generation, self.cell_bytes,
            self.layers, self.heads, *_numbers(self.granted), 0, 0, 0, 0, bytes(PERMIT_BYTES),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    op: Op
    tag: int
    place: Place
    region: Region

    @property
    def payload_bytes(self) -> int:
        return self.region.cells * self.place.cell_bytes

    @property
    def body_bytes(self) -> int:
        """What follows the head on its way to the server."""
        if self.op is Op.READ:
            return 0
        return self.region.cells * CHECKSUM_BYTES + self.payload_bytes

    @property
    def answer_bytes(self) -> int:
        """The body of the answer, when it is OK."""
        return self.place.trailer_bytes + self.payload_bytes if self.op is Op.READ else 0


@dataclass(frozen=True, slots=True)
class Reply:
    op: Op
    tag: int
    status: Status
    body_bytes: int = 0


# ---- greeting ----------------------------------------------------------------------------------


def encode_hello(hello: Hello) -> bytes:
    if len(hello.token) != TOKEN_BYTES:
        raise FrameError(f"token has {len(hello.token)} bytes, must have {TOKEN_BYTES}")
    return _HELLO.pack(_HELLO_MAGIC, VERSION, 0, hello.session, hello.client, 0, hello.token)


def decode_hello(raw: bytes) -> Hello:
    if len(raw) != HELLO_BYTES:
        raise FrameError(f"hello has {len(raw)} bytes, must have {HELLO_BYTES}")
    magic, version, zero, session, client, zeros, token = _HELLO.unpack(raw)
    if magic != _HELLO_MAGIC:
        raise FrameError("not a kvserver tcp hello")
    if version != VERSION:
        raise FrameError(f"framing version {version}, this side speaks {VERSION}")
    if zero or zeros:
        raise FrameError("reserved bytes are set")
    return Hello(session, client, token)


def encode_welcome(welcome: Welcome) -> bytes:
    text = welcome.text.encode()[:TEXT_BYTES_MAX]
    text = text.decode(errors="ignore").encode()  # a cut must not split a character
    status, epoch = welcome.status, welcome.epoch
    head = _WELCOME.pack(_WELCOME_MAGIC, VERSION, status, epoch, welcome.arena_id, len(text))
    return head + text


def welcome_text_bytes(head: bytes) -> int:
    """Length of the text behind a welcome's head (WELCOME_HEAD_BYTES long)."""
    magic, version, *_rest, text_bytes = _WELCOME.unpack(head)
    if magic != _WELCOME_MAGIC:
        raise FrameError("not a welcome of a kvserver")
    if version != VERSION:
        raise FrameError(f"framing version {version}, this side speaks {VERSION}")
    if text_bytes > TEXT_BYTES_MAX:
        raise FrameError(f"text of {text_bytes} bytes, at most {TEXT_BYTES_MAX}")
    return int(text_bytes)


def decode_welcome(raw: bytes) -> Welcome:
    head = raw[:WELCOME_HEAD_BYTES]
    if len(head) < WELCOME_HEAD_BYTES or len(raw) != len(head) + welcome_text_bytes(head):
        raise FrameError(f"welcome of {len(raw)} bytes is cut or too long")
    _, _, status, epoch, arena_id, _ = _WELCOME.unpack(head)
    if status not in {int(known) for known in HelloStatus}:
        raise FrameError(f"unknown status {status}")
    if head[-6:] != bytes(6):
        raise FrameError("reserved bytes are set")
    try:
        text = raw[WELCOME_HEAD_BYTES:].decode()
    except UnicodeDecodeError as error:
        raise FrameError("text is not UTF-8") from error
    return Welcome(HelloStatus(status), text, epoch, arena_id)


# ---- requests ----------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    place = request.place
    return _REQUEST.pack(
        request.op, request.tag, place.hold, place.offset, place.generation, place.cell_bytes,
        place.layers, place.heads, *_numbers(place.granted), *_numbers(request.region),
        place.permit,
    )  # fmt: skip


def decode_request(raw: bytes) -> Request:
    if len(raw) != REQUEST_BYTES:
        raise FrameError(f"request has {len(raw)} bytes, must have {REQUEST_BYTES}")
    op, tag, hold, offset, generation, cell_bytes, layers, heads, *rest = _REQUEST.unpack(raw)
    if op not in (Op.WRITE, Op.READ):
        raise FrameError(f"op {op} is unknown")
    if not 1 <= layers <= LAYERS_MAX or not 1 <= heads <= HEADS_MAX or layers * heads > CELLS_MAX:
        raise FrameError(f"a grid of {layers} x {heads} cells, at most {CELLS_MAX}")
    if not 1 <= cell_bytes < 1 << 40:
        raise FrameError(f"cells of {cell_bytes} bytes")
    granted, region = Region(*rest[:4]), Region(*rest[4:8])
    for name, one in (("granted region", granted), ("region", region)):
        if not (
            one.layer_start < one.layer_stop <= layers and one.head_start < one.head_stop <= heads
        ):
            raise FrameError(f"{name} {one} outside the grid of {layers} x {heads}")
    if not granted.contains(region):
        raise FrameError(f"region {region} outside what was granted, {granted}")
    place = Place(hold, offset, generation, cell_bytes, layers, heads, granted, rest[8])
    return Request(Op(op), tag, place, region)


# ---- replies -----------------------------------------------------------------------------------


def encode_reply(reply: Reply) -> bytes:
    return _REPLY.pack(reply.op, reply.tag, reply.status, 0, reply.body_bytes)


def decode_reply(raw: bytes) -> Reply:
    if len(raw) != REPLY_BYTES:
        raise FrameError(f"reply has {len(raw)} bytes, must have {REPLY_BYTES}")
    op, tag, status, zero, body_bytes = _REPLY.unpack(raw)
    if op not in (Op.WRITE, Op.READ) or zero:
        raise FrameError(f"op {op} is unknown or reserved bytes are set")
    return Reply(Op(op), tag, _status(status), body_bytes)


def encode_after(tag: int, status: Status) -> bytes:
    return _AFTER.pack(tag, status)


def decode_after(raw: bytes) -> tuple[int, Status]:
    if len(raw) != AFTER_BYTES:
        raise FrameError(f"end of an answer has {len(raw)} bytes, must have {AFTER_BYTES}")
    tag, status = _AFTER.unpack(raw)
    return tag, _status(status)


def _status(number: int) -> Status:
    if number not in {int(known) for known in Status}:
        raise FrameError(f"unknown status {number}")
    return Status(number)


def _numbers(region: Region) -> tuple[int, int, int, int]:
    return region.layer_start, region.layer_stop, region.head_start, region.head_stop
