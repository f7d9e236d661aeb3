"""A whole hub with a device tier, in process memory or on a GPU: the same must hold for both.

Blocks of 64 KiB in a host tier that holds about fifty of them, and no disk: what has left the
host and is still found was on the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import grpc
import numpy as np

from kvclient import Client
from kvclient.results import PullResult, Tier
from kvproto.v1 import kvserver_pb2 as pb
from kvproto.v1 import kvserver_pb2_grpc
from kvserver.config import Settings
from kvserver.server import Server
from tests.support.payload import Blocks

T = TypeVar("T")
BLOCKS = Blocks(layers=4, heads=2, page_bytes=1024)
HOT = BLOCKS.chain(1, 16)
OPTIONS = {"host_bytes": 4 << 20, "device_bytes": 8 << 20, "tcp_listen": ""}
DEADLINE_S = 20.0
FLIP_STEP = 16 << 10  # each slot holds at least so much payload


def stats(address: str) -> pb.StatsReply:
    with grpc.insecure_channel(address) as channel:
        admin = kvserver_pb2_grpc.AdminStub(channel)
        return admin.Stats(pb.StatsRequest(), timeout=10, wait_for_ready=True)


def tier_of(reply: pb.StatsReply, number: int = pb.TIER_DEVICE) -> pb.TierStats:
    return next(tier for tier in reply.tiers if tier.tier == number)


def push(address: str, keys: list[bytes]) -> int:
    with Client.connect(address) as client:
        return client.open_namespace(BLOCKS.spec).push(keys, BLOCKS.payloads(keys)).written


def pull(address: str, keys: list[bytes]) -> PullResult:
    """A wrong byte fails."""
    with Client.connect(address) as client:
        out = BLOCKS.out(len(keys))
        result = client.open_namespace(BLOCKS.spec).pull(keys, out)
        assert BLOCKS.wrong(keys, out, result.found) == []
        return result


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def heat(address: str) -> None:
    """Pull the hot blocks until each is on the device, as often as that takes and no more: on a
    slow machine they must not become so hot that `flood` cannot move them."""
    for _ in range(20):
        assert pull(address, HOT).found.all()
        until(lambda: not tier_of(stats(address)).slots_copying, "a copy does not end")
        if tier_of(stats(address)).slots_committed == len(HOT):
            return
    raise AssertionError("the hot blocks do not go to the device")


def flood(address: str) -> None:
    """Push other prompts until nothing of before is on the host."""
    with Client.connect(address) as client:
        namespace = client.open_namespace(BLOCKS.spec)
        for seed in range(100, 140):
            keys = BLOCKS.chain(seed, 12)
            namespace.push(keys, BLOCKS.payloads(keys))


def on_the_device(address: str) -> None:
    """The hot blocks, on the device and nowhere else."""
    assert push(address, HOT) == len(HOT)
    heat(address)
    flood(address)


def comes_back_whole(address: str) -> None:
    """What has left the host is pulled from the device, byte for byte."""
    on_the_device(address)
    result = pull(address, HOT)
    assert result.found.all()
    assert set(result.tiers.tolist()) == {Tier.DEVICE}
    counters = stats(address).counters
    assert counters["downloads"] == len(HOT)
    assert counters["bytes_device_out"] >= len(HOT) * BLOCKS.payload_bytes
    assert not counters["incidents"]
    assert not counters["corrupt_device"]


def wrong_bytes_are_dropped(server: ServerThread) -> None:
    """A bit that flips on the device is a miss, counted, and never served."""
    on_the_device(server.address)
    flip_every_slot(server)
    result = pull(server.address, HOT)
    assert not result.found.any()
    reply = stats(server.address)
    assert reply.counters["corrupt_device"] == len(HOT)
    assert not reply.counters["incidents"]
    assert tier_of(reply).up
    assert push(server.address, HOT) == len(HOT)  # the hub knows nothing of them any more
    assert pull(server.address, HOT).found.all()


def flip_every_slot(server: ServerThread) -> None:
    """Behind the hub's back, by the device's own copies."""
    assert server.server.device is not None
    arena = server.server.device._arena
    byte = np.empty(1, np.uint8)
    for offset in range(17, arena.data_bytes, FLIP_STEP):
        arena.download(offset, byte)
        arena.upload(offset, byte ^ 1)


class ServerThread:
    """A hub in a thread of this process, so that a test reaches what the wire does not show."""

    def __init__(self, **options: Any) -> None:
        self._directory = tempfile.mkdtemp(prefix="kvserver-test-", dir="/dev/shm")
        fixed = {"listen": "127.0.0.1:0", "metrics_listen": "", "host_dir": self._directory}
        self.server = Server(Settings(**fixed, **{**OPTIONS, **options}))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    @property
    def address(self) -> str:
        return self.server.address

    def start(self) -> None:
        self._call(self.server.start())

    def close(self) -> None:
        try:
            self._call(self.server.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE_S)
            self._loop.close()
            shutil.rmtree(self._directory, ignore_errors=True)


@contextlib.contextmanager
def server_thread(**options: Any) -> Iterator[ServerThread]:
    server = ServerThread(**options)
    try:
        server.start()
        yield server
    finally:
        server.close()
