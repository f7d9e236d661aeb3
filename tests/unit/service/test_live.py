"""Bad input over live gRPC: each is refused with its field named, and changes nothing."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.config import Settings
from kvserver.server import Server
from tests.support.payload import Blocks

BLOCKS = Blocks(layers=2, heads=2, page_bytes=512)
KEYS_MAX = 16
WHOLE = pb.Region(layer_stop=2, head_stop=2)
NO_SESSION = 12345


def spec_message() -> pb.NamespaceSpec:
    spec = BLOCKS.spec
    return pb.NamespaceSpec(
        format_version=spec.format_version,
        model=spec.model,
        weights=spec.weights,
        kv_dtype=spec.kv_dtype,
        encoding=spec.encoding,
        block_tokens=spec.block_tokens,
        page_tokens=spec.page_tokens,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        page_bytes=spec.page_bytes,
    )


@dataclass
class Hub:
    """A running server, its stubs, and a session with an open namespace."""

    server: Server
    channel: grpc.aio.Channel
    cache: Any
    admin: Any
    hello: Any = None
    namespace: Any = None
    keys: list[bytes] = field(default_factory=list)

    async def stats(self) -> pb.StatsReply:
        stats = await self.admin.Stats(pb.StatsRequest())
        stats.ClearField("uptime_ms")
        for session in stats.sessions:
            session.ClearField("idle_ms")
        for tier in stats.tiers:
            tier.ClearField("bytes_ready")
        return stats

    def reserve(self, **changes: Any) -> pb.ReserveRequest:
        fields = {
            "session": self.hello.session,
            "client": self.hello.client,
            "namespace": self.namespace.handle,
            "hashes": b"".join(self.keys),
            "parents": b"".join([bytes(32), *self.keys[:-1]]),
            "region": WHOLE,
        }
        return pb.ReserveRequest(**{**fields, **changes})

    def acquire(self, **changes: Any) -> pb.AcquireRequest:
        fields = {
            "session": self.hello.session,
            "client": self.hello.client,
            "namespace": self.namespace.handle,
            "hashes": b"".join(self.keys),
            "region": WHOLE,
        }
        return pb.AcquireRequest(**{**fields, **changes})


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    directory = Path(tempfile.mkdtemp(prefix="kvserver-test-", dir="/dev/shm"))
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_listen="",
        tcp_listen="",
        host_dir=str(directory),
        host_bytes=16 << 20,
        keys_per_call_max=KEYS_MAX,
        shm_tenants=("", "trusted"),
        message_bytes_max=1 << 20,
    )
    server = Server(settings)
    try:
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            hub = Hub(
                server,
                channel,
                kvserver_pb2_grpc.CacheStub(channel),
                kvserver_pb2_grpc.AdminStub(channel),
            )
            hub.hello = await hub.cache.Hello(pb.HelloRequest(protocol_version=1))
            hub.namespace = await hub.cache.OpenNamespace(
                pb.OpenNamespaceRequest(session=hub.hello.session, spec=spec_message())
            )
            hub.keys = BLOCKS.chain(1, 4)
            yield hub
    finally:
        await server.close()
        shutil.rmtree(directory, ignore_errors=True)


async def refused(call: Any, code: grpc.StatusCode, field_name: str) -> str:
    """The message of a call that must be refused with this status and field."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert error.code() is code, (error.code(), error.details())
    metadata = dict(error.trailing_metadata() or ())
    assert metadata.get("kv-field") == field_name, (metadata, error.details())
    return error.details() or ""


INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_wrong_protocol_version_names_both(hub: Hub) -> None:
    before = await hub.stats()
    message = await refused(
        hub.cache.Hello(pb.HelloRequest(protocol_version=9)),
        grpc.StatusCode.FAILED_PRECONDITION,
        "protocol_version",
    )
    assert "9" in message
    assert "1" in message
    assert await hub.stats() == before


async def test_a_wrong_token_joins_nothing(hub: Hub) -> None:
    before = await hub.stats()
    hello = pb.HelloRequest(protocol_version=1, join_token=bytes(16))
    await refused(hub.cache.Hello(hello), NOT_FOUND, "join_token")
    hello = pb.HelloRequest(protocol_version=1, join_token=b"short")
    await refused(hub.cache.Hello(hello), INVALID, "join_token")
    hello = pb.HelloRequest(protocol_version=1, join_token=hub.hello.token, tenant="other")
    await refused(hub.cache.Hello(hello), INVALID, "tenant")
    assert await hub.stats() == before
    assert len(hub.hello.token) == 16


async def test_a_rank_joins_by_token(hub: Hub) -> None:
    rank = await hub.cache.Hello(
        pb.HelloRequest(protocol_version=1, join_token=hub.hello.token, rank=1)
    )
    assert rank.session == hub.hello.session
    assert rank.client > hub.hello.client
    assert [s.clients for s in (await hub.stats()).sessions] == [2]


async def test_names_are_bounded(hub: Hub) -> None:
    hello = pb.HelloRequest(protocol_version=1, client_name="n" * 129)
    await refused(hub.cache.Hello(hello), INVALID, "client_name")


async def test_an_unknown_session_namespace_client_or_reservation(hub: Hub) -> None:
    before = await hub.stats()
    session, client = hub.hello.session, hub.hello.client
    keys = b"".join(hub.keys)
    lost = pb.HeartbeatRequest(session=NO_SESSION)
    await refused(hub.cache.Heartbeat(lost), NOT_FOUND, "session")
    await refused(hub.cache.Reserve(hub.reserve(session=NO_SESSION)), NOT_FOUND, "session")
    await refused(hub.cache.Reserve(hub.reserve(namespace=99)), NOT_FOUND, "namespace")
    await refused(hub.cache.Reserve(hub.reserve(client=client + 5)), NOT_FOUND, "client")
    lookup = pb.LookupRequest(session=session, namespace=99, hashes=keys)
    await refused(hub.cache.Lookup(lookup), NOT_FOUND, "namespace")
    commit = pb.CommitRequest(
        session=session,
        client=client,
        reservation=777,
        indices=bytes(4),
        region=WHOLE,
        checksums=bytes(4 * 8),
    )
    await refused(hub.cache.Commit(commit), NOT_FOUND, "reservation")
    abort = pb.AbortRequest(session=session, client=client, reservation=777)
    await refused(hub.cache.Abort(abort), NOT_FOUND, "reservation")
    await refused(hub.cache.Acquire(hub.acquire(namespace=99)).read(), NOT_FOUND, "namespace")
    assert await hub.stats() == before


async def test_ragged_and_oversized_lists(hub: Hub) -> None:
    before = await hub.stats()
    ragged = b"".join(hub.keys)[:-1]
    many = bytes(32 * (KEYS_MAX + 1))
    await refused(hub.cache.Reserve(hub.reserve(hashes=ragged)), INVALID, "hashes")
    await refused(hub.cache.Reserve(hub.reserve(hashes=b"")), INVALID, "hashes")
    await refused(hub.cache.Reserve(hub.reserve(parents=bytes(32))), INVALID, "parents")
    await refused(hub.cache.Reserve(hub.reserve(parents=ragged)), INVALID, "parents")
    await refused(hub.cache.Reserve(hub.reserve(hashes=many)), EXHAUSTED, "keys_per_call_max")
    await refused(hub.cache.Reserve(hub.reserve(tokens=bytes(15))), INVALID, "tokens")
    await refused(hub.cache.Reserve(hub.reserve(tokens=bytes(16))), INVALID, "tokens")
    too_many = np.full(4, 129, "<u4").tobytes()
    await refused(hub.cache.Reserve(hub.reserve(tokens=too_many)), INVALID, "tokens")
    release = pb.ReleaseRequest(session=hub.hello.session, leases=bytes(9))
    await refused(hub.cache.Release(release), INVALID, "leases")
    assert await hub.stats() == before


async def test_regions_and_durations_outside_their_limits(hub: Hub) -> None:
    before = await hub.stats()
    outside = pb.Region(layer_stop=3, head_stop=2)
    await refused(hub.cache.Reserve(hub.reserve(region=outside)), INVALID, "region.layers")
    await refused(hub.cache.Reserve(hub.reserve(region=None)), INVALID, "region.layers")
    await refused(hub.cache.Acquire(hub.acquire(region=outside)).read(), INVALID, "region.layers")
    longest = (1 << 32) - 1
    await refused(hub.cache.Reserve(hub.reserve(ttl_ms=longest)), EXHAUSTED, "reservation_ms_max")
    await refused(hub.cache.Reserve(hub.reserve(wait_ms=longest)), EXHAUSTED, "wait_ms_max")
    acquire = hub.acquire(lease_ms=longest)
    await refused(hub.cache.Acquire(acquire).read(), EXHAUSTED, "lease_ms_max")
    acquire = hub.acquire(window_bytes=(1 << 64) - 1)
    await refused(hub.cache.Acquire(acquire).read(), EXHAUSTED, "window_bytes_max")
    announce = pb.AnnounceRequest(
        session=hub.hello.session,
        namespace=hub.namespace.handle,
        hashes=hub.keys[0],
        ttl_ms=longest,
    )
    await refused(hub.cache.Announce(announce), EXHAUSTED, "announce_ttl_ms_max")
    assert await hub.stats() == before


async def test_a_commit_whose_parts_do_not_fit_together(hub: Hub) -> None:
    reply = await hub.cache.Reserve(hub.reserve())
    before = await hub.stats()
    fields: dict[str, Any] = {
        "session": hub.hello.session,
        "client": hub.hello.client,
        "reservation": reply.reservation,
        "indices": np.arange(2, dtype="<u4").tobytes(),
        "region": WHOLE,
        "checksums": bytes(2 * 4 * 8),
    }
    for name, value, refusal in (
        ("checksums", bytes(2 * 4 * 8 - 8), "checksums"),
        ("checksums", bytes(7), "checksums"),
        ("indices", bytes(7), "indices"),
        ("indices", np.array([0, 99], "<u4").tobytes(), "indices"),
        ("indices", np.array([1, 1], "<u4").tobytes(), "indices"),
        ("region", pb.Region(), "region.layers"),
        ("hashes", bytes(range(64)), "parents"),
        ("parents", bytes(range(64)), "hashes"),
        ("hashes", bytes(33), "hashes"),
    ):
        commit = pb.CommitRequest(**{**fields, name: value})
        await refused(hub.cache.Commit(commit), INVALID, refusal)
    assert await hub.stats() == before


async def test_a_spec_that_cannot_be_right_names_its_field(hub: Hub) -> None:
    before = await hub.stats()
    for name, value in (
        ("weights", b"x"),
        ("layers", 0),
        ("layers", 5000),
        ("page_bytes", 1 << 31),
        ("page_tokens", 7),
        ("model", ""),
        ("format_version", 2),
    ):
        spec = spec_message()
        setattr(spec, name, value)
        request = pb.OpenNamespaceRequest(session=hub.hello.session, spec=spec)
        with pytest.raises(grpc.aio.AioRpcError, match=r"spec\."):
            await hub.cache.OpenNamespace(request)
    other = spec_message()
    other.tenant = "somebody"
    request = pb.OpenNamespaceRequest(session=hub.hello.session, spec=other)
    await refused(hub.cache.OpenNamespace(request), INVALID, "spec.tenant")
    huge = spec_message()
    huge.page_bytes = 8 << 20
    request = pb.OpenNamespaceRequest(session=hub.hello.session, spec=huge)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hub.cache.OpenNamespace(request)
    assert caught.value.code() is EXHAUSTED
    assert await hub.stats() == before


async def test_a_near_miss_is_told_and_shown(hub: Hub) -> None:
    other = spec_message()
    other.kv_dtype = "bfloat16"
    reply = await hub.cache.OpenNamespace(
        pb.OpenNamespaceRequest(session=hub.hello.session, spec=other)
    )
    assert reply.handle != hub.namespace.handle
    assert [m for m in reply.near_misses if "kv_dtype" in m]
    listed = await hub.admin.ListNamespaces(pb.ListNamespacesRequest())
    shown = {n.namespace_id: list(n.near_misses) for n in listed.namespaces}
    assert shown[reply.namespace_id] == list(reply.near_misses)


async def test_admin_deletes_one_namespace_by_its_whole_id(hub: Hub) -> None:
    before = await hub.stats()
    await refused(hub.admin.Evict(pb.EvictRequest()), INVALID, "namespace_id")
    await refused(hub.admin.DropNamespace(pb.DropNamespaceRequest()), INVALID, "namespace_id")
    unknown = pb.DropNamespaceRequest(namespace_id=bytes(32))
    await refused(hub.admin.DropNamespace(unknown), NOT_FOUND, "namespace_id")
    assert await hub.stats() == before


async def test_the_offer_of_shared_memory_depends_on_the_tenant(hub: Hub) -> None:
    assert [t.name for t in hub.hello.transports] == ["shm"]
    stranger = await hub.cache.Hello(pb.HelloRequest(protocol_version=1, tenant="stranger"))
    assert list(stranger.transports) == []


async def test_an_exception_in_a_handler_is_an_incident_not_the_end(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(hub.server.node.sessions, "get", explode)
        with pytest.raises(grpc.aio.AioRpcError, match=r"incident [0-9a-f]{8}") as caught:
            await hub.cache.Heartbeat(pb.HeartbeatRequest(session=hub.hello.session))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert hub.server.incidents.count == 1
    beat = await hub.cache.Heartbeat(pb.HeartbeatRequest(session=hub.hello.session))
    assert beat.epoch == hub.hello.epoch


async def test_a_message_over_the_size_limit_is_refused(hub: Hub) -> None:
    request = hub.reserve(hashes=bytes(2 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hub.cache.Reserve(request)
    assert caught.value.code() is EXHAUSTED


async def test_calls_at_once_are_bounded_but_heartbeats_pass(hub: Hub) -> None:
    gate = hub.server.gate
    gate.running = gate.rpcs_max
    try:
        lookup = pb.LookupRequest(
            session=hub.hello.session, namespace=hub.namespace.handle, hashes=hub.keys[0]
        )
        await refused(hub.cache.Lookup(lookup), EXHAUSTED, "rpcs_max")
        await hub.cache.Heartbeat(pb.HeartbeatRequest(session=hub.hello.session))
    finally:
        gate.running = 0
    await hub.cache.Lookup(lookup)


async def test_a_cancelled_stream_leaves_nothing_behind(hub: Hub) -> None:
    call = hub.cache.Acquire(hub.acquire(wait_ms=30_000))
    announce = pb.AnnounceRequest(
        session=hub.hello.session, namespace=hub.namespace.handle, hashes=b"".join(hub.keys)
    )
    await hub.cache.Announce(announce)
    await asyncio.sleep(0.1)
    call.cancel()
    for _ in range(100):
        if hub.server.gate.running == 0:
            break
        await asyncio.sleep(0.02)
    assert hub.server.gate.running == 0
    assert hub.server.driver.open_requests == 0
    goodbye = pb.GoodbyeRequest(session=hub.hello.session, client=hub.hello.client, drained=True)
    await hub.cache.Goodbye(goodbye)
    assert list((await hub.stats()).sessions) == []


async def test_health_and_reflection(hub: Hub) -> None:
    health = health_pb2_grpc.HealthStub(hub.channel)
    reply = await health.Check(health_pb2.HealthCheckRequest(service="kvserver.v1.Cache"))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(hub.channel)
    call = reflection.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {s.name for s in (await call.read()).list_services_response.service}
    await call.done_writing()
    assert {"kvserver.v1.Cache", "kvserver.v1.Admin", "grpc.health.v1.Health"} <= listed
