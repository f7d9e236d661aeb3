"""Push and pull over tcp, as ratios to a bare socket; and what the data load costs control calls.

Method. The client process pushes or pulls batches of 8 MiB blocks over ONE connection; before each
sample the same number of bytes goes through a bare loopback socket between two processes, 1 MiB a
call, in the same direction, between memory of the same kinds: the client's blocks, and a resident
shared mapping of which random extents are used, as a hub's arena is. The median of the pairwise
ratios is the figure. A push and a pull
include everything: the gRPC calls, a checksum of each cell on both sides, the check of the root.

Control calls: a lookup of 1,024 keys and an empty call, in turns, 20 pairs a second, first with the
hub idle, then while another process pushes and pulls without a pause.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.control import LOOKUP_KEYS
from bench.fleet import Fleet
from bench.transfer import full_plan, wait_resident
from bench.worker import BARE_BYTES
from tests.support.server import free_port, start_server

Progress = Callable[[str], None]
BATCH = 16
FLOOR = 0.8
CONTROL_RATIO_MAX = 2.0
_PAUSE_S = 0.05
_LEAD_S = 0.01


@dataclass(frozen=True, slots=True)
class WireRow:
    """Speeds in GB/s (10^9)."""

    transport: str
    operation: str
    rounds: int
    bare_gb_s: float
    speed_gb_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    floor: float
    floor_met: bool


@dataclass(frozen=True, slots=True)
class ControlRow:
    """Milliseconds of one kind of call, idle and under data load; `ratio` is of the p99."""

    transport: str
    call: str
    idle_p50_ms: float
    idle_p99_ms: float
    loaded_p50_ms: float
    loaded_p99_ms: float
    ratio: float
    data_gb_s: float


def measure_tcp(
    *, rounds: int, seconds: float, progress: Progress
) -> tuple[list[WireRow], list[ControlRow]]:
    plan = full_plan()
    host_bytes = int(6 * BATCH * plan.block_bytes * 1.2) + (64 << 20)
    with (
        tempfile.TemporaryDirectory(prefix="kvserver-bench-") as scratch,
        start_server(
            Path(scratch), host_bytes=host_bytes, tcp_listen=f"127.0.0.1:{free_port()}"
        ) as server,
        Fleet(2) as fleet,
    ):
        wait_resident(server)
        connect = {
            "address": server.address, "spec": plan.spec.canonical, "sources": BATCH,
            "targets": BATCH, "seed": 1, "transport": "tcp", "connections": 1,
        }  # fmt: skip
        fleet.one("connect", **connect)
        port = fleet.one("bare_listen", worker=1)
        fleet.one("prepare", worker=1, block_bytes=plan.block_bytes)
        fleet.begin("bare_open", worker=1, port=0, arena_bytes=6 * BATCH * plan.block_bytes)
        fleet.one("bare_open", port=port)
        fleet.result(worker=1)
        known = fleet.one("publish", count=4 * BATCH, batch=BATCH)
        fleet.one("learn", keys=known[-BATCH:])
        rows = [_row(fleet, name, rounds, progress) for name in ("pull", "push")]
        control = _control(fleet, server.address, plan.spec.canonical, seconds, progress)
    return rows, control


def _row(fleet: Fleet, operation: str, rounds: int, progress: Progress) -> WireRow:
    bare: list[float] = []
    speed: list[float] = []
    for turn in range(rounds + 1):
        for worker, sends in enumerate((operation == "push", operation == "pull")):
            fleet.one("plan_bare", worker=worker, sends=sends)
        timings = fleet.all("run", at=time.monotonic() + _LEAD_S)
        bare_s = max(t.ended for t in timings) - min(t.began for t in timings)
        fleet.one(f"plan_{operation}", calls=1, batch=BATCH)
        timing = fleet.one("run", at=time.monotonic() + _LEAD_S)
        if operation == "pull":
            fleet.one("check_pulled", count=2)
        if turn:  # the first pair warms up
            bare.append(BARE_BYTES / bare_s / 1e9)
            speed.append(BARE_BYTES / (timing.ended - timing.began) / 1e9)
    ratios = sorted(s / b for s, b in zip(speed, bare, strict=True))
    ratio = statistics.median(ratios)
    row = WireRow(
        transport="tcp",
        operation=operation,
        rounds=rounds,
        bare_gb_s=round(statistics.median(bare), 2),
        speed_gb_s=round(statistics.median(speed), 2),
        ratio=round(ratio, 2),
        ratio_low=round(ratios[0], 2),
        ratio_high=round(ratios[-1], 2),
        floor=FLOOR,
        floor_met=ratio >= FLOOR,
    )
    progress(f"tcp {operation}: {row.speed_gb_s} GB/s, bare {row.bare_gb_s}, ratio {row.ratio}")
    return row


def _control(
    fleet: Fleet, address: str, spec: bytes, seconds: float, progress: Progress
) -> list[ControlRow]:
    keys = [os.urandom(32) for _ in range(LOOKUP_KEYS)]
    pace = {"address": address, "spec": spec, "keys": keys, "pause_s": _PAUSE_S}
    idle = fleet.one("pace_lookups", worker=1, seconds=seconds, **pace)
    fleet.begin("traffic", batch=BATCH // 2, seconds=2 * seconds + 2)
    loaded = fleet.one("pace_lookups", worker=1, seconds=seconds, **pace)
    moved = fleet.result()
    rows = []
    for call, quiet, busy in zip(("lookup", "empty call"), idle, loaded, strict=True):
        p50, p99 = _percentiles(quiet)
        busy50, busy99 = _percentiles(busy)
        speed = moved / (2 * seconds + 2) / 1e9
        ratio = round(busy99 / p99, 2)
        rows.append(ControlRow("tcp", call, p50, p99, busy50, busy99, ratio, round(speed, 2)))
        progress(f"{call}: p99 {p99} ms idle, {busy99} ms under {speed:.2f} GB/s")
    return rows


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return round(float(p50), 2), round(float(p99), 2)
