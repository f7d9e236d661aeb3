"""Cells through a socket, hashed while the caches hold them: what wires.c does, when it was built.

A grid of cells is uint8 [layers, heads, bytes], a region of a larger one perhaps; each cell is
contiguous. It travels in layer-major order, without gaps, and in calls without the interpreter's
lock: between two of a loop in Python lay 0.2 ms a MiB, more than the hash takes (docs/adr/0013).
Where this process has CORES_MIN cores, cells are hashed by a thread beside the call.

Rules:
 1. Plain sockets only, and cells that native code can hash (`usable`). For others, and where it was
    not built, callers have a loop of their own; what travels and what is found out is the same.
 2. Bounds are checked here, before native code is given an address; callers hold the arrays.
 3. A call ends at the socket's own limit (SO_SNDTIMEO, SO_RCVTIMEO: BlockingIOError), at a
    shutdown() by another thread, or, guarded, when nothing came for a while.
 4. A guarded grid is written only while two words of shared memory say that it may be: they are
    loaded before every system call that copies into it, and none of those waits.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

import numpy as np
import numpy.typing as npt

from kvproto import cells
from kvproto.cells import ROW_BYTES_MIN, Bytes, Checksums

PORTION_BYTES = 1 << 20  # hashed, then sent; or received at most, then hashed
CORES_MIN = 4  # two for each end of a connection

Words = npt.NDArray[np.uint64]


class Came(IntEnum):
    """How far `receive_guarded` got."""

    WHOLE = 0
    LOST = 1  # the guard says that this memory is not ours any more
    WAITED = 2  # nothing came for as long as it waits


@dataclass(frozen=True, slots=True)
class Guard:
    """Words [1] of shared memory, and what they have to be."""

    generation: Words
    generation_wanted: int
    epoch: Words
    epoch_wanted: int


@dataclass(eq=False, slots=True)
class Arrival:
    """Cells that are on their way. `done` bytes have come; of cells that are whole, `sums` are
    the checksums.
    """

    grid: Bytes
    guard: Guard
    sums: Checksums = field(init=False)
    _done: ctypes.c_size_t = field(init=False, default_factory=ctypes.c_size_t)

    def __post_init__(self) -> None:
        self.sums = np.zeros(self.grid.shape[0] * self.grid.shape[1], np.uint64)

    @property
    def done(self) -> int:
        return self._done.value


def usable(cell_bytes: int) -> bool:
    """Whether native code is here, and takes cells of this size."""
    return cells.native() is not None and cell_bytes >= ROW_BYTES_MIN


@cache
def beside() -> bool:
    """Whether there are cores for hashing beside a transfer. Of what the process had at first."""
    return len(os.sched_getaffinity(0)) >= CORES_MIN


def send(fd: int, head: bytes, grid: Bytes, sums: Checksums, *, apart: bool | None = None) -> None:
    """Send `head`, the cells and, little-endian, their checksums, which are left in `sums` too.

    On a blocking socket. OSError as from socket.send; ValueError for arrays of another kind.
    `apart` here and below: hashed by a thread of its own; None: as `beside` says.
    """
    layout = _layout(grid, sums)
    held = np.frombuffer(head, np.uint8)
    _raise(
        _library().kv_send_grid(
            fd,
            held.ctypes.data,
            held.size,
            *layout,
            sums.ctypes.data,
            PORTION_BYTES,
            _apart(apart, grid.size),
        )
    )


def receive(fd: int, grid: Bytes, sums: Checksums, *, apart: bool | None = None) -> None:
    """Receive all of `grid`, and leave what its cells are hashed to in `sums`.

    On a blocking socket. OSError as from socket.recv, ConnectionResetError at the end of the
    stream; ValueError for arrays of another kind.
    """
    layout = _layout(grid, sums, writes=True)
    _raise(
        _library().kv_receive_grid(
            fd, *layout, sums.ctypes.data, PORTION_BYTES, _apart(apart, grid.size)
        )
    )


def receive_guarded(
    fd: int, arrival: Arrival, *, more_bytes: int, wait_s: float, low: ctypes.c_int,
    apart: bool | None = None,
) -> Came:  # fmt: skip
    """Receive what comes. `more_bytes` are waited for together, `wait_s` at most; `low` is the
    socket's SO_RCVLOWAT, before and after. OSError as `receive`.
    """
    guard = arrival.guard
    for name, word in (("generation", guard.generation), ("epoch", guard.epoch)):
        if word.dtype != np.uint64 or word.shape != (1,) or word.ctypes.data % 8:
            raise ValueError(f"{name}: {word.dtype} {word.shape}, not one aligned uint64")
    layout = _layout(arrival.grid, arrival.sums, writes=True)
    return Came(
        _raise(
            _library().kv_guarded_grid(
                fd, *layout, arrival.sums.ctypes.data,
                guard.generation.ctypes.data, guard.generation_wanted,
                guard.epoch.ctypes.data, guard.epoch_wanted,
                PORTION_BYTES, more_bytes, round(wait_s * 1000),
                ctypes.byref(arrival._done), ctypes.byref(low),
                _apart(apart, arrival.grid.size - arrival.done),
            )
        )
    )  # fmt: skip


def _apart(asked: bool | None, left: int) -> int:
    """A portion is hashed before a thread has begun."""
    return int(left > PORTION_BYTES and beside() if asked is None else asked)


# ---- what native code is given -----------------------------------------------------------------


def _library() -> ctypes.CDLL:
    found = cells.native()
    assert found is not None, "no native code: ask `usable`"
    return found


def _layout(grid: Bytes, sums: Checksums, *, writes: bool = False) -> tuple[int, ...]:
    """base, layer_step, head_step, layers, heads, cell"""
    if grid.dtype != np.uint8 or grid.ndim != 3 or not grid.size:
        raise ValueError(f"grid: {grid.dtype} {grid.shape}, not uint8 [layers, heads, bytes]")
    if grid.strides[2] != 1 or grid.shape[2] < ROW_BYTES_MIN:
        raise ValueError(f"grid: its cells are not contiguous, or below {ROW_BYTES_MIN} bytes")
    if writes and not grid.flags.writeable:
        raise ValueError("grid: it is read-only")
    cells.check_sums(sums, grid.shape[0] * grid.shape[1])
    return (grid.ctypes.data, *grid.strides[:2], *grid.shape)


def _raise(answer: int) -> int:
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))
    return answer
