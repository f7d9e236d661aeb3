"""The client's end of calls over the shm socket, against a hub that says what the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from kvclient.errors import DeadlineExceeded, KVError, LimitExceeded, NotFound, Unavailable
from kvclient.local import LocalCalls, open_calls
from kvclient.timing import Deadline
from kvproto import calls
from kvproto.calls import Method, Refusal, RequestSplitter
from kvproto.handshake import REQUEST_BYTES, Answer, Mode, Status, decode_request, encode_answer
from kvproto.v1 import kvserver_pb2 as pb

LOOKUP = pb.LookupRequest(session=5, namespace=1, hashes=bytes(32))
FOUND = pb.LookupReply(usable_blocks=1)


class FakeHub:
    """`heard` are the requests that came; `say` sends bytes; `hang_up` ends the connection."""

    def __init__(self, path: Path, status: Status = Status.OK) -> None:
        self.path = str(path)
        self.heard: list[calls.Request] = []
        self.ended = asyncio.Event()
        self._status = status
        self._requests = RequestSplitter()
        self._news = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        shown = decode_request(await reader.readexactly(REQUEST_BYTES))
        assert (shown.mode, shown.session, shown.client) == (Mode.CALLS, 5, 6)
        writer.write(encode_answer(Answer(self._status)))
        try:
            while data := await reader.read(1 << 16):
                self.heard += self._requests.feed(data)
                self._news.set()
        except ConnectionError:
            pass
        self.ended.set()
        writer.close()

    async def hears(self, count: int) -> list[calls.Request]:
        async with asyncio.timeout(5):
            while len(self.heard) < count:
                self._news.clear()
                await self._news.wait()
        return self.heard

    def say(self, raw: bytes) -> None:
        self._writer.write(raw)

    def answer(self, request: calls.Request, message: pb.LookupReply) -> None:
        self.say(calls.encode_reply(request.call, message.SerializeToString(), last=True))

    def hang_up(self) -> None:
        self._writer.transport.abort()

    async def open(self) -> LocalCalls | None:
        return await open_calls(
            self.path, address="hub:1", session=5, client=6, token=bytes(16), deadline=Deadline(5)
        )


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[FakeHub]:
    hub = FakeHub(tmp_path / "shm.sock")
    server = await asyncio.start_unix_server(hub.serve, hub.path)
    yield hub
    server.close()


@pytest.fixture
async def local(hub: FakeHub) -> AsyncIterator[LocalCalls]:
    local = await hub.open()
    assert local is not None
    yield local
    local.close()


def lookup(local: LocalCalls, seconds: float = 5.0) -> asyncio.Task[pb.LookupReply]:
    assert local.takes("Lookup", LOOKUP)
    work: Awaitable[pb.LookupReply] = local.call("Lookup", LOOKUP, Deadline(seconds))
    return asyncio.ensure_future(work)


async def test_answers_find_their_calls_in_any_order(hub: FakeHub, local: LocalCalls) -> None:
    first, second = lookup(local), lookup(local)
    one, two = await hub.hears(2)
    assert (one.method, one.body) == (Method.LOOKUP, LOOKUP.SerializeToString())
    assert 4000 < one.deadline_ms <= 5001
    hub.answer(two, pb.LookupReply(usable_blocks=2))
    hub.answer(one, FOUND)
    assert ((await first).usable_blocks, (await second).usable_blocks) == (1, 2)


async def test_a_refusal_is_the_error_that_grpc_would_give(hub: FakeHub, local: LocalCalls) -> None:
    call = lookup(local)
    (request,) = await hub.hears(1)
    refusal = Refusal("no more", "limit", "rpcs_max", "3")
    hub.say(calls.encode_refusal(request.call, 8, refusal))
    with pytest.raises(LimitExceeded, match="Lookup at hub:1: no more") as caught:
        await call
    assert (caught.value.kind, caught.value.field, caught.value.limit) == ("limit", "rpcs_max", "3")


async def test_a_silent_hub_ends_at_the_deadline_and_is_told(
    hub: FakeHub, local: LocalCalls
) -> None:
    with pytest.raises(DeadlineExceeded, match=r"Lookup at hub:1: no answer within 0\.1 s"):
        await lookup(local, 0.1)
    request, cancel = await hub.hears(2)
    assert (cancel.method, cancel.call) == (Method.CANCEL, request.call)
    hub.answer(request, FOUND)  # late: it belongs to nobody
    call = lookup(local)
    hub.answer((await hub.hears(3))[2], FOUND)
    assert (await call).usable_blocks == 1


async def test_who_is_cancelled_says_so(hub: FakeHub, local: LocalCalls) -> None:
    call = lookup(local)
    await hub.hears(1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await hub.hears(2))[1].method is Method.CANCEL


@pytest.mark.parametrize(
    "end",
    [
        lambda hub, _: hub.hang_up(),
        lambda hub, _: hub.say(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        lambda hub, request: (
            hub.say(calls.encode_reply(request.call, FOUND.SerializeToString(), last=True)[:-1])
            or hub._writer.close()
        ),
    ],
    ids=["hung up", "garbage", "cut"],
)
async def test_a_connection_that_breaks_ends_its_calls_and_stays_broken(
    hub: FakeHub, local: LocalCalls, end: Callable[[FakeHub, calls.Request], None]
) -> None:
    call, stream = lookup(local), local.stream("Acquire", pb.AcquireRequest(session=5))
    request, _ = await hub.hears(2)
    end(hub, request)
    with pytest.raises(Unavailable, match="Lookup at hub:1"):
        await call
    with pytest.raises(Unavailable, match="Acquire at hub:1"):
        await stream.read()
    assert stream.done()
    assert not local.takes("Lookup", LOOKUP)


async def test_an_answer_that_cannot_be_read_is_an_error(hub: FakeHub, local: LocalCalls) -> None:
    call = lookup(local)
    (request,) = await hub.hears(1)
    hub.say(calls.encode_reply(request.call, b"\xff\xff\xff", last=True))
    with pytest.raises(KVError, match="unreadable answer"):
        await call


async def test_a_stream_hands_out_what_comes_until_the_last(
    hub: FakeHub, local: LocalCalls
) -> None:
    stream = local.stream("Acquire", pb.AcquireRequest(session=5))
    (request,) = await hub.hears(1)
    assert request.deadline_ms == 0
    for missing, last in ((b"\1\0\0\0", False), (b"\2\0\0\0", True)):
        body = pb.AcquireReply(missing=missing, done=last).SerializeToString()
        hub.say(calls.encode_reply(request.call, body, last=last))
    assert (await stream.read()).missing == b"\1\0\0\0"
    assert (await stream.read()).missing == b"\2\0\0\0"
    assert await stream.read() is None
    stream.cancel()
    assert len(hub.heard) == 1, "there is nothing to cancel"


async def test_a_stream_left_early_is_cancelled(hub: FakeHub, local: LocalCalls) -> None:
    stream = local.stream("Acquire", pb.AcquireRequest(session=5))
    await hub.hears(1)
    stream.cancel()
    assert (await hub.hears(2))[1].method is Method.CANCEL


async def test_a_refused_stream(hub: FakeHub, local: LocalCalls) -> None:
    stream = local.stream("Acquire", pb.AcquireRequest(session=5))
    (request,) = await hub.hears(1)
    hub.say(calls.encode_refusal(request.call, 5, Refusal("ended", "not_found", "session")))
    with pytest.raises(NotFound) as caught:
        await stream.read()
    assert caught.value.field == "session"


async def test_retired_it_ends_with_its_last_call(hub: FakeHub, local: LocalCalls) -> None:
    call = lookup(local)
    (request,) = await hub.hears(1)
    local.retire()
    assert not local.takes("Lookup", LOOKUP)
    hub.answer(request, FOUND)
    assert (await call).usable_blocks == 1
    await asyncio.wait_for(hub.ended.wait(), 5)


async def test_what_does_not_fit_goes_another_way(hub: FakeHub, local: LocalCalls) -> None:
    huge = pb.LookupRequest(session=5, hashes=bytes(calls.REQUEST_BODY_BYTES_MAX))
    assert not local.takes("Lookup", huge)
    assert not local.takes("Stats", pb.StatsRequest())
    running = [lookup(local) for _ in range(calls.CALLS_MAX)]
    await hub.hears(calls.CALLS_MAX)
    assert not local.takes("Lookup", LOOKUP)
    for call in running:
        call.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert local.takes("Lookup", LOOKUP)


@pytest.mark.parametrize("status", [Status.BUSY, Status.REFUSED, Status.BAD_REQUEST])
async def test_a_hub_that_takes_none_leaves_grpc(tmp_path: Path, status: Status) -> None:
    hub = FakeHub(tmp_path / "shm.sock", status)
    server = await asyncio.start_unix_server(hub.serve, hub.path)
    assert await hub.open() is None
    server.close()
    await server.wait_closed()
    assert await hub.open() is None, "nobody listens"
