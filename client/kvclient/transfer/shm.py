"""The `shm` transport: this process maps the hub's arena file, passed over a Unix socket.

Rules:
 1. Views for readers come from a map that is PROT_READ: writing through one is a fault, not a
    convention. A client opened for reading only never holds a writable descriptor.
 2. The liveness descriptor is closed exactly when the writable map goes, and that goes with its
    last view. Until then the hub finds the lock held and keeps our slots in quarantine.
 3. A forked child has neither: maps are MADV_DONTFORK, and the child closes its copies of the
    liveness descriptors. In the child the maps are never unmapped either, because something else
    may stand at their addresses by then.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
import weakref
from contextlib import suppress

import numpy as np

from kvclient.copying import Mapped
from kvclient.errors import DeadlineExceeded, Gone, KVError, Unavailable, Unsupported
from kvclient.transfer.base import Bytes
from kvproto.arena import ArenaReader
from kvproto.errors import FieldError
from kvproto.handshake import (
    ANSWER_HEAD_BYTES,
    Answer,
    HandshakeError,
    Mode,
    Request,
    Status,
    answer_bytes,
    decode_answer,
    encode_request,
)

_FDS_MAX = 4


class _Liveness:
    """The descriptor whose lock says that this process may still write."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_liveness: weakref.WeakSet[_Liveness] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: see rule 3."""
    for holder in list(_liveness):
        holder.close()
    for mapping in list(_maps):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))


os.register_at_fork(after_in_child=_leave_to_parent)


class ShmArena(Mapped):
    """An Arena (`kvclient.transfer.base`) over the mapped file. Built by `open_arena`."""

    transport = "shm"
    follows = False

    def __init__(self, address: str, answer: Answer, arena_fd: int, liveness_fd: int) -> None:
        """Takes the liveness descriptor (-1: for reading only); the caller closes `arena_fd`."""
        holder = _Liveness(liveness_fd)
        try:
            self._pid = os.getpid()
            self.address = address
            self.arena_id = answer.arena_id
            self.epoch = answer.epoch
            file: Bytes = np.frombuffer(
                _map(arena_fd, answer.file_bytes, mmap.PROT_READ), dtype=np.uint8
            )
            reader = ArenaReader(file)
            header = reader.header
            told = (answer.arena_id, answer.table_offset, answer.data_offset, answer.data_bytes)
            if told != (
                header.arena_id,
                header.table_offset,
                header.data_offset,
                header.data_bytes,
            ):
                raise FieldError("arena", "its header", "as the handshake says")
            self.data_bytes = header.data_bytes
            self._reader: ArenaReader | None = reader
            self._in: Bytes | None = file[header.data_offset :][: header.data_bytes]
            self._out: Bytes | None = None
            self._out_map: weakref.ref[mmap.mmap] | None = None
            if liveness_fd >= 0:
                writable = _map(arena_fd, answer.file_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
                weakref.finalize(writable, holder.close).atexit = False
                _liveness.add(holder)
                self._out_map = weakref.ref(writable)
                out: Bytes = np.frombuffer(writable, dtype=np.uint8)
                self._out = out[header.data_offset : header.data_offset + header.data_bytes]
        except BaseException:
            holder.close()
            raise

    @property
    def staging_bytes(self) -> int:
        return 0

    def alive(self) -> bool:
        reader = self._reader
        return reader is not None and reader.epoch() == self.epoch

    def current(self, offset: int, generation: int) -> bool:
        reader = self._reader
        return reader is not None and reader.current(offset, generation, self.epoch)

    def reading(self, offset: int, length: int) -> Bytes:
        self._check(offset, length)
        if self._in is None:
            raise self._gone()
        return self._in[offset : offset + length]

    def writing(self, offset: int, length: int) -> Bytes:
        self._check(offset, length)
        if self._in is None:
            raise self._gone()
        if self._out is None:
            raise Unsupported("this client was opened for reading only", field="read_only")
        return self._out[offset : offset + length]

    def close(self) -> None:
        self._reader = None
        self._in = None
        self._out = None

    @property
    def drained(self) -> bool:
        return self._out_map is None or self._out_map() is None

    def _check(self, offset: int, length: int) -> None:
        if os.getpid() != self._pid:
            raise Unsupported("the arena was mapped before a fork: open a client in this process")
        if offset < 0 or length < 0 or offset + length > self.data_bytes:
            raise Unavailable(
                f"the hub named bytes {offset}+{length} outside its arena of {self.data_bytes}"
            )

    def _gone(self) -> Gone:
        return Gone(f"the mapping of epoch {self.epoch} is closed")


def _map(fd: int, length: int, protection: int) -> mmap.mmap:
    mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, protection)
    mapping.madvise(mmap.MADV_DONTFORK)
    mapping.madvise(mmap.MADV_DONTDUMP)  # a core dump must not carry everybody's KV
    _maps.add(mapping)
    return mapping


def open_arena(
    path: str, *, session: int, client: int, token: bytes, read_only: bool, deadline_s: float
) -> ShmArena:
    """Ask the hub's socket at `path` for its arena and map it. Blocks up to `deadline_s` seconds.

    Unsupported when the socket cannot be reached or passes nothing (another host, another mount,
    another user): no retry helps. Unavailable when the hub refuses or breaks off.
    """
    mode = Mode.READ if read_only else Mode.WRITE
    fds: list[int] = []
    try:
        connection, answer = dial(path, Request(mode, session, client, token), fds, deadline_s)
        connection.close()
        if answer.status is not Status.OK:
            raise Unavailable(f"the hub refuses its arena at {path}: {answer.text}")
        if len(fds) != (1 if read_only else 2):
            raise Unsupported(f"the hub at {path} passed {len(fds)} descriptors for its arena")
        arena_fd = fds.pop()
        try:
            return ShmArena(path, answer, arena_fd, -1 if read_only else fds.pop())
        finally:
            os.close(arena_fd)
    except ValueError as error:  # also HandshakeError, FieldError, and mmap's own
        raise Unavailable(f"the arena at {path} is not as expected: {error}") from error
    except OSError as error:
        raise _unreachable(path, error) from error
    finally:
        for fd in fds:
            os.close(fd)


def _unreachable(path: str, error: OSError) -> KVError:
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"no arena from {path} in time", field="deadline_s")
    if isinstance(error, ConnectionResetError | BrokenPipeError | ConnectionRefusedError):
        return Unavailable(f"the hub's socket {path} broke off: {error}")
    return Unsupported(f"the arena at {path} cannot be mapped: {error}")


def dial(
    path: str, request: Request, fds: list[int], deadline_s: float
) -> tuple[socket.socket, Answer]:
    """One request, one answer, and the connection behind them. Descriptors that arrive are appended
    to `fds` whatever follows. Blocks; OSError, and HandshakeError for what is no answer.
    """
    end = time.monotonic() + deadline_s
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(deadline_s)
        connection.connect(path)
        with suppress(BrokenPipeError):  # a busy hub answers first and closes: read why
            connection.sendall(encode_request(request))
        raw = b""
        wanted = ANSWER_HEAD_BYTES
        while len(raw) < wanted:
            connection.settimeout(max(end - time.monotonic(), 1e-3))
            part, passed, _, _ = socket.recv_fds(
                connection, wanted - len(raw), _FDS_MAX, socket.MSG_CMSG_CLOEXEC
            )
            fds.extend(passed)
            if not part:
                raise HandshakeError(f"the hub closed after {len(raw)} bytes")
            raw += part
            if len(raw) == ANSWER_HEAD_BYTES:
                wanted = answer_bytes(raw)
        return connection, decode_answer(raw)
    except BaseException:
        connection.close()
        raise
