"""kill -9 at named places and at random times; afterwards every block is whole or absent.

The oracle stands outside the process that dies: it knows which pushes were acknowledged, which of
them durably, and which were under way (*maybe*). Payload is a function of the key.

    KVSERVER_CRASH_ROUNDS=1000 pytest tests/crash     # a long run; the seed is printed
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvclient import Client, KVError
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

ROUNDS = int(os.environ.get("KVSERVER_CRASH_ROUNDS", "25"))
SEED = int(os.environ.get("KVSERVER_CRASH_SEED", "20261121"))
BLOCKS = Blocks(layers=4, heads=2, page_bytes=4096)
CHAIN = 4

FAILPOINTS = [
    "commit.before_trailer",
    "commit.before_valid",
    "commit.after_valid",
    "reserve.after_entry",
    "spill.before_invalid",
    "spill.before_write",
    "spill.write",
    "spill.before_sync",
    "spill.before_valid",
    "spill.before_wal_sync",
    "spill.after_valid",
    "journal.put",
    "promote.before_valid",
]
START_FAILPOINTS = ["start.after_lock", "start.before_restore", "start.before_ready"]


@dataclass
class Oracle:
    """What was acknowledged. Keys of chains, by their seed."""

    acknowledged: set[int] = field(default_factory=set)
    durable: set[int] = field(default_factory=set)
    maybe: set[int] = field(default_factory=set)


def push_until_dead(
    address: str, oracle: Oracle, seeds: range, stop: threading.Event, rng: random.Random
) -> None:
    """Push chains one after another, until the server is gone or `seeds` are used up."""
    with Client.connect(address, name="crash", deadline_s=3.0) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        for seed in seeds:
            if stop.is_set():
                return
            keys = BLOCKS.chain(seed, CHAIN)
            durable = rng.random() < 0.4
            oracle.maybe.add(seed)
            result = namespace.push(keys, BLOCKS.payloads(keys), durable=durable)
            if result.written + result.present == CHAIN:
                oracle.acknowledged.add(seed)
                if durable:
                    oracle.durable.add(seed)
            if rng.random() < 0.5:
                old = rng.choice(sorted(oracle.maybe))
                check(namespace, old)


def check(namespace: object, seed: int) -> int:
    """Pull a chain; every block that is found has its own bytes. Returns how many were found."""
    keys = BLOCKS.chain(seed, CHAIN)
    out = BLOCKS.out(CHAIN)
    result = namespace.pull(keys, out)  # type: ignore[attr-defined]
    assert BLOCKS.wrong(keys, out, result.found) == [], f"chain {seed}: wrong bytes"
    return int(sum(result.found))


def verify(server: ServerProcess, oracle: Oracle, *, host_kept: bool) -> None:
    with Client.connect(server.address, name="oracle", deadline_s=10.0) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        for seed in sorted(oracle.maybe):
            found = check(namespace, seed)
            must = oracle.acknowledged if host_kept else oracle.durable
            if seed in must:
                assert found == CHAIN, f"chain {seed} was acknowledged, {found} of {CHAIN} came"
    stats = server.stats()
    for tier in stats.tiers:
        parts = (
            tier.slots_free + tier.slots_filling + tier.slots_committed
            + tier.slots_copying + tier.slots_quarantined
        )  # fmt: skip
        assert parts == tier.slots, tier


def one_round(number: int, server: ServerProcess, oracle: Oracle, rng: random.Random) -> str:
    """One life of the server, ended by a kill. Returns what killed it."""
    how = rng.choice(["time", "point", "point", "start"])
    if how == "start":
        point = rng.choice(START_FAILPOINTS)
        server.failpoints = f"{point}=kill"
        server.start(wait=False)
        assert server.wait_exit() == -9
        return point
    point = f"{rng.choice(FAILPOINTS)}=kill@{rng.randint(1, 12)}" if how == "point" else ""
    server.failpoints = point
    server.start()
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            seeds = range(number * 1000, number * 1000 + 40)
            push_until_dead(server.address, oracle, seeds, stop, rng)
        except KVError:
            pass  # the server died under it: what this test is about
        except BaseException as error:
            errors.append(error)

    pusher = threading.Thread(target=run)
    pusher.start()
    deadline = time.monotonic() + rng.uniform(0.05, 1.0)
    while server.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if server.exit_code() is None:
        server.kill()
    stop.set()
    pusher.join(20)
    assert not pusher.is_alive(), "a call outlived its deadline"
    if errors:
        raise errors[0]
    return point or "time"


@pytest.mark.timeout(60 + 8 * ROUNDS)
def test_after_any_kill_each_block_is_whole_or_absent(tmp_path: Path) -> None:
    print(f"seed {SEED}, {ROUNDS} rounds")
    rng = random.Random(SEED)
    oracle = Oracle()
    server = start_server(tmp_path, host_bytes="192MiB", disk_bytes="512MiB")
    try:
        server.kill()
        for number in range(ROUNDS):
            killed_by = one_round(number, server, oracle, rng)
            host_kept = rng.random() < 0.75
            if not host_kept:
                (server.host_dir / "arena").unlink(missing_ok=True)
                oracle.acknowledged = set(oracle.durable)
            server.failpoints = ""
            server.start()
            print(
                f"round {number}: {killed_by}, host kept: {host_kept}, {len(oracle.maybe)} chains"
            )
            verify(server, oracle, host_kept=host_kept)
            if len(oracle.maybe) > 60:
                forget(server, oracle)
            server.kill()
    finally:
        server.close()


def forget(server: ServerProcess, oracle: Oracle) -> None:
    """Drop the namespace, so that the tiers never have to evict what the oracle counts on."""
    with Client.connect(server.address, name="oracle") as client:
        client.drop_namespace(BLOCKS.spec.id)
    oracle.maybe.clear()
    oracle.acknowledged.clear()
    oracle.durable.clear()


def exercise(server: ServerProcess, point: str) -> None:
    """Push durably, then pull from disk after a restart: passes every failpoint of FAILPOINTS."""
    keys = BLOCKS.chain(1, CHAIN)
    with Client.connect(server.address, deadline_s=2.0) as client:
        client.open_namespace(BLOCKS.spec).push(keys, BLOCKS.payloads(keys), durable=True)
    server.kill()
    (server.host_dir / "arena").unlink()
    server.restart(failpoints=f"{point}=kill")
    with Client.connect(server.address, deadline_s=2.0) as client:
        client.open_namespace(BLOCKS.spec).pull(keys, BLOCKS.out(CHAIN))


@pytest.mark.parametrize("point", FAILPOINTS)
def test_each_failpoint_is_reached(point: str, serve: Callable[..., ServerProcess]) -> None:
    """A kill that never fires would prove nothing: each place lies on the path."""
    first = "" if point.startswith("promote") else f"{point}=kill"
    server = serve(disk_bytes="256MiB", failpoints=first)
    with contextlib.suppress(KVError):
        exercise(server, point)
    assert server.wait_exit() == -9
