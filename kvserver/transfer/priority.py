"""How those who move bytes give way to the loop where cores are short (ADR 0005)."""

from __future__ import annotations

import contextlib
import os


def step_back(nice: int) -> None:
    """Let the server's loop run first: the calling thread, and those that it starts, do not push it
    off its core when they wake up. A process calls it before it has other threads. With 0 nothing
    is changed.
    """
    if nice:
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.nice(nice)  # of this thread alone, on Linux
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
