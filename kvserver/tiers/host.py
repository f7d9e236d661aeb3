"""The host arena: one shared-memory file that carries its own directory and outlives the server.

Layout and reader's rules: `kvproto.arena`. Entries: `kvserver.tiers.entry`.

Rule 1: the directory's lock is held as long as the arena is open.
Rule 2: a file is reused (warm) only if its header counts, its format and geometry are this
        version's, and the machine has not been booted since. Otherwise it is retired (epoch 0, so
        that readers who still map it miss) and a fresh one takes its place by rename.
Rule 3: an engine may still map the file: it is never truncated (that would kill the engine with
        SIGBUS), its data never moves. A smaller arena gives back the pages beyond its end; a larger
        one grows in place as far as the table has room (four times the size it was made for).
Rule 4: header, table and data together stay within the budget. Room that the table does not use is
        a hole in the file.
Rule 5: data may be used once it is prefaulted: a full filesystem is an error there, not a SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvproto.arena import (
    DATA_ALIGN,
    DATA_BYTES_WORD,
    ENTRY_BYTES,
    EPOCH_OFFSET,
    EPOCH_WORD,
    GENERATION_FLOOR_WORD,
    HEADER_BYTES,
    RECORD_BYTES,
    RECORD_WORDS,
    RESERVED,
    UNIT,
    ArenaHeader,
)
from kvproto.errors import FieldError
from kvserver.tiers import syscalls
from kvserver.tiers.entry import (
    EntryTable,
    ReservedEntry,
    ValidEntry,
    generation_max_of,
    states_of,
)
from kvserver.tiers.lock import DirectoryLock
from kvserver.tiers.words import SealedRecords

ARENA_NAME = "arena"
FRESH_NAME = "arena.new"  # a file that is being made; worthless after a crash
HOST_BYTES_MIN = 1 << 20
TABLE_HEADROOM = 4
TABLE_DATA_BYTES_MIN = 1 << 30
PREFAULT_STEP_BYTES = 64 << 20
_PAGE = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

Bytes = npt.NDArray[np.uint8]


def data_bytes_within(budget_bytes: int) -> int:
    """The largest data area whose header, table and data fit `budget_bytes`."""
    units = max(0, budget_bytes - HEADER_BYTES - _PAGE) // (UNIT + ENTRY_BYTES)
    return units * UNIT


class HostArena:
    """The open arena. `warm`: blocks of an earlier server may be in it; else `cold_reason`."""

    def __init__(
        self, lock: DirectoryLock, path: Path, fd: int, header: ArenaHeader, *, mlock: bool
    ) -> None:
        self.path = path
        self.fd = fd
        self.notes: list[str] = []
        self.warm = False
        self.cold_reason = ""
        self.unreadable = False  # there was an arena, and its header made no sense
        self.made = False  # there was none
        self.arena_id = header.arena_id
        self.table_offset = header.table_offset
        self.data_offset = header.data_offset
        self.data_bytes = header.data_bytes
        self.file_bytes = header.data_offset + header.data_bytes  # as much as need be mapped
        self._lock = lock
        self._mlock = mlock
        # Views keep the map alive, so it is never closed but by the last of them.
        file: Bytes = np.frombuffer(mmap.mmap(fd, self.file_bytes), np.uint8)
        table_bytes = header.data_bytes // UNIT * ENTRY_BYTES
        self._populate(file[: header.table_offset + table_bytes], 0)
        self._header = SealedRecords(file[:RECORD_BYTES])
        self.buffer = file[header.data_offset :]
        self.entries = EntryTable(file[header.table_offset :][:table_bytes])
        self.read_entry = self.entries.read
        self.write_invalid = self.entries.write_invalid
        self.write_reserved = self.entries.write_reserved
        self.write_valid = self.entries.write_valid
        self.generation_max = max(header.generation_floor, self.entries.generation_max())

    @classmethod
    def open(
        cls,
        directory: Path,
        data_bytes_total: int,
        *,
        hugepages: bool = False,
        mlock: bool = False,
        keep: bool = True,
    ) -> HostArena:
        """Open `directory`'s arena, warm if possible; without `keep` always fresh.

        `data_bytes_total` is the whole budget in bytes. Raises DirectoryBusy when another server
        holds the directory, FieldError `host_bytes` when the budget is too small or the filesystem
        has less.
        """
        if data_bytes_total < HOST_BYTES_MIN:
            raise FieldError("host_bytes", data_bytes_total, f"at least {HOST_BYTES_MIN}")
        directory.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock.acquire(directory)
        try:
            arena = cls._open_locked(lock, directory, data_bytes_total, mlock=mlock, keep=keep)
        except BaseException:
            lock.release()
            raise
        if hugepages:
            arena._advise_hugepages()
        return arena

    @classmethod
    def _open_locked(
        cls, lock: DirectoryLock, directory: Path, budget_bytes: int, *, mlock: bool, keep: bool
    ) -> HostArena:
        path = directory / ARENA_NAME
        data_bytes = data_bytes_within(budget_bytes)
        found = _find(path, data_bytes, keep=keep)
        fd, header = found.fd, found.header
        try:
            if found.reason or header is None:
                _retire(path, fd)
                fd = -1
                _check_space(directory, budget_bytes, 0)
                fd, header = _create(directory, data_bytes, header.epoch + 1 if header else 1)
            elif data_bytes > header.data_bytes:
                _check_space(directory, budget_bytes, os.fstat(fd).st_blocks * 512)
            header = _resize(fd, header, data_bytes)
            arena = cls(lock, path, fd, header, mlock=mlock)
        except BaseException:
            if fd >= 0 and found.fd < 0:
                _retire(path, fd)
            elif fd >= 0:
                os.close(fd)
            raise
        arena.warm, arena.cold_reason = not found.reason, found.reason
        arena.unreadable, arena.made = found.unreadable, found.fd < 0
        if arena.warm:
            arena._header.step(0, EPOCH_WORD, header.epoch + 1, seed=0)
        return arena

    @property
    def epoch(self) -> int:
        """Grows by one with each start."""
        return self._header.load(0, EPOCH_WORD)

    @property
    def lock_fd(self) -> int:
        """Holds the directory's lock, and so does each copy of it."""
        return self._lock.fd

    @property
    def resident_bytes(self) -> int:
        """Memory that the file takes now."""
        return os.fstat(self.fd).st_blocks * 512

    def slot(self, offset: int, length: int) -> Bytes:
        """A view of `length` bytes of the data area."""
        return self.buffer[offset : offset + length]

    def scan(self) -> tuple[list[ValidEntry], list[ReservedEntry], int]:
        """What the directory says, and how many entries were dropped (made INVALID).

        Dropped are damaged entries and blocks that reach beyond a smaller arena's end; a reserved
        slot that does is told as far as the end.
        """
        found = self.entries.scan()
        valid = [e for e in found.valid if e.offset + e.slot_bytes <= self.data_bytes]
        beyond = [e.offset for e in found.valid if e.offset + e.slot_bytes > self.data_bytes]
        dropped = found.damaged + beyond
        generation = max(self.generation_max, self.entries.generation_max()) if dropped else 0
        for offset in dropped:
            self.entries.heal(offset, generation)
        reserved = [
            e._replace(slot_bytes=min(e.slot_bytes, self.data_bytes - e.offset))
            for e in found.reserved
        ]
        return valid, reserved, len(dropped)

    def prefault(self, start: int, stop: int) -> None:
        """Make the pages of data [start, stop) resident, contents unchanged; GIL released.

        FieldError `host_bytes` when the filesystem or the memory has no room for them.
        """
        for at in range(start, stop, PREFAULT_STEP_BYTES):
            view = self.buffer[at : min(stop, at + PREFAULT_STEP_BYTES)]
            self._populate(view, self.data_offset + at)
            if self._mlock:
                self._lock_memory(view)

    def close(self, *, keep: bool = True) -> None:
        """Let go of the file and the directory; without `keep`, remove the file."""
        if self.fd < 0:
            return
        if keep:
            os.close(self.fd)
        else:
            _retire(self.path, self.fd)
        self.fd = -1
        self._lock.release()

    def _populate(self, view: Bytes, file_offset: int) -> None:
        try:
            try:
                syscalls.madvise(view, syscalls.MADV_POPULATE_WRITE)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                self._note("MADV_POPULATE_WRITE is not available: prefault by fallocate and reads")
                syscalls.allocate(self.fd, file_offset, view.nbytes)
                view[::_PAGE].max()
        except OSError as error:
            free = _free_bytes(self.path.parent)
            raise FieldError(
                "host_bytes",
                self.data_bytes,
                f"what {self.path.parent} can hold ({free} bytes are free): {error}",
            ) from error

    def _lock_memory(self, view: Bytes) -> None:
        try:
            syscalls.mlock(view)
        except OSError as error:
            self._mlock = False
            self._note(f"mlock is refused: {error}; raise RLIMIT_MEMLOCK")

    def _advise_hugepages(self) -> None:
        try:
            syscalls.madvise(self.buffer, syscalls.MADV_HUGEPAGE)
            setting = _SHMEM_HUGE.read_text()
        except OSError as error:
            self._note(f"huge pages are not available: {error}")
            return
        if "[never]" in setting or "[deny]" in setting:
            self._note(f"huge pages are off for shared memory: {_SHMEM_HUGE} is {setting.strip()}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


class _Found(NamedTuple):
    fd: int  # -1: no file
    header: ArenaHeader | None  # None: unreadable
    reason: str  # why the file cannot be reused; empty if it can

    @property
    def unreadable(self) -> bool:
        return self.fd >= 0 and self.header is None


def _find(path: Path, data_bytes: int, *, keep: bool) -> _Found:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _Found(-1, None, "there was no arena file")
    try:
        header = ArenaHeader.decode(os.pread(fd, RECORD_BYTES, 0))
    except FieldError as error:
        return _Found(fd, None, str(error))
    reason = ""
    data_end = header.data_offset + header.data_bytes
    if not keep:
        reason = "a fresh arena was asked for"
    elif header.boot_id != _boot_id() or not any(header.boot_id):
        reason = "the machine was booted since"
    elif header.table_bytes < data_bytes // UNIT * ENTRY_BYTES:
        reason = "its table has no room for an arena this large"
    elif os.fstat(fd).st_size < data_end or header.data_offset % DATA_ALIGN:
        reason = "the file is shorter than its header says"
    return _Found(fd, header, reason)


def _retire(path: Path, fd: int) -> None:
    """Remove the file and tell those who still map it; closes `fd`."""
    if fd >= 0:
        os.pwrite(fd, bytes(8), EPOCH_OFFSET)
        path.unlink(missing_ok=True)
        os.close(fd)


def _create(directory: Path, data_bytes: int, epoch: int) -> tuple[int, ArenaHeader]:
    room = max(TABLE_DATA_BYTES_MIN, TABLE_HEADROOM * data_bytes) // UNIT * ENTRY_BYTES
    data_offset = -(-(HEADER_BYTES + room) // DATA_ALIGN) * DATA_ALIGN
    header = ArenaHeader(
        epoch=epoch,
        arena_id=secrets.token_bytes(16),
        boot_id=_boot_id(),
        table_offset=HEADER_BYTES,
        table_bytes=room,
        data_offset=data_offset,
        data_bytes=data_bytes,
        generation_floor=0,
    )
    fresh = directory / FRESH_NAME
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, data_offset + data_bytes)
        os.pwrite(fd, header.encode(), 0)
        fresh.rename(directory / ARENA_NAME)
    except BaseException:
        os.close(fd)
        fresh.unlink(missing_ok=True)
        raise
    return fd, header


def _resize(fd: int, header: ArenaHeader, data_bytes: int) -> ArenaHeader:
    """Make the data area `data_bytes` large; what fits stays. Each step may be the last.

    Entries beyond the new end are cleared, but reserved ones: their writers may still live when
    the arena grows again.
    """
    size, end = os.fstat(fd).st_size, header.data_offset + data_bytes
    if data_bytes != header.data_bytes:
        os.ftruncate(fd, max(size, end))
        table_end = header.table_offset + header.table_bytes
        file: Bytes = np.frombuffer(mmap.mmap(fd, table_end), np.uint8)
        words = SealedRecords(file[:RECORD_BYTES])
        entries = file[header.table_offset :].view(np.uint64).reshape(-1, RECORD_WORDS)
        rows = entries[data_bytes // UNIT : header.data_bytes // UNIT]
        floor = max(header.generation_floor, generation_max_of(rows))
        words.step(0, GENERATION_FLOOR_WORD, floor, seed=0)
        reserved = states_of(rows) == RESERVED
        rows[~reserved] = 0
        words.step(0, DATA_BYTES_WORD, data_bytes, seed=0)
        header = header._replace(data_bytes=data_bytes, generation_floor=floor)
        if not reserved.any():
            used = header.table_offset + data_bytes // UNIT * ENTRY_BYTES
            _punch(fd, -(-used // _PAGE) * _PAGE, table_end)
    _punch(fd, end, size)
    return header


def _punch(fd: int, start: int, stop: int) -> None:
    """Give memory back where the filesystem can; where it cannot, the file stays larger."""
    if start < stop:
        with contextlib.suppress(OSError):
            syscalls.punch(fd, start, stop - start)


def _check_space(directory: Path, needed: int, allocated: int) -> None:
    available = _free_bytes(directory) + allocated
    if needed > available:
        raise FieldError(
            "host_bytes",
            needed,
            f"at most {available} ({available / 2**30:.1f} GiB), free in {directory}",
        )


def _free_bytes(directory: Path) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def _boot_id() -> bytes:
    """16 bytes; zeros, which never match, where the kernel does not tell."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)
