"""Checksums of what arrived in the arena, beside the loop.

Native code hashes without the interpreter's lock, so where it is (`kvproto.cells.NATIVE`) the
thread that asks does it. Without, that thread would hold the lock for every cell of 64 KiB or less,
and so take turns with the loop: an empty call beside a full client took half as long again at the
median as beside none (docs/adr/0010). Then a process does it: it maps the arena, is told where to
look, and answers with checksums; what they should be, and what follows, is for the server.

    request = 'kvha' | u32 count | u32 layers | u32 heads | region 4 x u32
              | count x (u64 offset | u64 cell_bytes)
    answer  = count x cells(region) x u64, each place's cells in layer-major order

Rule 1: the process writes nothing but its answers, and knows neither permits nor generations:
whether a slot still is what it was is looked at by who asked.
Rule 2: a process that is gone or does not answer within HASH_S costs nobody a transfer: the thread
that asked hashes, now and until another one has been started.
Rule 3: the process ends with its socket, and so with the server, however that ends.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from kvproto.cells import NATIVE
from kvproto.checksum import grid_checksums
from kvproto.frames import Place
from kvproto.grid import Region
from kvserver.transfer.shm import SharedArena

HASH_S = 5.0  # of silence
RESTART_S = 5.0
END_S = 5.0
SETUP_BYTES = 512  # JSON, padded
MAGIC = b"kvha"
HEAD = struct.Struct("<4s7I")

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]


class Hashing:
    """From one thread; `start` and `close` from any, before and after it."""

    def __init__(
        self, arena: SharedArena, slot: Callable[[int, int], Bytes], *, nice: int,
        log: logging.Logger, native: bool = NATIVE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`slot(offset, bytes)` gives a view of the arena; `nice` is the process's, of
        which there is none where code is `native`."""
        self._arena = arena
        self._slot = slot
        self._nice = nice
        self._log = log
        self._native = native
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._start_at = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process, where there is to be one, without waiting for it. OSError when that
        cannot be."""
        if self._native:
            return
        self._start_at = self._clock() + RESTART_S
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "kvserver.transfer.hasher", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            arena = self._arena
            setup = {
                "file_bytes": arena.file_bytes, "arena_id": arena.arena_id.hex(),
                "epoch": arena.epoch, "nice": self._nice,
            }  # fmt: skip
            socket.send_fds(ours, [json.dumps(setup).encode().ljust(SETUP_BYTES)], [arena.fd])
        except OSError:
            ours.close()
            raise
        ours.settimeout(HASH_S)
        self._socket = ours

    def close(self) -> None:
        """The process has ended when this returns."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def sums(self, region: Region, places: Sequence[Place]) -> Numbers:
        """[places, cells of the region]: as they stand. The places are of one grid."""
        if self._native:
            return sums_here(self._slot, region, places)
        if self._socket is None and self._clock() >= self._start_at:
            with suppress(OSError):
                self.start()
        if self._socket is not None:
            try:
                return self._ask(self._socket, region, places)
            except OSError as error:
                self._log.warning("hasher_lost", extra={"fields": {"reason": repr(error)}})
                if self._process is not None:
                    self._process.kill()
                self.close()
        return sums_here(self._slot, region, places)

    def _ask(self, end: socket.socket, region: Region, places: Sequence[Place]) -> Numbers:
        end.sendall(encode(region, places))
        found = np.zeros((len(places), region.cells), "<u8")
        left = found.reshape(-1).view(np.uint8).data
        while left:
            count = end.recv_into(left)
            if not count:
                raise ConnectionResetError("the process ended")
            left = left[count:]
        return found.astype(np.uint64, copy=False)


def sums_here(
    slot: Callable[[int, int], Bytes], region: Region, places: Sequence[Place]
) -> Numbers:
    """The same, by this thread."""
    found = np.zeros((len(places), region.cells), np.uint64)
    layers = slice(region.layer_start, region.layer_stop)
    heads = slice(region.head_start, region.head_stop)
    for at, place in enumerate(places):
        view = slot(place.offset, place.payload_bytes)
        cells = view.reshape(place.layers, place.heads, place.cell_bytes)
        found[at] = grid_checksums(cells[layers, heads])
    return found


def encode(region: Region, places: Sequence[Place]) -> bytes:
    first = places[0]
    head = HEAD.pack(
        MAGIC, len(places), first.layers, first.heads, region.layer_start, region.layer_stop,
        region.head_start, region.head_stop,
    )  # fmt: skip
    return head + np.array([(p.offset, p.cell_bytes) for p in places], "<u8").tobytes()
