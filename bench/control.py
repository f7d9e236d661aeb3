"""Lookups against an empty call, and the time from SIGKILL to the first answer.

Lookup: 1,024 keys that are all there, through the client, in turns with a Heartbeat (a call that
carries two integers and does nothing) on a bare gRPC stub in the same process.

Restart: many small blocks in the host tier, SIGKILL, start on the same directory. A client that
was connected before stays and reconnects by itself; the clock runs from the kill to its first full
lookup and to its first pulled block, whose checksum is verified like any other's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from bench.fleet import Fleet
from bench.transfer import Progress
from kvproto.namespace import NamespaceSpec
from tests.support.server import start_server

LOOKUP_KEYS = 1024
_SLOT_BYTES = 16 << 10
_SPARE_BYTES = 64 << 20
_ANSWER_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True)
class LookupFigure:
    keys: int
    rounds: int
    lookup_ms: float
    lookup_p90_ms: float
    empty_call_ms: float
    empty_call_p90_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class RestartFigure:
    """Seconds from SIGKILL on; each instant includes the ones before it."""

    blocks: int
    dead_s: float  # the process is gone, its memory files closed
    ready_s: float  # the new process said that it serves
    looked_up_s: float  # the old client's first lookup found every key
    pulled_s: float  # and pulled a block
    restored_blocks: int
    recovery_s: float  # of the time to ready: reading the arena's directory into the block table
    start_s: float  # of the time to ready: everything else after the imports


def measure_lookup(*, rounds: int, progress: Progress) -> LookupFigure:
    progress(f"lookup of {LOOKUP_KEYS} keys against an empty call, {rounds} rounds")
    spec = _small_spec()
    with (
        tempfile.TemporaryDirectory(prefix="kvserver-bench-") as scratch,
        start_server(Path(scratch), host_bytes=_host_bytes(LOOKUP_KEYS)) as server,
        Fleet(1) as fleet,
    ):
        fleet.one(
            "connect", address=server.address, spec=spec.canonical, sources=64, targets=1, seed=1
        )
        keys = fleet.one("publish", count=LOOKUP_KEYS, batch=LOOKUP_KEYS)
        looked_up, empty = fleet.one(
            "lookups", address=server.address, spec=spec.canonical, keys=keys, rounds=rounds
        )
    ratio = statistics.median(a / b for a, b in zip(looked_up, empty, strict=True))
    return LookupFigure(
        keys=LOOKUP_KEYS,
        rounds=rounds,
        lookup_ms=_ms(statistics.median(looked_up)),
        lookup_p90_ms=_ms(_p90(looked_up)),
        empty_call_ms=_ms(statistics.median(empty)),
        empty_call_p90_ms=_ms(_p90(empty)),
        ratio=round(ratio, 2),
    )


def measure_restart(*, blocks: int, progress: Progress) -> RestartFigure:
    progress(f"restart: pushing {blocks} small blocks")
    spec = _small_spec()
    with (
        tempfile.TemporaryDirectory(prefix="kvserver-bench-") as scratch,
        start_server(Path(scratch), host_bytes=_host_bytes(blocks)) as server,
        Fleet(1) as fleet,
    ):
        fleet.one(
            "connect", address=server.address, spec=spec.canonical, sources=64, targets=1, seed=1
        )
        keys = fleet.one("publish", count=blocks, batch=LOOKUP_KEYS)
        progress("restart: SIGKILL")
        killed = time.monotonic()
        server.kill()
        dead = time.monotonic()
        fleet.begin("first_answer", keys=keys[:LOOKUP_KEYS], deadline=killed + _ANSWER_SECONDS_MAX)
        server.start()
        ready = time.monotonic()
        looked_up, pulled = fleet.result()
        recovered = [e for e in server.events() if e["event"] == "recovered"]
        recovery = round(float(recovered[-1]["seconds"]), 3)
        figure = RestartFigure(
            blocks=blocks,
            dead_s=round(dead - killed, 3),
            ready_s=round(ready - killed, 3),
            looked_up_s=round(looked_up - killed, 3),
            pulled_s=round(pulled - killed, 3),
            restored_blocks=int(server.stats().blocks),
            recovery_s=recovery,
            start_s=round(float(server.ready["seconds"]) - recovery, 3),
        )
    progress(f"restart: {asdict(figure)}")
    return figure


def _small_spec() -> NamespaceSpec:
    """Blocks of 4 KiB: the slot is the smallest there is."""
    return NamespaceSpec(
        model="bench-small",
        weights=sha256(b"bench").digest(),
        kv_dtype="bfloat16",
        encoding="bench/1",
        layers=1,
        kv_heads=1,
        page_bytes=4096,
        block_tokens=16,
        page_tokens=16,
    )


def _host_bytes(blocks: int) -> int:
    return blocks * _SLOT_BYTES * 9 // 8 + _SPARE_BYTES


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _p90(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]
