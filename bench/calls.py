"""How long each of an engine's calls into the adapter took: files of fixed records.

Each of the engine's processes, its scheduler's and its worker's, appends to a file of its own
(`CallLog`, from the engine's thread only); the benchmark reads them while the engine runs (`read`).
A record costs about a microsecond of the engine's time and no system call: the file is mapped.

Record: name of the call (its number in CALLS), start (CLOCK_MONOTONIC, ns), wall and processor
time of the calling thread (ns). The first 8 bytes of the file count the records.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

WORKER_CALLS = (
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)
"""Of a step, on the thread that runs the forward pass; the first and the last frame the step."""
SCHEDULER_CALLS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
)
CALLS = (*WORKER_CALLS, *SCHEDULER_CALLS)
RECORD = np.dtype([("call", "<u4"), ("cpu", "<u4"), ("start", "<u8"), ("wall", "<u8")])
HEAD = 8
RECORDS_MAX = 4_000_000

Records = npt.NDArray[np.void]


class CallLog:
    """Appends to this process's file; what does not fit is dropped."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        size = HEAD + RECORDS_MAX * RECORD.itemsize
        with (directory / str(os.getpid())).open("w+b") as file:
            file.truncate(size)
            raw = mmap.mmap(file.fileno(), size)
        self._count = np.frombuffer(raw, "<u8", 1)
        self._records = np.frombuffer(raw, RECORD, RECORDS_MAX, HEAD)
        self._next = 0

    def add(self, call: int, start: int, wall: int, cpu: int) -> None:
        at = self._next
        if at < RECORDS_MAX:
            self._records[at] = (call, cpu, start, wall)
            self._next = self._count[0] = at + 1


def read(directory: Path, since: int = 0) -> Records:
    """The records so far of all processes, from instant `since` on, in order of time."""
    parts = []
    for path in directory.iterdir():
        with path.open("rb") as file:
            count = int.from_bytes(file.read(HEAD), "little")
            parts.append(np.fromfile(file, RECORD, count))
    records = np.concatenate(parts) if parts else np.empty(0, RECORD)
    found: Records = np.sort(records[records["start"] >= since], order="start", kind="stable")
    return found


def of(records: Records, *names: str) -> Records:
    numbers = [CALLS.index(name) for name in names]
    found: Records = records[np.isin(records["call"], numbers)]
    return found


def percentile(values: Sequence[float] | npt.NDArray[np.generic], share: float) -> float:
    """The smallest value that so large a share of them does not exceed: of few, the largest."""
    ordered = sorted(values)
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def steps(records: Records) -> list[tuple[int, int, int]]:
    """(start, duration, time within calls) in ns of each step that ran a forward pass."""
    found = []
    begin, end = CALLS.index(WORKER_CALLS[0]), CALLS.index(WORKER_CALLS[-1])
    layer = CALLS.index("save_kv_layer")
    start, within, layers = 0, 0, 0
    for call, _, at, wall in of(records, *WORKER_CALLS).tolist():
        if call == begin:
            start, within, layers = at, 0, 0
        within += wall
        layers += call == layer
        if call == end and start and layers:
            found.append((start, at + wall - start, within))
    return found
