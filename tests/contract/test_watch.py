"""Watching a live hub: what a watcher knows is what the hub holds, whatever happens to either."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

from kvclient import (
    AsyncClient,
    CacheMap,
    Client,
    LimitExceeded,
    NotFound,
    Tier,
    Watch,
    WatchEvent,
    WatchKind,
)
from kvproto.prefix import ROOT
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.cli import main
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=2, heads=2, page_bytes=512)
OTHER = Blocks(layers=2, heads=2, page_bytes=512, name="other")
Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all tests that leave it as it was."""
    with start_server(tmp_path_factory.mktemp("hub"), disk_bytes="256MiB") as server:
        yield server


async def hear(
    watch: Watch, cached: CacheMap, until: Callable[[], bool], seconds: float = 15
) -> list[WatchEvent]:
    """Feed events until something holds."""
    seen: list[WatchEvent] = []
    async with asyncio.timeout(seconds):
        while not until():
            seen.append(await anext(watch))
            cached.apply(seen[-1])
    return seen


@contextlib.asynccontextmanager
async def watching(client: AsyncClient) -> AsyncIterator[tuple[Watch, CacheMap]]:
    async with client.watch() as watch:
        cached = CacheMap()
        await hear(watch, cached, lambda: cached.synced)
        yield watch, cached


def tiers(cached: CacheMap, blocks: Blocks = BLOCKS) -> dict[bytes, set[Tier]]:
    return {key: set(b.tiers) for key, b in cached.blocks.get(blocks.spec.id, {}).items()}


async def test_what_is_told_is_what_the_hub_holds(server: ServerProcess) -> None:
    keys = BLOCKS.chain(1, 6)
    async with AsyncClient.connect(server.address) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        await namespace.push(keys[:3], BLOCKS.payloads(keys[:3]), durable=True)
        async with watching(client) as (watch, cached):
            assert cached.epoch == client.epoch
            assert cached.specs == {BLOCKS.spec.id: BLOCKS.spec}
            both = {Tier.HOST, Tier.DISK}
            assert tiers(cached) == dict.fromkeys(keys[:3], both)
            await namespace.push(
                keys[3:], BLOCKS.payloads(keys[3:]), parents=keys[2:-1], durable=True
            )
            await hear(watch, cached, lambda: tiers(cached) == dict.fromkeys(keys, both))
            known = cached.blocks[BLOCKS.spec.id]
            assert [known[key].parent for key in keys] == [ROOT, *keys[:-1]]
            assert {block.tokens for block in known.values()} == {128}
            assert cached.prefix(BLOCKS.spec.id, keys) == 6
            await client.evict(BLOCKS.spec.id, keys[4:])
            await hear(watch, cached, lambda: len(tiers(cached)) == 4)
            assert cached.prefix(BLOCKS.spec.id, keys) == 4
            other = await client.open_namespace(OTHER.spec)
            await other.push(OTHER.chain(1, 1), OTHER.payloads(OTHER.chain(1, 1)))
            await hear(watch, cached, lambda: len(tiers(cached, OTHER)) == 1)
            await client.drop_namespace(BLOCKS.spec.id)
            await hear(watch, cached, lambda: BLOCKS.spec.id not in cached.blocks)
            assert set(cached.specs) == {OTHER.spec.id}


async def test_one_namespace_and_only_of_the_own_tenant(server: ServerProcess) -> None:
    keys = BLOCKS.chain(1, 2)
    async with (
        AsyncClient.connect(server.address) as client,
        AsyncClient.connect(server.address, tenant="stranger") as stranger,
    ):
        namespace = await client.open_namespace(BLOCKS.spec)
        other = await client.open_namespace(OTHER.spec)
        async with watching(stranger) as (theirs, nothing), namespace.watch() as watch:
            await other.push(keys, OTHER.payloads(keys))
            await namespace.push(keys, BLOCKS.payloads(keys))
            cached = CacheMap()
            await hear(watch, cached, lambda: len(tiers(cached)) == 2)
            assert set(cached.blocks) == {BLOCKS.spec.id}
            with pytest.raises(TimeoutError):
                await hear(theirs, nothing, lambda: bool(nothing.blocks), seconds=0.5)
        with pytest.raises(NotFound, match="no such namespace"):
            await anext(Watch(stranger.session, BLOCKS.spec.id))


async def test_a_restarted_hub_is_told_by_its_epoch(serve: Serve) -> None:
    server = serve()
    keys = BLOCKS.chain(1, 5)
    async with AsyncClient.connect(server.address, deadline_s=3) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        await namespace.push(keys, BLOCKS.payloads(keys))
        async with namespace.watch() as watch:
            cached = CacheMap()
            await hear(watch, cached, lambda: cached.synced)
            before, epoch = dict(cached.blocks), cached.epoch
            server.kill()
            lost = await hear(watch, cached, lambda: not cached.synced)
            assert [event.kind for event in lost] == [WatchKind.LOST]
            assert server.address in lost[0].reason
            server.restart()
            seen = await hear(watch, cached, lambda: cached.synced)
            assert (seen[0].kind, seen[0].reason) == (WatchKind.RESET, "start")
            assert cached.epoch == epoch + 1
            assert cached.blocks == before, "the restart was warm"
            more = BLOCKS.chain(2, 1)
            await namespace.push(more, BLOCKS.payloads(more))
            await hear(watch, cached, lambda: more[0] in cached.blocks[BLOCKS.spec.id])


async def test_a_slow_watcher_starts_again_and_slows_nobody(serve: Serve) -> None:
    """A watcher that reads nothing while 4 rounds of 1,500 blocks come and go. One that hears each
    round before the next never has more than 1,500 before it, however late it looks.
    """
    server = serve(watch_changes_max=2000, host_bytes="128MiB")
    narrow = [("grpc.http2.bdp_probe", 0)]  # else gRPC buffers megabytes on loopback
    async with (
        AsyncClient.connect(server.address, deadline_s=20) as client,
        grpc.aio.insecure_channel(server.address, options=narrow) as channel,
    ):
        cache: Any = kvserver_pb2_grpc.CacheStub(channel)
        hello = await cache.Hello(pb.HelloRequest(protocol_version=1))
        slow = cache.Watch(pb.WatchRequest(session=hello.session))
        beating = asyncio.create_task(beat(cache, hello))
        assert (await slow.read()).reason == "start"
        namespace = await client.open_namespace(BLOCKS.spec)
        async with watching(client) as (watch, cached):
            for keys in (BLOCKS.chain(seed, 1500) for seed in range(4)):
                async with await namespace.reserve(keys) as reserved:  # whatever they hold
                    await reserved.commit()
                await hear(watch, cached, lambda keys=keys: tiers(cached).keys() == set(keys))
                await client.evict(namespace.id)
                await hear(watch, cached, lambda: not tiers(cached))
            last = BLOCKS.chain(99, 3)
            await namespace.push(last, BLOCKS.payloads(last))
            await hear(watch, cached, lambda: tiers(cached).keys() == set(last))
        stats = await client.stats()
        assert stats.counters["watch_overflows"] == 0, "the other watcher kept up"
        heard = list[pb.WatchReply]()
        while not heard or heard[-1].kind != pb.WATCH_KIND_RESET:
            heard.append(await asyncio.wait_for(slow.read(), 10))
        assert heard[-1].reason == "overflow"
        assert sum(len(reply.tiers) for reply in heard) < 4 * 1500
        assert [reply.sequence for reply in heard] == list(range(2, len(heard) + 2))
        snapshot = await slow.read()
        assert snapshot.hashes == b"".join(last)
        assert (await slow.read()).kind == pb.WATCH_KIND_SYNCED
        beating.cancel()


async def beat(cache: Any, hello: pb.HelloReply) -> None:
    while True:
        await cache.Heartbeat(pb.HeartbeatRequest(session=hello.session, client=hello.client))
        await asyncio.sleep(1)


async def test_watchers_are_bounded_and_leave_their_place(serve: Serve) -> None:
    server = serve(watchers_max=2)
    async with AsyncClient.connect(server.address) as client:
        async with watching(client), watching(client):
            with pytest.raises(LimitExceeded) as refused:
                await anext(client.watch())
            assert (refused.value.field, refused.value.limit) == ("watchers_max", "2")
        for _ in range(400):  # a closed stream is heard of by the hub a moment later
            if (await client.stats()).counters["watchers"] == 0:
                break
            await asyncio.sleep(0.05)
        async with watching(client):
            pass


async def test_a_watch_ends_with_its_session(serve: Serve) -> None:
    server = serve(session_ttl_ms=1500, heartbeat_ms=100)
    async with grpc.aio.insecure_channel(server.address) as channel:
        cache: Any = kvserver_pb2_grpc.CacheStub(channel)
        hello = await cache.Hello(pb.HelloRequest(protocol_version=1))
        stream = cache.Watch(pb.WatchRequest(session=hello.session))
        assert (await stream.read()).kind == pb.WATCH_KIND_RESET
        assert (await stream.read()).kind == pb.WATCH_KIND_SYNCED
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stream.read()
        assert ended.value.code() is grpc.StatusCode.NOT_FOUND
        hello = await cache.Hello(pb.HelloRequest(protocol_version=1))
        wrong = cache.Watch(pb.WatchRequest(session=hello.session, namespace_id=b"x"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await wrong.read()
        assert "namespace_id" in str(refused.value.details())


async def test_a_server_that_stops_ends_its_watches_at_once(serve: Serve) -> None:
    server = serve()
    async with AsyncClient.connect(server.address) as client, watching(client) as (watch, cached):
        await asyncio.to_thread(server.terminate)
        (event,) = await hear(watch, cached, lambda: not cached.synced)
        assert event.kind is WatchKind.LOST


def test_the_synchronous_watch(server: ServerProcess) -> None:
    keys = BLOCKS.chain(1, 2)
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        with client.watch() as everything, namespace.watch() as watch:
            cached = CacheMap()
            for event in watch:
                cached.apply(event)
                if cached.synced:
                    break
            assert watch.next(0.1) is None
            namespace.push(keys, BLOCKS.payloads(keys))
            while len(tiers(cached)) < 2:
                told = watch.next(5.0)
                assert told is not None
                cached.apply(told)
            first = next(everything)
            assert first.kind is WatchKind.RESET
        assert list(watch) == []


def test_a_synchronous_watch_ends_when_its_client_is_closed(server: ServerProcess) -> None:
    client = Client.connect(server.address)
    watch, seen = client.watch(), list[WatchEvent]()
    reader = threading.Thread(target=lambda: seen.extend(watch))
    reader.start()
    client.close()
    reader.join(10)
    assert not reader.is_alive()


def test_the_command_tells_a_line_a_block(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = BLOCKS.chain(1, 2)
    with Client.connect(server.address) as client:
        for blocks in (BLOCKS, OTHER):
            client.open_namespace(blocks.spec).push(keys, blocks.payloads(keys), durable=True)
    identity = BLOCKS.spec.id.hex()
    command = ["watch", "--address", server.address, "--once"]
    assert main([*command, "--namespace", identity[:8]]) == 0
    reset, namespace, *blocks, synced = map(json.loads, capsys.readouterr().out.splitlines())
    assert (reset["event"], reset["reason"], synced) == ("reset", "start", {"event": "synced"})
    assert (namespace["namespace"], namespace["spec"]["model"]) == (identity, "oracle")
    assert {block["hash"]: block["parent"] for block in blocks} == {
        keys[0].hex(): ROOT.hex(),
        keys[1].hex(): keys[0].hex(),
    }
    assert {tuple(block["tiers"]) for block in blocks} == {("host", "disk")}
    assert main([*command, "--tenant", "stranger"]) == 0
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == [
        "reset", "synced",
    ]  # fmt: skip


@contextlib.contextmanager
def interruptible(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that SIGINT ends, also where this one ignores it (a job in the background)."""
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=default
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_command_goes_on_beyond_a_sessions_life_until_it_is_interrupted(serve: Serve) -> None:
    server = serve(session_ttl_ms=600, heartbeat_ms=200)
    command = [sys.executable, "-m", "kvserver", "watch", "--address", server.address]
    with interruptible(command) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline())["event"] for _ in range(2)]
        assert lines == ["reset", "synced"]
        threading.Event().wait(1.5)
        keys = BLOCKS.chain(1, 1)
        with Client.connect(server.address) as client:
            namespace = client.open_namespace(BLOCKS.spec)
            namespace.push(keys, BLOCKS.payloads(keys))
            client.evict(namespace.id)
        told = [json.loads(process.stdout.readline())["event"]]
        while "gone" not in told:
            told.append(json.loads(process.stdout.readline())["event"])
        assert told[0] == "namespace"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
