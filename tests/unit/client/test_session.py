"""Connecting to what is not there, pauses between attempts, and errors as they arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import pytest

from kvclient import AsyncClient, Client, errors
from kvclient.timing import Backoff, Deadline
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from tests.support.server import free_port


def test_backoff_doubles_from_50_ms_to_1_s() -> None:
    backoff = Backoff(draw=lambda: 1.0)
    assert [backoff.next() for _ in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    backoff.reset()
    assert backoff.next() == 0.05


def test_backoff_draws_from_the_upper_half() -> None:
    backoff = Backoff(draw=lambda: 0.0)
    assert [backoff.next() for _ in range(6)] == [0.025, 0.05, 0.1, 0.2, 0.4, 0.5]


def test_a_deadline_runs_out_and_stays_out() -> None:
    assert 0 < Deadline(60.0).left() <= 60.0
    deadline = Deadline(0.01)
    time.sleep(0.02)
    assert deadline.left() == 0


_serve: Callable[[object, grpc.aio.Server], None] = kvserver_pb2_grpc.add_CacheServicer_to_server


class _Refusing(kvserver_pb2_grpc.CacheServicer):
    """Answers Hello as it is told."""

    def __init__(self, answer: Callable[[grpc.aio.ServicerContext], Awaitable[object]]) -> None:
        self._answer = answer

    async def Hello(self, request: pb.HelloRequest, context: grpc.aio.ServicerContext) -> object:
        return await self._answer(context)


async def hello_through(
    answer: Callable[[grpc.aio.ServicerContext], Awaitable[object]], **options: float
) -> Exception:
    """What `connect` raises when Hello is answered by `answer`; names the address."""
    server = grpc.aio.server()
    _serve(_Refusing(answer), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        with pytest.raises(errors.KVError) as caught:
            await AsyncClient.connect(address, deadline_s=options.get("deadline_s", 5))
    finally:
        await server.stop(0)
    assert address in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgument),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.LimitExceeded),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.Conflict),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported),
        (grpc.StatusCode.INTERNAL, errors.KVError),
    ],
)
async def test_each_status_has_one_error(code: grpc.StatusCode, kind: type[errors.KVError]) -> None:
    async def refuse(context: grpc.aio.ServicerContext) -> object:
        metadata = (("kv-kind", "what"), ("kv-field", "sessions_max"), ("kv-limit", "3"))
        await context.abort(code, "no more", metadata)

    error = await hello_through(refuse)
    assert type(error) is kind
    assert "no more" in str(error)
    assert isinstance(error, errors.KVError)
    assert (error.kind, error.field, error.limit) == ("what", "sessions_max", "3")


async def test_no_transport_in_common_names_what_is_offered() -> None:
    async def offer(context: grpc.aio.ServicerContext) -> object:
        return pb.HelloReply(
            session=1,
            client=1,
            token=bytes(16),
            protocol_version=1,
            transports=[pb.TransportOffer(name="pigeon", address="h:1")],
        )

    error = await hello_through(offer)
    assert isinstance(error, errors.Unsupported)
    assert "offers pigeon; this client wants shm or nixl or tcp" in str(error)


async def test_an_arena_of_another_host_is_unsupported() -> None:
    async def offer(context: grpc.aio.ServicerContext) -> object:
        return pb.HelloReply(
            session=1,
            client=1,
            token=bytes(16),
            protocol_version=1,
            transports=[pb.TransportOffer(name="shm", address="/nowhere/shm.sock")],
        )

    error = await hello_through(offer)
    assert isinstance(error, errors.Unsupported)
    assert "/nowhere/shm.sock cannot be mapped" in str(error)
    assert "on the hub's host" in str(error)


async def test_another_protocol_is_unsupported() -> None:
    async def answer(context: grpc.aio.ServicerContext) -> object:
        return pb.HelloReply(session=1, client=1, token=bytes(16), protocol_version=9)

    error = await hello_through(answer)
    assert isinstance(error, errors.Unsupported)
    assert "speaks protocol 9, this client 1" in str(error)


async def test_a_silent_hub_ends_at_the_deadline() -> None:
    async def silent(context: grpc.aio.ServicerContext) -> object:
        await asyncio.sleep(30)
        return pb.HelloReply()

    started = time.monotonic()
    error = await hello_through(silent, deadline_s=0.3)
    assert isinstance(error, errors.DeadlineExceeded)
    assert time.monotonic() - started < 10


async def test_nobody_there_is_unavailable_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(errors.Unavailable, match=address):
        await AsyncClient.connect(address)
    assert time.monotonic() - started < 10


def test_the_synchronous_client_opens_at_first_use_and_may_try_again() -> None:
    address = f"127.0.0.1:{free_port()}"
    client = Client(address, deadline_s=2)
    for _ in range(2):
        with pytest.raises(errors.Unavailable, match=address):
            client.stats()
    client.close()
    client.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        client.stats()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"address": ""}, "address"),
        ({"transport": "pigeon"}, "transport"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"join_token": b"short"}, "join_token"),
        ({"copy_threads": 0}, "copy_threads"),
    ],
)
def test_options_are_checked_before_dialling(options: dict[str, object], field: str) -> None:
    arguments = {"address": "127.0.0.1:1", **options}
    with pytest.raises(errors.InvalidArgument) as caught:
        AsyncClient.connect(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
