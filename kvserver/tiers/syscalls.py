"""Linux calls that the standard library lacks or makes with the GIL held.

Each raises OSError with the system's errno. `ctypes` releases the GIL around them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal

import numpy as np
import numpy.typing as npt

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23  # Linux 5.14: maps pages for writing without changing a byte
PR_SET_PDEATHSIG = 1
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def madvise(view: npt.NDArray[np.uint8], advice: int) -> None:
    """`view` must begin on a page."""
    _check(_libc.madvise(view.ctypes.data, view.nbytes, advice), "madvise")


def mlock(view: npt.NDArray[np.uint8]) -> None:
    """Keep the pages of `view` in memory."""
    _check(_libc.mlock(view.ctypes.data, view.nbytes), "mlock")


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve blocks for a range of a file, which grows to hold it; contents stay."""
    _check(_libc.fallocate(fd, 0, offset, length), "fallocate")


def punch(fd: int, offset: int, length: int) -> None:
    """Give back the blocks of a range, which reads as zeros from now on; the size stays."""
    _check(_libc.fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length), "fallocate")


def end_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends, even while stopped. OSError (ESRCH)
    when `parent`, its process, is gone already."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, f"the parent is not process {parent} any more")


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
