"""What kvserver adds to bare NIXL: the same bytes with the same descriptors, in turns.

    python -m bench.nixl [--rounds 12] [--block-mib 2] [--batch 32] [--direct] [--agents 0]

The ways, one after the other in each round, because the speed of a machine drifts; the figure is
the median of the ratios to the bare transfer just before.

  bare   a second process with an agent of its own reads (push) or writes (pull) the client's
         staging ring from memory of its own (of the arena's kind), POST_BYTES a post, one
         post behind the other
  bare*  the same by as many agents as the hub has (`nixl_agents`), a thread each; on a push they
         also hash what a post brought, as the hub has to: what these cores can do at best
  move   the same bytes by calls of Move: permits, slots, gRPC, and on a push the hub hashes what
         arrived; the staging is filled beforehand, nothing is committed
  whole  `push` and `pull` of the client: reserve, copy and hash into staging, Move, commit; or
         acquire, Move, copy and check, release

With `--direct` the memory of all three is the client's own, registered, and `whole` copies nothing:
it hashes where the bytes lie. CPU time is that of client and hub, with the hub's
own processes. Every slot has been written before, as bare has touched all of its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import machine, report
from bench.budget import children_of, ticks_of
from bench.machine import rounded_down
from bench.transfer import wait_resident
from kvclient import AsyncClient, AsyncNamespace
from kvclient.copying import Reading, Slot, Writing
from kvclient.timing import Deadline
from kvclient.transfer.cutting import direct_addresses, parts, rooms, staged_addresses
from kvclient.transfer.direct import Scattered
from kvclient.transfer.nixl import DIRECT_BYTES, NixlTransfer
from kvclient.transfer.ring import EXTENTS, Ring
from kvproto import nixlib
from kvproto.checksum import grid_checksums
from kvproto.frames import Op
from kvproto.nixlib import Agent, Memory, State
from kvproto.rdma import rdma_devices
from kvproto.v1 import kvserver_pb2 as pb
from kvserver.moving import agents_for
from kvserver.transfer.nixl.posts import Post, cut
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, start_server


def bare_process() -> None:
    """The initiator: METADATA BYTES AGENTS on the first line, then `read ADDRESS ...` or `write
    ...`, by so many of the agents."""
    metadata, size, agents = sys.stdin.readline().split()
    # The same kind of memory as the hub's arena: a file on tmpfs, without huge pages.
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(int(size))
        mine = np.frombuffer(mmap.mmap(file.fileno(), int(size)), np.uint8)
    mine[:] = 0
    rng = np.random.default_rng(5)
    movers = []
    for number in range(int(agents)):
        agent = Agent(f"bare-hub-{number}", backend="UCX", params={}, progress=False)
        agent.register(int(mine.ctypes.data), mine.nbytes, Memory.DRAM)
        movers.append((agent, agent.add_peer(bytes.fromhex(metadata))))
    print("ready", flush=True)
    with ThreadPoolExecutor(len(movers)) as pool:
        for line in sys.stdin:
            word, base, pieces, piece, times, many, cell = line.split()
            starts = np.arange(int(pieces), dtype=np.uint64) * np.uint64(piece)
            # Slots are where they are: a set of its own each time, out of all of the memory.
            slots = rng.permutation(len(mine) // int(piece))[: int(pieces)].astype(np.uint64)
            posts = cut(
                slots * np.uint64(piece) + np.uint64(mine.ctypes.data), starts + np.uint64(base),
                np.full(int(pieces), int(piece), np.uint64), np.arange(int(pieces)), device=0,
            )  # fmt: skip
            began = time.perf_counter()
            turns = [posts[which :: int(many)] * int(times) for which in range(int(many))]
            each = [
                pool.submit(bare_posts, *mover, turn, word, mine, int(cell))
                for mover, turn in zip(movers, turns, strict=False)
            ]
            for one in each:
                one.result()
            print(time.perf_counter() - began, flush=True)


def bare_posts(
    agent: Agent, peer: str, posts: list[Post], word: str, mine: Bytes, cell: int
) -> None:
    """One after the other. With a `cell`, what came is hashed, in cells of so many bytes."""
    for post in posts:
        handle, state = agent.post(
            read=word == "read", peer=peer, local=post.local, remote=post.remote,
            memory=Memory.DRAM,
        )  # fmt: skip
        while state is State.RUNNING:
            state = agent.state(handle)
        assert state is State.DONE
        agent.release(handle)
        if cell:
            for address, size, _ in post.local.tolist():
                start = address - int(mine.ctypes.data)
                grid_checksums(mine[start : start + size].reshape(1, -1, cell))


class Bare:
    def __init__(self, transfer: NixlTransfer, memory_bytes: int, agents: int) -> None:
        assert transfer._agent is not None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.nixl", "--bare"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ask(f"{transfer._agent.metadata().hex()} {memory_bytes} {agents}")

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def seconds(
        self, word: str, address: int, *, pieces: int, piece_bytes: int, times: int, agents: int,
        cell_bytes: int,
    ) -> float:  # fmt: skip
        return float(
            self._ask(f"{word} {address} {pieces} {piece_bytes} {times} {agents} {cell_bytes}")
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


Bytes = npt.NDArray[np.uint8]
FLOOR = 0.85  # of bare, for what the hub moves


@dataclass(frozen=True, slots=True)
class NixlRow:
    """Speeds in GB/s (10^9), medians; ratios are medians of those of each round."""

    way: str  # "move" or "whole"
    operation: str
    direct: bool
    mib: int
    agents: int
    rounds: int
    bare_gb_s: float
    cores_gb_s: float  # bare*
    speed_gb_s: float
    ratio: float  # to bare
    ratio_low: float
    ratio_high: float
    of_cores: float  # ratio to bare*
    core_ms: float  # of client and hub, per MiB
    floor: float  # 0: none
    floor_met: bool


Progress = Callable[[str], None]
Requests = list[pb.MoveRequest]


def staged_requests(
    transfer: NixlTransfer, op: Op, work: Writing | Reading, ring: Ring
) -> Requests:
    """All parts of the work as Moves of what stands in the ring."""
    requests = []
    indices = range(len(work.slots))
    for at, part in enumerate(parts(work, indices, ring.extent_bytes)):
        extent = at % EXTENTS
        addresses = staged_addresses(part, ring.address_of(extent))
        request = transfer._request(op, work, part, next(transfer._numbers), addresses)
        if op is Op.WRITE:
            held = rooms(part, ring.view(extent))
            sums = np.stack([grid_checksums(held[i]) for i in part.indices])
            request.checksums = sums.astype("<u8").tobytes()
        requests.append(request)
    return requests


def direct_requests(
    transfer: NixlTransfer, op: Op, work: Writing | Reading, memory: np.ndarray
) -> Requests:
    """The same of registered memory."""
    memories = transfer._memories
    assert memories is not None
    found: dict[int, Scattered] = {}
    for index, block in enumerate(memory[: len(work.slots)]):
        place = memories.scattered(block)
        assert place is not None
        found[index] = place
    requests = []
    for part in parts(work, list(found), DIRECT_BYTES, found):
        addresses, _ = direct_addresses(part)
        request = transfer._request(op, work, part, next(transfer._numbers), addresses)
        if op is Op.WRITE:
            sums = np.stack([grid_checksums(memory[i]) for i in part.indices])
            request.checksums = sums.astype("<u8").tobytes()
        requests.append(request)
    return requests


async def moves(transfer: NixlTransfer, requests: Requests, ahead: int) -> float:
    """These Moves, `ahead` at once, without copies here."""
    queue = iter(requests)

    async def worker() -> None:
        for request in queue:
            reply = await transfer._move(request)
            assert reply.terminal
            assert not any(reply.statuses), reply.statuses

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(ahead)))
    return time.perf_counter() - began


class Bench:
    """One hub, one client, the bare process, and what was measured."""

    def __init__(
        self, client: AsyncClient, hub: ServerProcess, blocks: Blocks, batch: int, agents: int
    ) -> None:
        transfer = client.session.link.transfer
        assert isinstance(transfer, NixlTransfer)
        assert transfer._ring is not None
        self.transfer, self.ring, self.direct = transfer, transfer._ring, transfer.direct
        self.blocks, self.batch, self.hub, self.agents = blocks, batch, hub, agents
        self.size = batch * blocks.payload_bytes
        self.source, self.out = blocks.out(batch), blocks.out(batch)
        self.source[:] = np.random.default_rng(1).integers(0, 256, blocks.shape, np.uint8)
        self.ratios: dict[str, list[tuple[float, float]]] = {}
        self.speeds: dict[str, list[float]] = {}
        self.cpu_ms: dict[str, list[float]] = {}
        pieces = (
            batch if self.direct else min(batch, self.ring.bytes.nbytes // blocks.payload_bytes)
        )
        self._shape = {
            "pieces": pieces, "piece_bytes": blocks.payload_bytes, "times": batch // pieces,
        }  # fmt: skip

    def start_bare(self, host_bytes: int) -> None:
        self.bare_process = Bare(self.transfer, host_bytes, self.agents)

    def bare(self, word: str) -> tuple[float, float]:
        """Seconds of one agent, and of as many as the hub has, which also hash what they read."""
        memory = self.source if word == "read" else self.out
        address = int(memory.ctypes.data) if self.direct else self.ring.address
        cell = self.blocks.shape[2] if word == "read" else 0
        seconds = self.bare_process.seconds
        assert self.transfer._agent is not None
        with self.transfer._agent.moving():
            many = seconds(word, address, agents=self.agents, cell_bytes=cell, **self._shape)
            return seconds(word, address, agents=1, cell_bytes=0, **self._shape), many

    def note(self, name: str, seconds: float, bare: tuple[float, float], cpu_s: float) -> None:
        self.ratios.setdefault(name, []).append((bare[0] / seconds, bare[1] / seconds))
        self.speeds.setdefault(name, []).append(self.size / seconds / 1e9)
        for which, spent in zip(("bare ", "bare* "), bare, strict=True):
            speeds = self.speeds.setdefault(which + name.split()[1], [])
            speeds.append(self.size / spent / 1e9)
        self.cpu_ms.setdefault(name, []).append(cpu_s * 1e3 * (1 << 20) / self.size)

    def rows(self) -> list[NixlRow]:
        rows = []
        for name, pairs in sorted(self.ratios.items()):
            way, operation = name.split()
            ratios, of_cores = zip(*pairs, strict=True)
            ratio, floor = statistics.median(ratios), FLOOR if way == "move" else 0.0
            bare, cores, speed = (
                statistics.median(self.speeds[which])
                for which in (f"bare {operation}", f"bare* {operation}", name)
            )
            figures = bare, cores, speed, ratio, min(ratios), max(ratios)
            rows.append(
                NixlRow(
                    way, operation, self.direct, self.size >> 20, self.agents, len(pairs),
                    *(rounded_down(figure, 3) for figure in figures),
                    of_cores=rounded_down(statistics.median(of_cores), 3),
                    core_ms=round(statistics.median(self.cpu_ms[name]), 3),
                    floor=floor,
                    floor_met=ratio >= floor,
                )
            )  # fmt: skip
        return rows

    def cpu_s(self) -> float:
        hub = self.hub.pid
        ticks = sum(map(ticks_of, [hub, *children_of(hub)]))
        return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()

    async def round(self, namespace: AsyncNamespace, number: int, ahead: int) -> None:
        grid, batch = self.blocks.spec.grid, self.batch
        keys = self.blocks.chain(2 * number, batch)
        others = self.blocks.chain(2 * number + 1, batch)
        warm = number == 0  # memory is touched, connections stand

        bare = self.bare("read")
        async with await namespace.reserve(others) as held:
            slots = [held._slots[i] for i in range(batch)]
            writing = Writing(grid, grid.whole, slots, None, hold=held._id)
            requests = self._requests(Op.WRITE, writing, self.source)
            cpu = self.cpu_s()
            seconds = await moves(self.transfer, requests, ahead)
            if not warm:
                self.note("move push", seconds, bare, self.cpu_s() - cpu)
        bare, cpu = self.bare("read"), self.cpu_s()
        began = time.perf_counter()
        assert (await namespace.push(keys, self.source)).written == batch
        if not warm:
            self.note("whole push", time.perf_counter() - began, bare, self.cpu_s() - cpu)

        bare = self.bare("write")
        async with namespace.acquire(keys) as stream:
            grant = await stream.next_batch(Deadline(10))
            assert grant is not None
            got: list[Slot] = list(grant.slots)
            reading = Reading(grid, grid.whole, got, None, hold=grant.lease)
            requests = self._requests(Op.READ, reading, self.out)
            cpu = self.cpu_s()
            seconds = await moves(self.transfer, requests, ahead) * batch / len(got)
            if not warm:
                self.note("move pull", seconds, bare, self.cpu_s() - cpu)
            grant.release(len(got))
        bare, cpu = self.bare("write"), self.cpu_s()
        began = time.perf_counter()
        assert (await namespace.pull(keys, self.out)).found.all()
        if not warm:
            self.note("whole pull", time.perf_counter() - began, bare, self.cpu_s() - cpu)
        assert np.array_equal(self.out, self.source)

    def _requests(self, op: Op, work: Writing | Reading, memory: np.ndarray) -> Requests:
        if self.direct:
            return direct_requests(self.transfer, op, work, memory)
        return staged_requests(self.transfer, op, work, self.ring)


async def measure(
    rounds: int, block_bytes: int, batch: int, ahead: int, agents: int, *, direct: bool
) -> list[NixlRow]:
    blocks = Blocks(layers=8, heads=4, page_bytes=block_bytes // (8 * 4 * 8))
    size = batch * blocks.payload_bytes
    host_bytes = 4 * size + (256 << 20)
    with (
        tempfile.TemporaryDirectory() as directory,
        start_server(
            Path(directory), host_bytes=host_bytes, nixl_enabled="true", nixl_agents=agents
        ) as server,
    ):
        await asyncio.to_thread(wait_resident, server)
        async with AsyncClient.connect(
            server.address, transport="nixl", deadline_s=60, direct=direct
        ) as client:
            bench = Bench(client, server, blocks, batch, agents)
            if direct:
                await client.register(bench.source)
                await client.register(bench.out)
            await asyncio.to_thread(bench.start_bare, host_bytes)
            try:
                namespace = await client.open_namespace(blocks.spec)
                for number in range(-(-host_bytes // size)):  # into every slot
                    await namespace.push(blocks.chain(10_000 + number, batch), bench.source)
                for number in range(rounds + 1):
                    await bench.round(namespace, number, ahead)
            finally:
                bench.bare_process.close()
            return bench.rows()


def measure_nixl(*, quick: bool, progress: Progress) -> list[NixlRow]:
    """Staged and direct, in a hub of its own each. NixlError where there is no NIXL."""
    nixlib.load()
    agents = agents_for(os.cpu_count() or 1, rdma_devices())
    plans = [(2, 8, True)] if quick else [(7, 64, False), (7, 64, True), (5, 192, True)]
    rows = []
    for rounds, batch, direct in plans:
        progress(f"nixl: {'direct' if direct else 'staged'}, {batch} blocks of 2 MiB")
        rows += asyncio.run(measure(rounds, 2 << 20, batch, 3, agents, direct=direct))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nixl", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block-mib", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ahead", type=int, default=3)
    parser.add_argument("--agents", type=int, default=0, help="nixl_agents of the hub")
    parser.add_argument("--direct", action="store_true", help="without staging")
    parser.add_argument("--bare", action="store_true", help="the second process")
    options = parser.parse_args()
    if options.bare:
        bare_process()
    else:
        block_bytes = options.block_mib << 20
        agents = options.agents or agents_for(os.cpu_count() or 1, rdma_devices())
        work = measure(
            options.rounds, block_bytes, options.batch, options.ahead, agents, direct=options.direct
        )
        rows = asyncio.run(work)
        print(machine.facts())
        print(report.nixl([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
