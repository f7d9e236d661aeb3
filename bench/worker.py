"""A client process of the benchmark: buffers of its own, a connection of its own, timed jobs.

A job is planned first (keys, buffers and their random order are chosen) and then run at a given
instant, so that several processes start together and only the calls themselves are timed. Instants
are CLOCK_MONOTONIC seconds, which all processes of a machine share.

Source buffer i is filled from `seed` and i alone: any worker can check a block that another one
pushed without asking it for the bytes.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from kvclient import AsyncClient, Client, KVError
from kvclient.staging import aligned
from kvproto.checksum import grid_checksums
from kvproto.namespace import NamespaceSpec
from kvproto.v1 import kvserver_pb2, kvserver_pb2_grpc

Bytes = npt.NDArray[np.uint8]
DEADLINE_SECONDS = 60.0
BARE_BYTES = 128 << 20
BARE_CALL_BYTES = 1 << 20
BARE_CELL_BYTES = 32 << 10
_RETRY_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Timing:
    """When a job began and ended, and how long each of its calls took (seconds)."""

    began: float
    ended: float
    calls: list[float] = field(default_factory=list)


class WrongAnswer(RuntimeError):
    """A call succeeded and did less than was asked, or moved other bytes: no figure counts."""


class Worker:
    """What a client process does. Each method is one command of the coordinator."""

    def __init__(self) -> None:
        self._job: Callable[[], Timing] | None = None
        self._client: Client | None = None
        self._known: list[bytes] = []

    def connect(
        self, *, address: str, spec: bytes, sources: int, targets: int, seed: int,
        **options: Any,
    ) -> None:  # fmt: skip
        """Open the namespace (`spec`: its canonical encoding) and make resident buffers.
        `options` go to `Client.connect`.
        """
        namespace = NamespaceSpec.decode(spec)
        grid = namespace.grid
        shape = (grid.layers, grid.heads, grid.cell_bytes())
        size = grid.payload_bytes()
        self._rng = np.random.default_rng()
        self._sources: list[Bytes] = []
        whole = aligned(sources * size).reshape(sources, *shape)
        for i in range(sources):
            whole[i] = np.frombuffer(
                np.random.default_rng((seed, i)).bytes(size), np.uint8
            ).reshape(shape)
        self._sources = list(whole)
        targets_whole = aligned(targets * size).reshape(targets, *shape)
        targets_whole[:] = 1
        self._targets: list[Bytes] = list(targets_whole)
        self._block_bytes = size
        self._client = Client.connect(address, name="bench", deadline_s=DEADLINE_SECONDS, **options)
        self._namespace = self._client.open_namespace(namespace)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # ---- preparation, untimed ------------------------------------------------------------------

    def publish(self, *, count: int, batch: int) -> list[bytes]:
        """Push `count` new blocks; block i holds source i (modulo the sources)."""
        keys = [os.urandom(32) for _ in range(count)]
        for start in range(0, count, batch):
            part = range(start, min(start + batch, count))
            self._push([keys[i] for i in part], [i % len(self._sources) for i in part])
        return keys

    def learn(self, *, keys: list[bytes]) -> None:
        """Keys that `plan_pull` draws from, in the order in which they were published."""
        self._known = keys

    # ---- timed jobs ----------------------------------------------------------------------------

    def plan_copy(self, *, calls: int, batch: int) -> None:
        """numpy.copyto of whole blocks, source to target, both in random order."""
        pairs = list(
            zip(
                self._draw(len(self._sources), calls * batch),
                self._draw(len(self._targets), calls * batch),
                strict=True,
            )
        )

        def job() -> Timing:
            began = time.monotonic()
            for source, target in pairs:
                np.copyto(self._targets[target], self._sources[source])
            return Timing(began, time.monotonic())

        self._job = job

    def plan_push(self, *, calls: int, batch: int) -> None:
        """Push new blocks out of random source buffers."""
        order = self._draw(len(self._sources), calls * batch)
        keys = [os.urandom(32) for _ in order]
        parts = [slice(i * batch, (i + 1) * batch) for i in range(calls)]
        self._job = lambda: _timed([partial(self._push, keys[part], order[part]) for part in parts])

    def plan_pull(self, *, calls: int, batch: int) -> None:
        """Pull random known blocks, verified, into random target buffers."""
        blocks = self._draw(len(self._known), calls * batch)
        targets = [t for _ in range(calls) for t in self._draw(len(self._targets), batch)]
        parts = [slice(i * batch, (i + 1) * batch) for i in range(calls)]
        self._pulled = (blocks[parts[-1]], targets[parts[-1]])
        self._job = lambda: _timed(
            [partial(self._pull, blocks[part], targets[part]) for part in parts]
        )

    def run(self, *, at: float) -> Timing:
        """Run the planned job at an instant."""
        job, self._job = self._job, None
        assert job is not None, "nothing planned"
        time.sleep(max(0.0, at - time.monotonic()))
        return job()

    def check_pulled(self, *, count: int) -> None:
        """Compare some blocks of the last pull with what was pushed, byte for byte."""
        blocks, targets = self._pulled
        for i in self._rng.permutation(len(blocks))[:count]:
            expected = self._sources[blocks[i] % len(self._sources)]
            if not np.array_equal(self._targets[targets[i]], expected):
                raise WrongAnswer(f"block {blocks[i]}: pulled bytes differ from the pushed ones")

    # ---- a bare socket, to compare with --------------------------------------------------------

    def prepare(self, *, block_bytes: int) -> None:
        """For a worker that is no client."""
        self._rng = np.random.default_rng()
        self._block_bytes = block_bytes

    def bare_listen(self) -> int:
        """Wait for one connection, in the background; the port."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        port: int = self._listener.getsockname()[1]
        return port

    def bare_open(self, *, port: int, arena_bytes: int = 0) -> None:
        """Connect to `port`; 0 accepts what connected to `bare_listen`.

        With `arena_bytes` the bytes come from and go to memory like a hub's: a resident shared
        mapping of that size, 8 MiB extents of it in random order.
        """
        if port:
            self._bare = socket.create_connection(("127.0.0.1", port))
        else:
            with self._listener:
                self._bare, _ = self._listener.accept()
        self._bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if arena_bytes:
            self._bare_memory = np.frombuffer(mmap.mmap(-1, arena_bytes), np.uint8)
        else:
            self._bare_memory = aligned(BARE_BYTES)
        self._bare_memory[:] = 1

    def plan_bare(self, *, sends: bool, hashes: bool = False) -> None:
        """BARE_BYTES through the connection, BARE_CALL_BYTES a call, which also `hashes` cells of
        BARE_CELL_BYTES before it sends them or when it has them."""
        view, bare, cells = self._bare_memory.data, self._bare, self._bare_memory
        extents = self._draw(len(view) // self._block_bytes, BARE_BYTES // self._block_bytes)
        cell, whole = BARE_CELL_BYTES, socket.MSG_WAITALL

        def job() -> Timing:
            began = time.monotonic()
            for extent in extents:
                done, end = extent * self._block_bytes, (extent + 1) * self._block_bytes
                while done < end:
                    part = view[done : min(done + BARE_CALL_BYTES, end)]
                    if hashes and sends:
                        grid_checksums(cells[done : done + len(part)].reshape(1, -1, cell))
                        bare.sendall(part)
                        done += len(part)
                        continue
                    took = bare.send(part) if sends else bare.recv_into(part, 0, whole)
                    if hashes:
                        grid_checksums(cells[done : done + took].reshape(1, -1, cell))
                    done += took
            return Timing(began, time.monotonic())

        self._job = job

    # ---- control plane -------------------------------------------------------------------------

    def pace_lookups(
        self, *, address: str, spec: bytes, keys: list[bytes], seconds: float, pause_s: float
    ) -> tuple[list[float], list[float]]:
        """`lookups` of keys that are not there, one pair each `pause_s`, for `seconds`."""
        rounds, namespace = int(seconds / pause_s), NamespaceSpec.decode(spec)
        return asyncio.run(_lookups(address, namespace, keys, rounds, pause_s, present=False))

    def traffic(self, *, batch: int, seconds: float) -> int:
        """Push and pull in turns for `seconds`; the bytes moved."""
        end = time.monotonic() + seconds
        moved = 0
        while time.monotonic() < end:
            sources = self._draw(len(self._sources), batch)
            self._known = [os.urandom(32) for _ in range(batch)]
            self._push(self._known, sources)
            self._pull(list(range(batch)), self._draw(len(self._targets), batch))
            moved += 2 * batch * self._block_bytes
        return moved

    def lookups(
        self, *, address: str, spec: bytes, keys: list[bytes], rounds: int
    ) -> tuple[list[float], list[float]]:
        """Seconds of each lookup of all keys, and of each empty call, taken in turns."""
        return asyncio.run(_lookups(address, NamespaceSpec.decode(spec), keys, rounds))

    def first_answer(self, *, keys: list[bytes], deadline: float) -> tuple[float, float]:
        """Try until a lookup finds all keys and a pull brings the first: instants of both.

        For a client that outlives its server; failed calls are repeated until `deadline`.
        """
        while True:
            try:
                found = self._namespace.lookup(keys)
                looked_up = time.monotonic()
                if found.usable_blocks != len(keys):
                    raise WrongAnswer(f"{found.usable_blocks} of {len(keys)} blocks after restart")
                result = self._namespace.pull(keys[:1], [self._targets[0]])
                pulled = time.monotonic()
            except KVError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
                continue
            if not bool(np.all(result.found)):
                raise WrongAnswer("the pull after the restart missed")
            return looked_up, pulled

    # ---- inside --------------------------------------------------------------------------------

    def _draw(self, population: int, count: int) -> list[int]:
        """`count` indices in random order, none twice before all were drawn once."""
        rounds = -(-count // population)
        drawn = np.concatenate([self._rng.permutation(population) for _ in range(rounds)])
        return [int(i) for i in drawn[:count]]

    def _push(self, keys: list[bytes], sources: list[int]) -> None:
        result = self._namespace.push(keys, [self._sources[i] for i in sources])
        if result.written != len(keys):
            raise WrongAnswer(f"pushed {result.written} of {len(keys)} blocks: {result}")

    def _pull(self, blocks: list[int], targets: list[int]) -> None:
        out = [self._targets[i] for i in targets]
        result = self._namespace.pull([self._known[i] for i in blocks], out)
        if not bool(np.all(result.found)):
            raise WrongAnswer(f"pulled {int(np.sum(result.found))} of {len(blocks)} blocks")


def _timed(calls: list[Callable[[], None]]) -> Timing:
    instants = [time.monotonic()]
    for call in calls:
        call()
        instants.append(time.monotonic())
    return Timing(instants[0], instants[-1], [float(d) for d in np.diff(instants)])


async def _lookups(
    address: str,
    spec: NamespaceSpec,
    keys: list[bytes],
    rounds: int,
    pause_s: float = 0.0,
    *,
    present: bool = True,
) -> tuple[list[float], list[float]]:
    """Lookup through the client, Heartbeat through a bare stub: same loop, same transport."""
    looked_up: list[float] = []
    empty: list[float] = []
    async with (
        AsyncClient.connect(address, name="bench-lookup", deadline_s=DEADLINE_SECONDS) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        namespace = await client.open_namespace(spec)
        stub = kvserver_pb2_grpc.CacheStub(channel)
        hello = await stub.Hello(
            kvserver_pb2.HelloRequest(protocol_version=1, client_name="bench-empty")
        )
        beat = kvserver_pb2.HeartbeatRequest(session=hello.session, client=hello.client)
        for turn in range(rounds + 3):
            if pause_s:
                await asyncio.sleep(pause_s)
            began = time.monotonic()
            found = await namespace.lookup(keys)
            between = time.monotonic()
            await stub.Heartbeat(beat)
            ended = time.monotonic()
            if found.usable_blocks != len(keys) * present:
                raise WrongAnswer(f"lookup: {found.usable_blocks} of {len(keys)} usable")
            if turn >= 3:  # the first ones warm both paths up
                looked_up.append(between - began)
                empty.append(ended - between)
    return looked_up, empty


def main(pipe: Connection) -> None:
    """Serve commands until the other end closes: (method, arguments) -> ("ok" | "error", value)."""
    logging.getLogger("kvclient").setLevel(logging.ERROR)  # the restart's lost calls are its point
    worker = Worker()
    try:
        while True:
            method, arguments = pipe.recv()
            answer: tuple[str, Any]
            try:
                answer = ("ok", getattr(worker, method)(**arguments))
            except Exception:
                answer = ("error", traceback.format_exc())
            pipe.send(answer)
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        worker.close()
