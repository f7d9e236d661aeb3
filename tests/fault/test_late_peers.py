"""Peers that come back after the hub itself was killed and restarted, and readers of half a block.

Fences between living peers are tested in `tests/contract/test_fences.py`; here the hub that granted
is gone too, and what its successor knows stands in the arena's directory and in the locks.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvclient import Client, Namespace
from kvproto.grid import Region
from tests.contract.conftest import eventually, host_tier
from tests.contract.peer import BLOCKS, SEED, TTL_S, Peer
from tests.support.server import ServerProcess

Serve = Callable[..., ServerProcess]
FILL = 30  # more blocks than the host tier holds


def small(serve: Serve) -> ServerProcess:
    return serve(host_bytes="8MiB", session_ttl_ms=4000, heartbeat_ms=100)


def fill(namespace: Namespace) -> list[bytes]:
    keys = [BLOCKS.chain(seed, 1)[0] for seed in range(FILL)]
    for key in keys:
        assert namespace.push([key], BLOCKS.payloads([key])).written == 1
    return keys


def check(namespace: Namespace, keys: list[bytes]) -> int:
    out = BLOCKS.out(len(keys))
    result = namespace.pull(keys, out)
    assert BLOCKS.wrong(keys, out, result.found) == []
    assert result.corrupt == 0
    return int(result.found.sum())


@pytest.mark.parametrize("expired", [True, False])
def test_a_writer_stopped_over_a_restart_writes_into_no_reused_slot(
    expired: bool, serve: Serve
) -> None:
    server = small(serve)
    with Peer(server.address, "write", 4) as peer:
        assert peer.says() == "reserved 4"
        os.kill(peer.pid, signal.SIGSTOP)
        if expired:
            eventually(lambda: host_tier(server).slots_quarantined == 4, "expired")
        server.kill()
        server.restart()
        assert host_tier(server).slots_quarantined == 4, "the new hub knows of the old writer"
        time.sleep(2 * TTL_S)
        with Client.connect(server.address, name="test") as client:
            namespace = client.open_namespace(BLOCKS.spec)
            written = fill(namespace)
            assert host_tier(server).slots_quarantined == 4, "a restart is no fence"
            before = check(namespace, written)
            assert before
            peer.go()
            os.kill(peer.pid, signal.SIGCONT)
            assert peer.says(), "the writer has scribbled, and was refused"
            assert check(namespace, written) == before, "the late bytes hit nobody"
            assert namespace.lookup(BLOCKS.chain(SEED, 4)).usable_blocks == 0
            eventually(lambda: host_tier(server).slots_quarantined == 0, "its mapping is gone")


def test_a_writer_killed_while_the_hub_was_gone(serve: Serve) -> None:
    """Nobody saw it die: the new hub finds its lock free, and takes the slots back at once."""
    server = small(serve)
    with Peer(server.address, "write", 4) as peer:
        assert peer.says() == "reserved 4"
        server.kill()
        os.kill(peer.pid, signal.SIGKILL)
    server.restart()
    assert host_tier(server).slots_quarantined == 0
    assert server.stats().counters["dropped_unfinished_block"] == 4


def test_a_reader_stopped_over_a_restart_misses(serve: Serve) -> None:
    """Its blocks stand untouched, but the hub that promised that is no more."""
    server = small(serve)
    keys = BLOCKS.chain(SEED, 4)
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        assert namespace.push(keys, BLOCKS.payloads(keys)).written == 4
    with Peer(server.address, "read", 4) as peer:
        assert peer.says() == "granted 4"
        os.kill(peer.pid, signal.SIGSTOP)
        server.kill()
        server.restart()
        peer.go()
        os.kill(peer.pid, signal.SIGCONT)
        assert peer.says().split() == ["miss"] * 4


def test_a_late_reader_of_half_a_block_misses(serve: Serve) -> None:
    """A block that is still being written has no root yet: only its generation tells that another
    block stands in its slot, whose cells match the checksums that stand beside them.
    """
    server = small(serve)
    layers, heads, _ = BLOCKS.shape
    half = Region(0, layers // 2, 0, heads)
    (key,) = BLOCKS.chain(SEED, 1)
    payload = BLOCKS.payload(key)
    with (
        Client.connect(server.address, name="writer") as writer,
        Client.connect(server.address, name="reader") as reader,
    ):
        reservation = writer.open_namespace(BLOCKS.spec).reserve([key], ttl_s=2)
        cells = reservation.cells(0)
        cells[:] = payload.reshape(cells.shape)
        reservation.commit(region=half)
        namespace = reader.open_namespace(BLOCKS.spec)
        with namespace.acquire([key], region=half, lease_s=TTL_S) as stream:
            (granted,) = list(stream)
            assert not granted.complete
            view = granted.cells
            assert np.array_equal(view.reshape(-1), payload[: layers // 2].reshape(-1))
            assert granted.verify()
            eventually(lambda: host_tier(server).slots_quarantined == 1, "it was never finished")
            del cells
            reservation.abort()
            eventually(lambda: host_tier(server).slots_quarantined == 0, "the writer has left")
            fill(namespace)
            assert not np.array_equal(view.reshape(-1), payload[: layers // 2].reshape(-1))
            assert not granted.verify()
