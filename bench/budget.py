"""Where processor time goes: ms of a core per MiB that is pushed or pulled, by process.

    python -m bench.budget [--rounds 8] [--block-mib 8]

Processor time, unlike speed, means the same on a machine that does other things as well, and it
bounds speed: `cores / total` MiB a ms cannot be exceeded, however well the work overlaps. For
`bare` (1 MiB calls through a loopback socket, between memory of the same kinds) the bound is the
busier side, each with a core of its own. `bound` is the quotient of both: the best ratio to the
bare socket that this many cores allow.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.transfer import wait_resident
from kvclient import AsyncClient
from tests.support.payload import Blocks
from tests.support.server import ServerProcess, free_port, start_server

BATCH = 16
WARM_ROUNDS = 6  # connections stand, and every slot was touched by whoever writes it
CALL_BYTES = 1 << 20
MIB = 1 << 20
WAYS: dict[str, dict[str, Any]] = {
    "shm": {"transport": "shm"},
    "tcp": {"transport": "tcp", "connections": 1},
    "nixl": {"transport": "nixl"},
    "nixl direct": {"transport": "nixl", "direct": True},
}


def ticks_of(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


class Meter:
    """Core milliseconds of client, hub and the hub's own processes since it was made: data workers
    of tcp, and the one that moves for nixl."""

    def __init__(self, hub: ServerProcess) -> None:
        self._pids = {"hub": [hub.pid], "data worker": children_of(hub.pid)}
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        tick = 1e3 / os.sysconf("SC_CLK_TCK")
        spent = {name: tick * sum(map(ticks_of, pids)) for name, pids in self._pids.items()}
        return {"client": 1e3 * time.process_time(), **spent}

    def spent(self) -> dict[str, float]:
        return {name: value - self._before[name] for name, value in self._now().items()}


def bare(rounds: int, size: int) -> dict[str, float]:
    """Core ms per MiB of the two ends of a socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    source = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    child = os.fork()
    if child == 0:
        into = memoryview(mmap.mmap(-1, 4 * size))  # shared, as an arena is
        into[:: mmap.PAGESIZE] = bytes(len(into) // mmap.PAGESIZE)
        peer, _ = listener.accept()
        peer.sendall(b"!")
        before = resource.getrusage(resource.RUSAGE_SELF)
        at = 0
        while count := peer.recv_into(into[at : at + CALL_BYTES], 0, socket.MSG_WAITALL):
            at = (at + count) % (len(into) - CALL_BYTES)
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        peer.sendall(f"{spent:.6f}".encode())
        os._exit(0)
    with socket.create_connection(listener.getsockname()) as sock:
        sock.recv(1)
        began = time.process_time()
        for _ in range(rounds):
            for start in range(0, size, CALL_BYTES):
                sock.sendall(source.data[start : start + CALL_BYTES])
        sent = time.process_time() - began
        sock.shutdown(socket.SHUT_WR)
        received = float(sock.recv(64))
    os.waitpid(child, 0)
    listener.close()
    mib = rounds * size / MIB
    return {"sender": 1e3 * sent / mib, "receiver": 1e3 * received / mib}


async def budget(way: str, rounds: int, blocks: Blocks) -> dict[str, dict[str, float]]:
    size = BATCH * blocks.payload_bytes
    with tempfile.TemporaryDirectory(prefix="kvserver-bench-") as directory:
        options = {"tcp_listen": f"127.0.0.1:{free_port()}", "nixl_enabled": "true"}
        server = start_server(Path(directory), host_bytes=4 * size, **options)
        with server:
            wait_resident(server)
            async with AsyncClient.connect(server.address, deadline_s=60, **WAYS[way]) as client:
                source, out = blocks.out(BATCH), blocks.out(BATCH)
                source[:] = np.random.default_rng(1).integers(0, 256, blocks.shape, np.uint8)
                if client.direct:
                    await client.register(source)
                    await client.register(out)
                namespace = await client.open_namespace(blocks.spec)
                chains = [blocks.chain(seed, BATCH) for seed in range(rounds + WARM_ROUNDS)]
                for keys in chains[rounds:]:
                    await namespace.push(keys, source)
                    await namespace.pull(keys, out)
                meters = {"push": Meter(server)}
                for keys in chains[:rounds]:
                    assert (await namespace.push(keys, source)).written == BATCH
                spent = {"push": meters["push"].spent()}
                meters["pull"] = Meter(server)
                for _ in range(rounds):
                    assert (await namespace.pull(chains[rounds - 1], out)).found.all()
                spent["pull"] = meters["pull"].spent()
                assert np.array_equal(out, source)
    mib = rounds * size / MIB
    return {op: {name: value / mib for name, value in parts.items()} for op, parts in spent.items()}


def report(rounds: int, block_bytes: int, cores: int, write: Callable[[str], object]) -> None:
    blocks = Blocks(layers=32, heads=8, page_bytes=block_bytes // (32 * 8 * 8))
    ends = bare(rounds, BATCH * blocks.payload_bytes)
    busier = max(ends.values())
    write("| | client | hub | data worker | total | bound |")
    write("| --- | --- | --- | --- | --- | --- |")
    sent, received = ends["sender"], ends["receiver"]
    write(f"| bare socket | {sent:.3f} | | {received:.3f} | {sent + received:.3f} | 1 |")
    for way in WAYS:
        for operation, parts in asyncio.run(budget(way, rounds, blocks)).items():
            total = sum(parts.values())
            cells = [f"{parts[name]:.3f}" for name in ("client", "hub", "data worker")]
            bound = cores * busier / total
            write(f"| {way} {operation} | {' | '.join(cells)} | {total:.3f} | {bound:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block-mib", type=int, default=8)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(machine.facts())
    report(options.rounds, options.block_mib * MIB, options.cores, print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
