"""Peers that stop, die, or come back too late: no slot is reused early, no wrong byte is served."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvclient import Client, CommitVerdict, KVError, Namespace
from tests.contract.conftest import eventually, host_tier
from tests.contract.peer import BLOCKS, SEED, TTL_S, Peer
from tests.support.payload import Blocks
from tests.support.server import ServerProcess
from tests.support.ways import WAYS, Way


@pytest.fixture(scope="module", params=["shm", "tcp", "nixl"])
def way(request: pytest.FixtureRequest) -> Way:
    """TLS changes nothing here."""
    way = WAYS[request.param]
    if way.missing:
        pytest.skip(way.missing)
    return way


@pytest.fixture(scope="module")
def small(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A hub whose host tier holds about 14 of the peer's blocks, and which notices deaths soon."""
    directory = tmp_path_factory.mktemp("small")
    with way.serve(directory, host_bytes="8MiB", session_ttl_ms=4000, heartbeat_ms=100) as server:
        yield server


@pytest.fixture
def client(way: Way, small: ServerProcess) -> Iterator[Client]:
    with way.blocking(small, name="test") as client:
        yield client


@pytest.fixture
def mine(client: Client) -> Namespace:
    """The peer's namespace, with nothing in it."""
    namespace = client.open_namespace(BLOCKS.spec)
    client.evict(namespace.id)
    return namespace


def fill(namespace: Namespace, blocks: Blocks, seeds: range) -> list[bytes]:
    """Push single blocks one after the other; the keys that were written."""
    written = []
    for seed in seeds:
        keys = blocks.chain(seed, 1)
        if namespace.push(keys, blocks.payloads(keys)).written:
            written += keys
    return written


def check(namespace: Namespace, blocks: Blocks, keys: list[bytes]) -> int:
    """Pull all; nothing may be wrong or corrupt. How many are there."""
    out = blocks.out(len(keys))
    result = namespace.pull(keys, out)
    assert blocks.wrong(keys, out, result.found) == []
    assert result.corrupt == 0
    return int(result.found.sum())


def test_a_writer_killed_before_its_commit(way: Way, small: ServerProcess, mine: Namespace) -> None:
    keys = BLOCKS.chain(SEED, 4)
    payloads = BLOCKS.payloads(keys)
    with Peer(small.address, "write", 4, way.transport, ttl_s=3.0) as peer:
        assert peer.says() == "reserved 4"
        assert mine.push(keys, payloads).busy == 4
        os.kill(peer.pid, signal.SIGKILL)
    eventually(lambda: mine.push(keys, payloads).busy == 0, "the blocks are free again")
    assert check(mine, BLOCKS, keys) == 4
    eventually(lambda: host_tier(small).slots_quarantined == 0, "the dead writer's slots are back")


def test_a_writer_stopped_past_its_expiry_writes_into_no_reused_slot(
    way: Way, small: ServerProcess, mine: Namespace
) -> None:
    """Over shm only the writer's own lock says that it writes no more. Over the others the hub
    writes for it, and lets go by itself.
    """
    left = 4 if way.name == "shm" else 0
    with Peer(small.address, "write", 4, way.transport) as peer:
        assert peer.says() == "reserved 4"
        os.kill(peer.pid, signal.SIGSTOP)
        time.sleep(2 * TTL_S)
        eventually(lambda: host_tier(small).slots_quarantined == left, "expired")
        written = fill(mine, BLOCKS, range(30))  # every slot that may be used, several times over
        assert len(written) == 30
        assert host_tier(small).slots_quarantined == left, "a deadline is no fence"
        before = check(mine, BLOCKS, written)
        assert 0 < before < 30
        peer.go()
        os.kill(peer.pid, signal.SIGCONT)
        said = peer.says().split()
        assert said in ([str(int(CommitVerdict.GONE))] * 4, ["Gone"])
        assert check(mine, BLOCKS, written) == before, "the late bytes hit nobody"
        eventually(lambda: host_tier(small).slots_quarantined == 0, "fenced: the slots are back")
    assert mine.lookup(BLOCKS.chain(SEED, 4)).usable_blocks == 0


def test_a_reader_stopped_past_its_lease_misses(
    way: Way, small: ServerProcess, client: Client, mine: Namespace
) -> None:
    """Over shm it copies when it goes on. Over the others its blocks had arrived before."""
    keys = BLOCKS.chain(SEED, 4)
    assert mine.push(keys, BLOCKS.payloads(keys)).written == 4
    with Peer(small.address, "read", 4, way.transport) as peer:
        assert peer.says() == "granted 4"
        os.kill(peer.pid, signal.SIGSTOP)
        time.sleep(2 * TTL_S)
        evicted: list[int] = []

        def over() -> bool:
            evicted.append(client.evict(mine.id, keys).blocks)
            return sum(evicted) == 4

        eventually(over, "the leases are over")
        assert len(fill(mine, BLOCKS, range(30))) == 30
        peer.go()
        os.kill(peer.pid, signal.SIGCONT)
        said = peer.says().split()
    assert len(said) == 4
    assert "wrong" not in said
    assert ("miss" in said) == (way.name == "shm")


def test_a_live_lease_pins_its_block(small: ServerProcess, mine: Namespace) -> None:
    keys = BLOCKS.chain(SEED, 4)
    mine.push(keys, BLOCKS.payloads(keys))
    with mine.acquire(keys, lease_s=20) as stream:
        held = list(stream)
        fill(mine, BLOCKS, range(30))
        for granted in held:
            cells = granted.cells.reshape(BLOCKS.shape)
            assert np.array_equal(cells, BLOCKS.payload(keys[granted.index]))
            assert granted.verify()
            granted.release()


def quarantines(server: ServerProcess) -> int:
    """Slots that ever were in quarantine. A hub that writes for its clients knows by itself when
    nothing is written any more: such a slot may be free again before anybody has seen it there."""
    return int(server.stats().counters["quarantines"])


def test_an_expired_reservation_is_gone_and_its_slots_come_back(
    small: ServerProcess, mine: Namespace
) -> None:
    """The writer lives, and says by itself that its copies have drained."""
    keys = BLOCKS.chain(SEED, 3)
    before = quarantines(small)
    with mine.reserve(keys, ttl_s=0.2) as reservation:
        for i in range(3):
            reservation.cells(i)[:] = 1
        eventually(lambda: quarantines(small) == before + 3, "expired")
        assert reservation.commit().tolist() == [CommitVerdict.GONE] * 3
    eventually(lambda: host_tier(small).slots_quarantined == 0, "fenced at the end")
    assert mine.push(keys, BLOCKS.payloads(keys)).written == 3


def test_a_reservation_that_expired_unnoticed_is_fenced_too(
    small: ServerProcess, mine: Namespace
) -> None:
    """Nothing was committed, so nothing told the writer that it is too late."""
    before = quarantines(small)
    with mine.reserve(BLOCKS.chain(SEED, 3), ttl_s=0.2) as reservation:
        assert len(reservation.writable) == 3
        eventually(lambda: quarantines(small) == before + 3, "expired")
    eventually(lambda: host_tier(small).slots_quarantined == 0, "fenced at the end")


@pytest.mark.parametrize("way", ["shm"], indirect=True, scope="module")
def test_a_view_kept_after_a_restart_keeps_its_slot_in_quarantine(
    way: Way, small: ServerProcess
) -> None:
    """The old mapping may still be written, and the new server knows."""
    with Client.connect(small.address, name="keeps") as client:
        namespace = client.open_namespace(BLOCKS.spec)
        reservation = namespace.reserve(BLOCKS.chain(SEED, 2))
        view = reservation.cells(0)
        view[:] = 7
        small.kill()
        small.restart()
        eventually(lambda: client.reconnects == 1, "reconnected")
        time.sleep(1.5)
        assert host_tier(small).slots_quarantined == 2
        with pytest.raises(KVError):
            reservation.cells(1)
        with pytest.raises(KVError):
            reservation.commit()
        written = fill(namespace, BLOCKS, range(20))
        view[:] = 0xEE
        check(namespace, BLOCKS, written)
        del view
        eventually(lambda: host_tier(small).slots_quarantined == 0, "the mapping is gone")
        reservation.abort()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk"])
def test_readers_against_eviction(way: Way, tmp_path: Path, disk: bool) -> None:
    """The host tier oversubscribed three times, readers and writers at once: exact or a miss. With
    a disk below it, readers also meet blocks that are being promoted.
    """
    options = {"disk_path": str(tmp_path / "disk"), "disk_bytes": "96MiB"} if disk else {}
    with way.serve(tmp_path, host_bytes="24MiB", **options) as server:
        _readers_against_eviction(way, server)


def _readers_against_eviction(way: Way, server: ServerProcess) -> None:
    blocks = Blocks(layers=4, heads=2, page_bytes=4096, name="churn")  # 256 KiB a block
    total = 3 * (24 << 20) // blocks.payload_bytes
    chains = [blocks.chain(seed, 6) for seed in range(total // 6)]
    wrong: list[object] = []
    hits = [0, 0]
    connected = threading.Barrier(5)
    least, most = time.monotonic() + 3, time.monotonic() + 40

    def going() -> bool:
        """For three seconds, and on a slow machine until there is something to judge."""
        now = time.monotonic()
        return not wrong and (now < least or (now < most and not 50 < hits[0] < hits[1]))

    def write() -> None:
        rng = np.random.default_rng()
        with way.blocking(server) as client:
            namespace = client.open_namespace(blocks.spec)
            connected.wait(30)
            while going():
                keys = chains[int(rng.integers(len(chains)))]
                namespace.push(keys, blocks.payloads(keys))

    def read() -> None:
        rng = np.random.default_rng()
        with way.blocking(server) as client:
            namespace = client.open_namespace(blocks.spec)
            connected.wait(30)
            while going():
                keys = chains[int(rng.integers(len(chains)))]
                out = blocks.out(len(keys))
                result = namespace.pull(keys, out)
                bad = blocks.wrong(keys, out, result.found)
                if bad or result.corrupt:
                    wrong.append((bad, result))
                hits[0] += int(result.found.sum())
                hits[1] += len(keys)

    threads = [threading.Thread(target=work) for work in (write, write, read, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < hits[0] < hits[1], f"the tier was not oversubscribed: {hits}"
