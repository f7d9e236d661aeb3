"""The codec of the shm handshake: what one side writes the other reads, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto.handshake import (
    ANSWER_BYTES_MAX,
    ANSWER_HEAD_BYTES,
    REQUEST_BYTES,
    TEXT_BYTES_MAX,
    Answer,
    HandshakeError,
    Mode,
    Request,
    Status,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

MODE_BYTE = 6
U64 = st.integers(0, 2**64 - 1)
REQUESTS = st.builds(
    Request,
    mode=st.sampled_from(Mode),
    session=U64,
    client=st.integers(0, 2**32 - 1),
    token=st.binary(min_size=16, max_size=16),
)
ANSWERS = st.builds(
    Answer,
    status=st.sampled_from(Status),
    text=st.text(max_size=100),
    epoch=U64,
    file_bytes=U64,
    table_offset=U64,
    data_offset=U64,
    data_bytes=U64,
    arena_id=st.binary(min_size=16, max_size=16),
)


def test_request_bytes_are_fixed() -> None:
    raw = encode_request(Request(Mode.WRITE, 0x0102030405060708, 9, b"t" * 16))
    assert raw == (
        b"kvsh\x01\x00\x01\x00" + bytes.fromhex("0807060504030201") + b"\x09\0\0\0" + bytes(4)
        + b"t" * 16
    )  # fmt: skip
    assert len(raw) == REQUEST_BYTES == 40


def test_answer_head_is_72_bytes() -> None:
    assert ANSWER_HEAD_BYTES == 72
    assert encode_answer(Answer(Status.REFUSED, "no"))[-2:] == b"no"


@given(REQUESTS)
def test_request_round_trip(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


@given(ANSWERS)
def test_answer_round_trip(answer: Answer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


def test_long_text_is_cut_between_characters() -> None:
    raw = encode_answer(Answer(Status.FAILED, "ß" * TEXT_BYTES_MAX + "x"))
    assert len(raw) <= ANSWER_BYTES_MAX
    assert decode_answer(raw).text == "ß" * (TEXT_BYTES_MAX // 2)


@given(st.binary(max_size=2 * REQUEST_BYTES))
def test_garbage_is_no_request(raw: bytes) -> None:
    with pytest.raises(HandshakeError):
        decode_request(raw)


@given(st.binary(max_size=2 * ANSWER_HEAD_BYTES))
def test_garbage_is_no_answer(raw: bytes) -> None:
    with pytest.raises(HandshakeError):
        decode_answer(raw)


@given(REQUESTS, st.integers(0, 8 * 8 - 1))
def test_each_flipped_bit_of_the_frame_is_refused(request_: Request, bit: int) -> None:
    """Magic, version, mode and reserved byte. The rest is content, which the token guards."""
    raw = bytearray(encode_request(request_))
    raw[bit // 8] ^= 1 << bit % 8
    if bit // 8 == MODE_BYTE and raw[MODE_BYTE] in set(Mode):  # another mode
        assert decode_request(bytes(raw)).mode is Mode(raw[MODE_BYTE])
    else:
        with pytest.raises(HandshakeError):
            decode_request(bytes(raw))


def test_other_version_names_both() -> None:
    raw = bytearray(encode_request(Request(Mode.READ, 1, 1, bytes(16))))
    raw[4] = 7
    with pytest.raises(HandshakeError, match="version 7, this side speaks 1"):
        decode_request(bytes(raw))


def test_token_of_another_length_is_refused() -> None:
    with pytest.raises(HandshakeError, match="token has 3 bytes, must have 16"):
        encode_request(Request(Mode.READ, 1, 1, b"abc"))
