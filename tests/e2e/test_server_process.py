"""A server process over its life: warm restarts, draining, one server a directory, limits."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvclient import Client, KVError
from kvproto import cells
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from tests.contract.conftest import eventually
from tests.support.payload import Blocks
from tests.support.server import ServerError, ServerProcess, free_port, start_server

BLOCKS = Blocks(layers=4, heads=2, page_bytes=1024)
KEYS = BLOCKS.chain(1, 8)
Serve = Callable[..., ServerProcess]


def push(server: ServerProcess, keys: list[bytes] = KEYS, *, durable: bool = False) -> int:
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        return namespace.push(keys, BLOCKS.payloads(keys), durable=durable).written


def pull(server: ServerProcess, keys: list[bytes] = KEYS) -> int:
    """How many blocks were found; a wrong byte fails."""
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        out = BLOCKS.out(len(keys))
        found = namespace.pull(keys, out).found
        assert BLOCKS.wrong(keys, out, found) == []
        return int(np.count_nonzero(found))


def usable(server: ServerProcess, keys: list[bytes] = KEYS) -> int:
    with Client.connect(server.address) as client:
        return client.open_namespace(BLOCKS.spec).lookup(keys).usable_blocks


def scrape(server: ServerProcess) -> dict[str, float]:
    """Samples of /metrics by name and labels as they are printed."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def slots_add_up(stats: pb.StatsReply) -> bool:
    return all(
        t.slots
        == t.slots_free
        + t.slots_filling
        + t.slots_committed
        + t.slots_copying
        + t.slots_quarantined
        for t in stats.tiers
    )


def test_memory_survives_sigkill_and_the_epoch_grows(serve: Serve) -> None:
    server = serve()
    assert push(server) == len(KEYS)
    first = server.ready["epoch"]
    server.kill()
    server.restart()
    assert server.ready["warm"]
    assert server.ready["native"] is cells.LIBRARY.exists()
    assert server.ready["epoch"] == first + 1
    assert usable(server) == len(KEYS)
    assert pull(server) == len(KEYS)
    assert slots_add_up(server.stats())


def test_durable_blocks_survive_the_loss_of_the_memory(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB")
    assert push(server, durable=True) == len(KEYS)
    server.kill()
    (server.host_dir / "arena").unlink()
    server.restart()
    assert not server.ready["warm"]
    assert usable(server) == len(KEYS)
    assert pull(server) == len(KEYS)


def test_a_disk_that_is_added_later_knows_the_namespaces_of_before(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve()
    push(server)
    server.terminate()
    server.restart(disk_bytes="64MiB", disk_path=str(tmp_path / "disk"))
    assert pull(server) == len(KEYS)  # and so verified
    assert push(server, durable=True) == 0  # all present: only written to disk
    server.kill()
    (server.host_dir / "arena").unlink()
    (server.host_dir / "namespaces").unlink()
    server.restart()
    assert pull(server) == len(KEYS)


def test_three_tiers_serve_the_same_bytes(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB", device_bytes="16MiB", device="memory", host_bytes="16MiB")
    keys = [key for seed in range(20, 26) for key in BLOCKS.chain(seed, 12)]
    for start in range(0, len(keys), 12):
        assert push(server, keys[start : start + 12], durable=True) == 12
    for _ in range(5):
        assert pull(server, keys[:24]) == 24
    assert pull(server, keys) == len(keys)
    stats = server.stats()
    assert slots_add_up(stats)
    assert stats.counters["uploads"] > 0
    assert not stats.counters["incidents"]


def test_sigterm_drains_the_write_behind(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB", failpoints="spill.before_write=sleep:0.3")
    assert push(server) == len(KEYS)
    assert server.terminate() == 0
    assert server.wait_event("drained")
    (server.host_dir / "arena").unlink()
    server.restart()
    assert usable(server) == len(KEYS)


def test_sigterm_gives_up_at_its_deadline(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB", drain_ms=300, failpoints="spill.before_write=sleep:2")
    push(server)
    started = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - started < 8
    assert server.wait_event("drain_ended_early")


def test_a_second_server_in_the_same_directory_is_refused(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    push(server)
    with pytest.raises(ServerError, match="in use by pid"):
        start_server(tmp_path, host_dir=str(server.host_dir), listen=f"127.0.0.1:{free_port()}")
    assert pull(server) == len(KEYS)


def test_a_port_in_use_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        options = {"listen": listen, "metrics_listen": "", "host_dir": str(tmp_path / "host")}
        with pytest.raises(ServerError, match="in use or not an address") as refused:
            ServerProcess(tmp_path, options, "").start()
    assert len(str(refused.value).splitlines()) == 2, "the error and nothing else, like gRPC's own"
    assert not (tmp_path / "host").exists()


def test_a_start_that_is_refused_leaves_what_there_was_and_nothing_else(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(disk_bytes="64MiB")
    push(server, durable=True)
    server.terminate()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        fresh = {"host_dir": str(server.host_dir) + "-fresh", "disk_path": str(tmp_path / "fresh")}
        for place in (fresh, {"host_dir": server.host_dir, "disk_path": tmp_path / "disk"}):
            refused = ServerProcess(
                server.tmp_path, {"tcp_listen": taken, "disk_bytes": "64MiB", **place}, ""
            )
            with pytest.raises(ServerError, match=f"tcp_listen: {taken}"):
                refused.start()
    assert not any(Path(path).exists() for path in fresh.values())
    assert pull(server.restart()) == len(KEYS)
    assert server.ready["warm"]


def test_bad_settings_end_with_status_2(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"exited with 2 before ready:\n.*host_bytes is"):
        start_server(tmp_path, host_bytes="1KiB")
    with pytest.raises(ServerError, match=r"host_bytes is .* at most"):
        start_server(tmp_path, host_bytes="900TiB")


def test_metrics_and_stats_show_the_same_books(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB")
    push(server, durable=True)
    assert pull(server) == usable(server) == len(KEYS)
    assert usable(server, BLOCKS.chain(2, 4)) == 0
    metrics, stats = scrape(server), server.stats()
    assert metrics["kvserver_up"] == 1
    assert metrics['kvserver_blocks{tier="host"}'] == len(KEYS)
    assert metrics['kvserver_blocks{tier="disk"}'] == len(KEYS)
    assert metrics["kvserver_hits_total"] >= len(KEYS)
    assert metrics["kvserver_misses_total"] >= 4
    assert metrics['kvserver_rpc_seconds_count{rpc="Reserve"}'] >= 1
    assert metrics['kvserver_rpcs_total{code="OK",rpc="Commit"}'] >= 1
    payload = len(KEYS) * BLOCKS.payload_bytes
    assert metrics['kvserver_bytes_total{direction="in",tier="host"}'] == payload
    assert metrics['kvserver_bytes_total{direction="out",tier="host"}'] == payload
    assert metrics['kvserver_bytes_total{direction="in",tier="disk"}'] >= payload
    assert metrics['kvserver_slots{state="quarantined",tier="host"}'] == 0
    assert slots_add_up(stats)
    for tier in stats.tiers:
        name = {pb.TIER_HOST: "host", pb.TIER_DISK: "disk"}[tier.tier]
        assert metrics[f'kvserver_bytes_used{{tier="{name}"}}'] == tier.bytes_used


def test_a_stopped_server_is_seen_by_the_scrape(serve: Serve) -> None:
    server = serve()
    server.stop_signal()
    with pytest.raises(OSError, match="timed out"):
        urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=0.5)
    time.sleep(1.5)
    server.cont()
    assert scrape(server)["kvserver_up"] == 1
    assert server.wait_event("stalled")


def test_the_disk_fails_and_comes_back_while_memory_serves(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB", failpoints="spill.write=errno:EIO@1;disk.reopen=errno:EIO@1")
    assert push(server) == len(KEYS)
    down = server.wait_event("disk_down")
    assert "failpoint spill.write" in down["reason"]
    assert pull(server) == len(KEYS)  # from memory
    assert push(server, BLOCKS.chain(2, 4)) == 4
    assert any(not t.up and t.note for t in server.stats().tiers)
    server.wait_event("disk_up", timeout=20)
    keys = BLOCKS.chain(3, 4)
    assert push(server, keys, durable=True) == 4
    assert all(t.up for t in server.stats().tiers)


def test_a_full_disk_at_the_journal_takes_the_tier_down(serve: Serve) -> None:
    server = serve(disk_bytes="64MiB", failpoints="journal.put=errno:ENOSPC@1")
    push(server)
    assert (
        "ENOSPC" in server.wait_event("disk_down")["reason"]
        or "No space" in (server.wait_event("disk_down")["reason"])
    )
    server.wait_event("disk_up", timeout=20)
    assert push(server, BLOCKS.chain(4, 4), durable=True) == 4
    server.kill()
    (server.host_dir / "arena").unlink()
    server.restart()
    assert pull(server, BLOCKS.chain(4, 4)) == 4


@pytest.mark.parametrize(
    "place", ["start.after_lock", "start.before_restore", "start.before_ready"]
)
def test_a_kill_while_starting_costs_nothing(serve: Serve, place: str) -> None:
    server = serve(disk_bytes="64MiB")
    push(server, durable=True)
    server.kill()
    with pytest.raises(ServerError, match="exited with -9"):
        server.restart(failpoints=f"{place}=kill")
    server.restart()
    assert pull(server) == len(KEYS)


def test_ten_times_every_limit_is_refused_and_the_server_lives(serve: Serve) -> None:
    server = serve(
        sessions_max=4, namespaces_max=4, keys_per_call_max=64, rpcs_max=8, host_bytes="32MiB"
    )
    with grpc.insecure_channel(server.address) as channel:
        cache = kvserver_pb2_grpc.CacheStub(channel)
        outcomes = []
        for _ in range(40):
            try:
                cache.Hello(pb.HelloRequest(protocol_version=1), timeout=10)
                outcomes.append("OK")
            except grpc.RpcError as error:
                field = dict(error.trailing_metadata())["kv-field"]
                outcomes.append(f"{error.code().name} {field}")
        assert outcomes == ["OK"] * 4 + ["RESOURCE_EXHAUSTED sessions_max"] * 36
    assert len(server.stats().sessions) == 4


def test_more_namespaces_than_allowed_are_refused_by_name(serve: Serve) -> None:
    server = serve(namespaces_max=4)
    with Client.connect(server.address) as client:
        refused = []
        for number in range(40):
            try:
                client.open_namespace(Blocks(name=f"model-{number}").spec)
            except KVError as error:
                refused.append(error.field)
        assert refused == ["namespaces_max"] * 36


def test_many_clients_at_once_and_an_oversubscribed_arena(serve: Serve) -> None:
    server = serve(host_bytes="8MiB")
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with Client.connect(server.address) as client:
                namespace = client.open_namespace(BLOCKS.spec)
                for turn in range(6):
                    keys = BLOCKS.chain(100 * seed + turn, 12)
                    namespace.push(keys, BLOCKS.payloads(keys))
                    out = BLOCKS.out(len(keys))
                    found = namespace.pull(keys, out).found
                    assert BLOCKS.wrong(keys, out, found) == []
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert failures == []
    stats = server.stats()
    assert slots_add_up(stats)
    host = next(t for t in stats.tiers if t.tier == pb.TIER_HOST)
    assert host.bytes_used <= host.bytes_total
    eventually(lambda: not server.stats().sessions, "no session is left")
