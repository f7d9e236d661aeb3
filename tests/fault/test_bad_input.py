"""Storms of bad input on every port of a hub: each call is refused by name, and the process is left
as it was. What each edge says of which field is tested where the edge is (`unit/service`,
`unit/client`, `unit/transfer`, `unit/test_config.py`, `unit/test_cli.py`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvclient import Client, InvalidArgument
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from tests.contract.conftest import eventually
from tests.support.payload import Blocks
from tests.support.server import ServerProcess

BLOCKS = Blocks(layers=4, heads=2, page_bytes=2048)
ROUNDS = 20
STORMS = 7
GROWTH_BYTES_MAX = 24 << 20  # a list of 65,536 keys that stayed each time were 280 MiB
Serve = Callable[..., ServerProcess]


def descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def own_memory(server: ServerProcess) -> int:
    """Resident bytes that are not the arena's."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def slots(server: ServerProcess) -> list[pb.TierStats]:
    return list(server.stats().tiers)


def garbage(family: socket.AddressFamily, address: object, seed: int) -> None:
    """Bytes that are nothing, or the beginning of something, and then no more."""
    raw = np.random.default_rng(seed).bytes(200 + 997 * (seed % 5))
    with socket.socket(family, socket.SOCK_STREAM) as peer, suppress(OSError):
        peer.settimeout(2.0)
        peer.connect(address)  # type: ignore[arg-type]
        peer.sendall(raw)
        if seed % 2:
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):
                pass


def refused(call: Callable[[], object], *codes: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() in codes  # type: ignore[attr-defined]


def storm(server: ServerProcess, client: Client) -> None:
    namespace = client.open_namespace(BLOCKS.spec)
    (key,) = BLOCKS.chain(1, 1)
    invalid, not_found = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    many = grpc.StatusCode.RESOURCE_EXHAUSTED
    ports = [server.address, server.metrics_address, str(server.ready["tcp_listen"])]
    with grpc.insecure_channel(server.address) as channel:
        stub = kvserver_pb2_grpc.CacheStub(channel)
        for number in range(ROUNDS):
            nobody = pb.ReserveRequest(session=1 << 60, hashes=key)
            refused(lambda: stub.Reserve(nobody, timeout=10), not_found)  # noqa: B023
            link = client.aio.session.link
            ragged = pb.LookupRequest(
                session=link.session, namespace=link.handles[namespace.id], hashes=bytes(33)
            )
            refused(lambda: stub.Lookup(ragged, timeout=10), invalid)  # noqa: B023
            ragged.hashes = bytes(32 << 16)
            refused(lambda: stub.Lookup(ragged, timeout=10), many, invalid)  # noqa: B023
            with pytest.raises(InvalidArgument):
                namespace.push([key], np.zeros((1, 4, 2, 7), np.uint8))
            for port in ports:
                host, _, at = port.rpartition(":")
                garbage(socket.AF_INET, (host, int(at)), number)
            garbage(socket.AF_UNIX, str(server.host_dir / "shm.sock"), number)


@pytest.mark.timeout(120)
def test_storms_of_bad_input_leave_the_server_as_it_was(serve: Serve) -> None:
    server = serve(host_bytes="64MiB", tcp_listen="127.0.0.1:0")
    with Client.connect(server.address) as client:
        for _ in range(STORMS):
            storm(
                server, client
            )  # what is made once, and what is kept for the next, is made by now
        books, memory, open_files = slots(server), own_memory(server), descriptors(server)
        for _ in range(STORMS):
            storm(server, client)
        eventually(lambda: descriptors(server) <= open_files, "every connection is let go of")
        assert own_memory(server) - memory < GROWTH_BYTES_MAX
        assert slots(server) == books
        namespace = client.open_namespace(BLOCKS.spec)
        keys = BLOCKS.chain(2, 3)
        assert namespace.push(keys, BLOCKS.payloads(keys)).written == 3
        assert namespace.pull(keys, BLOCKS.out(3)).found.all()
