"""The tcp framing: what is encoded decodes to itself, and everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto import frames
from kvproto.frames import (
    FrameError,
    Hello,
    HelloStatus,
    Op,
    Place,
    Reply,
    Request,
    Status,
    Welcome,
)
from kvproto.grid import CELLS_MAX, HEADS_MAX, LAYERS_MAX, Region

HELLO = Hello(session=1 << 62, client=5, token=bytes(range(16)))
PLACE = Place(7, 1 << 14, 3, 4096, 4, 2, Region(0, 4, 0, 2), bytes(range(16)))
REQUEST = Request(Op.WRITE, 11, PLACE, Region(1, 3, 0, 2))


# ---- round trips -------------------------------------------------------------------------------


def test_the_layout_is_fixed() -> None:
    """These lengths and bytes are the protocol; a change to them is a new version."""
    lengths = (frames.HELLO_BYTES, frames.WELCOME_HEAD_BYTES, frames.REQUEST_BYTES)
    assert (*lengths, frames.REPLY_BYTES, frames.AFTER_BYTES) == (40, 40, 96, 24, 8)
    assert frames.encode_hello(HELLO).hex() == (
        "6b76746301000000" "0000000000000040" "0500000000000000" "000102030405060708090a0b0c0d0e0f"
    )  # fmt: skip
    assert frames.encode_request(REQUEST).hex() == (
        "010000000b000000" "0700000000000000" "0040000000000000" "0300000000000000"
        "0010000000000000" "0400000002000000" "00000000040000000000000002000000"
        "01000000030000000000000002000000" "000102030405060708090a0b0c0d0e0f"
    )  # fmt: skip
    reply = frames.encode_reply(Reply(Op.READ, 9, Status.STALE, 0))
    assert reply.hex() == "020000000900000001000000000000000000000000000000"
    assert frames.encode_after(9, Status.OK).hex() == "0900000000000000"


def test_hello_and_welcome() -> None:
    assert frames.decode_hello(frames.encode_hello(HELLO)) == HELLO
    for status in HelloStatus:
        welcome = Welcome(status, "why: é", 1 << 40, bytes(range(16)))
        raw = frames.encode_welcome(welcome)
        head = raw[: frames.WELCOME_HEAD_BYTES]
        assert len(raw) == len(head) + frames.welcome_text_bytes(head)
        assert frames.decode_welcome(raw) == welcome


def test_a_long_text_is_cut_between_characters() -> None:
    told = frames.decode_welcome(frames.encode_welcome(Welcome(HelloStatus.BUSY, "é" * 600)))
    assert told.text == "é" * (frames.TEXT_BYTES_MAX // 2)
    odd = frames.decode_welcome(frames.encode_welcome(Welcome(HelloStatus.BUSY, "x" + "é" * 600)))
    assert odd.text == "x" + "é" * (frames.TEXT_BYTES_MAX // 2 - 1)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    layers = draw(st.integers(1, LAYERS_MAX))
    heads = draw(st.integers(1, min(HEADS_MAX, CELLS_MAX // layers)))

    def region(within: Region) -> Region:
        layer = draw(st.integers(within.layer_start, within.layer_stop - 1))
        head = draw(st.integers(within.head_start, within.head_stop - 1))
        layer_stop = draw(st.integers(layer + 1, within.layer_stop))
        return Region(layer, layer_stop, head, draw(st.integers(head + 1, within.head_stop)))

    granted = region(Region(0, layers, 0, heads))
    u64 = st.integers(0, (1 << 64) - 1)
    cell_bytes = draw(st.integers(1, (1 << 40) - 1))
    permit = draw(st.binary(min_size=16, max_size=16))
    place = Place(draw(u64), draw(u64), draw(u64), cell_bytes, layers, heads, granted, permit)
    op, tag = draw(st.sampled_from(Op)), draw(st.integers(0, (1 << 32) - 1))
    return Request(op, tag, place, region(granted))


@given(requests())
def test_requests(request: Request) -> None:
    raw = frames.encode_request(request)
    assert frames.decode_request(raw) == request
    cells = request.region.cells
    if request.op is Op.WRITE:
        assert request.body_bytes == cells * (8 + request.place.cell_bytes)
        assert request.answer_bytes == 0
    else:
        assert request.body_bytes == 0
        grid = request.place.layers * request.place.heads
        assert request.answer_bytes == 8 * grid + cells * request.place.cell_bytes


@given(
    st.sampled_from(Op),
    st.integers(0, 2**32 - 1),
    st.sampled_from(Status),
    st.integers(0, 2**64 - 1),
)
def test_replies(op: Op, tag: int, status: Status, body_bytes: int) -> None:
    reply = Reply(op, tag, status, body_bytes)
    assert frames.decode_reply(frames.encode_reply(reply)) == reply
    assert frames.decode_after(frames.encode_after(tag, status)) == (tag, status)


def test_a_permit_vouches_for_all_but_one_requests_region() -> None:
    sealed = PLACE.sealed(Op.WRITE, 1)
    assert replace(PLACE, permit=bytes(16)).sealed(Op.WRITE, 1) == sealed
    others = [
        replace(PLACE, hold=8), replace(PLACE, offset=0), replace(PLACE, generation=4),
        replace(PLACE, cell_bytes=1), replace(PLACE, layers=5), replace(PLACE, heads=3),
        replace(PLACE, granted=Region(0, 4, 0, 1)),
    ]  # fmt: skip
    texts = {other.sealed(Op.WRITE, 1) for other in others}
    texts |= {PLACE.sealed(Op.READ, 1), PLACE.sealed(Op.WRITE, 2), sealed}
    assert len(texts) == len(others) + 3


# ---- refusals ----------------------------------------------------------------------------------


def changed(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"http", "not a kvserver"),
        (4, b"\x02", "version 2"),
        (6, b"\x01", "reserved"),
        (20, b"\x01", "reserved"),
    ],
)
def test_a_hello_that_is_none(at: int, value: bytes, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        frames.decode_hello(changed(frames.encode_hello(HELLO), at, value))


def test_a_token_of_another_length_is_not_sent() -> None:
    with pytest.raises(FrameError, match="token has 15 bytes"):
        frames.encode_hello(replace(HELLO, token=bytes(15)))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"http", "not a welcome"),
        (4, b"\x02", "version 2"),
        (6, b"\x09", "unknown status 9"),
        (32, b"\x01\x02", "text of 513 bytes"),
        (34, b"\x01", "reserved"),
        (40, b"\xff", "not UTF-8"),
    ],
)
def test_a_welcome_that_is_none(at: int, value: bytes, said: str) -> None:
    raw = frames.encode_welcome(Welcome(HelloStatus.BUSY, "why"))
    with pytest.raises(FrameError, match=said):
        frames.decode_welcome(changed(raw, at, value))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, u32(0), "op 0"),
        (0, u32(3), "op 3"),
        (32, bytes(8), "cells of 0 bytes"),
        (32, (1 << 40).to_bytes(8, "little"), "cells of"),
        (40, u32(0), "grid of 0 x 2"),
        (40, u32(LAYERS_MAX + 1), "grid of"),
        (44, u32(0), "grid of 4 x 0"),
        (44, u32(HEADS_MAX + 1), "grid of"),
        (40, u32(1024) + u32(17), "grid of 1024 x 17"),
        (48, u32(4), "granted region"),  # layer_start at its stop
        (52, u32(5), "granted region"),
        (56, u32(2), "granted region"),
        (60, u32(3), "granted region"),
        (64, u32(3), "outside the grid"),
        (68, u32(5), "outside the grid"),
        (72, u32(2), "outside the grid"),
        (76, u32(3), "outside the grid"),
        (48, u32(2), "outside what was granted"),
        (52, u32(2), "outside what was granted"),
        (60, u32(1), "outside what was granted"),
    ],
)
def test_a_request_that_cannot_be_right(at: int, value: bytes, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        frames.decode_request(changed(frames.encode_request(REQUEST), at, value))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [(0, u32(7), "op 7"), (8, u32(5), "unknown status 5"), (12, u32(1), "reserved")],
)
def test_a_reply_that_cannot_be_right(at: int, value: bytes, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        frames.decode_reply(changed(frames.encode_reply(Reply(Op.READ, 1, Status.OK)), at, value))


def test_the_end_of_an_answer_has_a_known_status() -> None:
    with pytest.raises(FrameError, match="unknown status 5"):
        frames.decode_after(u32(1) + u32(5))


DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "hello": (frames.decode_hello, frames.encode_hello(HELLO)),
    "welcome": (frames.decode_welcome, frames.encode_welcome(Welcome(HelloStatus.BUSY, "why"))),
    "request": (frames.decode_request, frames.encode_request(REQUEST)),
    "reply": (frames.decode_reply, frames.encode_reply(Reply(Op.READ, 1, Status.OK, 5))),
    "after": (frames.decode_after, frames.encode_after(3, Status.STALE)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_other_length_is_refused(name: str) -> None:
    decode, raw = DECODERS[name]
    for length in [*range(len(raw)), len(raw) + 1]:
        with pytest.raises(FrameError):
            decode((raw + b"\0")[:length])


ENCODERS: dict[str, Callable[[object], bytes]] = {
    "hello": frames.encode_hello,  # type: ignore[dict-item]
    "welcome": frames.encode_welcome,  # type: ignore[dict-item]
    "request": frames.encode_request,  # type: ignore[dict-item]
    "reply": frames.encode_reply,  # type: ignore[dict-item]
    "after": lambda told: frames.encode_after(*told),  # type: ignore[misc]
}


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_damage_is_refused_or_means_something_else(name: str, data: st.DataObject) -> None:
    """Rule 2: what a decoder accepts is exactly what its encoder writes for it."""
    decode, raw = DECODERS[name]
    noise = data.draw(
        st.binary(max_size=200)
        | st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)), max_size=4).map(
            lambda flips: bytes(byte ^ dict(flips).get(index, 0) for index, byte in enumerate(raw))
        )
    )
    try:
        told = decode(noise)
    except FrameError:
        return
    assert ENCODERS[name](told) == noise
