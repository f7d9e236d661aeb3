"""The data port of a real server: gRPC decides, raw sockets move the bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvproto.frames import Hello, HelloStatus, Place, Status
from kvproto.grid import Region
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from tests.contract.conftest import eventually, host_tier
from tests.support.server import ServerProcess, start_server
from tests.support.tcp import RawTcp, sums_of

Serve = Callable[..., ServerProcess]
LAYERS, HEADS, PAGE = 6, 4, 2048
WHOLE = Region(0, LAYERS, 0, HEADS)
CELL = 8 * PAGE
TTL_MS = 300


def message_of(region: Region) -> pb.Region:
    return pb.Region(
        layer_start=region.layer_start,
        layer_stop=region.layer_stop,
        head_start=region.head_start,
        head_stop=region.head_stop,
    )


class Engine:
    """One session, its stubs and its namespace; connections to the data port as asked."""

    def __init__(self, server: ServerProcess) -> None:
        self.channel = grpc.insecure_channel(server.address)
        self.stub = kvserver_pb2_grpc.CacheStub(self.channel)
        self.port = server.ready["tcp_listen"]
        self.hello = self.stub.Hello(pb.HelloRequest(protocol_version=1, client_name="raw"))
        self.ids = {"session": self.hello.session, "client": self.hello.client}
        spec = pb.NamespaceSpec(
            format_version=1,
            model="tcp",
            weights=bytes(32),
            kv_dtype="float16",
            encoding="raw/1",
            block_tokens=128,
            page_tokens=16,
            layers=LAYERS,
            kv_heads=HEADS,
            page_bytes=PAGE,
        )
        opened = self.stub.OpenNamespace(
            pb.OpenNamespaceRequest(session=self.hello.session, spec=spec)
        )
        assert opened.geometry.cell_bytes == CELL
        self.ids["namespace"] = opened.handle

    def connect(self) -> RawTcp:
        raw = RawTcp(self.port)
        welcome = raw.hello(Hello(self.hello.session, self.hello.client, self.hello.token))
        assert welcome.status is HelloStatus.OK, welcome
        assert (welcome.epoch, welcome.arena_id) == (self.hello.epoch, self.hello.arena_id)
        return raw

    def reserve(self, keys: list[bytes], *, ttl_ms: int = 0) -> tuple[pb.ReserveReply, list[Place]]:
        reply = self.stub.Reserve(
            pb.ReserveRequest(
                **self.ids,
                hashes=b"".join(keys),
                parents=bytes(32) + b"".join(keys[:-1]),
                region=message_of(WHOLE),
                ttl_ms=ttl_ms,
                wait_ms=5000,
            )
        )
        assert set(reply.verdicts) == {pb.RESERVE_VERDICT_WRITE}
        return reply, places(reply.reservation, reply)

    def commit(self, reservation: int, sums: list[bytes]) -> int:
        ids = {k: self.ids[k] for k in ("session", "client")}
        reply = self.stub.Commit(
            pb.CommitRequest(
                **ids,
                reservation=reservation,
                indices=np.arange(len(sums), dtype="<u4").tobytes(),
                region=message_of(WHOLE),
                checksums=b"".join(sums),
            )
        )
        assert not any(reply.verdicts)
        return int(reply.completed)

    def acquire(self, keys: list[bytes]) -> list[Place]:
        request = pb.AcquireRequest(
            **self.ids, hashes=b"".join(keys), region=message_of(WHOLE), lease_ms=5000
        )
        found: dict[int, Place] = {}
        for reply in self.stub.Acquire(request, timeout=10):
            if reply.HasField("grant"):
                indices = np.frombuffer(reply.grant.indices, "<u4").tolist()
                leased = places(reply.grant.lease, reply.grant)
                found |= dict(zip(indices, leased, strict=True))
        return [found[index] for index in sorted(found)]

    def close(self) -> None:
        self.channel.close()


def places(hold: int, granted: pb.ReserveReply | pb.Grant) -> list[Place]:
    offsets = np.frombuffer(granted.offsets, "<u8").tolist()
    generations = np.frombuffer(granted.generations, "<u8").tolist()
    permits = [granted.permits[i : i + 16] for i in range(0, len(granted.permits), 16)]
    return [
        Place(hold, offset, generation, CELL, LAYERS, HEADS, WHOLE, permit)
        for offset, generation, permit in zip(offsets, generations, permits, strict=True)
    ]


def keys_of(seed: int, count: int) -> list[bytes]:
    return [np.random.default_rng([seed, i]).bytes(32) for i in range(count)]


def payload_of(key: bytes) -> bytes:
    return np.random.default_rng(list(key)).bytes(WHOLE.cells * CELL)


@pytest.fixture(scope="module", params=[1, 0], ids=["process", "threads"])
def hub(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with start_server(
        tmp_path_factory.mktemp("tcp"),
        host_bytes="32MiB",
        tcp_listen="127.0.0.1:0",
        tcp_workers=request.param,
        tcp_stall_ms=20_000,
        session_ttl_ms=30_000,
    ) as server:
        yield server


@pytest.fixture
def engine(hub: ServerProcess) -> Iterator[Engine]:
    engine = Engine(hub)
    yield engine
    engine.close()


def test_what_is_written_committed_and_acquired_reads_the_same(
    hub: ServerProcess, engine: Engine
) -> None:
    keys = keys_of(1, 5)
    with engine.connect() as data:
        reply, writable = engine.reserve(keys)
        for key, place in zip(keys, writable, strict=True):
            assert data.write(place, WHOLE, payload_of(key)).status is Status.OK
        sums = [sums_of(payload_of(key), CELL) for key in keys]
        assert engine.commit(reply.reservation, sums) == 5
        readable = engine.acquire(keys)
        assert len(readable) == 5
        for key, place, told in zip(keys, readable, sums, strict=True):
            status, trailer, payload = data.read(place, WHOLE)
            assert (status, trailer) == (Status.OK, told)
            assert payload == payload_of(key)
        late = data.write(writable[0], WHOLE, bytes(WHOLE.cells * CELL))
        assert late.status is Status.STALE, "a committed block is immutable"
    (shown,) = [s for s in hub.stats().sessions if s.session == engine.hello.session]
    assert list(shown.transports) == ["tcp"]
    counted = 5 * WHOLE.cells * CELL
    eventually(lambda: hub.stats().counters["tcp_bytes_out"] >= counted, "bytes are counted")
    assert hub.stats().counters["tcp_bytes_in"] >= counted


def test_permits_are_for_clients_of_the_data_port_only(engine: Engine) -> None:
    assert [offer.name for offer in engine.hello.transports] == ["shm", "tcp"]
    ids = {**engine.ids, "region": message_of(WHOLE)}
    reply = engine.stub.Reserve(
        pb.ReserveRequest(**ids, hashes=keys_of(2, 1)[0], parents=bytes(32), wait_ms=5000)
    )
    assert reply.permits == b""
    engine.connect().close()
    assert len(engine.reserve(keys_of(3, 2))[0].permits) == 32


def test_a_writer_that_stands_in_a_frame_when_its_reservation_ends(
    hub: ServerProcess, engine: Engine
) -> None:
    """Its connection goes, its slots come back, and it may begin anew under the same name."""
    keys = keys_of(4, 1)
    payload = payload_of(keys[0])
    with engine.connect() as data:
        before = hub.stats().counters["quarantines"]
        _, (place,) = engine.reserve(keys, ttl_ms=TTL_MS)
        data.begin_write(place, WHOLE, sums_of(payload, CELL))
        data.sock.sendall(payload[: len(payload) // 2])
        eventually(lambda: hub.stats().counters["quarantines"] == before + 1, "expired")
        eventually(lambda: host_tier(hub).slots_quarantined == 0, "the slot is back")
        assert data.ended()
    with engine.connect() as data:
        reply, (again,) = engine.reserve(keys)
        assert (again.offset, again.generation) != (place.offset, place.generation)
        assert data.write(place, WHOLE, payload).status is Status.STALE, "the old permit is over"
        assert data.write(again, WHOLE, payload).status is Status.OK
        assert engine.commit(reply.reservation, [sums_of(payload, CELL)]) == 1
        (readable,) = engine.acquire(keys)
        assert data.read(readable, WHOLE)[2] == payload


def test_a_client_that_says_goodbye_is_dropped(engine: Engine) -> None:
    with engine.connect() as data:
        ids = {k: engine.ids[k] for k in ("session", "client")}
        engine.stub.Goodbye(pb.GoodbyeRequest(**ids, drained=True))
        assert data.ended()


def worker_of(server: ServerProcess) -> int:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    (worker,) = (
        int(child)
        for child in children
        if b"kvserver.transfer.tcp.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return worker


@pytest.mark.parametrize("nice", [10, 0])
def test_the_worker_steps_back_behind_the_server(serve: Serve, nice: int) -> None:
    """What moves bytes must not push the loop off its core (ADR 0005)."""
    options = {} if nice == 10 else {"tcp_worker_nice": nice}
    server = serve(host_bytes="8MiB", tcp_listen="127.0.0.1:0", **options)
    worker = worker_of(server)
    usual = os.getpriority(os.PRIO_PROCESS, server.pid)
    policy = os.SCHED_BATCH if nice else os.sched_getscheduler(server.pid)

    def stepped() -> bool:
        told = os.getpriority(os.PRIO_PROCESS, worker), os.sched_getscheduler(worker)
        return told == (min(19, usual + nice), policy)

    eventually(stepped, "its scheduling")


def test_the_worker_ends_with_a_killed_server(serve: Serve) -> None:
    server = serve(host_bytes="32MiB", tcp_listen="127.0.0.1:0")
    engine = Engine(server)
    keys = keys_of(5, 1)
    payload = payload_of(keys[0])
    with engine.connect() as data:
        _, (place,) = engine.reserve(keys)
        data.begin_write(place, WHOLE, sums_of(payload, CELL))
        data.sock.sendall(payload[:5000])
        server.kill()
        assert data.ended()
    engine.close()
    server.restart()
    eventually(lambda: host_tier(server).slots_quarantined == 0, "nobody writes any more")
    engine = Engine(server)
    with engine.connect() as data:
        stale = data.write(place, WHOLE, payload)
        assert stale.status is Status.DENIED, "permits end with the server that gave them"
    engine.close()


def test_a_killed_worker_is_replaced_and_the_server_lives(serve: Serve) -> None:
    server = serve(host_bytes="32MiB", tcp_listen="127.0.0.1:0")
    engine = Engine(server)
    with engine.connect() as data:
        os.kill(worker_of(server), signal.SIGKILL)
        assert data.ended()
    with engine.connect() as data:
        _, (place,) = engine.reserve(keys_of(6, 1))
        assert data.write(place, WHOLE, payload_of(b"x")).status is Status.OK
    assert server.wait_event("tcp_worker_lost")["status"] == -signal.SIGKILL
    engine.close()


def test_a_terminated_server_takes_its_worker_along(serve: Serve) -> None:
    server = serve(host_bytes="32MiB", tcp_listen="127.0.0.1:0")
    worker = worker_of(server)
    assert server.terminate() == 0
    assert not Path(f"/proc/{worker}").exists()


def test_a_port_that_is_taken_stops_the_start(serve: Serve, hub: ServerProcess) -> None:
    server = serve(host_bytes="32MiB", tcp_listen=hub.ready["tcp_listen"], wait=False)
    assert server.wait_exit() != 0
    assert f"tcp_listen: {hub.ready['tcp_listen']}" in server.log()
