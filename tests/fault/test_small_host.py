"""A host tier far smaller than what flows through it (issue point 4).

64 MiB of host memory, 1 GiB of disk, 640 MiB pushed, prompts larger than the host tier among them,
16 concurrent readers: byte-exact, no stall, memory within its limit, every slot accounted for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvclient import Client
from tests.contract.conftest import eventually, host_tier
from tests.support.payload import Blocks
from tests.support.server import ServerProcess

MIB = 1 << 20
BLOCKS = Blocks(layers=8, heads=4, page_bytes=4096)  # 1 MiB a block
PROMPTS = {1: 96, 2: 80, **dict.fromkeys(range(3, 61), 8)}  # two larger than the host tier
READERS = 16
READS_EACH = 6

Serve = Callable[..., ServerProcess]


class MemoryWatch(threading.Thread):
    """Samples what the server holds: its private memory and its shared arena, in bytes."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._done = threading.Event()
        self.private_max = 0
        self.shared_max = 0

    def run(self) -> None:
        while not self._done.wait(0.1):
            status = Path(f"/proc/{self._server.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            self.private_max = max(self.private_max, int(fields["RssAnon"].split()[0]) * 1024)
            self.shared_max = max(self.shared_max, int(fields["RssShmem"].split()[0]) * 1024)

    def stop(self) -> None:
        self._done.set()
        self.join(5)


def push_prompts(address: str) -> None:
    with Client.connect(address, name="writer", deadline_s=60.0) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        for seed, count in PROMPTS.items():
            keys = BLOCKS.chain(seed, count)
            for at in range(0, count, 8):
                part = keys[at : at + 8]
                parents = [bytes(32), *keys][at : at + 8]
                result = namespace.push(
                    part, BLOCKS.payloads(part), parents=parents, durable=True, wait_s=30
                )
                assert result.written + result.present == len(part), (seed, at, result)


def read(address: str, number: int) -> tuple[int, int, float]:
    """One reader: pulls prompts at random; returns blocks found, blocks asked, longest pull (s)."""
    rng = random.Random(number)
    found = asked = 0
    longest = 0.0
    with Client.connect(address, name=f"reader-{number}", deadline_s=60.0) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        seeds = [1 + number % 2, *rng.choices(sorted(PROMPTS), k=READS_EACH - 1)]
        for seed in seeds:
            keys = BLOCKS.chain(seed, PROMPTS[seed])
            out = BLOCKS.out(len(keys))
            began = time.monotonic()
            result = namespace.pull(keys, out)
            longest = max(longest, time.monotonic() - began)
            assert BLOCKS.wrong(keys, out, result.found) == []
            found += int(sum(result.found))
            asked += len(keys)
    return found, asked, longest


@pytest.mark.timeout(240)
def test_prompts_larger_than_the_host_tier_stream_through_it(serve: Serve) -> None:
    pushed = sum(PROMPTS.values()) * BLOCKS.payload_bytes
    assert pushed >= 640 * MIB
    server = serve(host_bytes="64MiB", disk_bytes="1GiB")
    watch = MemoryWatch(server)
    private_idle = rss_anonymous(server)
    watch.start()
    push_prompts(server.address)
    with ThreadPoolExecutor(READERS) as pool:
        results = list(pool.map(lambda n: read(server.address, n), range(READERS)))
    watch.stop()
    for found, asked, longest in results:
        assert found == asked, "everything was durably pushed and fits the disk"
        assert longest < 60.0, "a reader stalled"
    assert watch.shared_max <= 64 * MIB
    assert watch.private_max - private_idle < 160 * MIB
    eventually(lambda: at_rest(server), "nothing is filled or kept back any more")
    stats = server.stats()
    assert {t.tier for t in stats.tiers} >= {2, 3}
    for tier in stats.tiers:
        parts = (
            tier.slots_free + tier.slots_filling + tier.slots_committed
            + tier.slots_copying + tier.slots_quarantined
        )  # fmt: skip
        assert parts == tier.slots
        assert tier.bytes_used <= tier.bytes_total


def at_rest(server: ServerProcess) -> bool:
    tier = host_tier(server)
    return tier.slots_quarantined == tier.slots_filling == 0


def rss_anonymous(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
