"""Results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Everything of one result, in the order in which it was measured."""
    parts = [_machine(result)]
    if "transfer" in result:
        parts.append(_transfer(result["transfer"]))
        parts += [f"note: {note}" for note in result["notes"]]
    if "lookup" in result:
        parts.append(_lookup(result["lookup"]))
    if "restart" in result:
        parts.append(_restart(result["restart"]))
    if "wire" in result:
        parts.append(_wire(result["wire"]))
    if "nixl" in result:
        parts.append(nixl(result["nixl"]))
    if "control" in result:
        parts.append(_control(result["control"]))
    return "\n\n".join(parts)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads; the first is flush left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )


def _machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    quick = " (quick: no yardstick)" if result["quick"] else ""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
        f"Linux {facts['kernel']}, Python {facts['python']}, {facts['date']}, "
        f"load before {result['load_before']}{quick}"
    )


def _transfer(rows: list[dict[str, Any]]) -> str:
    head = ("shm", "clients", "batch", "block", "memcpy GB/s", "GB/s", "ratio", "range")
    return aligned(
        (*head, "call ms", "core-ms: memcpy", "client", "hub", "floor", ""),
        [
            (
                row["operation"],
                str(row["clients"]),
                str(row["batch_blocks"]),
                f"{row['block_bytes'] / (1 << 20):g} MiB",
                f"{row['memcpy_gb_s']:.2f}",
                f"{row['speed_gb_s']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
                f"{row['call_ms']:.1f}",
                f"{row['memcpy_core_ms']:.2f}",
                f"{row['client_core_ms']:.2f}",
                f"{row['hub_core_ms']:.2f}",
                f"{row['floor']:.1f}",
                "pass" if row["floor_met"] else "MISS",
            )
            for row in rows
        ],
    )


def _lookup(figure: dict[str, Any]) -> str:
    return aligned(
        ("control plane", "median ms", "p90 ms", "ratio"),
        [
            (
                f"lookup of {figure['keys']} keys",
                f"{figure['lookup_ms']:.2f}",
                f"{figure['lookup_p90_ms']:.2f}",
                f"{figure['ratio']:.2f}",
            ),
            (
                "empty gRPC call",
                f"{figure['empty_call_ms']:.2f}",
                f"{figure['empty_call_p90_ms']:.2f}",
                "1",
            ),
        ],
    )


def _restart(figure: dict[str, Any]) -> str:
    steps = ("dead_s", "ready_s", "looked_up_s", "pulled_s")
    names = (
        "process gone",
        f"new process ready (recovery {figure['recovery_s']:.2f} s)",
        "first lookup answered (same client)",
        "first block pulled and verified",
    )
    instants = [figure[step] for step in steps]
    rows = [
        (name, f"{instant:.2f}", f"{instant - before:.2f}")
        for name, instant, before in zip(names, instants, [0.0, *instants], strict=False)
    ]
    head = f"restart, {figure['restored_blocks']} blocks"
    return aligned((head, "s after SIGKILL", "step s"), rows)


def _wire(rows: list[dict[str, Any]]) -> str:
    return aligned(
        (
            "over a wire",
            "bare GB/s",
            "GB/s",
            "ratio",
            "range",
            "floor",
            "",
            "bare* GB/s",
            "of bare*",
        ),
        [
            (
                f"{row['transport']} {row['operation']}, {row['mib']} MiB",
                f"{row['bare_gb_s']:.2f}",
                f"{row['speed_gb_s']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
                f"{row['floor']:.2f}",
                "pass" if row["floor_met"] else "MISS",
                f"{row['hashed_gb_s']:.2f}",
                f"{row['of_hashed']:.2f}",
            )
            for row in rows
        ],
    )


def nixl(rows: list[dict[str, Any]]) -> str:
    """Of bare NIXL by one agent, and by as many as the hub has, which also hash what they read."""
    return aligned(
        ("over nixl", "agents", "bare GB/s", "GB/s", "ratio", "range", "floor", "",
         "bare* GB/s", "of bare*", "core-ms/MiB"),
        [
            (
                f"{row['way']} {row['operation']}, {'direct' if row['direct'] else 'staged'},"
                f" {row['mib']} MiB",
                str(row["agents"]),
                f"{row['bare_gb_s']:.2f}",
                f"{row['speed_gb_s']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
                f"{row['floor']:.2f}" if row["floor"] else "",
                ("pass" if row["floor_met"] else "MISS") if row["floor"] else "",
                f"{row['cores_gb_s']:.2f}",
                f"{row['of_cores']:.2f}",
                f"{row['core_ms']:.2f}",
            )
            for row in rows
        ],
    )  # fmt: skip


def _control(rows: list[dict[str, Any]]) -> str:
    return aligned(
        ("beside a client", "idle p50 ms", "p99", "beside p50", "p99", "p99 ratio", "GB/s", ""),
        [
            (
                f"{row['transport']}, {row['call']}",
                f"{row['idle_p50_ms']:.2f}",
                f"{row['idle_p99_ms']:.2f}",
                f"{row['loaded_p50_ms']:.2f}",
                f"{row['loaded_p99_ms']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['data_gb_s']:.2f}",
                "pass" if row["ratio"] <= row["ratio_max"] else "MISS",
            )
            for row in rows
        ],
    )
