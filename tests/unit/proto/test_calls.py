"""Calls over the shm socket: what is encoded decodes to itself, however it arrives, and everything
else is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto import calls
from kvproto.calls import FrameError, Method, Refusal, ReplySplitter, RequestSplitter
from kvproto.v1 import kvserver_pb2 as pb

numbers = st.integers(0, (1 << 64) - 1)
bodies = st.binary(max_size=300)
texts = st.text(max_size=40)
FEW = settings(max_examples=40)


def test_the_layout_is_fixed() -> None:
    """These bytes are the protocol; a change to them is a new version."""
    assert (calls.REQUEST_HEAD_BYTES, calls.REPLY_HEAD_BYTES) == (24, 16)
    assert calls.encode_request(Method.RESERVE, 7, 1500, b"abc").hex() == (
        "0300000003000000" "0700000000000000" "dc05000000000000" "616263"
    )  # fmt: skip
    assert calls.encode_cancel(7).hex() == "000000000000000007000000000000000000000000000000"
    assert calls.encode_reply(7, b"abc", last=True).hex() == (
        "0300000000010000" "0700000000000000" "616263"
    )  # fmt: skip
    refusal = calls.encode_refusal(7, 5, Refusal("gone", "not_found", "session", ""))
    assert refusal.hex() == (
        "1a00000005010000" "0700000000000000" "0900" "0700" "0000"
        + b"not_foundsession".hex() + b"gone".hex()
    )  # fmt: skip


def test_methods_are_calls_of_the_service() -> None:
    service = pb.DESCRIPTOR.services_by_name["Cache"].methods_by_name
    for method, (request, reply) in calls.MESSAGES.items():
        described = service[method.rpc]
        assert described.input_type.full_name == request.DESCRIPTOR.full_name
        assert described.output_type.full_name == reply.DESCRIPTOR.full_name
        assert described.server_streaming is (method in calls.STREAMING)
        assert request.DESCRIPTOR.fields_by_name["session"].number == 1


@FEW
@given(
    st.lists(
        st.tuples(st.sampled_from(list(calls.MESSAGES)), numbers, st.integers(0, 10**6), bodies),
        max_size=5,
    ),
    st.integers(1, 60),
)
def test_requests_come_out_whole_in_whatever_pieces_they_arrive(
    sent: list[tuple[Method, int, int, bytes]], step: int
) -> None:
    raw = b"".join(calls.encode_request(*one) for one in sent) + calls.encode_cancel(9)
    splitter, got = RequestSplitter(), []
    for at in range(0, len(raw), step):
        got += list(splitter.feed(raw[at : at + step]))
    assert [tuple(one) for one in got] == [*sent, (Method.CANCEL, 9, 0, b"")]


@FEW
@given(st.lists(st.tuples(numbers, bodies, st.booleans()), max_size=5), st.integers(1, 60))
def test_replies_too(sent: list[tuple[int, bytes, bool]], step: int) -> None:
    raw = b"".join(calls.encode_reply(call, body, last=last) for call, body, last in sent)
    splitter, got = ReplySplitter(), []
    for at in range(0, len(raw), step):
        got += list(splitter.feed(raw[at : at + step]))
    assert [(one.call, one.body, one.last) for one in got] == sent
    assert {one.status for one in got} <= {calls.OK}


@FEW
@given(numbers, st.integers(1, 16), texts, texts, texts, texts)
def test_refusals(call: int, status: int, message: str, kind: str, field: str, limit: str) -> None:
    refusal = Refusal(message, kind, field, limit)
    (reply,) = ReplySplitter().feed(calls.encode_refusal(call, status, refusal))
    assert (reply.status, reply.last, reply.call) == (status, True, call)
    assert calls.decode_refusal(reply.body) == refusal


def test_a_long_text_of_a_refusal_is_cut_between_characters() -> None:
    (reply,) = ReplySplitter().feed(calls.encode_refusal(1, 3, Refusal("x" + "é" * 9000)))
    assert calls.decode_refusal(reply.body).message == "x" + "é" * 511


def request(
    length: int = 0,
    method: int = 1,
    zero: int = 0,
    zeros: int = 0,
    deadline: int = 1,
    last: int = 0,
) -> bytes:
    return struct.pack("<IBBHQII", length, method, zero, zeros, 1, deadline, last)


def reply(length: int = 0, status: int = 0, last: int = 1, zeros: int = 0) -> bytes:
    return struct.pack("<IBBHQ", length, status, last, zeros, 1)


@pytest.mark.parametrize(
    ("splitter", "raw"),
    [
        (RequestSplitter, request(length=calls.REQUEST_BODY_BYTES_MAX + 1)),
        (RequestSplitter, request(method=9)),
        (RequestSplitter, request(method=255)),
        (RequestSplitter, request(zero=1)),
        (RequestSplitter, request(zeros=1)),
        (RequestSplitter, request(last=1)),
        (RequestSplitter, request(method=0)),  # a CANCEL with a deadline
        (RequestSplitter, request(length=1, method=0, deadline=0) + b"x"),
        (RequestSplitter, b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n"),
        (ReplySplitter, reply(length=calls.REPLY_BODY_BYTES_MAX + 1)),
        (ReplySplitter, reply(status=17)),
        (ReplySplitter, reply(last=2)),
        (ReplySplitter, reply(zeros=1)),
        (ReplySplitter, reply(status=5, last=0)),
    ],
)
def test_garbage_is_refused(
    splitter: Callable[[], RequestSplitter | ReplySplitter], raw: bytes
) -> None:
    with pytest.raises(FrameError):
        list(splitter().feed(raw))


@FEW
@given(st.binary(max_size=200))
def test_any_bytes_give_frames_or_a_frame_error(raw: bytes) -> None:
    for splitter in (RequestSplitter(), ReplySplitter()):
        try:
            list(splitter.feed(raw))
        except FrameError:
            continue
    try:
        calls.decode_refusal(raw)
    except FrameError:
        return


@pytest.mark.parametrize("body", [b"", b"12345", struct.pack("<HHH", 1, 0, 0), b"\0" * 6 + b"\xff"])
def test_a_refusal_that_is_none(body: bytes) -> None:
    with pytest.raises(FrameError):
        calls.decode_refusal(body)


def test_what_is_too_large_is_not_encoded() -> None:
    with pytest.raises(FrameError, match=str(calls.REQUEST_BODY_BYTES_MAX)):
        calls.encode_request(Method.COMMIT, 1, 1, bytes(calls.REQUEST_BODY_BYTES_MAX + 1))
    with pytest.raises(FrameError, match=str(calls.REPLY_BODY_BYTES_MAX)):
        calls.encode_reply(1, bytes(calls.REPLY_BODY_BYTES_MAX + 1), last=True)
