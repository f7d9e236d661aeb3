"""Calls over the shm socket of a live server, by a peer that is nothing but a socket."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvproto import calls
from kvproto.calls import Method
from kvproto.handshake import (
    Status,
)
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.config import Settings
from kvserver.observe import logs
from kvserver.server import Server
from kvserver.service.local import LocalCalls, rest_of
from tests.support.local_calls import WAIT_S, Peer
from tests.support.payload import Blocks
from tests.unit.service.test_live import WHOLE, spec_message

BLOCKS = Blocks(layers=2, heads=2, page_bytes=512)
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class Hub:
    """A running server with one session that has a namespace."""

    def __init__(self, server: Server, stub: Any, hello: Any, handle: int) -> None:
        self.server = server
        self.stub = stub
        self.hello = hello
        self.keys = BLOCKS.chain(1, 4)
        self.ids = {"session": hello.session, "namespace": handle}
        (offer,) = (offer for offer in hello.transports if offer.name == "shm")
        assert offer.options["calls"] == "1"
        self.path = offer.address

    def peer(self, **changes: Any) -> Peer:
        return Peer(self.path, self.hello, **changes)

    @property
    def connections(self) -> int:
        return len(self.server._local)

    def reserve(self, **changes: Any) -> pb.ReserveRequest:
        fields = {
            **self.ids,
            "client": self.hello.client,
            "hashes": b"".join(self.keys),
            "parents": b"".join([bytes(32), *self.keys[:-1]]),
            "region": WHOLE,
        }
        return pb.ReserveRequest(**{**fields, **changes})

    def acquire(self, **changes: Any) -> pb.AcquireRequest:
        fields = {
            **self.ids,
            "client": self.hello.client,
            "hashes": b"".join(self.keys),
            "region": WHOLE,
        }
        return pb.AcquireRequest(**{**fields, **changes})

    def lookup(self, **changes: Any) -> pb.LookupRequest:
        return pb.LookupRequest(**self.ids, hashes=b"".join(self.keys), **changes)

    async def publish(self, peer: Peer) -> None:
        granted = await peer.call(Method.RESERVE, self.reserve())
        reply = await peer.call(
            Method.COMMIT,
            pb.CommitRequest(
                session=self.hello.session,
                client=self.hello.client,
                reservation=granted.reservation,
                indices=b"".join(i.to_bytes(4, "little") for i in range(4)),
                region=WHOLE,
                checksums=bytes(4 * 4 * 8),
            ),
        )
        assert reply.completed == 4

    def held(self) -> tuple[int, int, int]:
        """Reservations and leases of the session, and requests without an answer."""
        (session,) = self.server.node.driver.stats().sessions
        return session.reservations, session.leases, self.server.node.driver.open_requests


async def eventually(true: Callable[[], bool], what: str) -> None:
    for _ in range(int(WAIT_S / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {WAIT_S} s: {what}")


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    directory = Path(tempfile.mkdtemp(prefix="kvserver-test-", dir="/dev/shm"))
    server = Server(
        Settings(
            listen="127.0.0.1:0",
            metrics_listen="",
            tcp_listen="",
            host_dir=str(directory),
            host_bytes=16 << 20,
        )
    )
    try:
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = kvserver_pb2_grpc.CacheStub(channel)
            hello = await stub.Hello(pb.HelloRequest(protocol_version=1))
            opened = await stub.OpenNamespace(
                pb.OpenNamespaceRequest(session=hello.session, spec=spec_message())
            )
            yield Hub(server, stub, hello, opened.handle)
    finally:
        await server.close()
        shutil.rmtree(directory, ignore_errors=True)


# ---- the same as gRPC ----------------------------------------------------------------------------


async def test_answers_are_those_of_grpc(hub: Hub) -> None:
    async with hub.peer() as peer:
        await hub.publish(peer)
        assert await peer.call(Method.LOOKUP, hub.lookup()) == await hub.stub.Lookup(hub.lookup())
        await peer.begin(Method.ACQUIRE, hub.acquire())
        reply = await peer.reply()
        assert reply.last
        here = pb.AcquireReply.FromString(reply.body)
        (there,) = [reply async for reply in hub.stub.Acquire(hub.acquire())]
        assert here.grant.lease != there.grant.lease
        here.grant.lease = there.grant.lease
        assert here == there
    families = await asyncio.to_thread(lambda: list(hub.server.metrics.registry.collect()))
    rpcs = {
        sample.labels["rpc"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "kvserver_rpcs_total"
    }
    assert (rpcs["Lookup"], rpcs["Acquire"], rpcs["Reserve"]) == (2, 2, 1)


@pytest.mark.parametrize("changes", [{"namespace": 77}, {"hashes": b"short"}, {"client": 999}])
async def test_refusals_are_those_of_grpc(hub: Hub, changes: dict[str, Any]) -> None:
    request = hub.reserve(**changes)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hub.stub.Reserve(request)
    metadata = dict(caught.value.trailing_metadata() or ())
    async with hub.peer() as peer:
        status, refusal = await peer.refused(Method.RESERVE, request)
        assert status == caught.value.code().value[0]
        assert refusal == (
            caught.value.details(), metadata["kv-kind"], metadata["kv-field"], metadata["kv-limit"]
        )  # fmt: skip


async def test_a_bug_of_ours_is_an_incident_here_too(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with hub.peer() as peer:
        monkeypatch.setattr(hub.server.node.sessions, "get", broken)
        status, refusal = await peer.refused(Method.LOOKUP, hub.lookup())
        assert status == grpc.StatusCode.INTERNAL.value[0]
        assert "internal error, incident" in refusal.message
        assert "a bug" not in refusal.message


# ---- who is let in -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"token": bytes(16)}, {"session": 5}, {"client": 999}])
async def test_strangers_are_refused(hub: Hub, changes: dict[str, Any]) -> None:
    peer = hub.peer(**changes)
    answer = await peer.shake()
    assert answer.status is Status.REFUSED
    assert await peer.hung_up()
    peer.sock.close()
    assert hub.connections == 0


async def test_a_connection_speaks_for_its_own_session_only(hub: Hub) -> None:
    other = await hub.stub.Hello(pb.HelloRequest(protocol_version=1))
    async with hub.peer() as peer:
        request = pb.LookupRequest(session=other.session, namespace=1, hashes=bytes(32))
        status, refusal = await peer.refused(Method.LOOKUP, request)
        assert (status, refusal.field) == (INVALID, "session")
        await peer.call(Method.LOOKUP, hub.lookup())


async def test_a_session_that_ended_is_not_found(hub: Hub) -> None:
    async with hub.peer() as peer:
        goodbye = pb.GoodbyeRequest(session=hub.hello.session, client=hub.hello.client)
        await hub.stub.Goodbye(goodbye)
        status, refusal = await peer.refused(Method.LOOKUP, hub.lookup())
        assert (status, refusal.field) == (NOT_FOUND, "session")


async def test_connections_are_bounded_and_those_of_clients_that_left_make_room(hub: Hub) -> None:
    hub.server._local._connections_max = 2
    other = await hub.stub.Hello(pb.HelloRequest(protocol_version=1))
    async with hub.peer() as first, Peer(hub.path, other) as second:
        third = hub.peer()
        assert (await third.shake()).status is Status.BUSY
        third.sock.close()
        await hub.stub.Goodbye(pb.GoodbyeRequest(session=other.session, client=other.client))
        third = hub.peer()
        assert (await third.shake()).status is Status.BUSY, "it is let in at the next try"
        third.sock.close()
        assert await second.hung_up()
        await eventually(lambda: hub.connections == 1, "the place is free")
        async with hub.peer():
            await first.call(Method.LOOKUP, hub.lookup())


# ---- whatever arrives ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: hub\r\nAccept: */*\r\n\r\n",
        b"\xff" * 24,
        (calls.REQUEST_BODY_BYTES_MAX + 1).to_bytes(4, "little") + b"\1" + bytes(19),
        calls.encode_cancel(1)[:4] + b"\x09" + bytes(19),
    ],
    ids=["http", "ones", "oversized", "unknown"],
)
async def test_garbage_ends_the_connection(hub: Hub, raw: bytes) -> None:
    async with hub.peer() as peer:
        await peer.send(raw)
        assert await peer.hung_up()
        await eventually(lambda: hub.connections == 0, "nothing of it is left")
    async with hub.peer() as peer:
        await peer.call(Method.LOOKUP, hub.lookup())


async def test_one_call_begun_twice_is_garbage(hub: Hub) -> None:
    async with hub.peer() as peer:
        waiting = hub.acquire(hashes=bytes(range(32)), wait_ms=5000)
        announce = pb.AnnounceRequest(**hub.ids, hashes=bytes(range(32)), ttl_ms=5000)
        await peer.call(Method.ANNOUNCE, announce)
        await peer.begin(Method.ACQUIRE, waiting, call=7)
        await peer.begin(Method.LOOKUP, hub.lookup(), call=7)
        assert await peer.hung_up()
    await eventually(lambda: hub.held() == (0, 0, 0), "the stream is cancelled")


async def test_a_message_that_cannot_be_read_is_refused(hub: Hub) -> None:
    async with hub.peer() as peer:
        await peer.send(calls.encode_request(Method.LOOKUP, 3, 1000, b"\xff\xff\xff"))
        reply = await peer.reply()
        assert (reply.status, reply.call) == (INVALID, 3)
        await peer.call(Method.LOOKUP, hub.lookup())


async def test_cut_at_every_boundary(hub: Hub) -> None:
    """Whatever part of a call arrives before its peer goes away: nothing of it stays."""
    raw = calls.encode_request(Method.RESERVE, 1, 5000, hub.reserve().SerializeToString())
    before = len(os.listdir("/proc/self/fd"))
    for end in (*range(30), *range(30, len(raw), 16), len(raw) - 1):
        async with hub.peer() as peer:
            await peer.send(raw[:end])
    await eventually(lambda: hub.connections == 0, "all are gone")
    assert hub.held() == (0, 0, 0)
    assert len(os.listdir("/proc/self/fd")) <= before
    async with hub.peer() as peer:
        assert (await peer.call(Method.RESERVE, hub.reserve())).reservation


# ---- who goes away -------------------------------------------------------------------------------


async def until_waiting(hub: Hub, peer: Peer) -> None:
    """A stream that waits for a block that was announced."""
    await hub.publish(peer)
    coming = BLOCKS.chain(2, 1)
    await peer.call(Method.ANNOUNCE, pb.AnnounceRequest(**hub.ids, hashes=coming[0], ttl_ms=9000))
    request = hub.acquire(hashes=b"".join([*hub.keys, *coming]), wait_ms=9000)
    await peer.begin(Method.ACQUIRE, request, call=9)
    reply = await peer.reply()
    assert (reply.call, reply.last) == (9, False)
    assert hub.held() == (0, 1, 1)


async def test_a_cancelled_stream_gives_its_leases_back(hub: Hub) -> None:
    async with hub.peer() as peer:
        await until_waiting(hub, peer)
        await peer.send(calls.encode_cancel(9))
        await peer.call(Method.LOOKUP, hub.lookup())
        await eventually(lambda: hub.held() == (0, 0, 0), "cancelled")
        await peer.send(calls.encode_cancel(9))
        await peer.call(Method.LOOKUP, hub.lookup())


async def test_a_call_cancelled_where_it_arrives_leaves_nothing(hub: Hub) -> None:
    """Both in one piece, as from a client that gave up while the server stood still."""
    async with hub.peer() as peer:
        raw = calls.encode_request(Method.RESERVE, 1, 5000, hub.reserve().SerializeToString())
        await peer.send(raw + calls.encode_cancel(1))
        await peer.begin(Method.LOOKUP, hub.lookup(), call=2)
        assert (await peer.reply()).call == 2, "the first is not answered"
        assert hub.held() == (0, 0, 0)


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_call_that_was_begun_where_it_arrived_is_cancelled_like_a_task(steps: int) -> None:
    """Also before its task has made a step; and what it awaits is told to it as to a task."""
    loop = asyncio.get_running_loop()
    seen: list[object] = []

    async def work(future: asyncio.Future[str]) -> None:
        try:
            seen.append(await future)
            await asyncio.sleep(0)
            seen.append(await future)
            await loop.create_future()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    future = loop.create_future()
    coroutine = work(future)
    task = loop.create_task(rest_of(coroutine, coroutine.send(None)))
    if steps == 2:
        future.set_result("told")
    for _ in range(5 * min(steps, 1)):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [*(["told", "told"] if steps == 2 else []), "cancelled"]


async def test_a_connection_that_ends_cancels_its_stream(hub: Hub) -> None:
    async with hub.peer() as peer:
        await until_waiting(hub, peer)
    await eventually(lambda: hub.held() == (0, 0, 0), "cancelled")


async def test_a_call_past_its_deadline_ends(hub: Hub) -> None:
    async with hub.peer() as peer:
        await hub.publish(peer)
        coming = BLOCKS.chain(2, 1)[0]
        await peer.call(Method.ANNOUNCE, pb.AnnounceRequest(**hub.ids, hashes=coming, ttl_ms=9000))
        request = hub.acquire(hashes=coming, wait_ms=9000)
        await peer.begin(Method.ACQUIRE, request, call=4, deadline_ms=100)
        await eventually(lambda: hub.held()[2] == 1, "it waits")
        await eventually(lambda: hub.held() == (0, 0, 0), "it has ended")


async def test_a_reserve_that_nobody_hears_of_is_aborted(hub: Hub) -> None:
    """It waits for space when its client goes away; when there is some, nobody is there."""
    per_block = 16384
    fill = [bytes([i & 255, i >> 8]) * 16 for i in range(1, 2 + (16 << 20) // per_block)]
    async with hub.peer() as holder:
        parents = bytes(32 * len(fill))
        granted = await holder.call(
            Method.RESERVE, hub.reserve(hashes=b"".join(fill), parents=parents)
        )
        assert granted.verdicts[-1] == pb.RESERVE_VERDICT_NO_SPACE
        async with hub.peer() as peer:
            await peer.begin(Method.RESERVE, hub.reserve(wait_ms=9000), deadline_ms=9000)
            await eventually(lambda: hub.held()[2] == 1, "it waits")
        await eventually(lambda: hub.held()[2] == 0, "its caller is gone")
        abort = pb.AbortRequest(
            session=hub.hello.session,
            client=hub.hello.client,
            reservation=granted.reservation,
            drained=True,
        )
        await holder.call(Method.ABORT, abort)
        await eventually(lambda: hub.held() == (0, 0, 0), "what it was given went back")


async def test_a_reservation_whose_answer_came_too_late_is_aborted(hub: Hub) -> None:
    """Its client gave up while the answer was on its way: the next one need not wait."""
    async with hub.peer() as peer:
        await peer.begin(Method.RESERVE, hub.reserve(), call=7)
        assert (await peer.reply()).call == 7
        assert hub.held() == (1, 0, 0)
        await peer.send(calls.encode_cancel(7))
        await eventually(lambda: hub.held() == (0, 0, 0), "aborted")
        granted = await peer.call(Method.RESERVE, hub.reserve())
        assert set(granted.verdicts) == {pb.RESERVE_VERDICT_WRITE}
        assert all(tier.quarantined == 0 for tier in hub.server.node.driver.stats().tiers.values())


async def test_the_lease_of_a_lookup_whose_answer_came_too_late_goes_back(hub: Hub) -> None:
    async with hub.peer() as peer:
        await hub.publish(peer)
        await peer.begin(Method.LOOKUP, hub.lookup(pin_ms=9000), call=7)
        await peer.reply()
        assert hub.held() == (0, 1, 0)
        await peer.send(calls.encode_cancel(7))
        await eventually(lambda: hub.held() == (0, 0, 0), "given back")


async def test_what_has_ended_already_is_not_taken_back(hub: Hub) -> None:
    async with hub.peer() as peer:
        await peer.begin(Method.RESERVE, hub.reserve(), call=7)
        granted = pb.ReserveReply.FromString((await peer.reply()).body)
        abort = pb.AbortRequest(session=hub.hello.session, client=hub.hello.client, drained=True)
        abort.reservation = granted.reservation
        await peer.call(Method.ABORT, abort)
        await peer.send(calls.encode_cancel(7))
        await peer.call(Method.LOOKUP, hub.lookup())
        assert hub.held() == (0, 0, 0)


async def test_answers_that_may_be_taken_back_are_bounded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvserver.service.local.ANSWERS_MAX", 2)
    async with hub.peer() as peer:
        for call in (5, 6, 7):
            one = hub.reserve(hashes=BLOCKS.chain(call, 1)[0], parents=bytes(32))
            await peer.begin(Method.RESERVE, one, call=call)
            await peer.reply()
        await peer.send(b"".join(map(calls.encode_cancel, (5, 6, 7))))
        await eventually(lambda: hub.held() == (1, 0, 0), "the two latest are aborted")


# ---- bounds --------------------------------------------------------------------------------------


async def test_calls_at_once_are_bounded_by_name(hub: Hub) -> None:
    async with hub.peer() as peer:
        coming = BLOCKS.chain(2, 1)[0]
        await peer.call(Method.ANNOUNCE, pb.AnnounceRequest(**hub.ids, hashes=coming, ttl_ms=9000))
        waiting = hub.acquire(hashes=coming, wait_ms=9000)
        for call in range(calls.CALLS_MAX):
            await peer.begin(Method.ACQUIRE, waiting, call=100 + call)
        status, refusal = await peer.refused(Method.LOOKUP, hub.lookup())
        assert (status, refusal.field, refusal.limit) == (
            EXHAUSTED, "calls_max", str(calls.CALLS_MAX)
        )  # fmt: skip
    await eventually(lambda: hub.held() == (0, 0, 0), "all are cancelled")


async def test_a_peer_that_reads_no_answers_is_bounded_and_hung_up_on(hub: Hub) -> None:
    local: LocalCalls = hub.server._local
    local.stall_s = 0.3
    async with hub.peer() as peer:
        await hub.publish(peer)
        many = pb.LookupRequest(**hub.ids, hashes=b"".join(hub.keys) * 256)
        raw = calls.encode_request(Method.LOOKUP, 1, 5000, many.SerializeToString())
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for call in range(1, 10**6):
                await asyncio.get_running_loop().sock_sendall(
                    peer.sock, raw[:8] + call.to_bytes(8, "little") + raw[16:]
                )
                sent += 1

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            async with asyncio.timeout(WAIT_S):
                await flood()
        answered = sent * 2 * 1024
        assert answered < 8 << 20, "answers pile up"
        await eventually(lambda: hub.connections == 0, "hung up")
    async with hub.peer() as peer:
        await peer.call(Method.LOOKUP, hub.lookup())


async def test_the_end_of_the_server_ends_its_connections(hub: Hub) -> None:
    local = LocalCalls(
        object.__new__(type("Servicer", (), {m.rpc: None for m in calls.MESSAGES})),
        knows=lambda *_: True,
        report=lambda *_: None,
        log=logs.get_logger("local"),
    )
    assert not local.full()
    await local.close(0.1)
    assert local.full(), "takes no more"
    async with hub.peer() as peer:
        await until_waiting(hub, peer)
        await hub.server._local.close(0.1)
        assert await peer.hung_up()
        assert hub.held() == (0, 0, 0)
