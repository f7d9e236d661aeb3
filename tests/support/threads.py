"""The threads of this process by name, native ones too."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


def threads_named(name: str) -> set[int]:
    """Their ids; `name` is at most 15 characters long, as the kernel keeps no more."""
    found = set()
    for comm in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread of somebody else that has just ended
            if comm.read_text() == f"{name}\n":
                found.add(int(comm.parent.name))
    return found


def none_left(name: str, *, but: Collection[int] = (), within_s: float = 20.0) -> bool:
    """No thread of this name is left, or none but these.

    Waits for that: a thread that has been joined stands in /proc for a moment more (here one of
    twenty did).
    """
    deadline = time.monotonic() + within_s
    while threads_named(name) - set(but):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
