"""A disk that fails, is full or is slow: the disk tier stops, memory serves on, the tier returns.

Failures come from failpoints (`kvserver.runtime.failpoints`) at the n-th call of each operation,
and from a filesystem that is really full, where this process may mount one.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvclient import Client, Namespace, Unavailable
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)  # 128 KiB a block
CHAIN = 4
POINTS = {
    "spill.write": "ENOSPC",
    "spill.before_sync": "EIO",
    "journal.put": "ENOSPC",
    "journal.sync": "EIO",
    "promote.read": "EIO",
}
NTH = [int(n) for n in os.environ.get("KVSERVER_ERROR_NTH", "1,2,5").split(",")]
CHAINS_MAX = 100  # of 512 KiB, on a disk of 64 MiB
FULL_BYTES = 96 << 20

Serve = Callable[..., ServerProcess]


class Chains:
    """Pushes and pulls chains; knows which were durably acknowledged."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self.durable: list[int] = []
        self.last = 0

    def push(self, *, durable: bool) -> bool:
        self.last += 1
        assert self.last < CHAINS_MAX, "the test would make the disk evict"
        keys = BLOCKS.chain(self.last, CHAIN)
        try:
            result = self._namespace.push(keys, BLOCKS.payloads(keys), durable=durable)
        except Unavailable:
            assert durable, "memory takes blocks whatever the disk does"
            return False
        done = result.written + result.present == CHAIN
        if done and durable:
            self.durable.append(self.last)
        return done

    def pull(self, seed: int) -> int:
        keys = BLOCKS.chain(seed, CHAIN)
        out = BLOCKS.out(CHAIN)
        found = self._namespace.pull(keys, out).found
        assert BLOCKS.wrong(keys, out, found) == [], f"chain {seed}: wrong bytes"
        return int(found.sum())


def downs(server: ServerProcess) -> list[str]:
    return [line["reason"] for line in server.events() if line["event"] == "disk_down"]


def ups(server: ServerProcess) -> int:
    return sum(line["event"] == "disk_up" for line in server.events())


def wait_up(server: ServerProcess) -> None:
    """Until the disk tier has come back from all its failures, by itself."""
    deadline = time.monotonic() + 30
    while ups(server) < len(downs(server)) or not disk_is_up(server):
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)


def disk_is_up(server: ServerProcess) -> bool:
    return all(tier.up for tier in server.stats().tiers)


def fail_at_the_nth(tmp_path: Path, n: int) -> None:
    tmp_path.mkdir()
    failpoints = ";".join(f"{point}=errno:{code}@{n}" for point, code in POINTS.items())
    with start_server(
        tmp_path, host_bytes="12MiB", disk_bytes="64MiB", failpoints=failpoints
    ) as server:
        with Client.connect(server.address) as client:
            chains = Chains(client.open_namespace(BLOCKS.spec))
            told: set[str] = set()
            while told != set(POINTS):
                chains.push(durable=True)
                chains.pull(max(1, chains.last - 40))
                if len(downs(server)) > ups(server):
                    assert chains.push(durable=False), "memory takes blocks while the disk is down"
                    assert chains.pull(chains.last) == CHAIN, "memory serves"
                    wait_up(server)
                reasons = " ".join(downs(server))
                told = set(re.findall(r"failpoint ([a-z_.]+)", reasons))
            assert chains.push(durable=True), "the disk is back"
            for seed in chains.durable:
                assert chains.pull(seed) == CHAIN, f"chain {seed} was durably acknowledged"
        server.kill()
        (server.host_dir / "arena").unlink()
        server.failpoints = ""
        server.start()
        with Client.connect(server.address) as client:
            again = Chains(client.open_namespace(BLOCKS.spec))
            for seed in range(1, chains.last + 1):
                assert again.pull(seed) == CHAIN or seed not in chains.durable


@pytest.mark.timeout(180)
def test_memory_serves_while_the_disk_fails_at_the_nth_call(tmp_path: Path) -> None:
    with ThreadPoolExecutor(len(NTH)) as pool:
        for done in [pool.submit(fail_at_the_nth, tmp_path / str(n), n) for n in NTH]:
            done.result()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path | None]:
    """A filesystem of 96 MiB of its own; None where this process may not mount one."""
    path = tmp_path / "volume"
    path.mkdir()
    options = f"size={FULL_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", options, "kvserver-test", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield path if mounted else None
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_full_filesystem_costs_the_disk_tier_only(volume: Path | None, serve: Serve) -> None:
    """Where none can be mounted, every write of the journal says that it is full."""
    options = {"disk_path": str(volume)} if volume else {}
    failpoints = "" if volume else "journal.put=errno:ENOSPC@2;disk.reopen=errno:ENOSPC@1"
    server = serve(host_bytes="32MiB", disk_bytes="16MiB", failpoints=failpoints, **options)
    with Client.connect(server.address) as client:
        chains = Chains(client.open_namespace(BLOCKS.spec))
        assert chains.push(durable=True)
        if volume:
            fill_up(volume / "ballast")
        for _ in range(8):
            chains.push(durable=True)
            assert chains.push(durable=False)
            assert chains.pull(chains.last) == CHAIN
        if volume:
            (volume / "ballast").unlink()
        wait_up(server)
        assert chains.push(durable=True)
        for seed in chains.durable:
            assert chains.pull(seed) == CHAIN
    server.kill()
    if volume:
        fill_up(volume / "ballast")
        start_or_say_why(server)
        (volume / "ballast").unlink()
    (server.host_dir / "arena").unlink()
    server.failpoints = ""
    server.start()
    with Client.connect(server.address) as client:
        again = Chains(client.open_namespace(BLOCKS.spec))
        assert [again.pull(seed) for seed in chains.durable] == [CHAIN] * len(chains.durable)


def start_or_say_why(server: ServerProcess) -> None:
    """On a full disk a start may succeed; one that fails names the reason and harms nothing."""
    server.start(wait=False)
    deadline = time.monotonic() + 20
    while server.exit_code() is None and "ready" not in last_event(server):
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.02)
    if server.exit_code() is None:
        server.kill()
    else:
        assert server.exit_code() == 1
        assert "No space" in server.log() or "disk_bytes" in server.log()


def last_event(server: ServerProcess) -> str:
    return str(server.events()[-1]["event"])


def pull_seconds(chains: Chains, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        assert chains.pull(1) == CHAIN
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)


def test_a_slow_disk_does_not_slow_host_hits(serve: Serve) -> None:
    """A tail of spills is on its way to a disk that takes 0.3 s a block; hits go on beside it. One
    that waited for the disk would wait for that long; a pause of the machine is shorter.
    """
    server = serve(
        host_bytes="64MiB", disk_bytes="64MiB", failpoints="spill.write=sleep:0.3@5-1000"
    )
    with Client.connect(server.address) as client:
        chains = Chains(client.open_namespace(BLOCKS.spec))
        assert chains.push(durable=True)
        baseline = pull_seconds(chains, 100)
        while chains.last < 20:
            assert chains.push(durable=False)
        assert server.stats().spill_queue_bytes
        beside = pull_seconds(chains, 100)
        assert server.stats().spill_queue_bytes, "the disk was done too soon"
        p99, floor = beside[98], baseline[98]
        assert p99 <= 2 * floor + 0.2, f"{p99:.4f} s beside a slow disk, {floor:.4f} s without"
