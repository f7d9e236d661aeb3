"""The device tier as the mover uses it: its failure, what it moved, and the pinning for it.

Rule 1: the first failure takes the tier down, until the server is started again: what a GPU's
memory holds after an error nobody knows, and CUDA rarely works on in the same process. The core
drops the tier's blocks; memory and disk never notice.
Rule 2: memory that cannot be pinned costs speed: the log says so, once, and no more is tried.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kvserver.core.events import Place
from kvserver.runtime import failpoints
from kvserver.tiers.device import DeviceArena
from kvserver.tiers.errors import TierError
from kvserver.tiers.host import HostArena

FAILURES = (TierError, OSError)
Bytes = npt.NDArray[np.uint8]


class DeviceDown(Exception):
    """The tier is down; the job cannot be done."""


class DeviceTier:
    """Thread-safe. `failed(reason)` is called once, from any thread, when the tier goes down."""

    def __init__(self, arena: DeviceArena, *, failed: Callable[[str], None]) -> None:
        self.name = arena.name
        self.up = True
        self.bytes_written = 0
        self.bytes_read = 0
        self._arena = arena
        self._failed = failed
        self._lock = threading.Lock()

    def upload(self, place: Place, view: Bytes) -> None:
        with self._io():
            failpoints.hit("device.upload")
            self._arena.upload(place.offset, view)
        with self._lock:
            self.bytes_written += view.nbytes

    def download(self, place: Place, view: Bytes) -> None:
        with self._io():
            failpoints.hit("device.download")
            self._arena.download(place.offset, view)
        with self._lock:
            self.bytes_read += view.nbytes

    @contextlib.contextmanager
    def _io(self) -> Iterator[None]:
        if not self.up:
            raise DeviceDown("the device tier is down")
        try:
            yield
        except FAILURES as error:
            self._go_down(str(error))
            raise DeviceDown(str(error)) from error

    def _go_down(self, reason: str) -> None:
        with self._lock:
            was_up, self.up = self.up, False
        if was_up:
            self._failed(reason)


class Pinning:
    """Pins the host arena for a device as it becomes resident. One thread calls it."""

    def __init__(self, arena: DeviceArena, host: HostArena, log: logging.Logger) -> None:
        self._arena = arena
        self._host = host
        self._log = log
        self._bytes = arena.pin(host.buffer, 0, 0)  # nothing: but its steps are known from now on
        self._seconds = 0.0
        self._refused = False

    def grew(self, ready: int) -> None:
        """The first `ready` bytes of the arena are resident."""
        if self._refused or self._bytes >= self._host.data_bytes:
            return
        started = time.monotonic()
        try:
            self._bytes = self._arena.pin(self._host.buffer, self._bytes, ready)
        except TierError as error:
            self._refused = True
            fields = {"bytes": self._bytes, "reason": str(error)}
            self._log.warning("host_not_pinned", extra={"fields": fields})
            return
        self._seconds += time.monotonic() - started
        if self._bytes == self._host.data_bytes:
            fields = {"bytes": self._bytes, "seconds": round(self._seconds, 3)}
            self._log.info("host_pinned", extra={"fields": fields})
