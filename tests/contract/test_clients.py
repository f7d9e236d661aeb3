"""The kinds of client over a real server: synchronous, threaded, read-only, and forked."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from kvclient import AsyncClient, Client, CommitVerdict, InvalidArgument
from tests.contract.oracle import check_all, fresh
from tests.support.server import ServerProcess
from tests.support.ways import WAYS, Way


@pytest.fixture(scope="module")
def way() -> Way:
    """These are about the client, whatever moves the bytes."""
    return WAYS["shm"]


def test_the_synchronous_client_from_eight_threads(hub: ServerProcess) -> None:
    blocks = fresh()
    wrong: list[object] = []
    with Client.connect(hub.address, name="threads") as client:
        namespace = client.open_namespace(blocks.spec)

        def work(seed: int) -> None:
            keys = blocks.chain(seed, 3)
            pushed = namespace.push(keys, blocks.payloads(keys))
            out = blocks.out(3)
            pulled = namespace.pull(keys, out)
            bad = blocks.wrong(keys, out, pulled.found)
            if pushed.written != 3 or not pulled.found.all() or bad:
                wrong.append((seed, pushed, pulled, bad))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_synchronous_client_mirrors_the_other(hub: ServerProcess) -> None:
    blocks = fresh()
    with Client(hub.address) as client:
        namespace = client.open_namespace(blocks.spec)
        keys = blocks.chain(1, 3)
        payloads = blocks.payloads(keys)
        assert namespace.announce(keys, 5) == 3
        with namespace.reserve(keys) as reservation:
            reservation.cells(0)[:] = payloads[0].reshape(reservation.cells(0).shape)
            assert reservation.commit([0]).tolist() == [CommitVerdict.OK]
            assert reservation.fill([1], payloads[1:2]).tolist() == [CommitVerdict.OK]
        lookup = namespace.lookup(keys)
        assert (lookup.usable_blocks, lookup.states.tolist()[:2]) == (2, [3, 3])
        with namespace.acquire(keys) as stream:
            for granted in stream:
                out = np.zeros(blocks.shape, np.uint8)
                assert granted.copy_to(out)
                assert granted.verify()
                assert np.array_equal(granted.cells.reshape(blocks.shape), out)
                assert np.array_equal(out, payloads[granted.index])
                granted.release()
        assert stream.missing == [2]
        assert client.stats().epoch == client.epoch
        assert namespace.id in {one.namespace_id for one in client.list_namespaces()}
        assert client.evict(namespace.id, keys[:1]).blocks >= 1
        assert client.drop_namespace(namespace.id).blocks >= 0
        assert client.healthy


async def test_a_read_only_client_reads_and_cannot_write(
    hub: ServerProcess, client: AsyncClient
) -> None:
    blocks = fresh()
    keys = blocks.chain(1, 2)
    await (await client.open_namespace(blocks.spec)).push(keys, blocks.payloads(keys))
    async with AsyncClient.connect(hub.address, read_only=True) as reader:
        namespace = await reader.open_namespace(blocks.spec)
        await check_all(namespace, blocks, keys)
        with pytest.raises(InvalidArgument) as caught:
            await namespace.push(blocks.chain(2, 1), blocks.payloads(blocks.chain(2, 1)))
        assert caught.value.field == "read_only"


def test_a_client_built_before_a_fork_works_after_it(hub: ServerProcess) -> None:
    """In a process of its own: the parent's opened client is refused in the child."""
    code = f"""
import os
from kvclient import Client, Unsupported
lazy, opened = Client({hub.address!r}), Client({hub.address!r})
lazy_first = os.fork()
if lazy_first == 0:
    lazy.stats()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(lazy_first, 0)[1]))
opened.open()
child = os.fork()
if child == 0:
    try:
        opened.stats()
    except Unsupported as error:
        os._exit(8 if "after the fork" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
opened.stats()
opened.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.stdout.split() == ["7", "8"], ended.stderr
    assert ended.returncode == 0, ended.stderr
