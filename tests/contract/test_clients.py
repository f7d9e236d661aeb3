"""The kinds of client over a real server: synchronous, threaded, read-only, and forked."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

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


def test_the_readmes_example_runs_as_it_stands(hub: ServerProcess) -> None:
    """Word for word, but for the hub's address; and it prints what the README says."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert example.count("127.0.0.1:50051") == 1
    done = subprocess.run(
        [sys.executable, "-c", example.replace("127.0.0.1:50051", hub.address)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"print\(.*\) +# (.*)", example)


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


FORKS = """
import os, sys
from kvclient import Client, Unsupported

def ended(child):
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

def refused(use):
    try:
        use()
    except Unsupported as error:
        return "fork" in str(error)
    return False

lazy, opened = Client(sys.argv[1]), Client(sys.argv[1])
child = os.fork()
if child == 0:
    lazy.stats()
    os._exit(7)
ended(child)
opened.open()
for _ in range(4):
    child = os.fork()
    if child == 0:
        os._exit(8 if refused(opened.stats) and refused(lazy.stats) else 2)
    ended(child)
child = os.fork()
if child == 0:
    opened.close()
    sys.exit(9)  # as a child that knows of nothing: the interpreter clears up
ended(child)
opened.stats()
opened.close()
assert "GRPC_ENABLE_FORK_SUPPORT" not in os.environ
"""


def test_a_client_works_in_one_process_and_a_fork_costs_nobody_his_life(
    hub: ServerProcess,
) -> None:
    """In processes of their own. With the fork handlers of gRPC, one child in ten was aborted."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", FORKS, hub.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for run in runs:
            out, errors = run.communicate(timeout=30)
            assert out.split() == ["7", "8", "8", "8", "8", "9"], errors
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
            run.communicate()
