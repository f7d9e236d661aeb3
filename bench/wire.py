"""Push and pull over tcp, as ratios to a bare socket.

Method. The client process pushes or pulls batches of 8 MiB blocks over ONE connection; before each
sample BARE_BYTES go through a bare loopback socket between two processes, 1 MiB a call, in the same
direction, between memory of the same kinds: the client's blocks, and a resident shared mapping of
which random extents are used, as a hub's arena is. The median of the pairwise ratios of speeds is
the figure. A push and a pull include everything: the gRPC calls, a checksum of each cell on both
sides, the check of the root. So there are two batches: what a short one waits for calls, a long one
does not notice.
With cores short, what decides is that bytes are hashed. So bare* is the bare socket whose ends also
hash what the protocol has them hash: both on a push, the client's on a pull; no calls, no hub.
All slots have been written before, as all pages of the bare receiver's mapping have.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fleet import Fleet
from bench.machine import rounded_down
from bench.transfer import full_plan, wait_resident
from bench.worker import BARE_BYTES
from tests.support.server import free_port, start_server

Progress = Callable[[str], None]
BATCHES = (16, 64)  # 128 MiB, as many as the bare socket moves, and 512
FLOOR = 0.8
_LEAD_S = 0.01


@dataclass(frozen=True, slots=True)
class WireRow:
    """Speeds in GB/s (10^9)."""

    transport: str
    operation: str
    mib: int
    rounds: int
    bare_gb_s: float
    speed_gb_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    hashed_gb_s: float  # bare*
    of_hashed: float  # ratio to bare*
    floor: float
    floor_met: bool


def measure_tcp(
    *, rounds: int, progress: Progress, batches: Sequence[int] = BATCHES
) -> list[WireRow]:
    plan, most = full_plan(), max(batches)
    host_bytes = int(3 * most * plan.block_bytes * 1.2) + (64 << 20)
    with (
        tempfile.TemporaryDirectory(prefix="kvserver-bench-") as scratch,
        start_server(
            Path(scratch), host_bytes=host_bytes, tcp_listen=f"127.0.0.1:{free_port()}"
        ) as server,
        Fleet(2) as fleet,
    ):
        wait_resident(server)
        connect = {
            "address": server.address, "spec": plan.spec.canonical, "sources": most,
            "targets": most, "seed": 1, "transport": "tcp", "connections": 1,
        }  # fmt: skip
        fleet.one("connect", **connect)
        port = fleet.one("bare_listen", worker=1)
        fleet.one("prepare", worker=1, block_bytes=plan.block_bytes)
        fleet.begin("bare_open", worker=1, port=0, arena_bytes=3 * most * plan.block_bytes)
        fleet.one("bare_open", port=port)
        fleet.result(worker=1)
        # Who writes a slot for the first time maps it in, which costs as much as the copy.
        rounds_to_fill = -(-host_bytes // (most * plan.block_bytes))
        known = fleet.one("publish", count=rounds_to_fill * most, batch=most)
        fleet.one("learn", keys=known[-most:])
        return [
            _row(fleet, operation, batch, batch * plan.block_bytes, rounds, progress)
            for batch in batches
            for operation in ("pull", "push")
        ]


def _bare(fleet: Fleet, operation: str, *, hashes: bool) -> float:
    """Seconds. The first worker is the client, the second one stands for the hub."""
    for worker, sends in enumerate((operation == "push", operation == "pull")):
        own = hashes and (operation == "push" or worker == 0)
        fleet.one("plan_bare", worker=worker, sends=sends, hashes=own)
    timings = fleet.all("run", at=time.monotonic() + _LEAD_S)
    return max(t.ended for t in timings) - min(t.began for t in timings)


def _row(
    fleet: Fleet, operation: str, batch: int, size: int, rounds: int, progress: Progress
) -> WireRow:
    bare: list[float] = []
    hashed: list[float] = []
    speed: list[float] = []
    for turn in range(rounds + 1):
        hashed_s = _bare(fleet, operation, hashes=True)
        bare_s = _bare(fleet, operation, hashes=False)
        fleet.one(f"plan_{operation}", calls=1, batch=batch)
        timing = fleet.one("run", at=time.monotonic() + _LEAD_S)
        if operation == "pull":
            fleet.one("check_pulled", count=2)
        if turn:  # the first pair warms up
            bare.append(BARE_BYTES / bare_s / 1e9)
            hashed.append(BARE_BYTES / hashed_s / 1e9)
            speed.append(size / (timing.ended - timing.began) / 1e9)
    ratios = sorted(s / b for s, b in zip(speed, bare, strict=True))
    ratio = statistics.median(ratios)
    row = WireRow(
        transport="tcp",
        operation=operation,
        mib=size >> 20,
        rounds=rounds,
        bare_gb_s=round(statistics.median(bare), 2),
        speed_gb_s=round(statistics.median(speed), 2),
        ratio=rounded_down(ratio, 2),
        ratio_low=rounded_down(ratios[0], 2),
        ratio_high=rounded_down(ratios[-1], 2),
        hashed_gb_s=round(statistics.median(hashed), 2),
        of_hashed=rounded_down(
            statistics.median(s / h for s, h in zip(speed, hashed, strict=True)), 2
        ),
        floor=FLOOR,
        floor_met=ratio >= FLOOR,
    )
    speeds = f"{row.speed_gb_s} GB/s, bare {row.bare_gb_s}, ratio {row.ratio}"
    progress(f"tcp {operation} of {row.mib} MiB: {speeds}")
    return row
