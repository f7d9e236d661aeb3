"""One server per directory: an exclusive `flock` on `<directory>/lock`.

Rule 1: the lock comes first, before anything in the directory is read or changed.
Rule 2: the lock is on the file that stands at the path now: one that was removed between open and
flock (by a purge) is not held, and the caller tries again.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from kvserver.tiers.errors import DirectoryBusy

LOCK_NAME = "lock"
ENDING_S = 5.0  # what a process may take to end after its server
_PAUSE_S = 0.01


class DirectoryLock:
    """Held from `acquire` until `release` or the end of the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, directory: Path) -> DirectoryLock:
        """DirectoryBusy, with the holder's pid as far as known, when another holds it."""
        path = directory / LOCK_NAME
        give_up = time.monotonic() + ENDING_S
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
                os.close(fd)
                if _has_ended(holder) and time.monotonic() < give_up:
                    time.sleep(_PAUSE_S)
                    continue
                raise DirectoryBusy(directory, holder) from None
            except OSError:
                os.close(fd)
                raise
            if _is_at(path, fd):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"pid {os.getpid()}".encode(), 0)
                return cls(path, fd)
            os.close(fd)

    @property
    def fd(self) -> int:
        return self._fd

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _has_ended(holder: str) -> bool:
    """Whether the lock's text names a process that is not there any more."""
    pid = holder.removeprefix("pid ")
    return pid.isdecimal() and not Path(f"/proc/{pid}").exists()


def _is_at(path: Path, fd: int) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
