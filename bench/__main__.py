"""`make bench`: figures of a real kvserver with real clients, as JSON and as a table.

    python -m bench [--quick] [--only SECTION] [--clients N] [--apart] [--out FILE]

Sections are transfer, lookup, restart, tcp, nixl and control; `--only` may be given more than once.
The whole run takes about ten minutes and up to 12 GiB of memory on two cores; `--quick` takes
half a minute and shows that everything works, its figures are no yardstick.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import control, load, machine, report, transfer, wire
from bench.nixl import measure_nixl
from kvproto.nixlib import NixlError

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("transfer", "lookup", "restart", "tcp", "nixl", "control")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    sections = options.only or list(SECTIONS)
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    result: dict[str, Any] = {
        "machine": machine.facts(),
        "quick": options.quick,
        "load_before": machine.load_average(),
        "command": "python -m bench" + (" --quick" if options.quick else ""),
    }
    if "transfer" in sections:
        plan = transfer.quick_plan() if options.quick else transfer.full_plan()
        if options.clients:
            plan = replace(plan, clients=tuple(options.clients))
        rows, notes = transfer.measure(plan, progress)
        result["transfer"] = [asdict(row) for row in rows]
        result["notes"] = notes
    if "lookup" in sections:
        rounds = 50 if options.quick else 500
        result["lookup"] = asdict(control.measure_lookup(rounds=rounds, progress=progress))
    if "restart" in sections:
        blocks = 2_000 if options.quick else 100_000
        result["restart"] = asdict(control.measure_restart(blocks=blocks, progress=progress))
    if "tcp" in sections:
        rounds, batches = (3, wire.BATCHES[:1]) if options.quick else (15, wire.BATCHES)
        wires = wire.measure_tcp(rounds=rounds, progress=progress, batches=batches)
        result["wire"] = [asdict(row) for row in wires]
    if "nixl" in sections:
        try:
            moved = measure_nixl(quick=options.quick, progress=progress)
            result["nixl"] = [asdict(row) for row in moved]
        except NixlError as error:
            progress(f"nixl: left out: {error}")
    if "control" in sections:
        rounds, seconds = (1, 2.0) if options.quick else (5, 3.0)
        calls = load.measure_load(
            rounds=rounds, seconds=seconds, apart=options.apart, progress=progress
        )
        result["control"] = [asdict(row) for row in calls]
    result["seconds"] = round(time.monotonic() - began, 1)

    out = options.out or _default_path(options.quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(report.table(result))
    print(f"\nWritten to {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Figures of kvserver over shared memory, tcp and nixl.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it works, no yardstick"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=SECTIONS,
        help="only this section; may be given more than once (default: all)",
    )
    parser.add_argument(
        "--clients",
        action="append",
        type=int,
        help="push and pull with so many clients; may be given more than once (default: 1 and 4)",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="control: the load has the last core for itself, the hub and who asks have the others",
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/DATE.json)")
    return parser


def _default_path(quick: bool) -> Path:
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return RESULTS / f"{day}{'-quick' if quick else ''}.json"


if __name__ == "__main__":
    sys.exit(main())
