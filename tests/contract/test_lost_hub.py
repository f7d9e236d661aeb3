"""The hub dies, stops or is replaced under its clients: typed errors in time, then back to work."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvclient import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Gone,
    KVError,
    NotFound,
    Unavailable,
)
from kvclient.transfer import choose
from kvclient.transfer.base import Transfer
from tests.contract.conftest import eventually
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=8, heads=2, page_bytes=8192)  # 1 MiB a block
Serve = Callable[..., ServerProcess]
DEADLINE_S = 3.0
LATE_S = 2.5
"""How late a machine that is busy may see that a call has ended. One that goes by another deadline
than it was given takes longer."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all: it is back after every test."""
    with start_server(tmp_path_factory.mktemp("lost")) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client.connect(server.address, name="survivor", deadline_s=DEADLINE_S) as client:
        client.evict(client.open_namespace(BLOCKS.spec).id)
        yield client


def test_the_same_client_after_a_restart(server: ServerProcess, client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(1, 4)
    assert namespace.push(keys, BLOCKS.payloads(keys)).written == 4
    epoch = client.epoch
    server.kill()
    started = time.monotonic()
    with pytest.raises(Unavailable, match=server.address):
        namespace.lookup(keys)
    assert time.monotonic() - started < DEADLINE_S + LATE_S
    server.restart()
    eventually(lambda: client.healthy and client.epoch > epoch, "reconnected", 20)
    out = BLOCKS.out(4)
    result = namespace.pull(keys, out)
    assert result.found.all(), "the restart was warm"
    assert BLOCKS.wrong(keys, out, result.found) == []
    more = BLOCKS.chain(2, 2)
    assert namespace.push(more, BLOCKS.payloads(more)).written == 2
    assert client.reconnects == 1


@pytest.mark.parametrize("work", ["push", "pull"])
def test_killed_and_restarted_in_the_middle(
    server: ServerProcess, client: Client, work: str
) -> None:
    """Calls without end while the server dies: each ends in its deadline, none with a bare error,
    and afterwards every block that is found is right.
    """
    namespace = client.open_namespace(BLOCKS.spec)
    chains = [BLOCKS.chain(seed, 8) for seed in range(5)]
    payloads = [BLOCKS.payloads(keys) for keys in chains]
    for keys, arrays in zip(chains, payloads, strict=True):
        namespace.push(keys, arrays, deadline_s=20)
    stop = threading.Event()
    failures: list[BaseException] = []
    slow: list[float] = []
    done = [0, 0]

    def run() -> None:
        out = BLOCKS.out(8)
        number = 0
        while not stop.is_set():
            number += 1
            keys, arrays = chains[number % 5], payloads[number % 5]
            started = time.monotonic()
            try:
                if work == "push":
                    fresh = BLOCKS.chain(1000 + number, 8)
                    namespace.push(fresh, arrays)
                else:
                    found = namespace.pull(keys, out).found
                    assert BLOCKS.wrong(keys, out, found) == []
                done[bool(failures)] += 1
            except KVError as error:
                failures.append(error)
                time.sleep(0.02)
            except BaseException as error:
                failures.append(error)
                raise
            slow.append(time.monotonic() - started)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: done[0] > 3, "work has begun")
    server.kill()
    eventually(lambda: bool(failures), "the loss was noticed")
    server.restart()
    eventually(lambda: done[1] > 3, "work goes on with the same client")
    stop.set()
    thread.join()
    assert all(isinstance(error, KVError) for error in failures), failures
    assert max(slow) < DEADLINE_S + LATE_S
    for keys in chains:
        out = BLOCKS.out(8)
        result = namespace.pull(keys, out)
        assert BLOCKS.wrong(keys, out, result.found) == []


def test_what_stood_on_the_old_session_is_gone(server: ServerProcess, client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(1, 4)
    namespace.push(keys[:2], BLOCKS.payloads(keys[:2]))
    stream = namespace.acquire(keys[:2])
    granted = next(stream)
    reservation = namespace.reserve(keys[2:], keys[1:3])
    reservation.cells(0)[:] = 1
    server.kill()
    server.restart()
    eventually(lambda: client.reconnects == 1, "reconnected", 20)
    with pytest.raises(Gone):
        reservation.commit()
    with pytest.raises(Gone):
        reservation.cells(0)
    with pytest.raises(Gone):
        _ = granted.cells
    assert not granted.verify(), "what was copied from it does not count"
    granted.release()
    reservation.abort()
    stream.close()
    assert namespace.push(keys[2:], BLOCKS.payloads(keys[2:]), parents=keys[1:3]).written == 2


def test_a_commit_before_the_loss_is_noticed_is_typed(server: ServerProcess) -> None:
    """No heartbeat has run since: the call itself finds out."""
    with Client.connect(server.address, deadline_s=DEADLINE_S) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        reservation = namespace.reserve(BLOCKS.chain(77, 1))
        assert reservation.writable == [0]
        server.kill()
        try:
            started = time.monotonic()
            with pytest.raises((Unavailable, Gone)):
                reservation.commit()
            assert time.monotonic() - started < DEADLINE_S + LATE_S
            reservation.abort()
        finally:
            server.restart()


def test_a_stopped_hub_costs_the_deadline_and_not_the_session(
    server: ServerProcess, client: Client
) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(1, 2)
    namespace.push(keys, BLOCKS.payloads(keys))
    server.stop_signal()
    try:
        for call in (
            lambda: namespace.lookup(keys, deadline_s=0.3),
            lambda: namespace.push(BLOCKS.chain(2, 1), BLOCKS.out(1), deadline_s=0.3),
            lambda: namespace.pull(keys, BLOCKS.out(2), deadline_s=0.3),
            lambda: client.stats(deadline_s=0.3),
        ):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                call()
            assert time.monotonic() - started < 0.9 * DEADLINE_S, "which is any other call's"
    finally:
        server.cont()
    out = BLOCKS.out(2)
    assert namespace.pull(keys, out).found.all()
    assert client.reconnects == 0


def test_closing_while_the_hub_is_stopped_does_not_hang(server: ServerProcess) -> None:
    client = Client.connect(server.address, deadline_s=DEADLINE_S)
    server.stop_signal()
    try:
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < DEADLINE_S + LATE_S
    finally:
        server.cont()


def test_a_session_that_ended_is_replaced_within_the_call(serve: Serve) -> None:
    """The client stood still beyond its session's life; its next call works all the same."""
    server = serve(session_ttl_ms=300, heartbeat_ms=50)
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(1, 1)
        namespace.push(keys, BLOCKS.payloads(keys))
        token = client.token
        assert client._runner is not None
        goes_on = threading.Event()
        client._runner.loop.call_soon_threadsafe(goes_on.wait, 30)
        eventually(lambda: not server.stats().sessions, "the session has ended")
        threading.Timer(0.2, goes_on.set).start()
        assert namespace.lookup(keys).usable_blocks == 1
        assert client.token != token


async def test_a_transport_may_take_longer_to_open_than_a_session_lives(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NIXL prefaults its staging: gigabytes, where memory is slow."""
    server = serve(session_ttl_ms=400, heartbeat_ms=100)
    open_transfer = choose.open_transfer

    async def slowly(*args: Any) -> Transfer:
        await asyncio.sleep(1.2)
        return await open_transfer(*args)

    monkeypatch.setattr(choose, "open_transfer", slowly)
    async with AsyncClient.connect(server.address, deadline_s=5) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(1, 1)
        assert (await namespace.push(keys, BLOCKS.payloads(keys))).written == 1
        assert client.reconnects == 0


def test_ranks_find_each_other_again(server: ServerProcess) -> None:
    with (
        Client.connect(server.address, rank=0, deadline_s=DEADLINE_S) as first,
        Client.connect(
            server.address, rank=1, deadline_s=DEADLINE_S, join_token=first.token
        ) as second,
    ):
        server.kill()
        server.restart()
        eventually(lambda: first.reconnects == 1 and second.reconnects >= 1, "both are back", 20)
        assert first.token != second.token, "the second works alone until it is told"
        second.rejoin(first.token)
        eventually(lambda: second.healthy and second.token == first.token, "together again", 20)
        assert second.stats().epoch == first.epoch


async def test_a_call_under_way_when_the_client_closes(server: ServerProcess) -> None:
    client = await AsyncClient.connect(server.address)
    namespace = await client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(555, 1)
    await namespace.announce(keys, 30)
    waiting = asyncio.create_task(namespace.pull(keys, BLOCKS.out(1), wait_s=20))
    await asyncio.sleep(0.2)
    await client.close()
    with pytest.raises(KVError):
        await asyncio.wait_for(waiting, 10)


async def test_an_evict_behind_a_release_ends_by_its_own_deadline(server: ServerProcess) -> None:
    """It waits for what the client gave back before, and no longer than it may."""
    async with AsyncClient.connect(server.address, deadline_s=8) as client:
        namespace = await client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(556, 1)
        await namespace.push(keys, BLOCKS.payloads(keys))
        lease = (await namespace.lookup(keys, pin_s=20)).lease
        server.stop_signal()
        try:
            await namespace.release(lease)
            await asyncio.sleep(0.1)  # the release is under way
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.evict(namespace.id, keys, deadline_s=0.4)
            assert time.monotonic() - started < 0.4 + LATE_S
        finally:
            server.cont()
        assert (await client.evict(namespace.id, keys)).in_use == 0


def test_connect_and_close_leak_nothing(server: ServerProcess) -> None:
    def state() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(str(server.host_dir))
        return len(os.listdir("/proc/self/fd")), maps

    def use() -> None:
        with Client.connect(server.address) as client:
            namespace = client.open_namespace(BLOCKS.spec)
            keys = BLOCKS.chain(1, 2)
            namespace.push(keys, BLOCKS.payloads(keys))
            namespace.pull(keys, BLOCKS.out(2))

    use()
    before = state()
    for _ in range(5):
        use()
    after = state()
    assert after[1] == 0
    assert after[0] <= before[0] + 2, (before, after)


def test_unknown_namespaces_are_not_found(client: Client) -> None:
    with pytest.raises(NotFound):
        client.drop_namespace(bytes(32))


async def test_a_keeper_that_is_woken_as_its_client_closes_ends(server: ServerProcess) -> None:
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that comes together with its
    result: then the keeper went on, and `close` waited for it without end.
    """
    client = await AsyncClient.connect(server.address)
    await asyncio.sleep(0.2)  # the keeper waits for its next beat
    client.session._wake.set()
    async with asyncio.timeout(5):
        await client.close()
