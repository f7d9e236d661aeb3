"""What full data load costs control calls: their p99 beside a client that pushes and pulls.

Method. One hub; one client process a transport, each of which pushes and pulls batches of 8 MiB
blocks, hashing at both ends as always, without a pause; and one process that asks: a lookup of
1,024 keys (through the client, as an engine of this host does) and an empty call (Heartbeat through
a bare gRPC stub), one pair every PAUSE_S. The loads take turns with none, `rounds` times, because
the speed of a machine drifts; the figures are of all calls of a kind together.

On a machine of few cores everything shares them, the asking process too: what is measured is then
also how fairly the kernel divides them. With `apart` the hub and who asks have all cores but the
last, the load has the last one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.control import LOOKUP_KEYS
from bench.fleet import Fleet
from bench.transfer import full_plan, wait_resident
from tests.support.server import free_port, start_server

Progress = Callable[[str], None]
BATCH = 8
RATIO_MAX = 2.0
PAUSE_S = 0.02
_LEAD_S = 0.5  # of the load before the first call, and behind the last one
WAYS: dict[str, dict[str, Any]] = {
    "shm": {"transport": "shm"},
    "tcp": {"transport": "tcp", "connections": 1},
    "nixl": {"transport": "nixl"},
}


@dataclass(frozen=True, slots=True)
class ControlRow:
    """Milliseconds of one kind of call, idle and beside a client of `transport`; `ratio` is of the
    p99. `data_gb_s` is what that client moved meanwhile.
    """

    transport: str
    call: str
    calls: int
    apart: bool
    idle_p50_ms: float
    idle_p99_ms: float
    loaded_p50_ms: float
    loaded_p99_ms: float
    ratio: float
    ratio_max: float
    data_gb_s: float


def measure_load(
    *, rounds: int, seconds: float, apart: bool, progress: Progress
) -> list[ControlRow]:
    """`seconds` of each load and of none, in each round."""
    plan = full_plan()
    asks = len(WAYS)
    took: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in ("", *WAYS)}
    moved = dict.fromkeys(WAYS, 0)
    with (
        tempfile.TemporaryDirectory(prefix="kvserver-bench-") as scratch,
        start_server(
            Path(scratch), host_bytes=8 * BATCH * plan.block_bytes, nixl_enabled="true",
            tcp_listen=f"127.0.0.1:{free_port()}",
        ) as server,
        Fleet(len(WAYS) + 1) as fleet,
    ):  # fmt: skip
        wait_resident(server)
        if apart:
            last = max(os.sched_getaffinity(0))
            _confine([server.pid, fleet.pids[asks]], os.sched_getaffinity(0) - {last})
            _confine(fleet.pids[:asks], {last})
        connect = {
            "address": server.address, "spec": plan.spec.canonical, "sources": BATCH,
            "targets": BATCH, "seed": 1,
        }  # fmt: skip
        for worker, options in enumerate(WAYS.values()):
            fleet.one("connect", worker=worker, **connect, **options)
            fleet.one("traffic", worker=worker, batch=BATCH, seconds=_LEAD_S)
        keys = [os.urandom(32) for _ in range(LOOKUP_KEYS)]
        ask = {
            "address": server.address, "spec": plan.spec.canonical, "keys": keys,
            "seconds": seconds, "pause_s": PAUSE_S,
        }  # fmt: skip
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            for worker, way in enumerate(("", *WAYS), start=-1):
                if way:
                    span = seconds + 2 * _LEAD_S
                    fleet.begin("traffic", worker=worker, batch=BATCH, seconds=span)
                for kept, new in zip(
                    took[way], fleet.one("pace_lookups", worker=asks, **ask), strict=True
                ):
                    kept += new
                if way:
                    moved[way] += fleet.result(worker=worker)
    spans = rounds * (seconds + 2 * _LEAD_S)
    return [
        _row(way, call, took[""][kind], took[way][kind], moved[way] / spans / 1e9, apart=apart)
        for way in WAYS
        for kind, call in enumerate((f"lookup of {LOOKUP_KEYS} keys", "empty call"))
    ]


def _confine(pids: list[int], cores: set[int]) -> None:
    """Every thread that these and their children have, and will have."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)
            _confine([int(child) for child in (task / "children").read_text().split()], cores)


def _row(
    way: str, call: str, idle: list[float], loaded: list[float], gb_s: float, *, apart: bool
) -> ControlRow:
    p50, p99 = np.percentile(idle, [50, 99]) * 1e3
    busy50, busy99 = np.percentile(loaded, [50, 99]) * 1e3
    return ControlRow(
        transport=way,
        call=call,
        calls=len(loaded),
        apart=apart,
        idle_p50_ms=round(float(p50), 2),
        idle_p99_ms=round(float(p99), 2),
        loaded_p50_ms=round(float(busy50), 2),
        loaded_p99_ms=round(float(busy99), 2),
        ratio=round(float(busy99 / p99), 2),
        ratio_max=RATIO_MAX,
        data_gb_s=round(gb_s, 2),
    )
