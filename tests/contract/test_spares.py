"""Slots reserved ahead by runs of small pushes: that they are used, given back, and never in the
way of what is right.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from kvclient import Client, InvalidArgument, KVError, Namespace, spares
from kvclient.copying import Slot
from kvclient.line import Line
from kvclient.transfer.shm import ShmArena
from kvclient.writing import Reservation
from kvproto import calls
from tests.contract.conftest import eventually, host_tier
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server

BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("spares"), host_bytes="64MiB") as server:
        yield server


@pytest.fixture
def client(hub: ServerProcess) -> Iterator[Client]:
    with Client.connect(hub.address) as client:
        yield client


@pytest.fixture(autouse=True)
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given back stays for longer than any test waits."""
    monkeypatch.setattr(spares, "TTL_S", 40.0)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that a pusher waits for, by name."""
    names: list[str] = []
    receive = Line.receive

    def noted(self: Line, name: str, deadline: Any) -> calls.Reply:
        names.append(name)
        return receive(self, name, deadline)

    monkeypatch.setattr(Line, "receive", noted)
    return names


def push_run(namespace: Namespace, seed: int, count: int) -> list[bytes]:
    """Pushes a chain, one block a call. Its keys."""
    keys = BLOCKS.chain(seed, count)
    payloads = BLOCKS.payloads(keys)
    for at, key in enumerate(keys):
        parents = [keys[at - 1]] if at else None
        assert namespace.push([key], payloads[at : at + 1], parents=parents).written == 1
    return keys


def all_there(namespace: Namespace, keys: list[bytes]) -> None:
    assert namespace.lookup(keys).usable_blocks == len(keys)
    out = BLOCKS.out(len(keys))
    found = namespace.pull(keys, out).found
    assert found.all()
    assert BLOCKS.wrong(keys, out, found) == []


def answers(namespace: Namespace) -> bool:
    with suppress(KVError):
        namespace.lookup(BLOCKS.chain(0, 1))
        return True
    return False


def none_left(hub: ServerProcess) -> bool:
    tier = host_tier(hub)
    return tier.slots_filling == tier.slots_quarantined == 0


def test_a_run_of_pushes_waits_for_its_commits_only(client: Client, waits: list[str]) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = push_run(namespace, 1, 40)
    assert waits.count("Commit") == 40
    assert waits.count("Reserve") <= 10  # the first few; one that a loaded machine answers late
    all_there(namespace, keys)


def test_what_is_not_plain_goes_the_ordinary_way(client: Client, waits: list[str]) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    keys = push_run(namespace, 30, 10)
    begun = waits.count("Reserve")
    extra = BLOCKS.chain(31, 4)
    payloads = BLOCKS.payloads(extra)
    block = payloads[0].reshape(4, 2, -1)
    wide = np.concatenate([block, block], axis=2)[:, :, : block.shape[2]]
    assert namespace.push(extra[:1], [wide]).written == 1  # its cells lie apart
    assert namespace.push(extra[1:2], [payloads[1]], tokens=[BLOCKS.spec.block_tokens]).written == 1
    assert namespace.push(extra[2:3], [payloads[2]], region=BLOCKS.spec.grid.whole).written == 1
    assert namespace.push(extra[3:4], [payloads[3]], wait_s=1.0).written == 1
    assert waits.count("Reserve") - begun in (3, 4)  # one that waits goes by the loop
    all_there(namespace, keys)
    out = BLOCKS.out(4)
    assert BLOCKS.wrong(extra, out, namespace.pull(extra, out).found) == []


def test_a_wrong_argument_in_a_run_is_refused_as_anywhere(
    hub: ServerProcess, client: Client
) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 32, 10)
    (key,) = BLOCKS.chain(33, 1)
    (payload,) = BLOCKS.payloads([key])
    for field, arguments in (
        ("hashes[0]", ([key[:31]], [payload])),
        ("arrays[0]", ([key], [payload[:1]])),
        ("arrays", ([key], [])),
        ("parents[0]", ([key], [payload], [b"no digest"])),
    ):
        keys, arrays, *parents = arguments
        with pytest.raises(InvalidArgument) as refused:
            namespace.push(keys, arrays, parents=parents[0] if parents else None)
        assert refused.value.field == field
    all_there(namespace, push_run(namespace, 34, 10))
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)


def test_a_slot_that_is_lost_in_mid_copy(
    hub: ServerProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 35, 10)
    current, asked = ShmArena.current, itertools.count()

    aborted: list[Slot] = []
    abort, fill = Reservation.abort, spares.write_whole

    def lost(self: ShmArena, offset: int, generation: int) -> bool:
        return current(self, offset, generation) and next(asked) % 6 > 0

    async def late(self: Reservation) -> None:
        with suppress(RuntimeError):  # an ordinary push ends its own here, without a loop
            await asyncio.sleep(0.2)
        await abort(self)

    def noted(self: Reservation) -> Any:
        if not self._ended:
            aborted.extend(self._slots.values())
        return late(self)

    def checked(arena: Any, grid: Any, slot: Slot, source: Any) -> Any:
        assert slot not in aborted, "the hub may give it to somebody else"
        return fill(arena, grid, slot, source)

    monkeypatch.setattr(ShmArena, "current", lost)
    monkeypatch.setattr(Reservation, "abort", noted)
    monkeypatch.setattr(spares, "write_whole", checked)
    for at, key in enumerate(keys := BLOCKS.chain(36, 30)):
        namespace.push([key], BLOCKS.payloads([key]), parents=[keys[at - 1]] if at else None)
    assert aborted
    monkeypatch.setattr(ShmArena, "current", current)
    out = BLOCKS.out(len(keys))
    found = namespace.pull(keys, out).found
    assert found.sum() > 15
    assert BLOCKS.wrong(keys, out, found) == []
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)


def test_a_commit_that_is_refused_is_pushed_the_ordinary_way(
    hub: ServerProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub has ended the reservation: nothing of it is known any more."""
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 37, 10)
    filled, ended = spares.write_whole, []

    def and_fenced(*arguments: Any) -> Any:
        sums = filled(*arguments)
        for spare in client.inline._spares._ready[:1]:  # of the reservation that is being filled
            ended.append(client.run(spare.reservation.abort, None, 0.0, "abort"))
        return sums

    monkeypatch.setattr(spares, "write_whole", and_fenced)
    all_there(namespace, push_run(namespace, 38, 8))
    assert ended
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)


def test_slots_go_back_when_a_run_has_ended(hub: ServerProcess, client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 2, 20)
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)
    push_run(namespace, 3, 20)
    other = client.open_namespace(Blocks(layers=4, heads=2, page_bytes=2048, name="other").spec)
    push_run(other, 4, 5)  # what the first one had is not left behind
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)


def test_a_closed_client_leaves_none(hub: ServerProcess) -> None:
    with Client.connect(hub.address) as pusher:
        push_run(pusher.open_namespace(BLOCKS.spec), 5, 20)
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)


def test_a_block_that_others_pushed_meanwhile_is_present(
    hub: ServerProcess, client: Client
) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 6, 10)
    keys = BLOCKS.chain(7, 6)
    with Client.connect(hub.address) as other:
        assert other.open_namespace(BLOCKS.spec).push(keys, BLOCKS.payloads(keys)).written == 6
    push_run(namespace, 8, 10)
    for at, key in enumerate(keys):  # other bytes under the same key: the first stay
        wrong = BLOCKS.payloads(BLOCKS.chain(9, 1))
        assert namespace.push([key], wrong, parents=[keys[at - 1]] if at else None).present == 1
    all_there(namespace, keys)
    eventually(lambda: none_left(hub), "the spares go back", seconds=20.0)


def test_one_that_expired_before_its_commit_costs_nothing(
    hub: ServerProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stop of the process in mid-push: the hub has given the slot up."""
    monkeypatch.setattr(spares, "TTL_S", 0.8)
    monkeypatch.setattr(spares, "MARGIN_S", 0.1)
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 10, 10)
    filled, slow = spares.write_whole, []

    def slowly(*arguments: Any) -> Any:
        sums = filled(*arguments)
        time.sleep(1.1)
        slow.append(sums)
        return sums

    monkeypatch.setattr(spares, "write_whole", slowly)
    keys = push_run(namespace, 11, 4)
    assert slow
    all_there(namespace, keys)
    eventually(lambda: none_left(hub), "they are fenced", seconds=20.0)


@pytest.mark.parametrize("slots", [33, 60])
def test_where_slots_are_few_none_is_taken_ahead(
    slots: int, tmp_path_factory: pytest.TempPathFactory, waits: list[str]
) -> None:
    """Two would be more than a 32nd."""
    size = slots * BLOCKS.payload_bytes
    with (
        start_server(tmp_path_factory.mktemp("few"), host_bytes=size) as server,
        Client.connect(server.address) as client,
    ):
        namespace = client.open_namespace(BLOCKS.spec)
        all_there(namespace, push_run(namespace, 12, 10))
        assert waits.count("Reserve") == waits.count("Commit") == 10


def test_a_killed_hub_ends_a_run_and_its_successor_begins_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("killed")
    with start_server(directory, host_bytes="64MiB") as server:
        client = Client.connect(server.address, deadline_s=20.0)
        namespace = client.open_namespace(BLOCKS.spec)
        keys = push_run(namespace, 13, 20)
        server.kill()
        with pytest.raises(KVError):
            push_run(namespace, 14, 2)
        server.start()
        eventually(lambda: answers(namespace), "it connects again", seconds=20.0)
        all_there(namespace, keys)
        all_there(namespace, push_run(namespace, 15, 20))
        client.close()


def test_a_line_that_brings_garbage_is_used_no_more(client: Client) -> None:
    """What arrived is read between two pushes, too: what is no frame of the hub's ends the line."""
    namespace = client.open_namespace(BLOCKS.spec)
    push_run(namespace, 16, 10)
    line = client.inline._line
    assert line is not None
    ours, theirs = socket.socketpair()
    with theirs:
        line._socket.close()
        line._socket = ours
        theirs.sendall(b"\xff" * 64)
        line.poll()
        assert not line.usable
    all_there(namespace, push_run(namespace, 17, 10))
