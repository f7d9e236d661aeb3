"""kill -9 at named places and at random times; afterwards every block is whole or absent.

The oracle stands outside the process that dies: it knows which pushes were acknowledged, which of
them durably, and which were under way (*maybe*). Payload is a function of the key.

Each life of the server first answers for the lives before it, then takes pushes, then is killed;
so restoring, verifying and promoting are killed like everything else. The last life is not killed.

    KVSERVER_CRASH_ROUNDS=1000 pytest tests/crash     # a long run; the seed is printed
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from kvclient import Client, KVError, Namespace
from kvproto.v1 import kvserver_pb2, kvserver_pb2_grpc
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

ROUNDS = int(os.environ.get("KVSERVER_CRASH_ROUNDS", "25"))
SEED = int(os.environ.get("KVSERVER_CRASH_SEED", "20261121"))
BLOCKS = Blocks(layers=4, heads=2, page_bytes=4096)
CHAIN = 4
CHAINS_MAX = 60  # what host and disk hold without evicting

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

    def clear(self) -> None:
        for seeds in (self.acknowledged, self.durable, self.maybe):
            seeds.clear()


def push(namespace: Namespace, oracle: Oracle, seeds: range, rng: random.Random) -> None:
    """Push chains one after another, and pull one of them now and then."""
    for seed in seeds:
        keys = BLOCKS.chain(seed, CHAIN)
        durable = rng.random() < 0.4
        oracle.maybe.add(seed)
        result = namespace.push(keys, BLOCKS.payloads(keys), durable=durable)
        if result.written + result.present == CHAIN:
            oracle.acknowledged.add(seed)
            if durable:
                oracle.durable.add(seed)
        if rng.random() < 0.5:
            check(namespace, rng.choice(sorted(oracle.maybe)))


def check(namespace: Namespace, seed: int) -> int:
    """Pull a chain; every block that is found has its own bytes. Returns how many were found."""
    keys = BLOCKS.chain(seed, CHAIN)
    out = BLOCKS.out(CHAIN)
    result = namespace.pull(keys, out)
    assert BLOCKS.wrong(keys, out, result.found) == [], f"chain {seed}: wrong bytes"
    return int(sum(result.found))


def verify(namespace: Namespace, oracle: Oracle) -> None:
    """Everything that was acknowledged is there; nothing that is there is wrong."""
    for seed in sorted(oracle.maybe):
        found = check(namespace, seed)
        if seed in oracle.acknowledged:
            assert found == CHAIN, f"chain {seed} was acknowledged, {found} of {CHAIN} came"


def check_books(server: ServerProcess) -> None:
    for tier in server.stats().tiers:
        parts = (
            tier.slots_free + tier.slots_filling + tier.slots_committed
            + tier.slots_copying + tier.slots_quarantined
        )  # fmt: skip
        assert parts == tier.slots, tier


def answers(server: ServerProcess) -> bool:
    """Whether it does at once; one that is gone refuses the connection."""
    with grpc.insecure_channel(server.address) as channel, contextlib.suppress(grpc.RpcError):
        kvserver_pb2_grpc.AdminStub(channel).Stats(kvserver_pb2.StatsRequest(), timeout=5)
        return True
    return False


@contextlib.contextmanager
def using(server: ServerProcess, client: Client, work: Callable[[], None]) -> Iterator[None]:
    """Does `work` with `client` in a thread while the block runs, and ends both after it.

    What work asserts is raised here; that its calls fail is expected once the server is dead.
    """
    wrong: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except KVError as error:
            # A connection ends a little before its process; one that answers still has not ended.
            deadline = time.monotonic() + 10
            while server.exit_code() is None:
                if answers(server) or time.monotonic() > deadline:
                    wrong.append(error)
                    return
                time.sleep(0.01)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(KVError):
            client.close()  # calls under way end at once
        thread.join(20)
    assert not thread.is_alive(), "a call outlived its client"
    if wrong:
        raise wrong[0]


def one_life(number: int, server: ServerProcess, oracle: Oracle, rng: random.Random) -> str:
    """One life of the server, ended by a kill. Returns what killed it."""
    how = rng.choice(["time", "point", "point", "start"])
    if how == "start":
        point = f"{rng.choice(START_FAILPOINTS)}=kill"
        server.failpoints = point
        server.start(wait=False)
        assert server.wait_exit() == -9
        return point
    point = f"{rng.choice(FAILPOINTS)}=kill@{rng.randint(1, 12)}" if how == "point" else ""
    server.failpoints = point
    server.start()
    client = Client.connect(server.address, name="crash", deadline_s=10.0).open()
    served = threading.Event()
    chances = random.Random(f"{SEED}-{number}")

    def work() -> None:
        namespace = client.open_namespace(BLOCKS.spec)
        verify(namespace, oracle)
        if len(oracle.maybe) > CHAINS_MAX:
            client.drop_namespace(BLOCKS.spec.id)  # the tiers must never have to evict
            oracle.clear()
            namespace = client.open_namespace(BLOCKS.spec)
        served.set()
        push(namespace, oracle, range(number * 1000, number * 1000 + 40), chances)

    lifetime = rng.uniform(0.05, 1.0)
    with using(server, client, work):
        deadline = time.monotonic() + 30
        while server.exit_code() is None and not served.is_set() and time.monotonic() < deadline:
            time.sleep(0.005)
        deadline = time.monotonic() + lifetime
        while server.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        killed_itself = server.exit_code() is not None
        assert killed_itself or served.is_set(), "the earlier lives were not answered for"
        if not killed_itself:
            server.kill()
    assert server.wait_exit() == -9
    return point if killed_itself else "time"


@pytest.mark.timeout(60 + 8 * ROUNDS)
def test_after_any_kill_each_block_is_whole_or_absent(tmp_path: Path) -> None:
    print(f"seed {SEED}, {ROUNDS} rounds")
    rng = random.Random(SEED)
    oracle = Oracle()
    server = start_server(tmp_path, host_bytes="192MiB", disk_bytes="512MiB")
    try:
        server.kill()
        for number in range(ROUNDS):
            killed_by = one_life(number, server, oracle, rng)
            host_kept = rng.random() < 0.75
            if not host_kept:
                (server.host_dir / "arena").unlink(missing_ok=True)
                oracle.acknowledged &= oracle.durable
            print(
                f"round {number}: {killed_by}, host kept: {host_kept}, {len(oracle.maybe)} chains"
            )
        server.failpoints = ""
        server.start()
        with Client.connect(server.address, name="oracle") as client:
            verify(client.open_namespace(BLOCKS.spec), oracle)
        check_books(server)
        server.kill()
    finally:
        server.close()


@pytest.mark.parametrize("point", FAILPOINTS)
def test_each_failpoint_is_reached(point: str, serve: Callable[..., ServerProcess]) -> None:
    """A kill that never fires would prove nothing: each place lies on the path."""
    keys = BLOCKS.chain(1, CHAIN)
    promotes = point.startswith("promote")
    server = serve(disk_bytes="256MiB", failpoints="" if promotes else f"{point}=kill")
    client = Client.connect(server.address).open()

    def push_durably() -> None:
        client.open_namespace(BLOCKS.spec).push(keys, BLOCKS.payloads(keys), durable=True)

    def pull() -> None:
        client.open_namespace(BLOCKS.spec).pull(keys, BLOCKS.out(CHAIN))

    if promotes:
        push_durably()
        client.close()
        server.kill()
        (server.host_dir / "arena").unlink()
        server.restart(failpoints=f"{point}=kill")
        client = Client.connect(server.address).open()
    with using(server, client, pull if promotes else push_durably):
        assert server.wait_exit() == -9
