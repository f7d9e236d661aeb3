"""Removes a host directory that nobody will reopen: until then its arena is memory lost.

Rule 1: only under the directory's lock, so never while a server holds it.
Rule 2: only files that a server makes there; the directory itself when it is empty then.
Rule 3: engines that still map the arena are told (epoch 0) and keep its memory until they unmap it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from kvproto.arena import EPOCH_OFFSET
from kvproto.errors import FieldError
from kvserver.tiers.host import ARENA_NAME, FRESH_NAME
from kvserver.tiers.liveness import LIVE_NAME
from kvserver.tiers.lock import LOCK_NAME, DirectoryLock
from kvserver.tiers.names import NAMESPACES_NAME

SOCKET_NAME = "shm.sock"
_NAMES = (FRESH_NAME, NAMESPACES_NAME, NAMESPACES_NAME + ".new", SOCKET_NAME)


def purge_host(directory: Path) -> int:
    """Remove it all; the bytes that its arena took. DirectoryBusy while a server holds it.

    FieldError `host_dir` when there is neither an arena nor a lock: not a server's directory.
    """
    arena = directory / ARENA_NAME
    if not arena.exists() and not (directory / LOCK_NAME).exists():
        raise FieldError("host_dir", str(directory), "a directory that a server has used")
    with DirectoryLock.acquire(directory) as lock:
        freed = 0
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(arena, os.O_RDWR | os.O_CLOEXEC)
            freed = os.fstat(fd).st_blocks * 512
            os.pwrite(fd, bytes(8), EPOCH_OFFSET)
            os.close(fd)
            arena.unlink()
        for name in _NAMES:
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / LIVE_NAME, ignore_errors=True)
        lock.path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()
    return freed
