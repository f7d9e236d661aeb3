"""The namespaces of a host arena: an append-only file, so that it can be read without the journal.

A record is `u32 magic | u32 length | u32 crc32(length, canonical) | canonical encoding`.

Rule 1: a record counts if its CRC does. A torn or damaged one costs itself only: reading goes on at
        the next record that counts.
Rule 2: what an entry's tag refers to is appended before the entry is written (by the caller).
Rule 3: no sync: the file lives as long as the arena, which no power cut survives.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

from kvproto.errors import require_int

NAMESPACES_NAME = "namespaces"
CANONICAL_BYTES_MAX = 1 << 20
_HEAD = struct.Struct("<4sII")
_MAGIC = b"kvnl"


def encode_record(canonical: bytes) -> bytes:
    length = struct.pack("<I", len(canonical))
    crc = zlib.crc32(canonical, zlib.crc32(length))
    return _HEAD.pack(_MAGIC, len(canonical), crc) + canonical


def decode_records(raw: bytes) -> tuple[list[bytes], int]:
    """The records of a file, first of each kind, and how many bytes belong to none."""
    found: dict[bytes, None] = {}
    at = lost = 0
    while at < len(raw):
        canonical = _record_at(raw, at)
        if canonical is not None:
            found.setdefault(canonical)
            at += _HEAD.size + len(canonical)
            continue
        following = raw.find(_MAGIC, at + 1)
        end = len(raw) if following < 0 else following
        lost += end - at
        at = end
    return list(found), lost


def _record_at(raw: bytes, at: int) -> bytes | None:
    if len(raw) - at < _HEAD.size:
        return None
    magic, length, crc = _HEAD.unpack_from(raw, at)
    start = at + _HEAD.size
    if magic != _MAGIC or length > CANONICAL_BYTES_MAX or start + length > len(raw):
        return None
    canonical = raw[start : start + length]
    return canonical if zlib.crc32(canonical, zlib.crc32(raw[at + 4 : at + 8])) == crc else None


def read_namespaces(directory: Path) -> tuple[list[bytes], int]:
    """`decode_records` of a directory's file; nothing when there is none."""
    try:
        return decode_records((directory / NAMESPACES_NAME).read_bytes())
    except FileNotFoundError:
        return [], 0


class NamespaceLog:
    """The open file. `lost_bytes` were in no record when it was opened."""

    def __init__(self, path: Path, fd: int, known: list[bytes], lost_bytes: int) -> None:
        self.path = path
        self.lost_bytes = lost_bytes
        self._fd = fd
        self._known = dict.fromkeys(known)

    @classmethod
    def open(cls, directory: Path) -> NamespaceLog:
        """Under the directory's lock. What is damaged is written anew, without the damage."""
        path = directory / NAMESPACES_NAME
        known, lost = read_namespaces(directory)
        log = cls(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), known, lost)
        if lost:
            log.rewrite(known)
        return log

    @property
    def canonicals(self) -> list[bytes]:
        """In the order in which they were first added."""
        return list(self._known)

    def add(self, canonical: bytes) -> bool:
        """Append a namespace; False when it is known."""
        require_int("namespace canonical bytes", len(canonical), 1, CANONICAL_BYTES_MAX)
        if canonical in self._known:
            return False
        self._append(canonical)
        self._known[canonical] = None
        return True

    def rewrite(self, canonicals: Iterable[bytes]) -> None:
        """Keep exactly these: dropped namespaces must not pile up. Whole or not at all."""
        kept = dict.fromkeys(canonicals)
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(b"".join(map(encode_record, kept)))
        fresh.rename(self.path)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._known = kept

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, canonical: bytes) -> None:
        """A write that fell short (a full filesystem) is taken back."""
        record = encode_record(canonical)
        size = os.fstat(self._fd).st_size
        written = 0
        try:
            while written < len(record):
                written += os.write(self._fd, record[written:])
        except OSError:
            os.ftruncate(self._fd, size)
            raise
