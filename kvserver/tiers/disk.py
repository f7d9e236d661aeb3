"""The disk tier's slot file: one preallocated file, moved by O_DIRECT straight to and from memory.

    header (4096 B) | its copy (4096 B) | unused to 16 KiB | data

Rule 1: payload only; what a slot holds is told by the journal, which names this file's id.
Rule 2: a file whose header does not count gets a new id, and so no journal record refers to it.
Rule 3: offsets and lengths are multiples of 4096, views begin on a page (arena slots do).
Rule 4: a call moves all its bytes or raises DiskError; a short transfer goes on where it stopped.
Rule 5: where O_DIRECT or fallocate is refused, the file works without and `notes` says so.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvproto.errors import FieldError
from kvserver.tiers import syscalls
from kvserver.tiers.errors import DiskError

SLOTS_NAME = "slots"
FORMAT = 1
HEADER_BYTES = 4096
DATA_OFFSET = 16 * 1024
DISK_BYTES_MIN = 1 << 20
FILE_ID_BYTES = 16
IO_ALIGN = 4096
_MAGIC = b"kvslots\0"
_HEADER = struct.Struct("<8sIIQ16s")  # magic, format, 0, data bytes, file id; then CRC-32
_CRC_AT = HEADER_BYTES - 4
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)

Bytes = npt.NDArray[np.uint8]


class DiskHeader(NamedTuple):
    data_bytes: int
    file_id: bytes

    def encode(self) -> bytes:
        """4096 bytes."""
        raw = _HEADER.pack(_MAGIC, FORMAT, 0, self.data_bytes, self.file_id).ljust(_CRC_AT, b"\0")
        return raw + struct.pack("<I", zlib.crc32(raw))

    @classmethod
    def decode(cls, raw: bytes) -> DiskHeader:
        """The inverse of `encode`. FieldError names what is not as this version writes it."""
        if len(raw) < HEADER_BYTES or raw[:8] != _MAGIC:
            raise FieldError("slots.magic", raw[:8], repr(_MAGIC))
        _, format_, _, data_bytes, file_id = _HEADER.unpack_from(raw)
        if format_ != FORMAT:
            raise FieldError("slots.format", format_, str(FORMAT))
        if zlib.crc32(raw[:_CRC_AT]) != struct.unpack_from("<I", raw, _CRC_AT)[0]:
            raise FieldError("slots.crc", raw[_CRC_AT:HEADER_BYTES], "the header's CRC")
        return cls(data_bytes, file_id)


class DiskFile:
    """The open slot file; its directory's lock is the caller's. Safe to use from any thread."""

    def __init__(self, path: Path, fd: int, header: DiskHeader, *, direct: bool) -> None:
        self.path = path
        self.file_id = header.file_id
        self.data_bytes = header.data_bytes
        self.direct = direct
        self.warm = True
        self.cold_reason = ""
        self.notes: list[str] = []
        self._fd = fd

    @classmethod
    def open(cls, path: Path, data_bytes: int, *, direct: bool = True) -> DiskFile:
        """Open or make the slot file with `data_bytes` of data; grows or shrinks an older one.

        FieldError `disk_bytes` when it is too small or the filesystem has less; DiskError when the
        system refuses.
        """
        if data_bytes < DISK_BYTES_MIN or data_bytes % IO_ALIGN:
            limit = f"at least {DISK_BYTES_MIN} and a multiple of {IO_ALIGN}"
            raise FieldError("disk_bytes", data_bytes, limit)
        notes: list[str] = []
        try:
            fd, direct = _open(path, os.O_RDWR | os.O_CREAT, direct, notes)
        except OSError as error:
            raise _disk_error("open", path, error) from error
        try:
            _allocate(fd, path, data_bytes, notes)
            direct = direct and _probe_direct(fd, notes)
            header, reason = _settle_header(fd, data_bytes)
        except OSError as error:
            os.close(fd)
            raise _disk_error("set up", path, error) from error
        except BaseException:
            os.close(fd)
            raise
        file = cls(path, fd, header, direct=direct)
        file.warm, file.cold_reason, file.notes = not reason, reason, notes
        return file

    @classmethod
    def open_readonly(cls, path: Path) -> DiskFile:
        """For an offline check. FieldError when the header does not count, DiskError otherwise."""
        notes: list[str] = []
        try:
            fd, direct = _open(path, os.O_RDONLY, True, notes)
        except OSError as error:
            raise _disk_error("open", path, error) from error
        try:
            direct = direct and _probe_direct(fd, notes)
            header, reason = _read_header(fd)
        except OSError as error:
            os.close(fd)
            raise _disk_error("read", path, error) from error
        if header is None:
            os.close(fd)
            raise FieldError("slots", str(path), f"a slot file: {reason}")
        file = cls(path, fd, header, direct=direct)
        file.notes = notes
        return file

    def read(self, offset: int, view: Bytes) -> None:
        """Fill `view` from the data area at `offset`."""
        self._check(offset, view)
        self._move("read", offset, view)

    def write(self, offset: int, view: Bytes) -> None:
        """Store `view` at `offset`; durable after `sync`."""
        self._check(offset, view)
        self._move("write", offset, view)

    def sync(self) -> None:
        """Returns when all that was written is durable. After an error nothing is known."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _disk_error("sync", self.path, error) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check(self, offset: int, view: Bytes) -> None:
        assert offset % IO_ALIGN == view.nbytes % IO_ALIGN == 0, (offset, view.nbytes)
        assert 0 <= offset <= self.data_bytes - view.nbytes, (offset, view.nbytes)

    def _move(self, operation: str, offset: int, view: Bytes) -> None:
        call = os.preadv if operation == "read" else os.pwritev
        rest = view.data
        at = DATA_OFFSET + offset
        while rest.nbytes:
            try:
                moved = call(self._fd, [rest], at)
            except OSError as error:
                raise _disk_error(operation, self.path, error) from error
            if moved <= 0:
                raise DiskError(operation, self.path, errno.EIO)
            rest = rest[moved:]
            at += moved


def _disk_error(operation: str, path: Path, error: OSError) -> DiskError:
    return DiskError(operation, path, error.errno or errno.EIO)


def _open(path: Path, flags: int, direct: bool, notes: list[str]) -> tuple[int, bool]:
    flags |= os.O_CLOEXEC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            notes.append(f"O_DIRECT is refused ({error.strerror}): I/O goes through the page cache")
    return os.open(path, flags, 0o600), False


def _probe_direct(fd: int, notes: list[str]) -> bool:
    """Some filesystems take the flag and refuse the I/O: go on without it then."""
    try:
        os.preadv(fd, [mmap.mmap(-1, IO_ALIGN)], 0)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        notes.append(f"O_DIRECT does not work ({error.strerror}): I/O goes through the page cache")
        return False
    return True


def _allocate(fd: int, path: Path, data_bytes: int, notes: list[str]) -> None:
    size = DATA_OFFSET + data_bytes
    stat, space = os.fstat(fd), os.statvfs(path)
    available = space.f_bavail * space.f_frsize + stat.st_blocks * 512
    if size > available:
        raise FieldError(
            "disk_bytes",
            data_bytes,
            f"at most {available} ({available / 2**30:.1f} GiB), free at {path}",
        )
    if stat.st_size > size:
        os.ftruncate(fd, size)
    try:
        syscalls.allocate(fd, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            limit = f"what is free at {path} ({available} bytes)"
            raise FieldError("disk_bytes", data_bytes, limit) from error
        if error.errno not in _REFUSED:
            raise
        os.ftruncate(fd, size)
        notes.append(f"fallocate is refused ({error.strerror}): the file is sparse, space may end")


def _read_header(fd: int) -> tuple[DiskHeader | None, str]:
    """The first of the two headers that counts, or why none does."""
    pages = mmap.mmap(-1, 2 * HEADER_BYTES)
    os.preadv(fd, [pages], 0)
    reasons = []
    for start in (0, HEADER_BYTES):
        try:
            return DiskHeader.decode(pages[start : start + HEADER_BYTES]), ""
        except FieldError as error:
            reasons.append(str(error))
    return None, reasons[0] if any(pages[:]) else "there was no slot file"


def _settle_header(fd: int, data_bytes: int) -> tuple[DiskHeader, str]:
    """The file's header for `data_bytes`, and why the file is a new one (empty: it is not)."""
    header, reason = _read_header(fd)
    if header is None:
        header = DiskHeader(data_bytes, secrets.token_bytes(FILE_ID_BYTES))
    elif header.data_bytes == data_bytes:
        return header, ""
    header = header._replace(data_bytes=data_bytes)
    pages = mmap.mmap(-1, HEADER_BYTES)
    pages[:] = header.encode()
    for start in (HEADER_BYTES, 0):  # one of the two counts at any moment
        if os.pwritev(fd, [pages], start) != HEADER_BYTES:
            raise OSError(errno.EIO, "short write of the header")
        os.fdatasync(fd)
    return header, reason
