"""A bell: rung by a thread that must not be held up, heard by an event loop within milliseconds.

    bell = Bell()
    loop.add_reader(bell.fileno(), answer)   # calls bell.heard() first
    bell.watch()                             # on the thread, and the cores, that hear it
    bell.ring()                              # from any thread

Rules:
 1. A ring is heard, once at least, whenever it came; rings that were not heard yet are one.
 2. Who rings keeps the interpreter's lock, and with native code (bell.c) makes no system call: a
    thread beside it looks each `tick_s`, after `idle_s` without a ring each `idle_tick_s`.
 3. After `asleep_s` without a ring that thread sleeps, and who rings writes the eventfd, until it
    is heard. So it is without native code, before `watch` and after `stop`.
 4. `stop` ends that thread. So does the last reference's end, which closes the eventfd, too.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from dataclasses import dataclass

from kvproto import cells


@dataclass(frozen=True, slots=True)
class Watch:
    """How often a bell is looked at."""

    tick_s: float = 500e-6
    idle_s: float = 0.05
    idle_tick_s: float = 2e-3
    asleep_s: float = 10.0


_write = ctypes.PyDLL(None).eventfd_write
"""Keeps the interpreter's lock, unlike `os.eventfd_write`: the thread that is woken would take it,
and whoever rang would wait until that lets go of it. Does not block: the eventfd does not."""
_write.argtypes, _write.restype = [ctypes.c_int, ctypes.c_uint64], ctypes.c_int


class Bell:
    """See the module."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._how = watch or Watch()
        self._watcher = _Watcher()
        self._rung: ctypes.c_uint32 | None = None
        self._asleep = ctypes.c_uint32(1)
        weakref.finalize(self, _end, self._watcher, self._fd).atexit = False

    def fileno(self) -> int:
        return self._fd

    @property
    def watched(self) -> bool:
        """Whether a native thread looks at it."""
        return self._rung is not None

    def watch(self) -> None:
        """Have a thread look, which may run where the calling one may. Nothing where there is no
        native code, or no thread to be had: ringing does its work then."""
        address = self._watcher.start(self._fd, self._how)
        if address:
            self._rung = ctypes.c_uint32.from_address(address)
            self._asleep = ctypes.c_uint32.from_address(address + ctypes.sizeof(self._rung))

    def ring(self) -> None:
        rung = self._rung
        if rung is not None:
            rung.value = 1
        if self._asleep.value:  # in this order: bell.c
            _write(self._fd, 1)

    def heard(self) -> None:
        """Take what was rung so far. BlockingIOError if nothing was."""
        os.eventfd_read(self._fd)
        if self._asleep.value:
            self._watcher.wake()

    def stop(self) -> None:
        """Waits for a look at most. What was rung right before may not be heard."""
        self._asleep = ctypes.c_uint32(1)
        self._rung = None
        self._watcher.stop()


class _Watcher:
    """At most one native thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._address = 0

    def start(self, fd: int, how: Watch) -> int:
        """The address of its bell; 0 without one."""
        library = cells.native()
        if library is None:
            return 0
        with self._lock:
            if not self._address:
                ticks = round(1e6 * how.tick_s), round(1e6 * how.idle_tick_s)
                looks = round(how.idle_s / how.tick_s), round(how.asleep_s / how.idle_tick_s)
                self._address = library.kv_bell_start(fd, *ticks, *looks) or 0
            return self._address

    def wake(self) -> None:
        with self._lock:
            library = cells.native()
            if library is not None and self._address:
                library.kv_bell_heard(self._address)

    def stop(self) -> None:
        with self._lock:
            library, address = cells.native(), self._address
            self._address = 0
            if library is not None and address:
                library.kv_bell_stop(address)


def _end(watcher: _Watcher, fd: int) -> None:
    watcher.stop()
    os.close(fd)
