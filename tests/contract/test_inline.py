"""Small pushes and pulls of a synchronous client, on the caller's thread: that they are, what they
leave behind, and that they are as good as the loop's when something goes wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvclient import Client, DeadlineExceeded, KVError, Namespace, Unavailable
from kvclient.inline import BYTES_MAX, Inline
from kvclient.results import PushVerdict
from tests.contract.conftest import eventually
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)
Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("inline"), host_bytes="64MiB") as server:
        yield server


@pytest.fixture
def client(hub: ServerProcess) -> Iterator[Client]:
    with Client.connect(hub.address) as client:
        yield client


def on_loop(client: Client) -> list[str]:
    """The calls that the loop makes from now on, by name."""
    local = client.aio.session.link.local
    assert local is not None
    carried: list[str] = []
    begin = local.begin

    def noted(call: object, request: object, seconds: float) -> int:
        carried.append(call.name)  # type: ignore[attr-defined]
        return begin(call, request, seconds)  # type: ignore[arg-type]

    local.begin = noted  # type: ignore[method-assign, assignment]
    return carried


def push_and_pull(namespace: Namespace, seed: int, count: int = 2) -> None:
    keys = BLOCKS.chain(seed, count)
    assert namespace.push(keys, BLOCKS.payloads(keys)).written == count
    out = BLOCKS.out(count)
    result = namespace.pull(keys, out)
    assert result.found.all()
    assert BLOCKS.wrong(keys, out, result.found) == []


def test_what_is_small_asks_nothing_of_the_loop(client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    carried = on_loop(client)
    push_and_pull(namespace, 1)
    keys = BLOCKS.chain(1, 2)
    again = namespace.push(keys, BLOCKS.payloads(keys))
    assert again.present == 2
    missing = namespace.pull(BLOCKS.chain(99, 1), BLOCKS.out(1))
    assert not missing.found.any()
    assert [name for name in carried if name != "Release"] == []


def test_what_is_large_or_waits_goes_by_the_loop(client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    carried = on_loop(client)
    push_and_pull(namespace, 2, count=BYTES_MAX // BLOCKS.payload_bytes + 1)
    assert {"Reserve", "Commit", "Acquire"} <= set(carried)
    del carried[:]
    namespace.pull(BLOCKS.chain(2, 1), BLOCKS.out(1), wait_s=0.1)
    assert "Acquire" in carried


def test_a_pulled_block_is_free_again_without_another_call(client: Client) -> None:
    """Leases go back by themselves, and before an eviction that is asked for at once."""
    namespace = client.open_namespace(BLOCKS.spec)
    push_and_pull(namespace, 3)
    evicted = client.evict(namespace.id, BLOCKS.chain(3, 2))
    assert (evicted.blocks, evicted.in_use) == (2, 0)
    push_and_pull(namespace, 3)
    time.sleep(0.5)  # and with nobody to hurry them
    with Client.connect(client.address) as other:
        evicted = other.evict(namespace.id, BLOCKS.chain(3, 2))
    assert (evicted.blocks, evicted.in_use) == (2, 0)


def test_threads_that_meet_here_do_not_wait_for_each_other(client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                push_and_pull(namespace, 100 + 10 * number + turn)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []


def test_a_namespace_that_was_dropped_is_opened_again(client: Client) -> None:
    """A refusal is asked for by the loop again, which knows what it means."""
    namespace = client.open_namespace(BLOCKS.spec)
    push_and_pull(namespace, 4)
    with Client.connect(client.address) as other:
        other.drop_namespace(namespace.id)
    push_and_pull(namespace, 4)


def test_a_session_that_ended_is_replaced_within_the_call(serve: Serve) -> None:
    server = serve(session_ttl_ms=300, heartbeat_ms=50)
    with Client.connect(server.address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        push_and_pull(namespace, 1)
        token = client.token
        assert client._runner is not None
        goes_on = threading.Event()
        client._runner.loop.call_soon_threadsafe(goes_on.wait, 30)
        eventually(lambda: not server.stats().sessions, "the session has ended")
        threading.Timer(0.3, goes_on.set).start()
        push_and_pull(namespace, 2)
        assert client.token != token


def test_a_stopped_hub_costs_the_deadline_and_forgets_the_call(
    hub: ServerProcess, client: Client
) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(5, 1)
    push_and_pull(namespace, 6)
    hub.stop_signal()
    try:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            namespace.push(keys, BLOCKS.payloads(keys), deadline_s=0.3)
        with pytest.raises(DeadlineExceeded):
            namespace.pull(keys, BLOCKS.out(1), deadline_s=0.3)
        assert time.monotonic() - started < 5, "and not for as long as a call may take"
    finally:
        hub.cont()
    result = namespace.push(keys, BLOCKS.payloads(keys))
    assert result.verdicts.tolist() == [PushVerdict.WRITTEN], "no reservation of it was left"
    assert client.reconnects == 0
    time.sleep(1.1)
    carried = on_loop(client)
    push_and_pull(namespace, 7)
    assert [name for name in carried if name != "Release"] == [], "it has another line by now"


def test_a_hub_that_comes_back_is_found_again(tmp_path: Path, serve: Serve) -> None:
    server = serve(host_bytes="64MiB")
    with Client.connect(server.address, deadline_s=5.0) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        push_and_pull(namespace, 1)
        server.kill()
        with pytest.raises(KVError):
            push_and_pull(namespace, 2)
        server.restart()
        eventually(lambda: client.healthy and client.reconnects == 1, "connected again")
        out = BLOCKS.out(2)
        result = namespace.pull(BLOCKS.chain(1, 2), out)
        assert result.found.all()
        assert BLOCKS.wrong(BLOCKS.chain(1, 2), out, result.found) == []
        push_and_pull(namespace, 3)


def test_closing_ends_what_waits_here(hub: ServerProcess) -> None:
    client = Client.connect(hub.address)
    namespace = client.open_namespace(BLOCKS.spec)
    push_and_pull(namespace, 8)
    ended: list[BaseException] = []

    def push() -> None:
        try:
            namespace.push(BLOCKS.chain(9, 1), BLOCKS.out(1))
        except BaseException as error:
            ended.append(error)

    hub.stop_signal()
    try:
        thread = threading.Thread(target=push)
        thread.start()
        inline = client._inline
        assert isinstance(inline, Inline)
        eventually(inline._using.locked, "the push waits here")
        started = time.monotonic()
        client.close()
        thread.join(10)
        assert time.monotonic() - started < 8, "the push might take ten"
    finally:
        hub.cont()
    assert not thread.is_alive()
    assert isinstance(ended[0], Unavailable), ended
    with pytest.raises(Unavailable):
        namespace.push(BLOCKS.chain(9, 1), BLOCKS.out(1))


def test_a_wrong_block_is_a_miss_and_is_reported(hub: ServerProcess, client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = BLOCKS.chain(11, 1)
    reservation = namespace.reserve(keys)
    reservation.cells(0)[:] = 7
    sums = np.ones((1, BLOCKS.spec.grid.cells), np.uint64)
    reservation.commit(checksums=sums)
    result = namespace.pull(keys, BLOCKS.out(1))
    assert (result.found.tolist(), result.corrupt) == ([False], 1)
    assert namespace.lookup(keys).usable_blocks == 0
