"""The journal's record: what is decoded is what was encoded, or nothing."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserver.journal.record import DiskRecord, RecordError, decode, encode, encode_key

RECORD = DiskRecord(
    5 << 20, 2 << 20, 1 << 40, bytes(range(16)), bytes(range(32)), bytes(32), 128, 0xFEDC << 48
)
records = st.builds(
    DiskRecord,
    offset=st.integers(0, (1 << 64) - 1),
    slot_bytes=st.integers(0, (1 << 32) - 1).map(lambda units: units * 4096),
    generation=st.integers(0, (1 << 64) - 1),
    tag=st.binary(min_size=16, max_size=16),
    key=st.binary(min_size=32, max_size=32),
    parent=st.binary(min_size=32, max_size=32),
    tokens=st.integers(0, (1 << 32) - 1),
    root=st.integers(0, (1 << 64) - 1),
)


@given(records)
def test_a_record_reads_back(record: DiskRecord) -> None:
    key, value = encode(record)
    assert key == encode_key(record.offset)
    assert decode(key, value) == record


def test_keys_are_in_the_order_of_offsets() -> None:
    offsets = [0, 1, 255, 256, 1 << 20, 1 << 40, (1 << 64) - 1]
    assert sorted(map(encode_key, offsets)) == [encode_key(offset) for offset in offsets]


def test_no_flipped_bit_is_accepted() -> None:
    key, value = encode(RECORD)
    whole = key + value
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            decode(bytes(raw[: len(key)]), bytes(raw[len(key) :]))


def test_no_cut_or_lengthened_record_is_accepted() -> None:
    key, value = encode(RECORD)
    for cut in range(len(value)):
        with pytest.raises(RecordError):
            decode(key, value[:cut])
    with pytest.raises(RecordError):
        decode(key, value + b"\0")
    for cut in range(len(key)):
        with pytest.raises(RecordError):
            decode(key[:cut], value)


def test_a_record_of_another_format_is_named() -> None:
    key, value = encode(RECORD)
    body = value[:4] + struct.pack("<H", 2) + value[6:-4]
    other = body + struct.pack("<I", zlib.crc32(body, zlib.crc32(key)))
    with pytest.raises(RecordError, match="format b'kvjr' 2, not b'kvjr' 1"):
        decode(key, other)


@given(st.binary(max_size=16), st.binary(max_size=200))
def test_rubbish_is_refused(key: bytes, value: bytes) -> None:
    with pytest.raises(RecordError):
        decode(key, value)
