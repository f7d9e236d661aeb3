"""What the figures were measured on: cores, memory, versions. Never a host's name."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import xxhash

from kvproto import cells
from kvserver import __version__

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def facts() -> dict[str, str | int | float]:
    """The machine and the versions, for the head of a result file."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory_kib("MemTotal") / (1 << 20), 1),
        "kernel": platform.release(),
        "huge_pages": _thp("enabled"),
        "huge_pages_shm": _thp("shmem_enabled"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "grpc": grpc.__version__,
        "xxhash": xxhash.VERSION,
        "native": str(cells.NATIVE),
        "kvserver": __version__,
    }


def memory_available_bytes() -> int:
    """What the kernel says can still be taken without swapping."""
    return _memory_kib("MemAvailable") << 10


def load_average() -> float:
    """Runnable tasks over the last minute: a figure taken beside other work says so."""
    return round(os.getloadavg()[0], 2)


def rounded_down(value: float, digits: int) -> float:
    """For what is held against a floor of so many digits or fewer: a figure that misses it must not
    look as if it met it."""
    shown = round(value, digits)
    return shown if shown <= value else round(shown - 10**-digits, digits)


def core_seconds(processes: Iterable[int]) -> float:
    """Processor time that the threads of these processes have had so far."""
    nanoseconds = 0
    for process in processes:
        for task in Path(f"/proc/{process}/task").iterdir():
            with suppress(FileNotFoundError):  # a thread that has just ended
                nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def _cpu_model() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_kib(field: str) -> int:
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def _thp(name: str) -> str:
    """The choice in brackets: `always [madvise] never` -> madvise."""
    try:
        text = (_THP / name).read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or text.strip()
