"""The byte layouts that docs/protocol.md tells: handshake, arena header and entry, checksums.

Each is taken apart here by the offsets of that document, not by the structs of the code.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvproto import arena, checksum, handshake
from kvproto.arena import ArenaHeader, ArenaReader
from kvproto.errors import FieldError
from kvproto.handshake import Answer, HandshakeError, Mode, Request, Status
from kvserver.tiers.entry import ReservedEntry, ValidEntry, encode_reserved, encode_valid

u32s = st.integers(0, (1 << 32) - 1)
u64s = st.integers(0, (1 << 64) - 1)
ids = st.binary(min_size=16, max_size=16)
requests = st.builds(Request, mode=st.sampled_from(Mode), session=u64s, client=u32s, token=ids)
answers = st.builds(
    Answer,
    status=st.sampled_from(Status),
    text=st.text(st.characters(codec="utf-8"), max_size=100),
    epoch=u64s,
    file_bytes=u64s,
    table_offset=u64s,
    data_offset=u64s,
    data_bytes=u64s,
    arena_id=ids,
)


def _u(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little")


# ---- handshake ---------------------------------------------------------------------------------


@given(requests)
def test_request_is_as_documented(request: Request) -> None:
    raw = handshake.encode_request(request)
    assert len(raw) == 40
    assert (raw[:4], _u(raw, 4, 2), raw[6], raw[7]) == (b"kvsh", 1, request.mode, 0)
    assert (_u(raw, 8, 8), _u(raw, 16, 4)) == (request.session, request.client)
    assert (raw[20:24], raw[24:40]) == (bytes(4), request.token)
    assert handshake.decode_request(raw) == request


@given(answers)
def test_answer_is_as_documented(answer: Answer) -> None:
    raw = handshake.encode_answer(answer)
    text = answer.text.encode()
    assert len(raw) == 72 + len(text)
    assert (raw[:4], _u(raw, 4, 2), _u(raw, 6, 2)) == (b"kvsr", 1, answer.status)
    numbers = [_u(raw, at, 8) for at in range(8, 48, 8)]
    assert numbers == [
        answer.epoch,
        answer.file_bytes,
        answer.table_offset,
        answer.data_offset,
        answer.data_bytes,
    ]
    assert (raw[48:64], _u(raw, 64, 2)) == (answer.arena_id, len(text))
    assert (raw[66:72], raw[72:]) == (bytes(6), text)
    assert handshake.decode_answer(raw) == answer


@given(requests, st.integers(0, 39), st.integers(1, 255))
def test_a_damaged_request_is_refused_or_another(request: Request, at: int, flip: int) -> None:
    raw = bytearray(handshake.encode_request(request))
    raw[at] ^= flip
    try:
        assert handshake.encode_request(handshake.decode_request(bytes(raw))) == bytes(raw)
    except HandshakeError:
        assert at < 8 or 20 <= at < 24, "magic, version, mode or a zero"


@given(st.binary(max_size=120))
def test_noise_is_no_handshake(noise: bytes) -> None:
    with pytest.raises(HandshakeError):
        handshake.decode_request(noise)
    with pytest.raises(HandshakeError):
        handshake.decode_answer(noise)


@given(answers, st.integers(1, 60))
def test_a_cut_or_lengthened_answer_is_refused(answer: Answer, count: int) -> None:
    raw = handshake.encode_answer(answer)
    for wrong in (raw[:-count], raw + bytes(count)):
        with pytest.raises(HandshakeError):
            handshake.decode_answer(wrong)


def test_another_version_is_refused_with_both_named() -> None:
    raw = handshake.encode_request(Request(Mode.READ, 1, 2, bytes(16)))
    with pytest.raises(HandshakeError, match="version 2, this side speaks 1"):
        handshake.decode_request(raw[:4] + b"\2\0" + raw[6:])
    raw = handshake.encode_answer(Answer(Status.OK))
    with pytest.raises(HandshakeError, match="version 2, this side speaks 1"):
        handshake.decode_answer(raw[:4] + b"\2\0" + raw[6:])


def test_a_long_text_is_cut_between_characters() -> None:
    answer = handshake.decode_answer(
        handshake.encode_answer(Answer(Status.REFUSED, "x" + "é" * handshake.TEXT_BYTES_MAX))
    )
    assert len(answer.text.encode()) == handshake.TEXT_BYTES_MAX - 1
    assert set(answer.text[1:]) == {"é"}


def test_a_short_token_is_refused() -> None:
    with pytest.raises(HandshakeError, match="15 bytes, must have 16"):
        handshake.encode_request(Request(Mode.READ, 1, 2, bytes(15)))


# ---- arena ---------------------------------------------------------------------------------------

HEADER = ArenaHeader(
    epoch=7,
    arena_id=b"a" * 16,
    boot_id=b"b" * 16,
    table_offset=4096,
    table_bytes=8192,
    data_offset=2 << 20,
    data_bytes=64 * 16_384,
    generation_floor=5,
)


def test_header_is_as_documented() -> None:
    raw = HEADER.encode()
    assert (raw[:8], _u(raw, 8, 4), _u(raw, 12, 4)) == (b"kvarena\0", 1, 128)
    assert (_u(raw, 16, 8), raw[24:40], raw[40:56]) == (7, b"a" * 16, b"b" * 16)
    assert [_u(raw, at, 8) for at in range(56, 104, 8)] == [16_384, *HEADER[3:]]
    assert raw[104:120] == bytes(16)
    assert _u(raw, 120, 4) == _u(raw, 124, 4) == zlib.crc32(raw[:120])
    assert ArenaHeader.decode(raw) == HEADER


def test_every_flipped_bit_of_the_header_is_found() -> None:
    whole = HEADER.encode()
    for bit in range(120 * 8):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FieldError, match=r"^arena\."):
            ArenaHeader.decode(bytes(raw))


def test_entries_are_as_documented() -> None:
    tag, key, parent = b"t" * 16, b"k" * 32, b"p" * 32
    raw = encode_valid(ValidEntry(3 * 16_384, 2 * 16_384, 9, tag, key, parent, 128, 0xDEAD_BEEF))
    assert (_u(raw, 0, 2), raw[2], raw[3], _u(raw, 4, 4)) == (0x456B, 1, 2, 2)
    assert [_u(raw, 8, 8), _u(raw, 16, 8), _u(raw, 24, 4), _u(raw, 28, 4)] == [
        9,
        0xDEAD_BEEF,
        128,
        0,
    ]
    assert (raw[32:48], raw[48:80], raw[80:112], raw[112:120]) == (tag, key, parent, bytes(8))
    assert _u(raw, 120, 4) == _u(raw, 124, 4) == zlib.crc32(raw[:120], 3)
    raw = encode_reserved(ReservedEntry(3 * 16_384, 2 * 16_384, 9, (5, 6)))
    assert (_u(raw, 0, 2), raw[2], raw[3], _u(raw, 4, 4), _u(raw, 8, 8)) == (0x456B, 1, 1, 2, 9)
    assert struct.unpack("<16I", raw[48:112]) == (5, 6, *(0,) * 14)
    assert len(raw) == 128


def _file() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    file = np.zeros(HEADER.data_offset + HEADER.data_bytes, np.uint8)
    file[:128] = np.frombuffer(HEADER.encode(), np.uint8)
    return file


def test_a_reader_sees_generations_and_epoch_change() -> None:
    file = _file()
    reader = ArenaReader(file)
    slots = [0, 5 * arena.UNIT, 63 * arena.UNIT]
    assert [reader.current(slot, 0, 7) for slot in slots] == [True, True, True]
    file[4096 + 5 * 128 + 8] = 1
    assert [reader.current(slot, 0, 7) for slot in slots] == [True, False, True]
    assert reader.current(slots[1], 1, 7)
    file[16] = 8
    assert reader.epoch() == 8
    assert [reader.current(slot, 0, 7) for slot in slots] == [False, False, False]
    assert reader.data.size == HEADER.data_bytes
    assert reader.data.base is not None


def test_a_file_that_is_no_arena_is_refused() -> None:
    with pytest.raises(FieldError, match=r"arena\.magic"):
        ArenaReader(np.zeros(1 << 20, np.uint8))


# ---- checksums -----------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.randoms())
def test_checksums_of_cells_trailer_and_root(
    layers: int, heads: int, cell_bytes: int, random: Random
) -> None:
    cells = layers * heads
    slot = np.frombuffer(random.randbytes(cells * cell_bytes + cells * 8 + 16), np.uint8).copy()
    expected = [
        xxhash.xxh3_64_intdigest(slot[i * cell_bytes : (i + 1) * cell_bytes].tobytes())
        for i in range(cells)
    ]
    payload = slot[: cells * cell_bytes]
    assert checksum.cell_checksums(payload, cell_bytes).tolist() == expected
    some = random.sample(range(cells), random.randint(0, cells))
    chosen = checksum.cell_checksums(slot, cell_bytes, some)
    assert chosen.tolist() == [expected[i] for i in some]
    grid = payload.reshape(layers, heads, cell_bytes)
    assert checksum.grid_checksums(grid).tolist() == expected
    assert checksum.grid_checksums(grid[:, heads - 1 :]).tolist() == expected[heads - 1 :: heads]
    trailer = checksum.trailer_of(slot, cells, cell_bytes)
    trailer[:] = np.array(expected, "<u8").view(np.uint8)
    raw = struct.pack(f"<{cells}Q", *expected)
    assert slot[cells * cell_bytes :][: cells * 8].tobytes() == raw
    assert checksum.root_of(trailer) == xxhash.xxh3_64_intdigest(raw)


def test_checksum_vectors() -> None:
    """xxh3-64 with seed 0, as its authors publish it for the empty input; ours for two more."""
    assert checksum.checksum(b"") == 0x2D06_8005_38D3_94C2
    document = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    for data in (b"kvserver", bytes(4096)):
        assert f"{checksum.checksum(data):016x}" in document
