"""What the journal says of one disk slot: a pure codec.

The key is the slot's offset; the value says which block the slot holds, whole.

    key   = "s" | u64 offset, big-endian (so that a scan is in the order of the file)
    value = "kvjr" | u16 format | u16 0 | u32 tokens | u32 slot bytes / 4096 | u64 generation
            | u64 root | tag[16] | key[32] | parent[32] | u32 CRC-32 over key and value

Rule 1: the CRC covers the key too: a value under another slot's key does not count.
Rule 2: `decode` gives the record that was encoded or raises RecordError; it never gives another.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

FORMAT = 1
KEY_PREFIX = b"s"
SLOT_ALIGN = 4096
_KEY = struct.Struct(">cQ")
KEY_BYTES = _KEY.size
_VALUE = struct.Struct("<4sHHIIQQ16s32s32s")
_CRC = struct.Struct("<I")
_MAGIC = b"kvjr"


class RecordError(ValueError):
    """A record that does not count: damaged, of another format, or no record at all."""


class DiskRecord(NamedTuple):
    """A whole block in the slot file. Sizes and offsets in bytes of the data area."""

    offset: int
    slot_bytes: int
    generation: int
    tag: bytes
    key: bytes
    parent: bytes
    tokens: int
    root: int


def encode_key(offset: int) -> bytes:
    return _KEY.pack(KEY_PREFIX, offset)


def encode(record: DiskRecord) -> tuple[bytes, bytes]:
    """The journal's key and value for `record`."""
    assert record.slot_bytes % SLOT_ALIGN == 0, record.slot_bytes
    assert (len(record.tag), len(record.key), len(record.parent)) == (16, 32, 32), record
    key = encode_key(record.offset)
    value = _VALUE.pack(
        _MAGIC, FORMAT, 0, record.tokens, record.slot_bytes // SLOT_ALIGN, record.generation,
        record.root, record.tag, record.key, record.parent,
    )  # fmt: skip
    return key, value + _CRC.pack(zlib.crc32(value, zlib.crc32(key)))


def decode_key(key: bytes) -> int:
    """The slot's offset. The key is one that `encode_key` has made."""
    offset: int = _KEY.unpack(key)[1]
    return offset


def decode(key: bytes, value: bytes) -> DiskRecord:
    """The inverse of `encode`. RecordError says what is wrong."""
    if len(key) != _KEY.size or key[:1] != KEY_PREFIX:
        raise RecordError(f"key of {len(key)} bytes")
    if len(value) != _VALUE.size + _CRC.size:
        raise RecordError(f"value of {len(value)} bytes")
    magic, format_, _, tokens, units, generation, root, tag, block, parent = _VALUE.unpack_from(
        value
    )
    if magic != _MAGIC or format_ != FORMAT:
        raise RecordError(f"format {magic!r} {format_}, not {_MAGIC!r} {FORMAT}")
    if zlib.crc32(value[: _VALUE.size], zlib.crc32(key)) != _CRC.unpack_from(value, _VALUE.size)[0]:
        raise RecordError("CRC mismatch")
    offset: int = _KEY.unpack(key)[1]
    return DiskRecord(offset, units * SLOT_ALIGN, generation, tag, block, parent, tokens, root)
