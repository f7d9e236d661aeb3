"""What kvserver adds to bare NIXL: the same bytes with the same descriptors, in turns.

    python -m bench.nixl [--rounds 12] [--block-mib 2] [--batch 32]

Three ways, one after the other in each round, because the speed of a machine drifts; the figure is
the median of the ratios to the bare transfer just before.

  bare   a second process with an agent of its own reads (push) or writes (pull) the client's
         staging ring from memory of its own (of the arena's kind), POST_BYTES a post, one
         post behind the other
  move   the same bytes by calls of Move: permits, slots, gRPC, and on a push the hub hashes what
         arrived; the staging is filled beforehand, nothing is committed
  whole  `push` and `pull` of the client: reserve, copy and hash into staging, Move, commit; or
         acquire, Move, copy and check, release
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import machine
from kvclient import AsyncClient
from kvclient.copying import Reading, Slot, Writing
from kvclient.timing import Deadline
from kvclient.transfer.nixl import NixlTransfer, _parts, _rooms
from kvclient.transfer.ring import EXTENTS, Ring
from kvproto.checksum import grid_checksums
from kvproto.frames import Op
from kvproto.nixlib import Agent, Memory, State
from kvserver.transfer.nixl import POST_BYTES, cut
from tests.support.payload import Blocks
from tests.support.server import start_server


def bare_process() -> None:
    """The initiator: METADATA BASE BYTES on the first line, then `read N` or `write N`."""
    metadata, base, size = sys.stdin.readline().split()
    # The same kind of memory as the hub's arena: a file on tmpfs, without huge pages.
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(int(size))
        mine = np.frombuffer(mmap.mmap(file.fileno(), int(size)), np.uint8)
    mine[:] = 0
    rng = np.random.default_rng(5)
    agent = Agent("bare-hub", backend="UCX", params={}, progress=False)
    agent.register(int(mine.ctypes.data), mine.nbytes, Memory.DRAM)
    peer = agent.add_peer(bytes.fromhex(metadata))
    print("ready", flush=True)
    for line in sys.stdin:
        word, pieces, piece, times = line.split()
        starts = np.arange(int(pieces), dtype=np.uint64) * np.uint64(piece)
        # Slots are where they are: a set of its own each time, out of all of the memory.
        slots = rng.permutation(len(mine) // int(piece))[: int(pieces)].astype(np.uint64)
        posts = cut(
            slots * np.uint64(piece) + np.uint64(mine.ctypes.data), starts + np.uint64(base),
            np.full(int(pieces), int(piece), np.uint64), np.arange(int(pieces)), device=0,
        )  # fmt: skip
        began = time.perf_counter()
        for _ in range(int(times)):
            for post in posts:
                handle, state = agent.post(
                    read=word == "read", peer=peer, local=post.local, remote=post.remote,
                    memory=Memory.DRAM,
                )  # fmt: skip
                while state is State.RUNNING:
                    state = agent.state(handle)
                assert state is State.DONE
                agent.release(handle)
        print(time.perf_counter() - began, flush=True)


class Bare:
    def __init__(self, transfer: NixlTransfer, memory_bytes: int) -> None:
        ring = transfer._ring
        assert ring is not None
        assert transfer._agent is not None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.nixl", "--bare"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ask(f"{transfer._agent.metadata().hex()} {ring.address} {memory_bytes}")

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def seconds(self, word: str, *, pieces: int, piece_bytes: int, times: int) -> float:
        return float(self._ask(f"{word} {pieces} {piece_bytes} {times}"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


async def moves(
    transfer: NixlTransfer, op: Op, work: Writing | Reading, ring: Ring, ahead: int
) -> float:
    """All parts of the work as Moves, `ahead` at once, without copies here."""
    parts = list(_parts(work, ring.extent_bytes))
    requests = []
    for at, part in enumerate(parts):
        extent = at % EXTENTS
        request = transfer._request(
            op, work, part, next(transfer._numbers), ring.address_of(extent)
        )
        if op is Op.WRITE:
            rooms = _rooms(work, part, ring.view(extent))
            sums = np.stack([grid_checksums(rooms[i]) for i in part.indices])
            request.checksums = sums.astype("<u8").tobytes()
        requests.append(request)
    queue = iter(requests)

    async def worker() -> None:
        for request in queue:
            reply = await transfer._rpc("Move", request, Deadline(30))
            assert reply.terminal
            assert not any(reply.statuses), reply.statuses

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(ahead)))
    return time.perf_counter() - began


async def measure(rounds: int, block_bytes: int, batch: int, ahead: int) -> None:
    blocks = Blocks(layers=8, heads=4, page_bytes=block_bytes // (8 * 4 * 8))
    size = batch * blocks.payload_bytes
    ratios: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}

    def note(name: str, seconds: float, bare: float) -> None:
        ratios.setdefault(name, []).append(bare / seconds)
        speeds.setdefault(name, []).append(size / seconds / 1e9)
        speeds.setdefault("bare " + name.split()[1], []).append(size / bare / 1e9)

    host_bytes = 4 * size + (256 << 20)
    with tempfile.TemporaryDirectory() as directory:
        server = start_server(Path(directory), host_bytes=host_bytes, nixl_enabled="true")
        client = await AsyncClient.connect(server.address, transport="nixl", deadline_s=60)
        transfer = client.session.link.transfer
        assert isinstance(transfer, NixlTransfer)
        ring = transfer._ring
        assert ring is not None
        bare = Bare(transfer, host_bytes)
        pieces = min(batch, ring.bytes.nbytes // blocks.payload_bytes)
        shape = {"pieces": pieces, "piece_bytes": blocks.payload_bytes, "times": batch // pieces}
        namespace = await client.open_namespace(blocks.spec)
        source = blocks.out(batch)
        source[:] = np.random.default_rng(1).integers(0, 256, source.shape[1:], np.uint8)
        out = blocks.out(batch)
        grid = blocks.spec.grid
        for number in range(rounds + 1):
            keys = blocks.chain(2 * number, batch)
            others = blocks.chain(2 * number + 1, batch)

            before = bare.seconds("read", **shape)
            async with await namespace.reserve(others) as held:
                slots = [held._slots[i] for i in range(batch)]
                work = Writing(grid, grid.whole, slots, None, hold=held._id)
                moved = await moves(transfer, Op.WRITE, work, ring, ahead)
            before_whole = bare.seconds("read", **shape)
            began = time.perf_counter()
            assert (await namespace.push(keys, source)).written == batch
            pushed = time.perf_counter() - began

            before_pull = bare.seconds("write", **shape)
            async with namespace.acquire(keys) as stream:
                grant = await stream.next_batch(Deadline(10))
                assert grant is not None
                got: list[Slot] = list(grant.slots)
                reading = Reading(grid, grid.whole, got, None, hold=grant.lease)
                pulled_moves = await moves(transfer, Op.READ, reading, ring, ahead)
                share = len(got) / batch
                grant.release(len(got))
            before_whole_pull = bare.seconds("write", **shape)
            began = time.perf_counter()
            assert (await namespace.pull(keys, out)).found.all()
            pulled = time.perf_counter() - began
            if number == 0:
                continue  # memory is touched, connections stand
            note("move push", moved, before)
            note("whole push", pushed, before_whole)
            note("move pull", pulled_moves / share, before_pull)
            note("whole pull", pulled, before_whole_pull)
        assert np.array_equal(out, source)
        bare.close()
        await client.close()
        server.close()
    print(machine.facts())
    print(f"{batch} blocks of {blocks.payload_bytes >> 20} MiB, {POST_BYTES >> 20} MiB a post,"
          f" {rounds} rounds, {ahead} moves ahead")  # fmt: skip
    for name, found in sorted(speeds.items()):
        ratio = f"  {statistics.median(ratios[name]):.2f} of bare" if name in ratios else ""
        print(f"{name:12} {statistics.median(found):6.2f} GB/s{ratio}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nixl", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block-mib", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ahead", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help="the second process")
    options = parser.parse_args()
    if options.bare:
        bare_process()
    else:
        asyncio.run(measure(options.rounds, options.block_mib << 20, options.batch, options.ahead))
    return 0


if __name__ == "__main__":
    sys.exit(main())
