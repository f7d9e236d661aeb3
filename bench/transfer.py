"""Push and pull over shared memory, as ratios to memcpy of the same sizes in the same minutes.

Method. One kvserver process; `clients` client processes, each with source and target buffers of its
own. A sample is one job in all clients at once, timed from the first start to the last end. Samples
alternate (memcpy, push, memcpy, push, ...), because the speed of a machine drifts; each sample is
set against the memcpy sample taken just before it, and the median of those ratios is the figure.

What is equal on both sides: block size, blocks a sample, number of processes, resident memory
(arena prefaulted, its pages mapped into each client by a pass over all of it, buffers touched),
random order of blocks. A push is reserve, copy, checksum, commit of new keys; the arena is full, so
each push also evicts. A pull is acquire, copy, checksum against the block's root, release. After
each pull sample some blocks are compared byte for byte with what was pushed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from bench.fleet import Fleet
from bench.machine import core_seconds, memory_available_bytes, rounded_down
from bench.worker import Timing
from kvproto.namespace import NamespaceSpec
from tests.support.server import ServerProcess, start_server

FLOORS = {"push": 0.5, "pull": 0.4}
_SLOT_OVERHEAD = 1.2  # size classes waste up to an eighth; slabs round up
_ARENA_SPARE_BYTES = 32 << 20
_SPARE_MEMORY_BYTES = 1 << 30
_PUBLISH_BATCH = 16
_READY_SECONDS_MAX = 300.0
_SEED = 20_260_101

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. Sizes in blocks of `spec` unless they say otherwise."""

    spec: NamespaceSpec
    batches: tuple[int, ...]
    clients: tuple[int, ...]
    working_set_blocks: int  # of all clients together; a larger batch needs more
    sample_blocks: int  # a sample moves at least so many a client
    rounds: int

    @property
    def block_bytes(self) -> int:
        return self.spec.grid.payload_bytes()


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. Speeds in GB/s over all clients; `floor_met` compares `ratio` with the floor.
    `core_ms` is processor time a block, in milliseconds of one core.
    """

    operation: str
    clients: int
    batch_blocks: int
    block_bytes: int
    rounds: int
    memcpy_gb_s: float
    speed_gb_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    call_ms: float
    memcpy_core_ms: float
    client_core_ms: float
    hub_core_ms: float
    floor: float
    floor_met: bool


def full_plan() -> Plan:
    """8 MiB blocks, a working set of 1 GiB."""
    return Plan(
        spec=_spec(layers=32, kv_heads=8, page_bytes=4096),
        batches=(1, 16, 256),
        clients=(1, 4),
        working_set_blocks=128,
        sample_blocks=32,
        rounds=9,
    )


def quick_plan() -> Plan:
    """The same with little: 1 MiB blocks, a working set of 32 MiB."""
    return Plan(
        spec=_spec(layers=8, kv_heads=4, page_bytes=4096),
        batches=(1, 16),
        clients=(1, 2),
        working_set_blocks=32,
        sample_blocks=16,
        rounds=3,
    )


def measure(plan: Plan, progress: Progress) -> tuple[list[Row], list[str]]:
    """All rows of a plan, and a note for each one left out."""
    rows: list[Row] = []
    notes: list[str] = []
    for clients in plan.clients:
        for operation in ("push", "pull"):
            batches = [b for b in plan.batches if not _lacks(plan, operation, clients, b, notes)]
            if batches:
                rows += _measure(plan, operation, clients, batches, progress)
    return rows, notes


def _measure(
    plan: Plan, operation: str, clients: int, batches: list[int], progress: Progress
) -> list[Row]:
    arena, sources, targets = _blocks(plan, operation, clients, max(batches))
    progress(f"{operation}, {clients} client(s): arena {_gib(plan, arena)}, prefaulting it")
    host_bytes = int(arena * plan.block_bytes * _SLOT_OVERHEAD) + _ARENA_SPARE_BYTES
    with (
        tempfile.TemporaryDirectory(prefix="kvserver-bench-") as scratch,
        start_server(Path(scratch), host_bytes=host_bytes) as server,
        Fleet(clients) as fleet,
    ):
        wait_resident(server)
        fleet.all(
            "connect",
            address=server.address,
            spec=plan.spec.canonical,
            sources=sources,
            targets=targets,
            seed=_SEED,
        )
        progress(f"{operation}, {clients} client(s): touching all of it from each client")
        _warm(fleet, operation, arena)
        rows = []
        for batch in batches:
            row = _row(plan, fleet, server.pid, operation, batch)
            progress(
                f"{operation}, {clients} client(s), batch {batch}: {row.speed_gb_s:.2f} GB/s, "
                f"memcpy {row.memcpy_gb_s:.2f}, ratio {row.ratio:.2f}"
            )
            rows.append(row)
    return rows


def _row(plan: Plan, fleet: Fleet, hub: int, operation: str, batch: int) -> Row:
    calls = max(1, plan.sample_blocks // batch)
    blocks = len(fleet) * calls * batch
    moved = blocks * plan.block_bytes
    memcpy: list[float] = []
    speed: list[float] = []
    call_seconds: list[float] = []
    cores: list[list[float]] = []
    for turn in range(plan.rounds + 1):
        before = core_seconds(fleet.pids)
        copied = fleet.timed("plan_copy", calls=calls, batch=batch)
        between, hub_before = core_seconds(fleet.pids), core_seconds([hub])
        timings = fleet.timed(f"plan_{operation}", calls=calls, batch=batch)
        after, hub_after = core_seconds(fleet.pids), core_seconds([hub])
        if operation == "pull":
            fleet.all("check_pulled", count=2)
        if turn == 0:  # the first pair warms caches and is not counted
            continue
        cores.append([between - before, after - between, hub_after - hub_before])
        memcpy.append(_speed(copied, moved))
        speed.append(_speed(timings, moved))
        call_seconds += [s for timing in timings for s in timing.calls]
    ratios = sorted(s / m for s, m in zip(speed, memcpy, strict=True))
    ratio = statistics.median(ratios)
    copy_ms, client_ms, hub_ms = (
        round(1e3 * statistics.median(column) / blocks, 2) for column in zip(*cores, strict=True)
    )
    return Row(
        operation=operation,
        clients=len(fleet),
        batch_blocks=batch,
        block_bytes=plan.block_bytes,
        rounds=plan.rounds,
        memcpy_gb_s=round(statistics.median(memcpy), 3),
        speed_gb_s=round(statistics.median(speed), 3),
        ratio=rounded_down(ratio, 3),
        ratio_low=rounded_down(ratios[0], 3),
        ratio_high=rounded_down(ratios[-1], 3),
        call_ms=round(1e3 * statistics.median(call_seconds), 2),
        memcpy_core_ms=copy_ms,
        client_core_ms=client_ms,
        hub_core_ms=hub_ms,
        floor=FLOORS[operation],
        floor_met=ratio >= FLOORS[operation],
    )


def _warm(fleet: Fleet, operation: str, arena: int) -> None:
    """Touch the whole arena from every client, and leave known blocks in it for pulls."""
    if operation == "push":
        for worker in range(len(fleet)):
            fleet.one("publish", worker=worker, count=arena, batch=_PUBLISH_BATCH)
        return
    keys = fleet.one("publish", count=arena, batch=_PUBLISH_BATCH)
    fleet.all("learn", keys=keys)
    fleet.timed("plan_pull", calls=arena // _PUBLISH_BATCH, batch=_PUBLISH_BATCH)


def wait_resident(server: ServerProcess) -> None:
    """Wait until the host tier is prefaulted to its end."""
    deadline = time.monotonic() + _READY_SECONDS_MAX
    while time.monotonic() < deadline:
        host = server.stats().tiers[0]
        if host.bytes_ready >= host.bytes_total:
            return
        time.sleep(0.2)
    raise TimeoutError(f"the arena was not resident after {_READY_SECONDS_MAX} s")


def _blocks(plan: Plan, operation: str, clients: int, batch: int) -> tuple[int, int, int]:
    """Blocks of the arena, and of each client's sources and targets.

    Pushes of all clients must fit into the arena at once, pulls share its blocks; a pull's targets
    are distinct, a push may send one source under several keys.
    """
    share = max(1, plan.working_set_blocks // clients)
    if operation == "push":
        return max(plan.working_set_blocks, clients * batch), share, share
    return max(plan.working_set_blocks, batch), share, max(share, batch)


def _lacks(plan: Plan, operation: str, clients: int, batch: int, notes: list[str]) -> bool:
    """Whether memory for this row is missing; then a note says so."""
    arena, sources, targets = _blocks(plan, operation, clients, batch)
    blocks = arena * _SLOT_OVERHEAD + clients * (sources + targets)
    needed = int(blocks * plan.block_bytes) + _SPARE_MEMORY_BYTES
    if needed <= memory_available_bytes():
        return False
    notes.append(
        f"{operation}, {clients} clients, batch {batch}: left out, "
        f"needs {needed / (1 << 30):.1f} GiB of free memory"
    )
    return True


def _speed(timings: list[Timing], moved: int) -> float:
    """GB/s (10^9) from the first start to the last end."""
    return moved / (max(t.ended for t in timings) - min(t.began for t in timings)) / 1e9


def _gib(plan: Plan, blocks: int) -> str:
    return f"{blocks * plan.block_bytes / (1 << 30):.2f} GiB"


def _spec(*, layers: int, kv_heads: int, page_bytes: int) -> NamespaceSpec:
    return NamespaceSpec(
        model="bench",
        weights=sha256(b"bench").digest(),
        kv_dtype="bfloat16",
        encoding="bench/1",
        layers=layers,
        kv_heads=kv_heads,
        page_bytes=page_bytes,
    )
